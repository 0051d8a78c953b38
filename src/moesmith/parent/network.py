"""A feed-forward network: what it computes, and the parent's own.

It is gated, y = down(act(gate x) * (up x)), or not, y = down(act(gate x)); its products may have biases.

Shapes: D model width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def hidden(
    x: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor | None,
    activation: Activation,
    gate_bias_F: Tensor | None = None,
    up_bias_F: Tensor | None = None,
) -> Tensor:
    """Compute the input of ``down``, (…, D) to (…, F): act(gate x + b) * (up x + c), or act(gate x + b) ungated."""
    a = activation(F.linear(x, gate_FD, gate_bias_F))
    return a if up_FD is None else a * F.linear(x, up_FD, up_bias_F)


@dataclass
class Network:
    """A feed-forward network, y = down(hidden(x)): gated, or with two matrices; with biases or without.

    Attributes:
        gate_FD: (F, D), the matrix before the activation.
        up_FD: (F, D), or ``None`` when the network is not gated.
        down_DF: (D, F).
        activation: act, elementwise.
        gate_bias_F: added before the activation, (F,), or ``None``.
        up_bias_F: added to up's product, (F,); there if ``gate_bias_F`` and ``up_FD`` are.
        down_bias_D: added to the output, (D,), or ``None``.
    """

    gate_FD: Tensor
    up_FD: Tensor | None
    down_DF: Tensor
    activation: Activation
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Its matrices: gate, up where it is gated, down."""
        return [part for part in (self.gate_FD, self.up_FD, self.down_DF) if part is not None]

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Its biases, of gate, up and down."""
        return self.gate_bias_F, self.up_bias_F, self.down_bias_D

    @property
    def matrices(self) -> int:
        """How many matrices the network has: 3 when it is gated, otherwise 2."""
        return len(self.weights)

    def hidden(self, x: Tensor) -> Tensor:
        """The input of ``down``, (…, D) to (…, F)."""
        return hidden(x, self.gate_FD, self.up_FD, self.activation, self.gate_bias_F, self.up_bias_F)

    def output(self, x: Tensor) -> Tensor:
        """What it computes, (…, D) to (…, D)."""
        return F.linear(self.hidden(x), self.down_DF, self.down_bias_D)

    def to(self, *place: Any) -> Network:
        """Move it to a device, a dtype or both, as ``Tensor.to`` does."""
        parts = (self.gate_FD, self.up_FD, self.down_DF, *self.biases)
        gate_FD, up_FD, down_DF, *biases = (None if part is None else part.to(*place) for part in parts)
        assert gate_FD is not None
        assert down_DF is not None
        return Network(gate_FD, up_FD, down_DF, self.activation, *biases)

    def replaced(self, weights: Sequence[Tensor]) -> Network:
        """The same with other matrices, in the order of :attr:`weights`."""
        gate_FD, *up, down_DF = weights
        return Network(gate_FD, up[0] if up else None, down_DF, self.activation, *self.biases)

    def narrowed(self, kept: Tensor, down_DF: Tensor) -> Network:
        """Keep some channels, with columns of ``down`` of their own."""
        kept = kept.to(self.gate_FD.device)
        rows = (self.up_FD, self.gate_bias_F, self.up_bias_F)
        up_FD, gate_bias_F, up_bias_F = (None if part is None else part[kept] for part in rows)
        biases = (gate_bias_F, up_bias_F, self.down_bias_D)
        return Network(self.gate_FD[kept], up_FD, down_DF, self.activation, *biases)


@dataclass(kw_only=True)
class FFN(Network):
    """A parent's feed-forward network; its tensors are views into the model's weights.

    Attributes:
        path: the module's name in the model, e.g. ``model.layers.3.mlp``.
        down: the module whose input is :meth:`hidden`; a forward pre-hook on it sees (…, F).
        module: the whole network; a forward pre-hook on it sees the router's input (…, D).
        activation_name: the activation's name in ``transformers.activations.ACT2FN``.
    """

    path: str
    down: nn.Module
    module: nn.Module
    activation_name: str
