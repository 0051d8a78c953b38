"""DIVE: every expert keeps the channels that score highest on its own domains' text (dive.md §4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moesmith.methods.moments import Moments
from moesmith.methods.scores import channel_scores, choose
from moesmith.parent.load import Parent
from moesmith.run.recipe import CarveSection


def by_score(parent: Parent, groups: Sequence[Moments], spec: CarveSection, seed: int) -> list[list[Tensor]]:
    """The best-scoring channels of each group of domains."""
    experts = [choose(channel_scores(parent, group, spec.score), spec.ratio, spec.selection) for group in groups]
    return [list(layer) for layer in zip(*experts, strict=True)]
