"""Masks over the head dimension: the rotation's pairs, the scale of scores, and what a gate keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesmith.export.native import write_native
from moesmith.mixture.attention import CarvedAttention, GatedLinear, install, narrowed, rotary_width, zeroed
from moesmith.native.heads import HeadGate, PrunedAttention, expand_pairs, keep
from moesmith.parent.layerwise import share
from moesmith.parent.sizes import Sizes
from moesmith.parent.structure import attention_of, attention_weights, decoder_layers, head_dim
from moesmith.testing.masks import harvested, tiny_masks
from moesmith.testing.parents import FAMILIES, tiny_model, tiny_parent

S, H = 12, 16


def rotated(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotate-half convention, written out: dimensions i and i + r/2 are one plane; what lies behind stays."""
    turning = cos.shape[-1]
    y, rest = y[..., :turning], y[..., turning:]
    first, second = y[..., : turning // 2], y[..., turning // 2 :]
    return torch.cat([y * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def angles(rotary: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(S)[:, None] * 100.0 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def in_order(q: Tensor, k: Tensor) -> Tensor:
    """Scores summed one dimension after the other, so that zeros change no bit."""
    scores = torch.zeros(len(q), len(k))
    for i in range(q.shape[-1]):
        scores += q[:, None, i] * k[None, :, i]
    return scores


@pytest.mark.parametrize("rotary", [16, 8])
def test_slicing_is_masking_to_the_last_bit(rotary: int) -> None:
    (q, k), (cos, sin) = torch.randn(2, S, H), angles(rotary)
    free = torch.rand(H - rotary // 2) < 0.5
    mask = expand_pairs(free, H, rotary)
    assert 0 < mask.sum() < H
    assert torch.equal(mask[: rotary // 2], mask[rotary // 2 : rotary])
    kept = mask.nonzero()[:, 0]
    pairs = int(mask[: rotary // 2].sum())
    attention = SimpleNamespace(pairs=pairs)
    turning = kept[: 2 * pairs]
    parts = [(rotated(y * mask, cos, sin), y[..., kept]) for y in (q, k)]
    sliced = [PrunedAttention._rotate(attention, y, cos[:, turning], sin[:, turning]) for _, y in parts]  # type: ignore[arg-type]
    for (masked, _), narrow in zip(parts, sliced, strict=True):
        assert torch.equal(masked[..., kept], narrow)
        assert not masked[..., ~mask].any()
    scores = in_order(parts[0][0], parts[1][0])
    assert (scores - in_order(*sliced)).abs().max() == 0.0
    assert not torch.allclose(scores, in_order(rotated(q, cos, sin), rotated(k, cos, sin)), atol=0.1)


@pytest.mark.parametrize("rotary", [16, 8])
def test_only_paired_masks_commute_with_the_rotation(rotary: int) -> None:
    q, (cos, sin) = torch.randn(S, H), angles(rotary)
    paired = expand_pairs(torch.arange(H - rotary // 2) % 2 == 0, H, rotary)
    assert torch.equal(rotated(q * paired, cos, sin), rotated(q, cos, sin) * paired)
    unpaired = paired.clone()
    unpaired[0] = ~unpaired[0]
    assert not torch.allclose(rotated(q * unpaired, cos, sin), rotated(q, cos, sin) * unpaired, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_those_of_the_models_own_rotation(family: str) -> None:
    """Turn one dimension of a head: the model moves it into its partner's place and nowhere else."""
    model = tiny_model(family)
    h, rotary = head_dim(model.config), rotary_width(model.config)
    assert rotary == (h // 2 if family == "phi" else h)
    turning, *_ = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    cos, sin = turning(torch.zeros(1, 4, h), torch.arange(4)[None])
    assert cos.shape[-1] == rotary
    for i in range(h):
        moved = rotated(torch.eye(h)[i].expand(4, h), cos[0], sin[0]).abs().amax(0) > 1e-6
        partner = i if i >= rotary else (i + rotary // 2) % rotary
        assert set(moved.nonzero()[:, 0].tolist()) == {i, partner}
        entries = expand_pairs(torch.arange(h - rotary // 2), h, rotary)
        assert entries[i] == entries[partner]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_scores_keep_the_scale_of_the_whole_head(family: str, tmp_path: Any) -> None:
    parent = tiny_parent(family)
    carving = harvested(parent, budget=0.5)
    write_native(parent, carving, tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    pruned, h = [m for m in model.modules() if isinstance(m, PrunedAttention)], head_dim(parent.config)
    assert [m.scaling for m in pruned] == [h**-0.5] * 2
    ids = torch.randint(300, (2, 24))
    with torch.no_grad():
        right = model(ids).logits
        for module in pruned:
            assert module.q_proj.out_features < module.config.num_attention_heads * h
            module.scaling = (module.q_proj.out_features // module.config.num_attention_heads) ** -0.5
        assert (model(ids).logits - right).abs().max() > 0.01 * right.std()


def test_keep_is_a_threshold_with_a_ceiling_and_a_floor() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0], [-3.0, -1.0, -2.0, -4.0], [5.0, 4.0, 3.0, 2.0]])
    kept = keep(logits, torch.tensor(0.5), 3)
    assert kept.tolist() == [[True, True, True, False], [False, True, False, False], [True, True, True, False]]
    assert keep(logits, torch.tensor(0.5), 2).sum(-1).tolist() == [2, 1, 2]
    assert keep(logits, torch.tensor(2.0), 4).sum(-1).tolist() == [2, 1, 4]  # a logit at the threshold is kept


def gated(family: str, **settings: Any) -> tuple[Any, Any, Any, Tensor]:
    """A tiny attention with sampled masks installed, the parent's own, its gate, and an input."""
    parent = tiny_parent(family)
    gate = tiny_masks(parent, bias=0.0, **settings).attention[0]
    layer = decoder_layers(share(parent.model))[1][0]
    install(layer, parent.config, gate)
    x_BSD = torch.randn(2, 5, parent.D)
    gate.read(x_BSD)
    return attention_of(layer), attention_of(decoder_layers(parent.model)[1][0]), gate, x_BSD


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "phi"])
@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_masks_multiply_every_head_of_the_projections(family: str, attention: str) -> None:
    masked, plain, gate, x_BSD = gated(family, attention=attention)
    assert gate.qk.shape == gate.vo.shape == (2, 5, 8)
    names = ("qkv_proj",) if family == "phi3" else ("q_proj", "k_proj", "v_proj")
    found, whole = (torch.cat([getattr(m, n)(x_BSD) for n in names], -1) for m in (masked, plain))
    for head in range(8):  # 4 of queries, 2 of keys, 2 of values
        mask = gate.qk if head < 6 else gate.vo
        here = slice(8 * head, 8 * head + 8)
        assert torch.equal(found[..., here], whole[..., here] * mask)
    assert 0.1 < (found == 0).float().mean() < 0.9
    assert len(gate.qk.flatten(0, 1).unique(dim=0)) > 1  # hybrid: the noise of the shared mask is drawn by token


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("output_mask", [True, False])
def test_the_output_projection_sees_the_query_tokens_mask(family: str, output_mask: bool) -> None:
    masked, plain, gate, _ = gated(family, output_mask=output_mask)
    out, original = (m.dense if family == "phi" else m.o_proj for m in (masked, plain))
    mixed = torch.randn(2, 5, 32)
    wanted = (mixed.view(2, 5, 4, 8) * gate.vo[:, :, None]).flatten(-2) if output_mask else mixed
    assert torch.equal(out(mixed), original(wanted))
    gate.vo = torch.ones_like(gate.vo)
    assert torch.equal(out(mixed), original(mixed))


def test_hybrid_masks_of_queries_and_keys_are_one_for_all_tokens_without_noise_by_token() -> None:
    _, _, gate, _ = gated("llama", noise="expert")
    assert gate.qk.shape == (8,)
    assert gate.vo.shape == (2, 5, 8)
    assert torch.equal(gate.qk[:4], gate.qk[4:])
    assert gate.width_qk == gate.qk.sum()
    assert gate.width_vo == gate.vo.sum(-1).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_projections_are_the_nonzero_rows_of_the_masked_ones(family: str) -> None:
    parent = tiny_parent(family)
    h = head_dim(parent.config)
    qk = expand_pairs(torch.arange(Sizes.of(parent).static) % 3 != 1, h, rotary_width(parent.config))
    carved = CarvedAttention(qk_h=qk, vo_h=torch.arange(h) % 4 != 2)
    for name, tensor in attention_weights(decoder_layers(parent.model)[1][1], parent.config).items():
        if "norm" in name or name == "o_proj.bias":
            assert torch.equal(zeroed(name, tensor, carved), tensor)
            continue
        narrow, zeros = narrowed(name, tensor, carved), zeroed(name, tensor, carved)
        axis = 1 if name == "o_proj.weight" else 0
        mask = (carved.qk_h if name[0] in "qk" else carved.vo_h).repeat(tensor.shape[axis] // h)
        assert torch.equal(narrow, tensor.index_select(axis, mask.nonzero()[:, 0]))
        assert torch.equal(zeros.index_select(axis, mask.nonzero()[:, 0]), narrow)
        assert not zeros.index_select(axis, (~mask).nonzero()[:, 0]).any()
        assert zeros.shape == tensor.shape


def test_widths_of_a_carved_attention() -> None:
    carved = CarvedAttention(torch.tensor([True, False, True, False, True, True]), torch.arange(6) > 0)
    assert (carved.width_qk, carved.width_vo) == (4, 5)
    rows = torch.zeros(4, 128)  # 6 dimensions, two pairs and two single: 4 free entries
    for entries, width in ((1, 2), (2, 4), (3, 5), (4, 6)):
        dynamic = CarvedAttention(
            torch.ones(6, dtype=torch.bool), carved.vo_h, top_k=torch.tensor(3),
            dynamic_WR=rows, top_k_qk=torch.tensor(entries),
        )  # fmt: skip
        assert (dynamic.width_qk, dynamic.width_vo) == (width, 3)
    assert CarvedAttention(**carved.tensors()).tensors().keys() == {"qk_h", "vo_h"}


def test_a_gate_reads_one_token_as_it_reads_many() -> None:
    parent = tiny_parent("llama")
    gate = HeadGate(harvested(parent).attention[1].tensors())
    x_BSD = torch.randn(1, 9, parent.D)
    gate.read(x_BSD)
    whole = gate.vo
    assert 0 < whole.mean() < 1
    for position in range(9):
        gate.read(x_BSD[:, position : position + 1])
        assert torch.equal(gate.vo[:, 0], whole[:, position])


def test_a_gated_projection_under_an_open_mask_is_the_projection() -> None:
    linear, gate = nn.Linear(8, 8), SimpleNamespace(qk=torch.ones(4))
    x = torch.randn(2, 3, 8)
    assert torch.equal(GatedLinear(linear, gate, [("qk", 8)], 4)(x), linear(x))  # type: ignore[arg-type]
