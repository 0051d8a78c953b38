"""DIVE: every expert keeps the channels that score highest on its own domains' text (dive.md §4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moesmith.moments import Moments
from moesmith.parents import Parent
from moesmith.recipe import CarveSection
from moesmith.scores import channel_scores, choose


def by_score(parent: Parent, groups: Sequence[Moments], spec: CarveSection, seed: int) -> list[list[Tensor]]:
    """The best-scoring channels of each group of domains."""
    experts = [choose(channel_scores(parent, group, spec.score), spec.ratio, spec.selection) for group in groups]
    return [list(layer) for layer in zip(*experts, strict=True)]
