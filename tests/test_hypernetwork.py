"""What ToMoE trains: its size in closed form, its start, and who talks to whom in the hypernetwork."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from moesmith.methods.tomoe.hypernetwork import Hypernetwork, Masks
from moesmith.parent.sizes import EMBEDDING, Sizes
from moesmith.testing.masks import ATTENTION, harvested, spec_of, tiny_masks
from moesmith.testing.parents import FAMILIES, tiny_parent


@dataclass
class Row:
    """A row of the published table of sizes; ``parameters`` are the whole model's."""

    sizes: Sizes
    parameters: float
    trained: float
    shipped: float
    percent: float
    total: float
    attention: int


ROWS = {
    "llama-2 7b": Row(Sizes(32, 4096, 11008, 32, 32, 128, 128), 6.738e9, 63.8e6, 18.36e6, 0.273, 6.476e9, 33),
    "llama-2 13b": Row(Sizes(40, 5120, 13824, 40, 40, 128, 128), 13.016e9, 99.7e6, 28.5e6, 0.219, 12.688e9, 33),
    "llama-3 8b": Row(Sizes(32, 4096, 14336, 32, 8, 128, 128), 8.030e9, 77.4e6, 18.4e6, 0.229, 6.979e9, 19),
    "qwen-2.5 7b": Row(Sizes(28, 3584, 18944, 28, 4, 128, 128), 7.616e9, 82.3e6, 14.1e6, 0.185, 6.525e9, 13),
    "qwen-2.5 14b": Row(Sizes(48, 5120, 13824, 40, 8, 128, 128), 14.770e9, 119.6e6, 34.2e6, 0.232, 13.212e9, 23),
    "phi-2": Row(Sizes(32, 2560, 10240, 32, 32, 80, 80, 2), 2.780e9, 53.6e6, 11.5e6, 0.413, 2.517e9, 33),
    "qwen-2.5 0.5b": Row(Sizes(24, 896, 4864, 14, 2, 64, 64), 0.494e9, 18.2e6, 3.13e6, 0.63, 0.358e9, 12),
    "smollm2 135m": Row(Sizes(30, 576, 1536, 9, 3, 64, 64), 0.1345e9, 8.7e6, 2.61e6, 1.9, 0.106e9, 25),
}


def shipped(sizes: Sizes, experts: int) -> int:
    """Parameters that the finished model carries beside the parent's: routers and attention gates."""
    gate = EMBEDDING * sizes.D + sizes.h * EMBEDDING + 3 * EMBEDDING
    return sizes.L * (sizes.D * experts + gate)


@pytest.mark.parametrize("name", ROWS)
def test_sizes_of_published_models(name: str) -> None:
    row = ROWS[name]
    assert row.sizes.trained(8) == pytest.approx(row.trained, abs=0.05e6)
    assert shipped(row.sizes, 8) == pytest.approx(row.shipped, rel=3e-3)
    assert 100 * shipped(row.sizes, 8) / row.parameters == pytest.approx(row.percent, rel=0.025)
    assert row.sizes.total == pytest.approx(row.total, rel=2e-3)
    attention = row.sizes.L * row.sizes.attention(row.sizes.h, row.sizes.h)
    assert round(100 * attention / row.sizes.total) == row.attention


def test_llama_2_7b_carries_what_the_paper_quotes() -> None:
    sizes = ROWS["llama-2 7b"].sizes
    assert shipped(sizes, 8) == 18_362_368
    assert 100 * shipped(sizes, 8) / 6.738e9 == pytest.approx(0.273, abs=5e-4)
    assert sizes.total == 6_476_005_376


def test_a_partial_rotation_leaves_more_entries_free() -> None:
    whole = ROWS["phi-2"].sizes
    phi = replace(whole, rotary=32)  # a head of 80 of which 32 turn
    assert (whole.static, phi.static) == (40, 64)
    assert phi.trained(8) - whole.trained(8) == 32 * 24 * 128
    assert shipped(phi, 8) == shipped(whole, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", [1, 8])
def test_real_masks_are_as_large_as_predicted(family: str, experts: int) -> None:
    parent = tiny_parent(family)
    sizes = Sizes.of(parent)
    masks = Masks(sizes, experts, spec_of(), seed=0)
    assert sum(p.numel() for p in masks.parameters()) == sizes.trained(experts)
    assert sum(p.numel() for p in masks.hyper.parameters()) == 37_632
    matrices = [p for n, p in parent.model.named_parameters() if ".layers." in n and p.dim() == 2]
    assert sizes.total == sum(p.numel() for p in matrices)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_finished_model_carries_as_much_as_predicted(family: str) -> None:
    parent = tiny_parent(family)
    carving = harvested(parent)
    gate = ("proj_in_RD", "norm_weight_R", "norm_bias_R", "base_R", "proj_out_hR")
    carried = sum(attention.tensors()[name].numel() for attention in carving.attention for name in gate)
    carried += sum(layer.router.weight_ED.numel() for layer in carving.layers)
    assert carried == shipped(Sizes.of(parent), 4)


def test_training_starts_dense() -> None:
    masks = Masks(Sizes(4, 32, 4096, 8, 2, 64, 64), 8, spec_of(), seed=0)
    masks.draw()
    logits = torch.stack([layer.logits() for layer in masks.ffn])
    assert float(logits.detach().std()) == pytest.approx(0.37, abs=0.05)
    kept = torch.cat([layer.sample().flatten() for layer in masks.ffn])
    assert 0.9999 < kept.mean() <= 1
    x_BSD = torch.randn(2, 200, 32)
    for attention in masks.attention:
        attention.read(x_BSD)
        assert attention.vo.shape == attention.qk.shape == (2, 200, 64)
        assert min(attention.vo.mean(), attention.qk.mean()) > 0.9999
        assert attention.width_vo == attention.width_qk == 64


def test_the_start_depends_on_the_seed_alone() -> None:
    sizes = Sizes(2, 32, 64, 4, 2, 8, 8)
    masks = []
    for seed, disturbance in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(disturbance)
        masks.append(Masks(sizes, 4, spec_of(), seed).state_dict())
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(disturbance)))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not torch.equal(masks[0]["hyper.z_MNI"], masks[2]["hyper.z_MNI"])


def test_golden_start() -> None:
    masks = Masks(Sizes(2, 32, 64, 4, 2, 8, 8), 4, spec_of(), seed=42)
    masks.draw()
    found = [masks.hyper().double().norm(), masks.ffn[1].logits().double().norm()]
    found += [masks.attention[0].static_logits().double().norm(), masks.ffn[0].router_ND.double().norm()]
    torch.testing.assert_close(
        torch.stack(found).detach(), torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-4, atol=0
    )


GOLDEN = [9.885946, 6.18189, 0.447281, 1.104355]  # norms of the embeddings, two sets of mask logits and a router


def test_layers_talk_to_each_other_and_experts_do_not() -> None:
    torch.manual_seed(0)
    hyper = Hypernetwork(6, 5)
    before = hyper()
    assert before.shape == (6, 5, 128)
    assert before.dtype == torch.float32
    with torch.no_grad():
        hyper.z_MNI[2, 3] += 1.0
    moved_MN = (hyper() - before).abs().amax(-1) > 0
    assert moved_MN[:, 3].all()
    assert not moved_MN[:, [0, 1, 2, 4]].any()


def test_experts_differ_because_their_inputs_do() -> None:
    hyper = Hypernetwork(4, 3)
    before = hyper()
    hyper.z_MNI = hyper.z_MNI[:, [2, 0, 1]]
    torch.testing.assert_close(hyper(), before[:, [2, 0, 1]])
    hyper.z_MNI = hyper.z_MNI[:, :1].expand(-1, 3, -1).contiguous()
    torch.testing.assert_close(hyper(), hyper()[:, :1].expand(-1, 3, -1))


def test_the_input_stays_fixed() -> None:
    masks = Masks(Sizes(2, 32, 64, 4, 2, 8, 8), 4, spec_of(), seed=0)
    assert "hyper.z_MNI" in masks.state_dict()
    assert not any("z_MNI" in name for name, _ in masks.named_parameters())


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_module_gets_its_own_position(attention: str) -> None:
    parent = tiny_parent("llama")
    masks = tiny_masks(parent, attention=attention)
    embeddings_MNR = masks.hyper()
    assert embeddings_MNR.shape == (4, 4, 128)
    for index, (ffn, gate) in enumerate(masks.layers()):
        assert torch.equal(ffn.embedding_NR, embeddings_MNR[2 * index + 1])
        if attention == "none":
            assert gate is None
        else:
            assert torch.equal(gate.embedding_NR, embeddings_MNR[2 * index])
            torch.testing.assert_close(gate.base(), embeddings_MNR[2 * index].mean(0))


def test_logits_are_the_published_formulas() -> None:
    """ToMoE's masks and attention gate (arXiv:2501.15316), written out."""
    parent = tiny_parent("phi")
    masks = tiny_masks(parent)
    ffn, gate = masks.layers()[1]
    gelu, x_BSD = torch.nn.functional.gelu, torch.randn(2, 5, parent.D)

    def norm(e: torch.Tensor, module: torch.nn.LayerNorm) -> torch.Tensor:
        spread = ((e - e.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (e - e.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * module.weight + module.bias

    torch.testing.assert_close(ffn.logits(), gelu(norm(ffn.embedding_NR, ffn.norm)) @ ffn.decoder_FR.T)
    mean_R = gate.embedding_NR.mean(0)
    inner = gelu(norm(mean_R + x_BSD @ gate.proj_in_RD.T, gate.norm))
    torch.testing.assert_close(gate.token_logits(x_BSD)[..., :8], inner @ gate.proj_out_WR[:8].T)
    torch.testing.assert_close(gate.static_logits(), gelu(norm(mean_R, gate.norm)) @ gate.proj_out_WR[8:].T)
    assert gate.static_logits().shape == (6,)  # 4 of 8 dimensions turn: two pairs and four more


@pytest.mark.parametrize("routing", ["sampled", "argmax"])
def test_routing_is_shaken_only_where_it_is_sampled(routing: str) -> None:
    parent = tiny_parent("llama")
    masks = tiny_masks(parent, routing=routing, spread=1.0)
    x_TD = torch.randn(200, parent.D)
    ffn: Any = masks.ffn[0]
    drawn = []
    for _ in range(2):
        ffn(x_TD, torch.ones(200, parent.F), False)
        drawn.append(ffn.one_hot_TN.argmax(-1))
    best_T = (x_TD @ ffn.router_ND.T).argmax(-1)
    assert bool((drawn[0] != drawn[1]).any()) is (routing == "sampled")
    assert bool(torch.equal(drawn[0], best_T)) is (routing == "argmax")
