"""Turn router logits into expert weights and ids, as the stored semantics say.

Shapes: T tokens, D model width, E experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def select(logits_TE: Tensor, spec: Any) -> tuple[Tensor, Tensor]:
    """Compute the sparse gate: weights (T, K) in fp32 and expert ids (T, K), largest first.

    Averaged experts have the softmax of the kept logits as weights, which sums to 1; added ones have the weight 1 each.
    """
    logits_TE = logits_TE.float()
    # a CPU is many times slower at selecting in short rows than at finding their maximum
    top_TK, ids_TK = logits_TE.max(-1, keepdim=True) if spec.top_k == 1 else logits_TE.topk(spec.top_k, dim=-1)
    return torch.ones_like(top_TK) if added(spec) else top_TK.softmax(-1), ids_TK


def added(spec: Any) -> bool:
    """Whether chosen experts count in full; files of moesmith 0.1 do not say, and their experts are averaged."""
    return getattr(spec, "mix", "average") == "sum"


def straight_through(weights_TK: Tensor, ids_TK: Tensor, logits_TE: Tensor) -> Tensor:
    """Keep the weights' values and give the router a gradient.

    With K = 1 a renormalised weight is the constant 1 and its gradient is zero. Multiplying by s / s.detach(),
    with s the softmax mass of the selected experts, keeps the forward value to the last bit and lets
    d log s through.
    """
    mass_T1 = logits_TE.float().softmax(-1).gather(-1, ids_TK).sum(-1, keepdim=True)
    return weights_TK * (mass_T1 / mass_T1.detach())


class Router(nn.Module):
    """A noisy top-k router (DIVE, arXiv:2506.09351): hidden states (T, D) to ``(logits, weights, ids)``.

    In evaluation it is the plain sparse gate of ``spec``. In training ``temperature`` switches to the dense
    gate (all experts, softmax of logits / temperature), ``gradient`` adds the straight-through path, and
    ``spec.noise`` adds Gaussian noise scaled by softplus(noise · x).

    Attributes:
        weight: (E, D) router matrix, in the model's dtype; in an analytic router the gate rows of its channels.
        noise: (E, D) noise matrix or ``None``.
        up: (E, D) up rows of an analytic router's channels, or ``None``.
        bias: (E,) what the network of these channels adds before the activation, or ``None``.
        up_bias: (E,) what it adds to up's product, or ``None``.
        activation: activation of an analytic router that reads the network's hidden channels, else ``None``.
        temperature: the dense gate's temperature in training, or ``None`` for the sparse gate.
        gradient: ``"straight-through"`` or ``"none"``, used by the sparse gate in training.
        forced: an expert that every token is sent to (an oracle for measurements), or ``None``.
    """

    def __init__(
        self,
        spec: Any,
        weight_ED: Tensor,
        noise_ED: Tensor | None = None,
        up_ED: Tensor | None = None,
        bias_E: Tensor | None = None,
        up_bias_E: Tensor | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(weight_ED, requires_grad=False)
        self.noise = None if noise_ED is None else nn.Parameter(noise_ED, requires_grad=False)
        self.up = None if up_ED is None else nn.Parameter(up_ED, requires_grad=False)
        self.bias = None if bias_E is None else nn.Parameter(bias_E, requires_grad=False)
        self.up_bias = None if up_bias_E is None else nn.Parameter(up_bias_E, requires_grad=False)
        self.activation = activation
        self.temperature: float | None = None
        self.gradient = "none"
        self.forced: int | None = None

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits without noise, (T, E) fp32: W x, or |act(gate x) · (up x)| of the channels that stand for experts."""
        logits_TE = F.linear(x_TD, self.weight, self.bias)
        if self.activation is None:
            return logits_TE.float()
        hidden_TE = self.activation(logits_TE)
        return (hidden_TE if self.up is None else hidden_TE * F.linear(x_TD, self.up, self.up_bias)).float().abs()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens: logits (T, E) fp32, weights (T, K) fp32, ids (T, K); K = E with the dense gate."""
        logits_TE = self.logits(x_TD)
        if self.training and self.noise is not None and self.spec.noise > 0:
            spread_TE = F.softplus(F.linear(x_TD, self.noise).float())
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE * self.spec.noise
        if self.forced is not None:
            ids_T1 = torch.full((len(x_TD), 1), self.forced, dtype=torch.long, device=x_TD.device)
            return logits_TE, torch.ones_like(ids_T1, dtype=torch.float32), ids_T1
        if self.training and self.temperature is not None:
            ids_E = torch.arange(self.spec.experts, device=x_TD.device)
            weights_TE = (logits_TE / self.temperature).softmax(-1)
            if added(self.spec):  # the same sum as the K that will be chosen
                weights_TE = weights_TE * self.spec.top_k
            return logits_TE, weights_TE, ids_E.expand(len(x_TD), -1)
        weights_TK, ids_TK = select(logits_TE, self.spec)
        if self.training and self.gradient == "straight-through":
            weights_TK = straight_through(weights_TK, ids_TK, logits_TE)
        return logits_TE, weights_TK, ids_TK
