"""CMoE (arXiv:2502.04416): experts from channels that are active on the same tokens, routed by one channel each.

A token marks the channels with the largest |h|, h the input of ``down_proj``. Channels that are marked most often are
shared; the others are divided into experts of equal size by the tokens that mark them. Of each expert one channel
stands for all of it: what it computes is the expert's logit.

Shapes: T tokens, K marks of a token, F channels, N channels that are not shared, E routed experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.arguments import ceil_div
from moesmith.calibration.view import LayerView
from moesmith.methods.balanced import balanced_assignment
from moesmith.methods.base import Needs, Routed
from moesmith.methods.partition import Partition, check_ratio, members
from moesmith.methods.parts import hidden_of
from moesmith.methods.registry import register
from moesmith.methods.router import fitted_router
from moesmith.mixture.layer import Analytic, Layer, Linear
from moesmith.parent.network import Network
from moesmith.run.folder import Run

CHUNK = 2048  # tokens whose channels exist at once


@register
class CMoE(Partition):
    """Shared channels by rate, experts by balanced assignment, an analytic router. Layers see carved activations."""

    name, title, paper = "cmoe", "experts from channels that are active together (CMoE)", "arXiv:2502.04416"
    activations = "carved"

    class Settings(Routed):
        """How channels are marked and divided, and how tokens are routed."""

        method: Literal["cmoe"] = "cmoe"
        experts: int = Field(6, ge=1, le=1024, description="routed experts")
        top_k: int = Field(2, ge=1, description="experts active per token, besides the shared one")
        ratio: float = Field(0.5, ge=0, lt=1, description="share of the FFN channels that a token does not use")
        marked: int = Field(10, ge=1, description="channels that a token marks (ATopK)")
        sample: int = Field(16_384, ge=16, description="tokens of all domains that mark channels")
        rounds: int = Field(1, ge=1, description="of assigning channels and computing centres")
        represent: Literal["centre", "cosine"] = "centre"
        router: Literal["analytic", "linear"] = "analytic"
        ridge: float = Field(0.01, gt=0, description="linear router: ridge of the fit")

        @model_validator(mode="after")
        def _leaves(self) -> Self:
            check_ratio(self.ratio, self.experts, self.top_k)
            return self

        def without_effect(self) -> dict[str, str]:
            """Settings of the fit, if there is none."""
            return {} if self.router == "linear" else {"ridge": "carve.router is not linear"}

    def needs(self) -> Needs:
        """Count two passes over the sample: to look at it, and through what was carved."""
        return Needs(inputs=False, passes=2.0)

    def router(self) -> Linear | Analytic:
        """Return the kind of router to expect."""
        return Analytic(torch.zeros(self.experts, dtype=torch.int64)) if self.analytic else super().router()

    @property
    def analytic(self) -> bool:
        """Whether the router is the published one."""
        return bool(self.settings.router == "analytic")

    def windows(self, domains: int) -> int:
        """Return how many windows of each domain hold the sample."""
        return ceil_div(self.settings.sample, domains * self.recipe.domains.window)

    def carve(self, view: LayerView) -> Layer:
        """Mark, divide, choose who represents an expert."""
        spec, network, F = self.settings, view.network, view.parent.F
        x_TD = view.sample(spec.sample)
        ids_TK = marks(network, x_TD, spec.marked)
        counts_F = torch.bincount(ids_TK.flatten(), minlength=F)
        order_F = counts_F.argsort(descending=True, stable=True)
        common, widths = self.sizes(F)
        shared, rest = order_F[:common].sort().values, order_F[common:]
        experts, heads_E = divide(ids_TK, rest, widths, F, spec.rounds, cosine=spec.represent == "cosine")
        self.note(shared=round(common / F, 4), shared_marks=round(float(counts_F[shared].sum()) / ids_TK.numel(), 4))
        router = Analytic(heads_E) if self.analytic else Linear(fit_router(network, x_TD, heads_E, spec.ridge))
        return self.layer(shared, experts, router, self.top_k)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how many of all marks the shared channels have."""
        (curves,) = metrics["layers"].values()
        return f"shared channels have {statistics.mean(curves['shared_marks']):.0%} of the marks"

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        spec = self.settings
        way = "the absolute value of one channel per expert" if self.analytic else "a linear fit to one channel each"
        return [*super().about(run), f"channels by the tokens that mark them ({spec.marked} each); router: {way}"]


def marks(network: Network, x_TD: Tensor, count: int) -> Tensor:
    """The channels that each token marks, those with the largest |h| (ATopK): (T, K) int64 on the CPU."""
    found = []
    for rows_CD in x_TD.split(CHUNK):
        hidden_CF = network.hidden(rows_CD.to(network.gate_FD.dtype)).abs()
        found.append(hidden_CF.topk(min(count, hidden_CF.shape[-1]), dim=-1).indices.cpu())
    return torch.cat(found)


def centres(ids_TK: Tensor, group_F: Tensor, groups: int) -> Tensor:
    """Mean marker vector of every group of channels, (T, E): the share of a group's channels that a token marks.

    Args:
        ids_TK: the channels that each token marks.
        group_F: the group of every channel; ``groups`` for those of none.
        groups: how many there are.
    """
    found_TE = torch.zeros(len(ids_TK), groups + 1)
    found_TE.scatter_add_(1, group_F[ids_TK], torch.ones(ids_TK.shape))
    return found_TE[:, :groups] / torch.bincount(group_F, minlength=groups + 1)[:groups].clamp_min(1)


def distances(ids_TK: Tensor, centre_TE: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """L1 distances of every channel's marker vector m to every centre c, and their products m · c: (F, E) each.

    m is 0 or 1 and c lies between: ‖m − c‖₁ = Σ m + Σ c − 2 m · c, so only marks are ever visited.
    """
    common_FE = torch.zeros(F, centre_TE.shape[1])
    chunk = max(1, CHUNK * 64 // ids_TK.shape[1] // centre_TE.shape[1])
    for ids_CK, centre_CE in zip(ids_TK.split(chunk), centre_TE.split(chunk), strict=True):
        common_FE.index_add_(0, ids_CK.flatten(), centre_CE.repeat_interleave(ids_CK.shape[1], 0))
    counts_F = torch.bincount(ids_TK.flatten(), minlength=F).float()
    return counts_F[:, None] + centre_TE.sum(0) - 2 * common_FE, common_FE


def divide(
    ids_TK: Tensor, rest: Tensor, widths: Sequence[int], F: int, rounds: int = 1, *, cosine: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Divide channels into experts by the tokens that mark them, and choose who represents each.

    The first centres are the channels that are marked most. A round assigns all channels at the least sum of distances,
    with sizes as given, and then computes the centres anew.

    Args:
        ids_TK: the channels that each token marks.
        rest: the channels to divide, those that are marked most first, (N,).
        widths: of every expert.
        F: how many channels there are.
        rounds: at most; fewer if nothing changes.
        cosine: represent an expert by the channel whose markers have the largest cosine with its centre, instead of the
            one nearest to it.

    Returns:
        the sorted channels of every expert, and their representatives (E,).
    """
    experts = len(widths)
    group_F = torch.full((F,), experts)
    group_F[rest[:experts]] = torch.arange(experts)
    rest = rest.sort().values
    for _ in range(rounds):
        far_FE, _ = distances(ids_TK, centres(ids_TK, group_F, experts), F)
        ids_N = torch.from_numpy(balanced_assignment(far_FE[rest].numpy(), widths))
        if torch.equal(group_F[rest], ids_N):
            break
        group_F[rest] = ids_N
    far_FE, common_FE = distances(ids_TK, centres(ids_TK, group_F, experts), F)
    if cosine:
        counts_F = torch.bincount(ids_TK.flatten(), minlength=F).float()
        far_FE = -common_FE / counts_F.clamp_min(1).sqrt()[:, None]
    found = members(group_F[rest], rest, experts)
    heads = [channels[far_FE[channels, expert].argmin()] for expert, channels in enumerate(found)]
    return found, torch.stack(heads)


def fit_router(network: Network, x_TD: Tensor, heads_E: Tensor, ridge: float) -> Tensor:
    """Fit a linear router to an analytic one's logits |h| of the experts' channels (:func:`router.fitted_router`)."""
    one = network.narrowed(heads_E, network.down_DF[:, heads_E.to(network.down_DF.device)])
    return fitted_router(x_TD, torch.cat([a_NE.abs() for a_NE in hidden_of(one, x_TD)]), ridge)
