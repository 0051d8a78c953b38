"""ExpertWeaver (arXiv:2602.15521): experts from how the gate's activity differs between samples of text.

A channel's profile is the mean of |act(gate x)| over each sample. Where many channels are active on some samples only,
the layer shares little, and the loudest channels are shared. The others are divided by balanced k-means of their
profiles; an expert's router row is the mean of its gate rows. The paper has no public code: docs/methods.md says what
is ours.

Shapes: F channels, N channels that are not shared, E routed experts, S samples, K active experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as functional
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.arguments import ceil_div
from moesmith.calibration.moments import Second
from moesmith.calibration.view import LayerView
from moesmith.errors import MoesmithError
from moesmith.methods.balanced import balanced_kmeans, even_sizes
from moesmith.methods.base import Needs
from moesmith.methods.partition import Partition, check_ratio, members
from moesmith.methods.registry import register
from moesmith.methods.router import constant_direction
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer, Linear
from moesmith.parent.load import Parent
from moesmith.parent.network import Network
from moesmith.run.folder import Run
from moesmith.run.settings import Section
from moesmith.run.step import Job
from moesmith.world import crew

PUBLISHED = 0.75  # share of the channels that a token uses where the published bounds of the shared share hold
SMALL = 1e-6  # added to a mean before dividing by it


@register
class ExpertWeaver(Partition):
    """Shares by layer from coefficients of variation, experts by balanced k-means, routers from gate rows."""

    name, title, paper = "expert-weaver", "experts from profiles of the gate (ExpertWeaver)", "arXiv:2602.15521"

    class Settings(Section):
        """How much is shared, and how the rest is divided."""

        method: Literal["expert-weaver"] = "expert-weaver"
        experts: int = Field(64, ge=2, le=1024, description="experts of one width, shared ones included")
        ratio: float = Field(0.5, ge=0, lt=1, description="share of the FFN channels that a token does not use")
        shares: Literal["layer", "equal"] = "layer"
        least: float = Field(0.2, ge=0, le=1, description="least shared share, at ratio 0.25")
        most: float = Field(0.7, ge=0, le=1, description="largest shared share, at ratio 0.25")
        threshold: float = Field(0.6, gt=0, description="coefficient of variation above which a channel is specialised")
        samples: int = Field(256, ge=2, description="windows of all domains whose activity is compared")
        rounds: int = Field(5, ge=1, description="of balanced k-means")

        @model_validator(mode="after")
        def _leaves(self) -> Self:
            check_ratio(self.ratio, self.experts, 1)
            if self.least > self.most:
                raise ValueError(f"least {self.least:g} is above most {self.most:g}")
            return self

        def without_effect(self) -> dict[str, str]:
            """What tells layers apart, if they are not."""
            return {} if self.shares == "layer" else {"threshold": "carve.shares is not layer"}

    @property
    def used(self) -> int:
        """How many of the equal parts a token uses, shared ones included: k."""
        return max(1, round(self.settings.experts * self.active))

    def common(self, specialised: float) -> int:
        """Return how many parts a layer shares (the paper's equation 6): round(α E), at least one less than k.

        α = most − (most − least) · r, times (1 − ratio) / 0.75.

        Args:
            specialised: r, the share of channels with a coefficient of variation above the threshold.
        """
        spec = self.settings
        alpha = (spec.most - (spec.most - spec.least) * specialised) * self.active / PUBLISHED
        return max(0, min(self.used - 1, round(alpha * spec.experts)))

    @property
    def experts(self) -> int:
        """Routed experts of a layer in the middle of the bounds."""
        return int(self.settings.experts) - self.common(0.5)

    @property
    def top_k(self) -> int:
        """How many of them a token visits."""
        return self.used - self.common(0.5)

    def divided(self, F: int, specialised: float) -> tuple[int, list[int], int]:
        """Divide a layer's F channels: how many are shared, the widths of routed experts, how many a token visits."""
        common, widths = self.common(specialised), even_sizes(F, self.settings.experts)
        return sum(widths[:common]), widths[common:], self.used - common

    def check(self, parent: Parent) -> None:
        """Refuse a parent that has too few channels for the experts."""
        if self.settings.experts > parent.F:
            raise MoesmithError(f"{parent.F} channels are too few for {self.settings.experts} experts", "Give fewer.")

    def width(self, parent: Parent) -> int:
        """Return the channels of an expert."""
        return even_sizes(parent.F, self.settings.experts)[0]

    def outline(self, parent: Parent) -> Carving:
        """Divide the channels in their order; if layers will differ, those of the outline do, from bound to bound."""
        last, layers = max(1, parent.L - 1), []
        for index in range(parent.L):
            common, widths, top_k = self.divided(parent.F, index / last if self.settings.shares == "layer" else 0.5)
            first, *rest = torch.arange(parent.F).split([common, *widths])
            layers.append(self.layer(first, rest, Linear(torch.zeros(len(rest), 0)), top_k))
        return Carving(layers, parent.F)

    def needs(self) -> Needs:
        """Count one pass, in which the gate is computed twice."""
        return Needs(groups=1, passes=1.3)

    def windows(self, domains: int) -> int:
        """Return how many samples of each domain there are: a window is one."""
        return ceil_div(self.settings.samples, domains)

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Return the samples, by domain."""
        texts = super().begin(job)
        self.length = texts[0][0].shape[1]
        return texts

    def carve(self, view: LayerView) -> Layer:
        """Take profiles, decide how much is shared, divide the rest."""
        spec, network, F = self.settings, view.network, view.parent.F
        found: list[Tensor] = []

        def look(x_TD: Tensor, _group: int) -> Tensor:
            found.append(profiles(network, x_TD, self.length))
            return torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device)

        (stats,) = view.statistics(look, 1)
        profile_FS = torch.cat(crew().ordered(found), 1)  # of all processes' batches
        specialised = float((variation(profile_FS) > spec.threshold).float().mean())
        common, widths, top_k = self.divided(F, specialised if spec.shares == "layer" else 0.5)
        order_F = profile_FS.mean(1).argsort(descending=True, stable=True)
        shared, rest = order_F[:common].sort().values, order_F[common:].sort().values
        ids_N = balanced_kmeans(profile_FS[rest], len(widths), view.generator, spec.rounds)
        experts = members(ids_N, rest, len(widths))
        assert sorted(map(len, experts)) == sorted(widths)
        shares = {"shared": common / F, "specialised": specialised, "visited": top_k / len(widths)}
        self.note(**{name: round(share, 4) for name, share in shares.items()})
        return self.layer(shared, experts, Linear(mean_router(view.ffn, experts, stats.inputs)), top_k)

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        gates = run.carving_header().gates
        counts = [f"{gate.top_k} of {gate.experts}" for gate in (gates[0], gates[-1])]
        count = (
            counts[0]
            if len({(g.top_k, g.experts) for g in gates}) == 1
            else f"by layer, such as {' and '.join(counts)}"
        )
        return [
            f"experts of one width that add up, active per token {count}, beside those that every token uses",
            f"a token uses {self.active:.0%} of the FFN, divided without changing a weight",
            "channels by their gate's activity on samples of text; router: means of gate rows",
        ]

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how much is shared."""
        shares = next(iter(metrics["layers"].values()))["shared"]
        return f"shared {min(shares):.0%} to {max(shares):.0%}"


def profiles(network: Network, x_TD: Tensor, length: int) -> Tensor:
    """Mean of |act(gate x)| over each sample of ``length`` tokens, (F, S) fp32 on the CPU."""
    found = []
    for rows_CD in x_TD.split(length):
        active_CF = network.activation(functional.linear(rows_CD, network.gate_FD, network.gate_bias_F))
        found.append(active_CF.float().abs().mean(0).cpu())
    return torch.stack(found, 1)


def variation(profile_FS: Tensor) -> Tensor:
    """Coefficient of variation of every channel over the samples, (F,): σ / (μ + ε)."""
    return profile_FS.std(1, correction=0) / (profile_FS.mean(1) + SMALL)


def mean_router(network: Network, experts: list[Tensor], inputs: Second) -> Tensor:
    """The mean gate row of every expert, (E, D) fp32 on the CPU.

    Where the gate has a bias, its mean is carried by v, v·x ≈ 1 on the router's ``inputs``.
    """
    rows = [network.gate_FD[channels.to(network.gate_FD.device)].float().mean(0).cpu() for channels in experts]
    router_ED, bias_F = torch.stack(rows), network.gate_bias_F
    if bias_F is None:
        return router_ED
    bias_E = torch.stack([bias_F[channels.to(bias_F.device)].float().mean().cpu() for channels in experts])
    constant_D, _ = constant_direction(inputs)
    return router_ED + (bias_E - bias_E.mean())[:, None] * constant_D
