"""Compute a layer's experts as a stock architecture has them: the rewriting that ``mixture/home.py`` decided on.

Shapes: D model width, F_e an expert's width, W its width on disk, E experts, K active experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesmith.export.stock.constant import constant_channel
from moesmith.mixture.carving import Carving
from moesmith.mixture.home import Home, home_of
from moesmith.mixture.layer import Analytic, Expert, Layer, Linear
from moesmith.native.gate import Router
from moesmith.parent.load import Parent
from moesmith.parent.structure import STREAM, decoder_layers

# Spread of one token's logits when they are scaled down so that all chosen experts weigh the same. The weights stray
# from 1/K by as much; fp32 softmax tells apart logits that differ by 6e-8, so less would mistake more near ties
SPREAD = 2.0**-13
# The same where a sigmoid of the logits chooses a single expert: it tells apart least where it is nearly 0 or 1
SIGMOID = 2.0**-2
Matrices = tuple[Tensor, Tensor, Tensor]  # gate (W, D), up (W, D), down (D, W), in fp32


class Parts(NamedTuple):
    """An expert in fp32, its bias apart."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    bias_D: Tensor | None

    def times(self, factor: float) -> Parts:
        """The expert whose output is ``factor`` times as large."""
        bias_D = None if self.bias_D is None else self.bias_D * factor
        return self._replace(down_DF=self.down_DF * factor, bias_D=bias_D)

    def beside(self, other: Parts) -> Parts:
        """The expert that computes the sum of both."""
        biases = [bias_D for bias_D in (self.bias_D, other.bias_D) if bias_D is not None]
        return Parts(
            torch.cat([self.gate_FD, other.gate_FD]),
            torch.cat([self.up_FD, other.up_FD]),
            torch.cat([self.down_DF, other.down_DF], 1),
            torch.stack(biases).sum(0) if biases else None,
        )


@dataclass
class StockLayer:
    """One layer on disk.

    Attributes:
        parent: the dense model, from whose rows the experts are made.
        carving: what it was carved into.
        index: the layer's index.
        home: the architecture and its sizes. Matrices are made one expert at a time, so a model's are never all in
            memory together.
    """

    parent: Parent
    carving: Carving
    index: int
    home: Home

    @property
    def layer(self) -> Layer:
        """The carving's layer."""
        return self.carving.layers[self.index]

    @property
    def level(self) -> bool:
        """Whether all chosen experts must weigh the same."""
        return (self.layer.mix == "sum" and self.layer.top_k > 1) or not self.home.divided

    @property
    def factor(self) -> int:
        """What experts are multiplied by where all chosen ones weigh the same: a stock gate divides their sum by it."""
        return self.layer.top_k if self.home.divided else self.home.experts

    @property
    def scale(self) -> float:
        """What the router's logits are multiplied by on disk, a power of two; 1 where the gate weighs as it is."""
        if not self.level and self.home.dialect != "mimo2":
            return 1.0
        weight_ED = linear_router(self.parent, self.layer, self.index).weight_ED
        return scale_of(self.parent, self.index, weight_ED, SIGMOID if self.home.dialect == "mimo2" else SPREAD)

    def router(self) -> Tensor:
        """Return the router's matrix, (E, D) fp32."""
        return linear_router(self.parent, self.layer, self.index).weight_ED * self.scale

    def shared_gate(self) -> Tensor:
        """Return the shared expert's gate (1, D), whose sigmoid is one half.

        llama.cpp computes it as silu(z) / z, which fails at zero: there z is tiny instead of zero.
        """
        if self.home.divided or self.layer.shared is None:
            return torch.zeros(1, self.parent.D)
        weight_ED = linear_router(self.parent, self.layer, self.index).weight_ED
        return (weight_ED[:1] if weight_ED.any() else torch.ones(1, self.parent.D)) * self.scale * SPREAD

    def routed(self, expert: int) -> Matrices:
        """Make the matrices of one routed expert, ``home.width`` channels wide."""
        layer, home = self.layer, self.home
        parts = self._parts(layer.routed[expert], expert)
        if self.level:
            parts = parts.times(self.factor)
        if home.folded and layer.shared is not None:
            parts = parts.beside(self._parts(layer.shared, layer.shared))
        return self._padded(parts, home.width)

    def dense(self) -> Matrices:
        """Make those of a layer that has no other expert, ``home.dense_width`` channels wide."""
        return self._padded(self._parts(self.layer.routed[0], 0), self.home.dense_width)

    def shared(self) -> Matrices:
        """Make those of the shared expert, ``home.shared`` wide; zeros if there is none. Its gate is one half."""
        own = None if self.home.folded else self.layer.shared
        if own is None:
            zeros_WD = torch.zeros(self.home.shared, self.parent.D)
            return zeros_WD, zeros_WD, zeros_WD.T.contiguous()
        return self._padded(self._parts(own, own).times(2), self.home.shared)

    def _parts(self, expert: Expert, which: int | Expert) -> Parts:
        gate_FD, up_FD, down_DF = self.carving.expert_weights(self.parent, self.index, which)
        assert up_FD is not None, "stock_config refuses such a parent"
        return Parts(gate_FD, up_FD, down_DF, expert.bias_D)

    def _padded(self, parts: Parts, width: int) -> Matrices:
        gate_FD, up_FD, down_DF, bias_D = parts
        if bias_D is not None:
            gate_D, up_D, (down_D,) = constant_channel(self.parent.ffns[self.index], self.layer, [bias_D])
            gate_FD = torch.cat([gate_FD, gate_D.to(gate_FD.device)[None]])
            up_FD = torch.cat([up_FD, up_D.to(up_FD.device)[None]])
            down_DF = torch.cat([down_DF, down_D.to(down_DF.device)[:, None]], 1)
        missing = width - len(gate_FD)
        return F.pad(gate_FD, (0, 0, 0, missing)), F.pad(up_FD, (0, 0, 0, missing)), F.pad(down_DF, (0, missing))


def router_scales(parent: Parent, carving: Carving) -> list[float]:
    """Return what each layer's logits are multiplied by in the stock folder of a carving (:attr:`StockLayer.scale`)."""
    home = home_of(parent.family, carving)
    return [StockLayer(parent, carving, index, home).scale for index in range(parent.L)]


def scale_of(parent: Parent, index: int, weight_ED: Tensor, spread: float) -> float:
    """Choose the power of two that brings a token's logits to about ``spread``."""
    # x is a norm's output, which points anywhere: each number is as large as its weight
    norm: Any = getattr(decoder_layers(parent.model)[1][index], STREAM[1])
    centred_ED = (weight_ED - weight_ED.mean(0)).double()
    size = float((centred_ED * norm.weight.detach().cpu().double()).square().sum(1).mean().sqrt())
    return float(2.0 ** math.floor(math.log2(spread / size))) if size else 1.0


class Level(Router):
    """A router that chooses and weighs as a stock gate does, whose logits are scaled down so that all weigh the same.

    Experts behind it are multiplied by what their weights are too small by.

    The softmax in fp32 does not tell apart logits that differ by 5e-4 of their spread. In a deep model most texts hold
    such a pair somewhere; so what a folder is compared with orders these experts as the folder does.
    """

    def __init__(self, router: Router, scale: float, *, divided: bool) -> None:
        super().__init__(router.spec, router.weight.detach())
        self.scale, self.divided = scale, divided

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens: logits (T, E) fp32, weights (T, K) fp32 of about 1/K, or 1/E where not divided, ids (T, K)."""
        logits_TE = self.logits(x_TD)
        top_TK, ids_TK = (logits_TE * self.scale).softmax(-1).topk(self.spec.top_k, dim=-1)
        return logits_TE, top_TK / top_TK.sum(-1, keepdim=True) if self.divided else top_TK, ids_TK


def linear_router(parent: Parent, layer: Layer, index: int) -> Linear:
    """Return the layer's router as a matrix; ``stock_refusal`` refuses layers that have none."""
    router = layer.router
    found = router.folded(parent.ffns[index]) if isinstance(router, Analytic) else router
    assert found is not None, "stock_refusal knows it"
    return found
