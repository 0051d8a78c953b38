"""Gumbel operators: keep probability, straight-through gradients, the fused mask is plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesmith.methods.tomoe.estimators import (
    CHUNK,
    exponential,
    gumbel_sigmoid,
    gumbel_softmax,
    masked,
    masked_reference,
    median_logit,
)

TAU, BIAS = 0.4, 3.0
T, N, R, F = CHUNK + 70, 3, 8, 24  # tokens in two chunks
PUBLISHED = {-3.3665: 0.5, -3.0: 0.632, -4.0: 0.308, -6.0: 0.049}


def keep_probability(logits: Tensor, bias: float) -> Tensor:
    """P(kept) = 1 − exp(−exp(o + b)) of :func:`gumbel_sigmoid`: a single Gumbel, not the difference of two."""
    return -torch.expm1(-torch.exp(logits + bias))


@pytest.mark.parametrize("logit", PUBLISHED)
def test_keep_probability_is_the_published_curve(logit: float) -> None:
    assert float(keep_probability(torch.tensor(logit), BIAS)) == pytest.approx(PUBLISHED[logit], abs=5e-4)


def test_half_of_the_units_are_kept_at_the_median() -> None:
    assert median_logit(BIAS) == pytest.approx(-3.3665, abs=1e-4)
    assert float(keep_probability(torch.tensor(median_logit(1.0)), 1.0)) == pytest.approx(0.5, abs=1e-6)
    assert float(1 - keep_probability(torch.tensor(0.0, dtype=torch.float64), BIAS)) == pytest.approx(2e-9, rel=0.1)


def test_samples_follow_the_curve() -> None:
    logits_W, draws = torch.linspace(-7, -1, 13), 20_000
    wanted_W = keep_probability(logits_W, BIAS)
    mask_DW = gumbel_sigmoid(logits_W, exponential(draws, 13, like=logits_W), TAU, BIAS)
    kept_DW = masked(
        torch.ones(draws, 13),
        torch.zeros(draws, R),
        torch.zeros(13, R),
        logits_W[None],
        torch.zeros(draws, dtype=torch.long),
        temperature=TAU,
        bias=BIAS,
    )
    bound_W = 4 * (wanted_W * (1 - wanted_W) / draws).sqrt() + 1e-4
    for found_DW in (mask_DW, kept_DW):
        assert set(found_DW.unique().tolist()) == {0.0, 1.0}
        assert ((found_DW.mean(0) - wanted_W).abs() < bound_W).all()


def test_noise_is_gumbel() -> None:
    g = -exponential(200_000, like=torch.zeros(1)).log()
    assert float(g.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(g.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_gumbel_sigmoid_is_hard_forward_and_soft_backward() -> None:
    logits = torch.randn(50, 7, requires_grad=True)
    noise, weight = exponential(50, 7, like=logits), torch.randn(50, 7)
    mask = gumbel_sigmoid(logits - 3, noise, TAU, BIAS)
    soft = torch.sigmoid((logits - noise.log()) / TAU)
    assert torch.equal(mask.detach(), (logits - noise.log() > 0).float())
    assert 0 < mask.mean() < 1
    found, wanted = (torch.autograd.grad((y * weight).sum(), logits, retain_graph=True)[0] for y in (mask, soft))
    torch.testing.assert_close(found, wanted)


def test_gumbel_softmax_is_one_hot_with_the_gradient_of_the_softmax() -> None:
    logits = torch.randn(40, 5, requires_grad=True)
    noise, weight = exponential(40, 5, like=logits), torch.randn(40, 5)
    hard = gumbel_softmax(logits, noise, TAU)
    soft = ((logits - noise.log()) / TAU).softmax(-1)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(-1), torch.ones(40))
    assert torch.equal(hard.argmax(-1), (logits - noise.log()).argmax(-1))
    found, wanted = (torch.autograd.grad((y * weight).sum(), logits, retain_graph=True)[0] for y in (hard, soft))
    torch.testing.assert_close(found, wanted)


def test_gumbel_softmax_draws_experts_by_their_probability() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0])
    drawn = gumbel_softmax(logits.expand(20_000, 3), exponential(20_000, 3, like=logits), TAU).mean(0)
    torch.testing.assert_close(drawn, logits.softmax(-1), atol=0.015, rtol=0)


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations, decoder inputs by expert and decoder, and each token's expert; logits lie around the median."""
    v_TF = torch.randn(T, F, dtype=dtype).requires_grad_()
    h_NR = torch.randn(N, R).add_(-1.5).requires_grad_()
    decoder_FR = torch.rand(F, R).requires_grad_()
    return v_TF, h_NR, decoder_FR, torch.randint(N, (T,))


def noise_of(per: str, logits_NF: Tensor, ids_T: Tensor) -> tuple[Tensor | None, Tensor]:
    """Noise by expert as ``masked`` takes it, and by token; for fresh noise the seed is set back to draw it again."""
    if per == "expert":
        noise_NF = exponential(N, F, like=logits_NF)
        return noise_NF, noise_NF[ids_T]
    torch.manual_seed(7)
    noise_TF = torch.cat([exponential(len(part), F, like=logits_NF) for part in ids_T.split(CHUNK)])
    torch.manual_seed(7)
    return None, noise_TF


@pytest.mark.parametrize("per", ["token", "expert"])
@pytest.mark.parametrize("double", [True, False])
def test_fused_mask_is_plain_autograd(per: str, double: bool) -> None:
    v_TF, h_NR, decoder_FR, ids_T = leaves()
    logits_NF = (h_NR @ decoder_FR.T).detach()
    noise_NF, noise_TF = noise_of(per, logits_NF, ids_T)
    wanted = masked_reference(v_TF, h_NR[ids_T], decoder_FR, noise_TF, temperature=TAU, bias=BIAS, double=double)
    found = masked(
        v_TF, h_NR[ids_T], decoder_FR, logits_NF, ids_T, temperature=TAU, bias=BIAS, noise_NF=noise_NF, double=double
    )
    assert torch.equal(found, wanted)
    assert 0.02 < (found != 0).float().mean() < 0.98
    weight = torch.randn(T, F)
    for got, plain in zip(
        *(torch.autograd.grad((y * weight).sum(), (v_TF, h_NR, decoder_FR)) for y in (found, wanted)), strict=True
    ):
        assert plain.any()
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-3)


def test_fused_mask_in_bf16_rounds_and_no_more() -> None:
    v_TF, h_NR, decoder_FR, ids_T = leaves(torch.bfloat16)
    logits_NF = (h_NR @ decoder_FR.T).detach()
    noise_NF, noise_TF = noise_of("token", logits_NF, ids_T)
    wanted = masked_reference(v_TF, h_NR[ids_T], decoder_FR, noise_TF, temperature=TAU, bias=BIAS, double=True)
    found = masked(v_TF, h_NR[ids_T], decoder_FR, logits_NF, ids_T, temperature=TAU, bias=BIAS, noise_NF=noise_NF)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    for got, plain in zip(
        *(torch.autograd.grad(y.float().sum(), (v_TF, h_NR, decoder_FR)) for y in (found, wanted)), strict=True
    ):
        assert got.dtype == plain.dtype
        assert (got - plain).float().norm() < 0.02 * plain.float().norm()


@pytest.mark.parametrize("double", [True, False])
def test_a_dropped_channel_learns_only_under_single_masking(double: bool) -> None:
    v_TF, h_NR, decoder_FR, _ = leaves()
    ids = torch.zeros(1, dtype=torch.long)
    logits_NF = (h_NR @ decoder_FR.T).detach()
    noise_NF = 2 * torch.exp(logits_NF + BIAS)  # odds of 2: dropped, and not far from being kept
    noise_NF[:, ::3] /= 4
    found = masked(
        v_TF[:1], h_NR[:1], decoder_FR, logits_NF, ids, temperature=TAU, bias=BIAS, noise_NF=noise_NF, double=double
    )
    (grad_FR,) = torch.autograd.grad(found.sum(), decoder_FR)
    kept = found[0] != 0
    assert 0 < kept.sum() < F
    assert bool(grad_FR[~kept].any()) is not double
    assert grad_FR[kept].any(1).all()


def test_double_masking_doubles_a_kept_channels_gradient() -> None:
    v_TF, h_NR, decoder_FR, ids_T = leaves()
    logits_NF = (h_NR @ decoder_FR.T).detach()
    noise_NF = exponential(N, F, like=logits_NF)
    noise_NF[:, ::3] = 1e-6
    grads = [
        torch.autograd.grad(
            masked(
                v_TF, h_NR[ids_T], decoder_FR, logits_NF, ids_T,
                temperature=TAU, bias=BIAS, noise_NF=noise_NF, double=double,
            ).sum(),
            decoder_FR,
        )[0]
        for double in (True, False)
    ]  # fmt: skip
    always_F = (logits_NF + BIAS > noise_NF.log()).all(0)
    assert always_F.any()
    assert not always_F.all()
    torch.testing.assert_close(grads[0][always_F], 2 * grads[1][always_F])
    assert not torch.allclose(grads[0][~always_F], 2 * grads[1][~always_F], rtol=0.1)
