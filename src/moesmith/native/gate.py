"""Gates as modules: router logits become expert weights and ids, as the stored semantics say.

Shapes: T tokens, D model width, E experts, K active experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def select(logits_TE: Tensor, spec: Any) -> tuple[Tensor, Tensor]:
    """The sparse gate: weights (T, K) in fp32 and expert ids (T, K), largest first.

    ``order`` matters only without ``renormalise``: the softmax of the kept logits always sums to 1.
    """
    logits_TE = logits_TE.float()
    # a CPU selects in short rows many times slower than it finds their maximum
    top_TK, ids_TK = logits_TE.max(-1, keepdim=True) if spec.top_k == 1 else logits_TE.topk(spec.top_k, dim=-1)
    if spec.renormalise or spec.order == "topk-softmax":
        weights_TK = top_TK.softmax(-1)
    else:
        weights_TK = logits_TE.softmax(-1).gather(-1, ids_TK)
    return weights_TK * spec.scale, ids_TK


def straight_through(weights_TK: Tensor, ids_TK: Tensor, logits_TE: Tensor) -> Tensor:
    """Leave the weights' values alone and give the router a gradient.

    With K = 1 a renormalised weight is the constant 1 and its gradient is zero. Multiplying by s / s.detach(),
    with s the softmax mass of the selected experts, keeps the forward value to the last bit and lets
    d log s through.
    """
    mass_T1 = logits_TE.float().softmax(-1).gather(-1, ids_TK).sum(-1, keepdim=True)
    return weights_TK * (mass_T1 / mass_T1.detach())


class Router(nn.Module):
    """DIVE's noisy top-k router (dive.md §6.1): hidden states (T, D) to ``(logits, weights, ids)``.

    In evaluation it is the plain sparse gate of ``spec``. In training ``temperature`` switches to the dense
    gate (all experts, softmax of logits / temperature), ``gradient`` adds the straight-through path, and
    ``spec.noise`` adds Gaussian noise scaled by softplus(noise · x).

    Attributes:
        weight: (E, D) router matrix, in the model's dtype.
        noise: (E, D) noise matrix or ``None``.
        temperature: dense gate's temperature in training, or ``None`` for the sparse gate.
        gradient: ``"straight-through"`` or ``"none"``, used by the sparse gate in training.
        forced: an expert every token is sent to (an oracle for measurements), or ``None``.
    """

    def __init__(self, spec: Any, weight_ED: Tensor, noise_ED: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(weight_ED, requires_grad=False)
        self.noise = None if noise_ED is None else nn.Parameter(noise_ED, requires_grad=False)
        self.temperature: float | None = None
        self.gradient = "none"
        self.forced: int | None = None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens: logits (T, E) fp32, weights (T, K) fp32, ids (T, K); K = E with the dense gate."""
        logits_TE = F.linear(x_TD, self.weight).float()
        if self.training and self.noise is not None and self.spec.noise > 0:
            spread_TE = F.softplus(F.linear(x_TD, self.noise).float())
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE * self.spec.noise
        if self.forced is not None:
            ids_T1 = torch.full((len(x_TD), 1), self.forced, dtype=torch.long, device=x_TD.device)
            return logits_TE, torch.ones_like(ids_T1, dtype=torch.float32), ids_T1
        if self.training and self.temperature is not None:
            ids_E = torch.arange(self.spec.experts, device=x_TD.device)
            return logits_TE, (logits_TE / self.temperature).softmax(-1), ids_E.expand(len(x_TD), -1)
        weights_TK, ids_TK = select(logits_TE, self.spec)
        if self.training and self.gradient == "straight-through":
            weights_TK = straight_through(weights_TK, ids_TK, logits_TE)
        return logits_TE, weights_TK, ids_TK
