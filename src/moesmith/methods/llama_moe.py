"""LLaMA-MoE's independent construction at DIVE's width: each expert a random share of the channels (dive.md §8.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesmith.methods.moments import Moments
from moesmith.methods.scores import kept_channels
from moesmith.parent.load import Parent
from moesmith.run.recipe import CarveSection


def independent_random(parent: Parent, groups: Sequence[Moments], spec: CarveSection, seed: int) -> list[list[Tensor]]:
    """Independent uniform choices, so two halves overlap with an IoU of 1/3 on average."""
    generator = torch.Generator().manual_seed(seed)
    kept = kept_channels(parent.F, spec.ratio)
    return [
        [torch.randperm(parent.F, generator=generator)[:kept].sort().values for _ in range(spec.experts)]
        for _ in range(parent.L)
    ]
