"""DIVE's baseline "LLaMA-MoE", as we infer it (arXiv:2506.09351): each expert gets a random share of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moesmith.calibration.view import LayerView
from moesmith.errors import MoesmithError
from moesmith.methods.base import ROUTING, Kept, Needs, Routed
from moesmith.methods.channels import Channels, Part
from moesmith.methods.dive import about_experts
from moesmith.methods.registry import register
from moesmith.methods.scores import kept_channels
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.step import Job


@register
class LlamaMoe(Channels):
    """Independent uniform choices, so two halves overlap with an IoU of 1/3 on average."""

    name, title, paper = "llama-moe", "random shares of the channels (LLaMA-MoE)", "arXiv:2406.16554"
    sections = ROUTING

    class Settings(Routed, Kept):
        """Experts and what they keep."""

        method: Literal["llama-moe"] = "llama-moe"

    def check(self, parent: Parent) -> None:
        """Refuse a router's start that tells experts' texts apart: all experts have the same."""
        super().check(parent)
        if self.lda:
            raise MoesmithError(
                "router.start is lda, which tells experts' texts apart, but those of llama-moe have the same",
                "Set router.start to random.",
            )

    def needs(self) -> Needs:
        """Count the statistics of all experts once: they have the same text."""
        return replace(super().needs(), groups=1 if self.refit else None)

    def moments_tokens(self) -> int | None:
        """Take none unless there is a bias, which replaces what is lost."""
        return None if self.settings.compensation == "bias" else 0

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Draw all channels: layer by layer, a carving that goes on behind finished layers would draw theirs again.

        With a generator of its own, so that the choice does not depend on what the router draws.
        """
        F, kept = job.parent.F, kept_channels(job.parent.F, self.ratio(job.parent))
        draws = torch.Generator().manual_seed(self.recipe.seed)
        self.drawn = [
            [torch.randperm(F, generator=draws)[:kept].sort().values for _ in range(self.experts)]
            for _ in range(job.parent.L)
        ]
        return super().begin(job)

    def choose(self, view: LayerView, groups: Sequence[Part]) -> list[Tensor]:
        """Return what was drawn, without looking at any statistics."""
        return self.drawn[view.index]

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        return [*about_experts(self), f"channels: drawn at random; compensation: {self.settings.compensation}"]
