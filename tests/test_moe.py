"""Identities of the MoE block: masked = sliced = reference, all channels = parent, equal experts = that expert."""

from __future__ import annotations

import pytest
import torch

from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer, Linear
from moesmith.mixture.lora import add_lora, lora_tensors
from moesmith.mixture.moe import SlicedExperts, build, experts_reference, forced, moe_blocks
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, tiny_parent

IDS = torch.arange(2, 50).view(2, 24)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["masked", "sliced"])
def test_one_expert_with_every_channel_is_the_parent(family: str, form: str) -> None:
    parent = tiny_parent(family)
    whole = random_carving(parent, experts=1, kept=parent.F)
    assert torch.allclose(logits(build(parent, whole, form)), logits(parent.model), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compensation", ["none", "bias", "refit"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_masked_is_sliced(family: str, compensation: str, top_k: int) -> None:
    parent = tiny_parent(family)
    carving = random_carving(parent, top_k=top_k, compensation=compensation)
    masked, sliced = logits(build(parent, carving, "masked")), logits(build(parent, carving, "sliced"))
    assert (masked - logits(parent.model)).abs().max() > 0.01  # the carving does something
    assert torch.allclose(masked, sliced, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_ragged_experts_are_padded_exactly(family: str) -> None:
    parent = tiny_parent(family)
    carving = random_carving(parent, top_k=2, compensation="refit", ragged=True)
    assert len(set(carving.widths()[0].tolist())) == 4
    assert torch.allclose(logits(build(parent, carving, "masked")), logits(build(parent, carving, "sliced")), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_sliced_is_the_token_by_token_reference(family: str) -> None:
    parent = tiny_parent(family)
    block = moe_blocks(build(parent, random_carving(parent, top_k=2, compensation="bias"), "sliced"))[0]
    x_TD = torch.randn(40, parent.D)
    _, weights, ids = block.router(x_TD)
    expected = experts_reference(block.experts, x_TD, ids, weights)
    assert torch.allclose(block.experts(x_TD, ids, weights), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("form", ["masked", "sliced"])
@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_equal_experts_are_that_expert_for_any_router(family: str, mode: str, form: str) -> None:
    parent = tiny_parent(family)
    one = random_carving(parent, experts=1, compensation="bias")
    layers = [Layer(layer.routed * 8, Linear(torch.randn(8, parent.D)), top_k=2) for layer in one.layers]
    eight = build(parent, Carving(layers, parent.F), form)
    if mode == "dense":
        eight.train()
        for block in moe_blocks(eight):
            block.router.temperature = 0.5
    assert torch.allclose(logits(eight), logits(build(parent, one, form)), atol=1e-4)


def test_dense_gate_at_low_temperature_tends_to_top_1() -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent)
    model = build(parent, carving, "masked")
    sparse = logits(model)
    model.train()
    for block in moe_blocks(model):
        block.router.temperature = 1e-4
    assert torch.allclose(logits(model), sparse, atol=1e-3)


def test_forced_expert_is_that_experts_own_model() -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent, compensation="refit")
    alone = Carving([Layer([x.routed[2]], Linear(torch.zeros(1, parent.D))) for x in carving.layers], parent.F)
    model = build(parent, carving)
    with forced(model, 2):
        inside = logits(model)
    assert torch.allclose(inside, logits(build(parent, alone)), atol=1e-5)
    assert not torch.allclose(logits(model), inside, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_merged_lora_is_unmerged_lora(family: str) -> None:
    parent = tiny_parent(family)
    carving = random_carving(parent, top_k=2, ragged=True)
    model = build(parent, carving)
    add_lora(model, rank=3, alpha=6.0, dropout=0.5, seed=1)
    before = logits(model)
    assert torch.allclose(before, logits(build(parent, carving)), atol=1e-6)  # B starts at zero
    with torch.no_grad():
        for block in moe_blocks(model):
            for name, p in block.experts.lora.named_parameters():
                if name.endswith("B"):
                    p.normal_(0, 0.2)
    unmerged = logits(model)
    assert not torch.allclose(unmerged, before, atol=1e-2)
    carving.lora = lora_tensors(moe_blocks(model))
    assert torch.allclose(logits(build(parent, carving)), unmerged, atol=1e-4)


def test_building_leaves_the_parent_alone_and_shares_its_weights() -> None:
    parent = tiny_parent("llama")
    before = logits(parent.model)
    model = build(parent, random_carving(parent), "masked")
    assert model.model.embed_tokens.weight.data_ptr() == parent.model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(parent.model), before)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_gradients_of_masked_and_sliced_agree(family: str) -> None:
    parent = tiny_parent(family)
    for compensation in ("bias", "refit"):
        carving = random_carving(parent, compensation=compensation)
        grads = []
        for form in ("masked", "sliced"):
            model = build(parent, carving, form).train()
            for block in moe_blocks(model):
                block.router.temperature = 0.5
                block.router.weight.requires_grad_(True)
            model(input_ids=IDS).logits.square().mean().backward()
            grads.append(torch.stack([block.router.weight.grad for block in moe_blocks(model)]))
        assert grads[0].abs().max() > 1e-6
        assert torch.allclose(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_an_expert_without_tokens_is_no_problem() -> None:
    parent = tiny_parent("llama")
    model = build(parent, random_carving(parent))
    experts = moe_blocks(model)[0].experts
    assert isinstance(experts, SlicedExperts)
    x_TD = torch.randn(5, parent.D)
    ids = torch.full((5, 1), 3)
    assert torch.allclose(experts(x_TD, ids, torch.ones(5, 1)), experts.expert(x_TD, 3), atol=1e-6)
