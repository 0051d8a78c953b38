"""Grouped LoRA: its dropout, and its rows against each expert's own pair."""

from __future__ import annotations

import torch

from moesmith.mixture.lora import add_lora, dropout
from moesmith.mixture.moe import build, moe_blocks
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent


def test_dropout_keeps_the_mean_and_its_share() -> None:
    x = torch.ones(1001, 333, requires_grad=True)
    y = dropout(x, 0.1, True)
    kept = y > 0
    assert abs(float(kept.float().mean()) - 0.9) < 0.002
    assert torch.allclose(y[kept], torch.tensor(1 / 0.9))
    rows, columns = kept.float().mean(1), kept.float().mean(0)  # no stripes
    assert abs(float(rows.std()) - (0.09 / 333) ** 0.5) < 0.002
    assert abs(float(columns.std()) - (0.09 / 1001) ** 0.5) < 0.002
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, 0.1, False) is x


def test_dropout_follows_the_seed() -> None:
    x, draws = torch.ones(50, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5, True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_every_row_gets_its_own_experts_pair() -> None:
    parent = tiny_parent("llama")
    model = build(parent, random_carving(parent))
    add_lora(model, 3, 6.0, 0.0, 0)
    lora = moe_blocks(model)[0].experts.lora
    with torch.no_grad():
        for name in ("gate_B", "up_B", "down_B"):
            getattr(lora, name).normal_()
    x_ND, owner_N = torch.randn(9, parent.D), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    gate_up_NG = lora.gate_up(x_ND, owner_N)
    for row, expert in enumerate(owner_N.tolist()):
        gate = 2.0 * lora.gate_B[expert] @ lora.gate_A[expert] @ x_ND[row]
        up = 2.0 * lora.up_B[expert] @ lora.up_A[expert] @ x_ND[row]
        assert torch.allclose(gate_up_NG[row], torch.cat([gate, up]), atol=1e-5)
