"""What a method is: statistics of the parent in, channels per layer and expert out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moesmith.methods.moments import Moments
from moesmith.parent.load import Parent
from moesmith.run.recipe import CarveSection


class Method(Protocol):
    """A way to choose channels."""

    def __call__(self, parent: Parent, groups: Sequence[Moments], spec: CarveSection, seed: int) -> list[list[Tensor]]:
        """Channels by layer, then expert: sorted int64 vectors.

        Args:
            parent: the dense model.
            groups: channel moments, one entry per expert.
            spec: experts, ratio, score and selection.
            seed: for methods that draw at random.
        """
        ...
