"""The chunked head loss against plain autograd, values and gradients."""

from __future__ import annotations

import pytest
import torch

from moesmith.parent.head import LogitShape
from moesmith.training import losses


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(0.3), LogitShape(2.0, 3.0)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("mix", "temperature"), [(0.0, 1.0), (1.0, 1.0), (1.0, 2.0), (0.3, 1.5)])
def test_fused_loss_is_the_reference(
    mix: float, temperature: float, biased: bool, shape: LogitShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 7)
    head = torch.randn(60, 16)
    labels = torch.randint(0, 60, (33,))
    teacher = torch.randn(33, 16) if mix else None
    bias = torch.randn(60) if biased else None
    results = []
    for function in (losses.head_loss, losses.head_loss_reference):
        torch.manual_seed(1)
        hidden = torch.randn(33, 16, requires_grad=True)
        loss = function(hidden, head, labels, teacher, mix, temperature, bias, shape)
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_distillation_from_itself_is_zero() -> None:
    hidden, head = torch.randn(9, 16, requires_grad=True), torch.randn(60, 16)
    loss = losses.head_loss(hidden, head, torch.zeros(9, dtype=torch.long), hidden.detach(), 1.0, 1.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert hidden.grad.abs().max() < 1e-5
