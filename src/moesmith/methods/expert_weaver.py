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
from moesmith.calibration.stream import LayerView
from moesmith.methods.balanced import balanced_kmeans
from moesmith.methods.base import Needs
from moesmith.methods.partition import Partition, check_ratio, members, sizes
from moesmith.methods.registry import register
from moesmith.methods.router import constant_direction
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer, Linear
from moesmith.parent.load import Parent
from moesmith.parent.structure import Network
from moesmith.run.folder import Run
from moesmith.run.settings import Section
from moesmith.run.step import Job

PUBLISHED = 0.75  # share of the channels that a token uses where the published bounds of the shared share hold
SMALL = 1e-6  # added to a mean before dividing by it


@register
class ExpertWeaver(Partition):
    """Shares by layer from coefficients of variation, experts by balanced k-means, routers from gate rows."""

    name, title, paper = "expert-weaver", "experts from profiles of the gate (ExpertWeaver)", "arXiv:2602.15521"

    class Settings(Section):
        """How much is shared, and how the rest is divided."""

        method: Literal["expert-weaver"] = "expert-weaver"
        experts: int = Field(64, ge=2, le=1024, description="routed experts")
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
    def top_k(self) -> int:
        """Experts that a token visits in a layer in the middle of the bounds."""
        return self.visits(0.5)

    def visits(self, specialised: float) -> int:
        """Return K of a layer: as many experts as fill up what a token uses beyond the shared share.

        α = most − (most − least) · r, times (1 − ratio) / 0.75, and E (1 − ratio / (1 − α)), rounded, but at least one.
        The shared expert then gets exactly what is left (:func:`moesmith.methods.partition.sizes`).

        Args:
            specialised: r, the share of channels with a coefficient of variation above the threshold.
        """
        spec = self.settings
        shared = (spec.most - (spec.most - spec.least) * specialised) * self.active / PUBLISHED
        wanted = spec.experts * (1 - spec.ratio / (1 - shared)) if shared < 1 else 0.0
        return max(1, min(spec.experts - 1, round(wanted)))

    def outline(self, parent: Parent) -> Carving:
        """Divide the channels in their order; if layers will differ, those of the outline do, from bound to bound."""
        spec, last = self.settings, max(1, parent.L - 1)
        layers = []
        for index in range(parent.L):
            top_k = self.visits(index / last) if spec.shares == "layer" else self.top_k
            common, widths = sizes(parent.F, spec.experts, top_k, spec.ratio)
            first, *rest = torch.arange(parent.F).split([common, *widths])
            layers.append(self.layer(first, rest, self.router(), top_k))
        return Carving(layers, parent.F)

    def check(self, parent: Parent) -> None:
        """Refuse a parent that has too few channels for the experts where most is shared."""
        least = self.visits(0.0 if self.settings.shares == "layer" else 0.5)
        sizes(parent.F, self.experts, least, self.settings.ratio)

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
        profile_FS = torch.cat(found, 1)
        specialised = float((variation(profile_FS) > spec.threshold).float().mean())
        top_k = self.visits(specialised if spec.shares == "layer" else 0.5)
        common, widths = sizes(F, spec.experts, top_k, spec.ratio)
        order_F = profile_FS.mean(1).argsort(descending=True, stable=True)
        shared, rest = order_F[:common].sort().values, order_F[common:].sort().values
        ids_N = balanced_kmeans(profile_FS[rest], spec.experts, view.generator, spec.rounds)
        experts = members(ids_N, rest, spec.experts)
        assert sorted(map(len, experts)) == sorted(widths)
        shares = {"shared": common / F, "specialised": specialised, "visited": top_k / spec.experts}
        self.note(**{name: round(share, 4) for name, share in shares.items()})
        return self.layer(shared, experts, Linear(mean_router(view.ffn, experts, stats.inputs)), top_k)

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        gates = run.carving_header().gates
        least, most = (bound(gate.top_k for gate in gates) for bound in (min, max))
        count = f"{least}" if least == most else f"{least} to {most}"
        return [
            f"{self.experts} experts that add up, {count} active per token and layer, beside one that every token uses",
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
