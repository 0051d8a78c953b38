"""ToMoE's straight-through Gumbel operators (arXiv:2501.15316), and activations times their expert's mask, fused.

Noise is drawn as e ~ Exp(1); g = −log e is the Gumbel variable of the paper. A unit is kept iff o + g + b > 0, that is
iff e · exp(−(o + b)) < 1, and its soft value is 1 / (1 + (e · exp(−(o + b)))^(1/τ)): no logarithm per element.

Shapes: T tokens, N experts, F channels, R width of the expert embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# tokens whose fp32 noise exists at once: what fits in a core's cache; more where starting a kernel costs more
CHUNK, DEVICE_CHUNK = 128, 4096


def median_logit(bias: float) -> float:
    """Return the logit o at which a unit is kept half of the time: log log 2 − b."""
    return float(torch.tensor(2.0).log().log()) - bias


def exponential(*shape: int, like: Tensor) -> Tensor:
    """Draw fresh noise e ~ Exp(1), fp32 and above 0, on ``like``'s device.

    On a CPU the generator draws on one core, one number after the other. Here two numbers come from one 64-bit draw, as
    −log u of 32-bit uniforms, in a quarter of the time of torch's own. So a device draws other numbers than a CPU.
    """
    if like.device.type != "cpu":
        tiny = torch.finfo(torch.float32).tiny
        return torch.empty(shape, device=like.device, dtype=torch.float32).exponential_().clamp_min_(tiny)
    count = math.prod(shape)
    draws = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)[:count]
    uniform = draws.view(shape).float().mul_(2.0**-32).add_(0.5)
    return uniform.clamp_(2.0**-32, 1 - 2.0**-24).log_().neg_()


def gumbel_sigmoid(logits: Tensor, noise: Tensor, temperature: float, bias: float) -> Tensor:
    """Draw a hard 0/1 mask, straight through to σ((o + g + b)/τ); ``noise`` is Exp(1), broadcast against ``logits``."""
    soft = torch.sigmoid((logits + bias - noise.log()) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order: exactly 0 or 1


def gumbel_softmax(logits_TN: Tensor, noise_TN: Tensor, temperature: float) -> Tensor:
    """Draw a one-hot argmax, straight through to softmax((r + g)/τ)."""
    soft_TN = ((logits_TN - noise_TN.log()) / temperature).softmax(-1)
    hard_TN = torch.zeros_like(soft_TN).scatter_(-1, soft_TN.argmax(-1, keepdim=True), 1.0)
    return hard_TN + (soft_TN - soft_TN.detach())


class _Masked(torch.autograd.Function):
    """Compute v ⊙ s(token's expert) with the gradient of s through its soft value.

    Mask logits o = W_D h are never formed for every token: o takes N distinct rows, and the gradient of a token's
    decoder input is (dL/do) W_D whatever its row. For the backward pass only the slope is stored, in low precision,
    its sign saying what is kept, instead of several fp32 copies of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v_TF: Tensor,
        h_TR: Tensor,
        decoder_FR: Tensor,
        logits_NF: Tensor,
        ids_T: Tensor,
        noise_NF: Tensor | None,
        temperature: float,
        bias: float,
        double: bool,
    ) -> Tensor:
        odds_NF = torch.exp(-(logits_NF + bias))
        slope_TF = torch.empty_like(v_TF)
        if noise_NF is not None:
            slope_NF = _sample(odds_NF.mul_(noise_NF), temperature, double).to(v_TF.dtype)
            torch.index_select(slope_NF, 0, ids_T, out=slope_TF)
        else:
            chunk = CHUNK if v_TF.device.type == "cpu" else DEVICE_CHUNK
            for start in range(0, len(ids_T), chunk):
                part = slice(start, start + chunk)
                odds_CF = odds_NF.index_select(0, ids_T[part])
                odds_CF.mul_(exponential(*odds_CF.shape, like=odds_CF))
                slope_TF[part] = _sample(odds_CF, temperature, double)
        ctx.save_for_backward(v_TF, slope_TF, h_TR, decoder_FR)
        return _kept(v_TF, slope_TF)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> Any:  # type: ignore[override]
        v_TF, slope_TF, h_TR, decoder_FR = ctx.saved_tensors
        do_TF = (grad_TF * v_TF).mul_(slope_TF.abs())
        dh_TR = (do_TF @ decoder_FR.to(do_TF.dtype)).to(h_TR.dtype)
        ddecoder_FR = (do_TF.T @ h_TR.to(do_TF.dtype)).to(decoder_FR.dtype)
        return _kept(grad_TF, slope_TF), dh_TR, ddecoder_FR, None, None, None, None, None, None


def _sample(odds: Tensor, temperature: float, double: bool) -> Tensor:
    """Compute the slope of the mask, with the sign bit set where the mask is 0; overwrites ``odds``.

    The slope of the soft value is s̃ (1 − s̃) / τ with s̃ = 1 / (1 + odds^(1/τ)); for a double mask s² it is 2 s times
    that, 0 for a dropped channel. Slopes are never negative, so their sign is free to say what is kept, which saves a
    tensor per layer between the passes; even a slope of 0 has a sign.
    """
    sign = 1 - odds
    soft = _power(odds, 1 / temperature).add_(1).reciprocal_()
    slope = torch.addcmul(soft, soft, soft, value=-1).mul_((2.0 if double else 1.0) / temperature).copysign_(sign)
    return slope.clamp_min_(-0.0) if double else slope


def _kept(x: Tensor, slope: Tensor) -> Tensor:
    """Keep ``x`` where the slope's sign bit is clear, else 0: by bits, ten times as fast as a CPU's ``masked_fill``."""
    integer, sign = {2: (torch.int16, 15), 4: (torch.int32, 31), 8: (torch.int64, 63)}[x.dtype.itemsize]
    keep = (slope.view(integer) >> sign).bitwise_not_()  # all ones or none
    return keep.bitwise_and_(x.contiguous().view(integer)).view(x.dtype)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Raise x to the ``exponent`` in place; half-integers, as for the published τ, take half of a power's time."""
    if not (2 * exponent).is_integer() or exponent < 1:
        return x.pow_(exponent)
    root = x.sqrt() if exponent % 1 else None
    if exponent >= 2:
        x.pow_(int(exponent))
    return x if root is None else x.mul_(root)


def masked(
    v_TF: Tensor,
    h_TR: Tensor,
    decoder_FR: Tensor,
    logits_NF: Tensor,
    ids_T: Tensor,
    *,
    temperature: float,
    bias: float,
    noise_NF: Tensor | None = None,
    double: bool = True,
) -> Tensor:
    """Multiply activations by the sampled mask of each token's expert, (T, F).

    Args:
        v_TF: input of ``down_proj``.
        h_TR: decoder input of each token's expert, GELU(LN(ê)), fp32; it carries the router's and embedding's gradient.
        decoder_FR: the decoder W_D.
        logits_NF: mask logits of every expert, the same numbers as W_D h; no gradient is taken through them.
        ids_T: each token's expert.
        temperature: τ.
        bias: b.
        noise_NF: one Exp(1) draw per expert and channel, shared by its tokens; fresh noise per token if ``None``, as
            published.
        double: the mask multiplies both factors of a gated product, as published: s² = s forward, but a dropped
            channel gets no gradient and a kept one twice as much (ToMoE, arXiv:2501.15316).
    """
    return _Masked.apply(  # type: ignore[no-any-return]
        v_TF, h_TR, decoder_FR, logits_NF, ids_T, noise_NF, temperature, bias, double
    )


def masked_reference(
    v_TF: Tensor, h_TR: Tensor, decoder_FR: Tensor, noise_TF: Tensor, *, temperature: float, bias: float, double: bool
) -> Tensor:
    """Compute the same directly, with each token's own logits in plain autograd, for tests and the memory benchmark."""
    mask_TF = gumbel_sigmoid(h_TR @ decoder_FR.T, noise_TF, temperature, bias)
    return v_TF * (mask_TF * mask_TF if double else mask_TF).to(v_TF.dtype)
