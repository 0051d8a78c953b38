"""Scores, selection, compensation, refit and the closed-form router."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesmith.calibration.moments import Moments, Second
from moesmith.errors import MoesmithError
from moesmith.methods.refit import compensation_bias, refit_down
from moesmith.methods.router import constant_direction, lda_router, random_router
from moesmith.methods.scores import channel_scores, choose, kept_channels
from moesmith.testing.parents import tiny_parent


def second(x_TN: torch.Tensor) -> Second:
    return Second(len(x_TN), x_TN.mean(0), x_TN.T @ x_TN / len(x_TN))


def test_scores_are_their_formulas() -> None:
    parent = tiny_parent("llama")
    moments = Moments(10, torch.randn(parent.L, parent.F), torch.rand(parent.L, parent.F))
    W, var, mean = parent.ffns[1].down_DF, moments.var_LF[1], moments.mean_LF[1]
    assert torch.allclose(channel_scores(parent, moments, "ifv")[1], var)
    assert torch.allclose(channel_scores(parent, moments, "wifv")[1], var * (W**2).sum(0))
    assert torch.allclose(channel_scores(parent, moments, "wifn")[1], W.abs().mean(0) * (var + mean**2).sqrt())
    sizes = [parent.ffns[1].gate_FD.norm(dim=1), parent.ffns[1].up_FD.norm(dim=1), W.norm(dim=0)]
    assert torch.allclose(channel_scores(parent, moments, "magnitude")[1], sizes[0] * sizes[1] * sizes[2])
    plain = tiny_parent("phi").ffns[1]  # no gate: two sizes
    found = channel_scores(tiny_parent("phi"), moments, "magnitude")[1]
    assert torch.allclose(found, plain.gate_FD.norm(dim=1) * plain.down_DF.norm(dim=0))


@given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 0.99), st.booleans())
def test_selection_keeps_exactly_its_quota(width: int, layers: int, ratio: float, ties: bool) -> None:
    scores = torch.ones(layers, width) if ties else torch.rand(layers, width)
    kept = kept_channels(width, ratio)
    uniform = choose(scores, ratio)
    assert [len(c) for c in uniform] == [kept] * layers
    adaptive = choose(scores, ratio, "adaptive")
    assert sum(len(c) for c in adaptive) == kept * layers
    for channels in [*uniform, *adaptive]:
        assert len(channels) >= 1
        assert torch.equal(channels, channels.unique())  # sorted, no repeats
    if not ties:
        assert set(uniform[0].tolist()) == set(scores[0].topk(kept).indices.tolist())


def test_dive_widths() -> None:
    assert kept_channels(5632, 0.5) == 2816
    assert kept_channels(5632, 0.75) == 1408
    with pytest.raises(MoesmithError, match="leaves no channel"):
        kept_channels(64, 1.0)


def test_bias_is_exact_for_constant_channels() -> None:
    W, a = torch.randn(8, 20), torch.randn(50, 20)
    kept = torch.tensor([0, 3, 4, 11])
    pruned = [j for j in range(20) if j not in kept.tolist()]
    a[:, pruned] = a[0, pruned]
    bias = compensation_bias(W, a.mean(0), kept)
    assert torch.allclose(a[:, kept] @ W[:, kept].T + bias, a @ W.T, atol=1e-4)
    assert torch.equal(compensation_bias(W, a.mean(0), torch.arange(20)), torch.zeros(8))


def test_refit_is_the_ridge_solution_and_beats_plain_slicing() -> None:
    W, mixing = torch.randn(8, 20), torch.randn(20, 20)
    a = torch.randn(400, 20) @ mixing
    gram, kept = a.T @ a / len(a), torch.tensor([1, 2, 5, 8, 13, 19])
    fitted = refit_down(W, gram, kept, 0.01)
    S = a[:, kept].double()
    damping = 0.01 * gram.diagonal()[kept].mean().double()
    # augmented least squares: stack √λ I below the data, √λ W_S below the targets
    data = torch.cat([S / len(a) ** 0.5, damping.sqrt() * torch.eye(6, dtype=torch.float64)])
    goal = torch.cat([(a @ W.T).double() / len(a) ** 0.5, damping.sqrt() * W[:, kept].T.double()])
    assert torch.allclose(fitted.double(), torch.linalg.lstsq(data, goal).solution.T, atol=1e-3)
    dense = a @ W.T
    assert (a[:, kept] @ fitted.T - dense).square().mean() < 0.9 * (a[:, kept] @ W[:, kept].T - dense).square().mean()
    assert torch.allclose(refit_down(W, gram, torch.arange(20), 0.01), W, atol=1e-3)


def test_refit_of_a_dead_layer_is_finite() -> None:
    assert refit_down(torch.randn(4, 6), torch.zeros(6, 6), torch.tensor([0, 2]), 0.01).isfinite().all()


def test_constant_direction_stands_in_for_a_bias() -> None:
    x = torch.randn(2000, 16) * 0.05
    x[:, 3] += 0.7
    v, error = constant_direction(second(x))
    assert abs(error - float((x @ v - 1).square().mean())) < 1e-4
    assert error < 0.01


def test_lda_is_the_bayes_rule_for_gaussians_with_one_covariance() -> None:
    shape = torch.randn(12, 12) * 0.2
    means = torch.randn(3, 12)
    means[:, 0] = 5  # the constant direction
    draws = [means[k] + torch.randn(4000, 12) @ shape * (torch.arange(12) > 0) for k in range(3)]
    W = lda_router([second(x) for x in draws], ridge=1e-6)
    inverse = torch.linalg.pinv((shape.T @ shape) * (torch.arange(12) > 0) * (torch.arange(12) > 0)[:, None])
    agree = 0.0
    for x in draws:
        distances = torch.stack([((x - m) @ inverse * (x - m)).sum(-1) for m in means], -1)
        agree += float((distances.argmin(-1) == (x @ W.T).argmax(-1)).float().mean()) / 3
    assert agree > 0.97
    assert torch.allclose(lda_router([second(x) for x in draws], 1e-6, 0.05), 0.05 * W, atol=1e-5)


def test_random_router_is_a_linear_layers_default() -> None:
    W = random_router(8, 400, torch.Generator().manual_seed(1))
    assert W.abs().max() <= 1 / 20
    assert abs(float(W.std()) - 1 / 20 / 3**0.5) < 1e-3
