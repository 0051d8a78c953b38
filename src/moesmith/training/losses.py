"""Compute next-token and distillation loss from hidden states, without ever holding the whole logits.

The output head is frozen in every stage, so the gradient of the loss with respect to a hidden state has a closed form
and is taken in the forward pass, a chunk of tokens at a time: two head products per chunk instead of the three of
checkpointing, and memory for one chunk of logits instead of T × vocabulary numbers in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesmith.parent.accelerator import Sum, has_double
from moesmith.parent.head import LogitShape

CHUNK, DEVICE_CHUNK = 128, 512  # tokens whose logits exist at once: on a CPU, and where starting a kernel costs more
PLAIN = LogitShape()
PIECE = 8  # tokens whose probabilities exist at once on a CPU: they stay in a core's cache


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        teacher_ND: Tensor | None,
        mix: float,
        temperature: float,
        head_V: Tensor | None,
        shape: LogitShape,
    ) -> Tensor:
        N = len(hidden_ND)
        total = Sum(torch.zeros((), device=hidden_ND.device))
        grad_ND = torch.zeros_like(hidden_ND)
        cpu = hidden_ND.device.type == "cpu"
        for rows in torch.arange(N).split(CHUNK if cpu else DEVICE_CHUNK):
            part, size = slice(int(rows[0]), int(rows[-1]) + 1), PIECE if cpu else len(rows)
            logits_CV = shape(F.linear(hidden_ND[part], head_VD, head_V))
            slope = shape.slope(logits_CV)
            teacher_CV = None
            if teacher_ND is not None and mix > 0:
                teacher_CV = shape(F.linear(teacher_ND[part], head_VD, head_V))
            grad_CV = torch.empty_like(logits_CV, dtype=hidden_ND.dtype)
            for start in range(0, len(rows), size):
                piece = slice(start, start + size)
                wanted_PV = None if teacher_CV is None else teacher_CV[piece]
                loss, grad_PV = _piece(logits_CV[piece], labels_N[part][piece], wanted_PV, mix, temperature)
                total.add(loss)
                grad_CV[piece] = grad_PV
            if slope is not None:
                grad_CV.mul_(slope)
            grad_ND[part] = grad_CV @ head_VD
        ctx.save_for_backward(grad_ND)
        ctx.scale = 1 / N
        return (total.single() / N).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * (grad * ctx.scale).to(grad_ND.dtype), *[None] * 7


def _piece(
    logits_PV: Tensor, labels_P: Tensor, teacher_PV: Tensor | None, mix: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute the summed loss of a few tokens and its gradient by their logits, fp32; may overwrite both logits.

    The sum is fp64, or fp32 where the device has no fp64.
    """
    wide = torch.float64 if has_double(logits_PV.device) else torch.float32
    loss, grad_PV = torch.zeros((), dtype=wide, device=logits_PV.device), None
    if mix < 1:
        log_PV = F.log_softmax(logits_PV, -1, dtype=torch.float32)
        labels_P1 = labels_P[:, None]
        loss = loss - (1 - mix) * log_PV.gather(1, labels_P1).sum().to(wide)
        grad_PV = log_PV.exp_().mul_(1 - mix)
        grad_PV.scatter_add_(1, labels_P1, torch.full_like(labels_P1, mix - 1, dtype=torch.float32))
    if teacher_PV is not None:
        if temperature != 1:  # every pass over the logits costs time
            teacher_PV, logits_PV = teacher_PV.div_(temperature), logits_PV.div_(temperature)
        wanted_PV = F.log_softmax(teacher_PV, -1, dtype=torch.float32)
        given_PV = F.log_softmax(logits_PV, -1, dtype=torch.float32)
        p_PV = wanted_PV.exp()
        loss = loss + mix * temperature**2 * wanted_PV.sub_(given_PV).mul_(p_PV).sum().to(wide)
        soft_PV = given_PV.exp_().sub_(p_PV)
        if mix * temperature != 1:
            soft_PV.mul_(mix * temperature)
        grad_PV = soft_PV if grad_PV is None else soft_PV.add_(grad_PV)
    return loss, torch.zeros_like(logits_PV) if grad_PV is None else grad_PV


def head_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    teacher_ND: Tensor | None = None,
    mix: float = 0.0,
    temperature: float = 1.0,
    head_V: Tensor | None = None,
    shape: LogitShape = PLAIN,
) -> Tensor:
    """Compute (1 − mix) · cross-entropy + mix · τ² · KL(teacher ‖ student), mean over N tokens, a scalar.

    Args:
        hidden_ND: final hidden states (N, D), those that predict ``labels_N``.
        head_VD: the frozen output head (V, D); it gets no gradient.
        labels_N: next token ids.
        teacher_ND: the dense parent's hidden states for the same tokens; its head is the same.
        mix: share of distillation in [0, 1]; 0 without a teacher.
        temperature: τ, applied to both sides of the KL term.
        head_V: the head's bias (V,), if it has one; frozen as well.
        shape: what the model does to the head's product.
    """
    given = (hidden_ND, head_VD, labels_N, teacher_ND, mix, temperature, head_V, shape)
    return _HeadLoss.apply(*given)  # type: ignore[no-any-return]


def head_loss_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    teacher_ND: Tensor | None = None,
    mix: float = 0.0,
    temperature: float = 1.0,
    head_V: Tensor | None = None,
    shape: LogitShape = PLAIN,
) -> Tensor:
    """Compute the same loss in plain autograd, for the tests."""

    def logits(hidden_ND: Tensor) -> Tensor:
        product_NV = F.linear(hidden_ND, head_VD, head_V).float() * shape.scale
        return product_NV if shape.cap is None else shape.cap * (product_NV / shape.cap).tanh()

    logits_NV = logits(hidden_ND)
    loss = (1 - mix) * F.cross_entropy(logits_NV, labels_N)
    if teacher_ND is not None:
        wanted_NV = (logits(teacher_ND) / temperature).log_softmax(-1)
        given_NV = (logits_NV / temperature).log_softmax(-1)
        loss = loss + mix * temperature**2 * F.kl_div(given_NV, wanted_NV, reduction="batchmean", log_target=True)
    return loss
