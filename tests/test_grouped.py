"""The kernel that does all experts' products at once, against a product per expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesmith.mixture.lora import add_lora
from moesmith.mixture.moe import block, experts_reference
from moesmith.native import experts as native
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
@pytest.mark.parametrize(("top_k", "lora"), [(1, False), (2, False), (1, True)])
def test_grouped_products_are_products_per_expert(
    family: str, top_k: int, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tiny_parent(family)
    moe: Any = torch.nn.ModuleList([block(parent, random_carving(parent, top_k=top_k), 0)])
    if lora:
        add_lora(moe, 4, 8, 0.0, seed=1)
        torch.nn.init.normal_(moe[0].experts.lora.down_B, std=0.1)
    x_TD = torch.randn(50, parent.D)
    _, weights_TK, ids_TK = moe[0].router(x_TD)
    ids_TK[ids_TK == 2] = 1  # an expert without rows
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(native, "groupable", lambda *_, grouped=grouped: grouped)
        x = x_TD.clone().requires_grad_(True)
        y_TD = moe[0].experts(x, ids_TK, weights_TK)
        y_TD.square().sum().backward()
        found.append((y_TD.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    if not lora:
        wanted_TD = experts_reference(moe[0].experts, x_TD, ids_TK, weights_TK)
        torch.testing.assert_close(found[1][0], wanted_TD, rtol=1e-4, atol=1e-5)


def test_a_cpu_keeps_its_own_way() -> None:
    assert not native.groupable(torch.zeros(2, 8, dtype=torch.bfloat16), 8, 8)
