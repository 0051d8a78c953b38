"""Experts that divide the channels of a network among themselves: what CMoE and ExpertWeaver share.

Every channel belongs to one routed expert or to the expert that every token uses, and outputs are added with weight 1.
So a token that visits all experts gets what the parent computes, and one that visits K of E lacks the channels of the
others. Which share that is, is ``carve.ratio``; the shared expert gets what the sizes below leave.

Shapes: F channels, N channels to divide, E routed experts, K active ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesmith.arguments import ceil_div
from moesmith.calibration.view import spread
from moesmith.errors import MoesmithError
from moesmith.methods.balanced import even_sizes
from moesmith.methods.base import Carver
from moesmith.methods.steps import windows_of
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic, Expert, Layer, Linear
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.shapes import Shapes
from moesmith.run.step import Job


def check_ratio(ratio: float, experts: int, top_k: int) -> None:
    """Refuse a share that K of E experts cannot leave out: if nothing is shared, they leave (E − K) / E.

    Raises:
        ValueError: they cannot, for a recipe's section.
    """
    most = 1 - top_k / experts
    if not 0 <= ratio <= most + 1e-6:
        raise ValueError(f"ratio {ratio:g} is above {most:g}, all that {top_k} of {experts} experts leave out")


def sizes(F: int, experts: int, top_k: int, ratio: float) -> tuple[int, list[int]]:
    """Divide F channels: how many are shared, and how many each routed expert has.

    A token leaves out ratio · F channels, those of E − K experts. So all routed experts together have
    ratio · F · E / (E − K), their widths differ by one at most, and the rest is shared. With K = E nothing is left out,
    and all channels are routed.

    Raises:
        MoesmithError: an expert would have no channel.
    """
    routed = F if top_k == experts else min(F, round(ratio * F * experts / (experts - top_k)))
    if routed < experts:
        raise MoesmithError(
            f"at carve.ratio {ratio:g} there are {routed} of {F} channels for {experts} routed experts",
            "Give fewer experts, or a higher ratio.",
        )
    return F - routed, even_sizes(routed, experts)


def members(ids_N: Tensor, channels_N: Tensor, experts: int) -> list[Tensor]:
    """The channels of every group, sorted."""
    return [channels_N[ids_N == expert].sort().values for expert in range(experts)]


class Partition(Carver):
    """A method whose experts divide a network's channels among them and add up.

    ``carve.ratio`` is the share of the channels that a token does not use, whatever the number of experts it visits.
    """

    @classmethod
    def ratio_of(cls, active: float, top_k: int) -> float:
        """Return the ``carve.ratio`` with which a token uses a share ``active``."""
        return 1 - active

    @property
    def active(self) -> float:
        """Share of the channels that a token uses."""
        return 1 - float(self.settings.ratio)

    def at_least(self, active: float) -> float:
        """Round up to what the visited experts have where nothing is shared."""
        visited = int(getattr(self.settings, "top_k", 1))
        return max(active, round(visited / self.experts, 6))

    @property
    def shared(self) -> float:
        """Share of the channels that every token uses."""
        left_out = self.experts - self.top_k
        return 1 - float(self.settings.ratio) * self.experts / left_out if left_out else 0.0

    def sizes(self, F: int) -> tuple[int, list[int]]:
        """Divide F channels (:func:`sizes`)."""
        return sizes(F, self.experts, self.top_k, float(self.settings.ratio))

    def check(self, parent: Parent) -> None:
        """Refuse a parent that has too few channels for the experts."""
        self.sizes(parent.F)

    def width(self, parent: Parent) -> int:
        """Return the channels of the widest routed expert."""
        return max(self.sizes(parent.F)[1])

    def router(self) -> Linear | Analytic:
        """Return a router of the kind to expect, without numbers."""
        return Linear(torch.zeros(self.experts, 0))

    def outline(self, parent: Parent) -> Carving:
        """Divide the channels in their order."""
        common, widths = self.sizes(parent.F)
        first, *rest = torch.arange(parent.F).split([common, *widths])
        layer = self.layer(first, list(rest), self.router(), self.top_k)
        return Carving([layer] * parent.L, parent.F)

    @staticmethod
    def layer(common: Tensor, routed: Sequence[Tensor], router: Linear | Analytic, top_k: int) -> Layer:
        """Make a layer of a shared expert, if it has channels, and of routed ones that are added."""
        shared = Expert(common) if len(common) else None
        return Layer([Expert(channels) for channels in routed], router, top_k, "sum", shared=shared)

    def windows(self, domains: int) -> int:
        """Return how many windows of each domain are looked at."""
        raise NotImplementedError

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Return those windows, evenly spread: a group for every domain."""
        windows, few = windows_of(job.run), self.windows(len(job.names))
        return [[spread(windows[name], few)] for name in job.names]

    def tokens(self, shapes: Shapes) -> int:
        """Count the tokens of these windows."""
        spec = self.recipe.domains
        return shapes.domains * min(ceil_div(spec.tokens, spec.window), self.windows(shapes.domains)) * spec.window

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        spec = self.settings
        beside = f", beside one of {self.shared:.0%} of the FFN that every token uses" if self.shared > 0 else ""
        first = f"{spec.experts} experts that add up, {self.top_k} active per token{beside}"
        return [first, f"a token uses {self.active:.0%} of the FFN, divided without changing a weight"]

    def metrics(self) -> dict[str, Any]:
        """Return what was noted of the layers, as curves."""
        return {"layers": {"share of channels or tokens": dict(self.measured)}} if self.measured else {}
