"""Gate semantics: weights, order, gradients (docs/gates.md)."""

from __future__ import annotations

import pytest
import torch

from moesmith.errors import MoesmithError
from moesmith.mixture.gates import GateSpec
from moesmith.native.gate import Router, select, straight_through


def test_both_orders_agree_when_renormalised() -> None:
    logits = torch.randn(50, 8)
    by_logits, ids = select(logits, GateSpec(experts=8, top_k=3))
    kept, same_ids = logits.softmax(-1).topk(3)
    assert torch.equal(ids, same_ids)
    assert torch.allclose(by_logits, kept / kept.sum(-1, keepdim=True), atol=1e-6)


def test_added_experts_count_in_full() -> None:
    logits = torch.randn(50, 8)
    weights, ids = select(logits, GateSpec(experts=8, top_k=2, mix="sum"))
    assert torch.equal(weights, torch.ones(50, 2))
    assert torch.equal(ids, logits.topk(2).indices)


def test_a_gate_of_version_0_1() -> None:
    old = {"experts": 8, "top_k": 2, "order": "topk-softmax", "renormalise": True, "scale": 1.0, "noise": 0.5}
    assert GateSpec.read(old) == GateSpec(experts=8, top_k=2, noise=0.5)
    assert GateSpec.read(old | {"order": "softmax-topk"}) == GateSpec(experts=8, top_k=2, noise=0.5)  # as they divide
    for other in ({"scale": 2.0}, {"order": "softmax-topk", "renormalise": False}):
        with pytest.raises(MoesmithError, match="do not sum to 1"):
            GateSpec.read(old | other)


def test_top_1_weight_is_exactly_one_and_gives_no_gradient() -> None:
    logits = torch.randn(20, 8, requires_grad=True)
    weights, _ = select(logits, GateSpec(experts=8, top_k=1))
    assert torch.equal(weights, torch.ones(20, 1))
    (weights * torch.randn(20, 1)).sum().backward()
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_straight_through_keeps_the_value_and_lets_log_p_through(top_k: int) -> None:
    logits = torch.randn(20, 8, requires_grad=True)
    weights, ids = select(logits, GateSpec(experts=8, top_k=top_k))
    passed = straight_through(weights, ids, logits)
    assert torch.equal(passed, weights)
    passed.sum().backward()
    fresh = logits.detach().clone().requires_grad_(True)
    fresh.softmax(-1).gather(1, ids).sum(-1).log().sum().backward()
    assert torch.allclose(logits.grad, fresh.grad, atol=1e-6)


def test_noise_and_the_dense_gate_only_exist_in_training() -> None:
    spec = GateSpec(experts=4, top_k=1, noise=0.5)
    router = Router(spec, torch.randn(4, 16), torch.randn(4, 16))
    router.temperature = 0.5
    x = torch.randn(30, 16)
    router.eval()
    logits, _, ids = router(x)
    assert ids.shape == (30, 1)
    assert torch.equal(logits, x @ router.weight.T)
    router.train()
    noisy, dense, all_ids = router(x)
    assert not torch.equal(noisy, logits)
    assert dense.shape == (30, 4)
    assert torch.allclose(dense.sum(-1), torch.ones(30), atol=1e-6)
    assert torch.equal(all_ids[0], torch.arange(4))


def test_top_k_above_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 3 but there are 2 experts"):
        GateSpec(experts=2, top_k=3)
