"""Upcycling: every expert starts as a copy of the whole feed-forward network, and training makes them differ.

*Sparse upcycling* (arXiv:2212.05055) changes nothing in the copies; with weights that sum to 1, as here, the untrained
mixture computes what the parent computes, whoever is chosen. *Drop-Upcycling* (arXiv:2502.19261) draws a share of each
expert's channels again, so that experts differ from the start. Both add parameters, do not save any, and read no
calibration text.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moesmith.calibration.view import LayerView
from moesmith.methods.base import Carver, Needs, Routed
from moesmith.methods.registry import register
from moesmith.methods.router import random_router
from moesmith.methods.steps import Carve
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.load import Parent
from moesmith.parent.network import Network
from moesmith.run.folder import Run
from moesmith.run.shapes import Shapes
from moesmith.run.step import Job, Step


class Copied(Routed):
    """Settings of experts that are copies of the whole network."""

    top_k: int = Field(2, ge=1, description="experts active per token")


@register
class Upcycling(Carver):
    """Copies, and a router that starts at random."""

    name, title, paper = "upcycling", "every expert a copy of the whole FFN (sparse upcycling)", "arXiv:2212.05055"

    class Settings(Copied):
        """How many copies."""

        method: Literal["upcycling"] = "upcycling"

    def steps(self) -> list[Step]:
        """List the only step: there is no text to read."""
        return [Carve(self.recipe, self)]

    def needs(self) -> Needs:
        """Ask for nothing."""
        return Needs(inputs=False, passes=0.0)

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Return no text."""
        return []

    def tokens(self, shapes: Shapes) -> int:
        """Count none."""
        return 0

    def width(self, parent: Parent) -> int:
        """Return all channels."""
        return parent.F

    def copies(self, view: LayerView) -> list[Expert]:
        """Make one layer's experts: all channels, with the parent's own matrices."""
        return [Expert(torch.arange(view.parent.F)) for _ in range(self.experts)]

    def carve(self, view: LayerView) -> Layer:
        """Copy the network, draw the router."""
        router = Linear(random_router(self.experts, view.parent.D, view.generator))
        return Layer(self.copies(view), router, self.top_k)

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        spec = self.settings
        return [f"{spec.experts} experts, {spec.top_k} active per token, each a copy of the whole FFN"]


@register
class DropUpcycling(Upcycling):
    """Copies in which a share of the channels is drawn again, other ones in every expert."""

    name, title = "drop-upcycling", "copies of the FFN with a share of channels drawn again (Drop-Upcycling)"
    paper = "arXiv:2502.19261"

    class Settings(Copied):
        """How many copies, and how much of each is new."""

        method: Literal["drop-upcycling"] = "drop-upcycling"
        redrawn: float = Field(0.5, ge=0, le=1, description="share r of each expert's channels that is drawn again")

    def steps(self) -> list[Step]:
        """List the only step."""
        return [Carve(self.recipe, self)]

    def outline(self, parent: Parent) -> Carving:
        """Experts with matrices of their own."""
        found, own = super().outline(parent), torch.zeros(0)
        for layer in found.layers:
            for expert in layer.routed:
                expert.gate_FD = expert.down_DF = own
                expert.up_FD = None if parent.ffns[0].up_FD is None else own
        return found

    def copies(self, view: LayerView) -> list[Expert]:
        """Copy the network and draw floor(r F) of its channels again, for every expert."""
        F, stored = view.parent.F, view.parent.stored
        experts = []
        for _ in range(self.experts):
            dropped_N = torch.randperm(F, generator=view.generator)[: int(F * self.settings.redrawn)]
            gate_FD, *up, down_DF = (part.to(stored) for part in redraw(view.ffn, dropped_N, view.generator))
            experts.append(Expert(torch.arange(F), down_DF, gate_FD, up[0] if up else None))
        return experts

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        return [*super().about(run), f"{self.settings.redrawn:.0%} of each copy's channels drawn again at random"]


def redraw(ffn: Network, dropped_N: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Copy a network's matrices, with some channels drawn again (arXiv:2502.19261, its diversity re-initialisation).

    In every matrix, the dropped channels' weights give way to draws from a normal distribution with their own mean and
    standard deviation: one pair of numbers per matrix. The same channels are drawn again in gate, up and down; the
    others, and a gate's bias, stay as they are.

    Args:
        ffn: the network.
        dropped_N: the channels, N of F; none leaves plain copies.
        generator: of the draws, on the CPU.

    Returns:
        Gate (F, D), up (F, D) if there is one, and down (D, F): fp32 on the CPU.
    """
    found: list[Tensor] = []
    for part in ffn.weights:
        fresh = part.detach().to("cpu", torch.float32, copy=True)
        rows_FD = fresh.T if part is ffn.down_DF else fresh  # a view
        if len(dropped_N):
            lost_ND = rows_FD[dropped_N]
            drawn_ND = torch.randn(lost_ND.shape, generator=generator)
            rows_FD[dropped_N] = lost_ND.mean() + lost_ND.std() * drawn_ND
        found.append(fresh)
    return found
