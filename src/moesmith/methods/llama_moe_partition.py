"""LLaMA-MoE's partitions (arXiv:2406.16554): the channels of a network divided among experts, perhaps after the most
important ones, which every token uses.

As published: index sets without overlap (Eq. 5) at random, by balanced k-means of the rows of ``up_proj`` (its code
offers ``gate_proj`` as well), or, in the code alone, by cutting MoEfication's graph of co-activation; a router that
starts at random; outputs multiplied by E/K. In the residual form some neurons are shared.

What differs: chosen experts are added, each times E/K, where the published gate multiplies a softmax over the K chosen
by E/K, so that each counts about E/K². E/K is the factor that leaves the expected output as it was if experts are
chosen at random, and the whole partition computes what the parent computes. Shared channels are those that add most
energy to the output, where the paper takes those that gradients find important for most clusters of text (Eq. 8): that
needs a backward pass through the whole parent. The partition by gradients is left out for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.calibration.view import LayerView
from moesmith.methods.parts import EqualParts, Parts, split_channels
from moesmith.methods.registry import register
from moesmith.methods.router import fitted_router, random_router


@register
class LlamaMoePartition(EqualParts):
    """Equal parts of the channels, without overlap."""

    name, title, paper = "llama-moe-partition", "a partition of the channels (LLaMA-MoE)", "arXiv:2406.16554"

    class Settings(Parts):
        """How channels are divided."""

        method: Literal["llama-moe-partition"] = "llama-moe-partition"
        split: Literal["random", "cluster", "co-activation"] = "random"
        shared: int = Field(0, ge=0, description="parts of the most important channels, which every token uses")
        rescale: bool = Field(True, description="outputs of routed experts times their number over those chosen")
        selector: Literal["random", "norm"] = "random"

        @model_validator(mode="after")
        def _leaves_experts(self) -> LlamaMoePartition.Settings:
            if self.shared >= self.used_parts:
                raise ValueError(
                    f"shared {self.shared} leaves no part to choose: a token uses {self.used_parts} of {self.experts};"
                    " lower shared or ratio"
                )
            return self

        @property
        def looks(self) -> bool:
            """Whether calibration text matters."""
            return self.split == "co-activation" or self.shared > 0 or self.selector == "norm"

        def without_effect(self) -> dict[str, str]:
            """Settings of a sample that is not taken, and of a router that is not fitted."""
            found = {} if self.looks else {"sample": "nothing depends on text; see carve.split, .shared and .selector"}
            return found | ({} if self.selector == "norm" else {"ridge": "carve.selector is not norm"})

    @property
    def shared(self) -> int:
        """How many parts every token uses."""
        return int(self.settings.shared)

    @property
    def scale(self) -> float:
        """E/K."""
        return self.experts / self.top_k if self.settings.rescale else 1.0

    @property
    def sampled(self) -> bool:
        """Whether anything depends on text."""
        return bool(self.settings.looks)

    def parts(self, view: LayerView, rest: Tensor, x_TD: Tensor) -> Tensor:
        """Divide the channels; clusters are of rows of ``up_proj``, or of the only matrix where there is no gate."""
        rows_FD = view.ffn.gate_FD if view.ffn.up_FD is None else view.ffn.up_FD
        return split_channels(self.settings.split, rows_FD, rest, self.experts, view, x_TD)

    def route(self, view: LayerView, routed: Sequence[Tensor], x_TD: Tensor, norms_TE: Tensor) -> Tensor:
        """Draw the router as published, or fit it."""
        if self.settings.selector == "norm":
            return fitted_router(x_TD, norms_TE, self.settings.ridge)
        return random_router(len(routed), view.parent.D, view.generator).to(torch.float32)
