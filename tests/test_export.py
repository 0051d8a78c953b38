"""Exports: the folder computes what the carving computes, and says so in the layout that others read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.activations import ACT2FN

from moesmith.errors import MoesmithError
from moesmith.export import folder as folders
from moesmith.export.native import write_native
from moesmith.export.stock.constant import constant_gain
from moesmith.export.stock.write import stock_reference, verify_folder, write_stock
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent, load_parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, LLAMA3_ROPE, STOCK, save_tiny, tiny_model, tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer

IDS = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def trained(parent: Parent, carving: Carving) -> Carving:
    """Give a carving LoRA updates and norms, as after training."""
    E, width, rank = carving.experts, int(carving.widths().max()), 3
    sizes = {"gate": (parent.D, width), "up": (parent.D, width), "down": (width, parent.D)}
    for layer in range(parent.L):
        for name, (inner, outer) in sizes.items():
            carving.lora[f"{layer}.{name}.A"] = 0.2 * torch.randn(E, rank, inner)
            carving.lora[f"{layer}.{name}.B"] = 0.2 * torch.randn(E, outer, rank)
    for name, p in parent.model.named_parameters():
        if "norm" in name:
            carving.norms[name] = p.detach() + 0.3 * torch.randn(p.shape)
    return carving


@pytest.mark.parametrize("form", ["top-1", "top-2 ragged refitted", "trained", "one expert"])
@pytest.mark.parametrize("family", STOCK)
def test_stock_folder_computes_the_carving(family: str, form: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    if form == "top-2 ragged refitted":
        carving = random_carving(parent, top_k=2, ragged=True, compensation="refit")
    elif form == "trained":
        carving = trained(parent, random_carving(parent, ragged=True))
    else:
        carving = random_carving(parent, experts=1 if form == "one expert" else 4)
    metrics = write_stock(parent, carving, tmp_path / "moe", torch.float32)
    difference = (logits_of(load(tmp_path / "moe")) - logits_of(build(parent, carving))).abs().max()
    assert difference <= 1e-4
    assert not torch.allclose(logits_of(parent.model), logits_of(build(parent, carving)), atol=0.1)
    metrics |= verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)
    assert metrics["logits_difference"] <= 1e-4
    assert metrics["argmax_agreement"] == 1.0
    assert metrics["compared_tokens"] == IDS.numel()
    assert metrics["expert_width"] == 32


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_bf16_parent_keeps_its_bits(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family, dtype=torch.bfloat16)
    carving = random_carving(parent)
    write_stock(parent, carving, tmp_path / "moe")
    model = load(tmp_path / "moe", torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    kept = carving.layers[1].routed[2].channels
    assert torch.equal(experts.gate_up_proj[2, :32], parent.ffns[1].gate_FD[kept])
    assert torch.equal(experts.gate_up_proj[2, 32:], parent.ffns[1].up_FD[kept])
    assert torch.equal(experts.down_proj[2], parent.ffns[1].down_DF[:, kept])
    assert model.config.dtype == torch.bfloat16
    before = {p.dtype for p in parent.model.parameters()}
    assert verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)["verified"] == "whole"
    assert {p.dtype for p in parent.model.parameters()} == before  # the reference shares them


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 rope, own head_dim, tied": ("llama3", {"tie_word_embeddings": True}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "max_position_embeddings": 64,
        },
    ),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen3 window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "phi3 window": ("phi3", {"sliding_window": 8}),
    "window unused": ("mistral", {"sliding_window": None}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "three layers, other eps and base": (
        "qwen3",
        {
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "all heads their own": ("mistral", {"num_key_value_heads": 4}),
}


# a stock architecture goes on with the keys of the short factors where Phi-3 computes them again
LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "long rope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
    ),
    "long rope as published": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", **{k: LONGROPE[k] for k in ("short_factor", "long_factor")}},
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_long_rope_goes_to_our_own_format(name: str, tmp_path: Path) -> None:
    family, overrides = LONG[name]
    parent = tiny_parent(family, **overrides)
    carving = random_carving(parent, top_k=2)
    with pytest.raises(MoesmithError, match=r"once a text outgrows 16 tokens .*Write the native format"):
        write_stock(parent, carving, tmp_path / "moe", torch.float32)
    write_native(parent, carving, tmp_path / "native")
    model, ours = load(tmp_path / "native"), build(parent, carving)
    assert (logits_of(model) - logits_of(ours)).abs().max() <= 1e-4
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1, :8], **options), ours.generate(IDS[:1, :8], **options))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family_survive(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    parent = tiny_parent(family, **overrides)
    carving = random_carving(parent, top_k=2)
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    assert (logits_of(load(tmp_path / "moe")) - logits_of(build(parent, carving))).abs().max() <= 1e-4


def test_config_carries_what_attention_needs(tmp_path: Path) -> None:
    parent = tiny_parent("llama3")
    write_stock(parent, random_carving(parent, top_k=2), tmp_path / "moe", torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert config.architectures == ["MixtralForCausalLM"]
    assert config.rope_parameters == LLAMA3_ROPE
    assert (config.head_dim, config.num_local_experts, config.num_experts_per_tok) == (16, 4, 2)
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (0, 1, 512)
    # readers older than transformers 5 look here, and would use defaults without a word
    raw = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert raw["rope_theta"] == 10000.0
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    parent = tiny_parent("qwen3")
    write_stock(parent, random_carving(parent), tmp_path / "qwen3", torch.float32)
    assert json.loads((tmp_path / "qwen3" / "config.json").read_text())["num_experts"] == 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_tied_stays_tied(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    write_stock(parent, random_carving(parent), tmp_path / "moe", torch.float32)
    tied, model = family != "mistral", load(tmp_path / "moe")
    assert ("lm_head.weight" in names_in(tmp_path / "moe")) is not tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


EXPERT_TENSORS = {
    "llama": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "qwen2": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    "qwen3": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}


@pytest.mark.parametrize("family", EXPERT_TENSORS)
def test_one_tensor_per_expert_padded_with_zeros(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving = random_carving(parent, kept=36, ragged=True)
    metrics = write_stock(parent, carving, tmp_path / "moe", torch.float32)
    assert metrics["expert_width"] == 64
    assert metrics["zero_channels"] == pytest.approx(1 - 34.5 / 64, abs=1e-4)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    assert metrics["bytes"] == sum(t.nbytes for t in tensors.values())
    for layer in range(parent.L):
        for expert, kept in enumerate(e.channels for e in carving.layers[layer].routed):
            parts = [tensors[f"model.layers.{layer}.{n.format(expert)}.weight"] for n in EXPERT_TENSORS[family]]
            parts[2], ffn = parts[2].T, parent.ffns[layer]
            for part, dense in zip(parts, (ffn.gate_FD, ffn.up_FD, ffn.down_DF.T), strict=True):
                assert part.shape == (64, 32)
                assert torch.equal(part[: len(kept)], dense[kept])
                assert not part[len(kept) :].any()
    assert not any("gate_up_proj" in name for name in tensors)


def test_companions_survive(tmp_path: Path) -> None:
    parent = load_parent(str(save_tiny("qwen3", tmp_path / "dense")), torch.float32)
    write_stock(parent, random_carving(parent), tmp_path / "moe", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    chat = [{"role": "user", "content": "The quick fox"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == tiny_tokenizer().apply_chat_template(chat, tokenize=False)
    assert tokenizer("def add").input_ids == tiny_tokenizer()("def add").input_ids
    generation = GenerationConfig.from_pretrained(tmp_path / "moe")
    assert (generation.temperature, generation.do_sample) == (0.7, True)
    assert load(tmp_path / "moe").generate(IDS[:1], max_new_tokens=3).shape == (1, 27)


# --- the constant channel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_constant_channel_errs_in_second_order(name: str) -> None:
    gain, act = constant_gain(name), ACT2FN[name]
    s = torch.tensor([0.9, 0.95, 1.0, 1.05, 1.1], dtype=torch.float64)
    channel = s * act(gain * s) / act(torch.tensor(gain, dtype=torch.float64))
    assert channel[2] == 1
    assert (channel - 1).abs().max() < 0.02  # where s itself errs by 0.1
    assert (channel[[1, 3]] - 1).abs().max() < 0.005  # by 0.05


def with_constant(parent: Parent, carving: Carving) -> Carving:
    for layer in carving.layers:
        layer.constant_D = torch.randn(parent.D) / parent.D
    return carving


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bias_becomes_a_channel(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving = with_constant(parent, random_carving(parent, top_k=2, compensation="bias", ragged=True))
    metrics = write_stock(parent, carving, tmp_path / "moe", torch.float32)
    assert metrics["expert_width"] == 64  # 32 kept and the channel
    metrics = verify_folder(parent, tmp_path / "moe", stock_reference(parent, carving), IDS)
    assert metrics["logits_difference"] < 1e-4
    loose = verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)  # measured, not judged
    assert loose["logits_kl"] > metrics["logits_kl"]


def test_channel_replaces_the_bias_where_the_direction_is_constant(tmp_path: Path) -> None:
    # a large common offset in the embedding, and a huge last weight of the norm: v·x is 1 up to a few percent
    model = tiny_model("mistral")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p[0] = 0.0
    parent = Parent.from_model(model, tiny_tokenizer())
    carving = random_carving(parent, compensation="bias")
    seen: list[Tensor] = []
    handles = [f.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for f in parent.ffns]
    logits_of(parent.model)
    for handle in handles:
        handle.remove()
    for layer, x in zip(carving.layers, seen, strict=True):
        x_TD = x.flatten(0, 1).double()
        layer.constant_D = (
            torch.linalg.lstsq(x_TD, torch.ones(len(x_TD), 1, dtype=torch.float64)).solution[:, 0].float()
        )
        assert ((x_TD @ layer.constant_D.double() - 1) ** 2).mean() < 0.01
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    channel = verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)["logits_kl"]
    exact, without = logits_of(build(parent, carving)), random_carving(parent, compensation="bias")
    for layer in without.layers:
        for expert in layer.routed:
            expert.bias_D = None
    dropped = logits_of(build(parent, without))
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - dropped.log_softmax(-1))).sum(-1).mean()
    assert channel < 0.01 * kl


def test_bias_without_a_direction_is_refused(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    with pytest.raises(
        MoesmithError, match=r"no constant direction for it\. Set carve\.compensation to refit\. Write the native"
    ):
        write_stock(parent, random_carving(parent, compensation="bias"), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


# --- whole or not at all, and verified -----------------------------------------------------------------------


def test_gate_of_another_kind_is_refused(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent, top_k=2)
    carving.layers[1].top_k = 1
    with pytest.raises(MoesmithError, match=r"4 \(top-1\) and 4 \(top-2\) experts"):
        write_stock(parent, carving, tmp_path / "moe")
    carving.layers[1] = replace(carving.layers[0], router=Analytic(torch.tensor([1, 2, 3, 4])))
    with pytest.raises(MoesmithError, match="Layer 1 routes by what its channels compute"):
        write_stock(parent, carving, tmp_path / "moe")


def test_failed_write_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_parent("llama")
    write_stock(parent, random_carving(parent), tmp_path / "moe", torch.float32)
    before = {p.name: p.read_bytes() for p in (tmp_path / "moe").iterdir()}

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_tensors", full)
    for target in ("moe", "other"):
        with pytest.raises(MoesmithError, match="No space left"):
            write_stock(parent, random_carving(parent, seed=1), tmp_path / target, torch.float32, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "moe").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]
    monkeypatch.undo()
    with pytest.raises(MoesmithError, match=r"moe exists\. Give --overwrite"):
        write_stock(parent, random_carving(parent, seed=1), tmp_path / "moe", torch.float32)
    write_stock(parent, random_carving(parent, seed=1), tmp_path / "moe", torch.float32, overwrite=True)
    assert (tmp_path / "moe" / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(MoesmithError, match="holds something else"):
        write_stock(parent, random_carving(parent), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 60_000)
    parent = tiny_parent("qwen2")
    carving = random_carving(parent)
    metrics = write_stock(parent, carving, tmp_path / "moe", torch.float32)
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == metrics["bytes"]
    assert {tmp_path / "moe" / name for name in index["weight_map"].values()} == set(files)
    verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)


SPOILT = {
    "model.layers.1.self_attn.k_proj.weight": lambda t: t * 1.02,
    "model.layers.0.block_sparse_moe.gate.weight": lambda t: t.flip(0),
    "model.layers.1.block_sparse_moe.experts.2.w1.weight": lambda t: t.roll(1, 0),
    "model.norm.weight": None,
}


@pytest.mark.parametrize("name", SPOILT)
def test_folder_that_disagrees(name: str, tmp_path: Path) -> None:
    parent = tiny_parent("llama3")
    carving = random_carving(parent)
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    path = tmp_path / "moe" / "model.safetensors"
    tensors, spoil = load_file(path), SPOILT[name]
    old = tensors.pop(name)
    if spoil is not None:
        tensors[name] = spoil(old).contiguous()
    save_file(tensors, path, {"format": "pt"})
    reason = "does not compute what the carving computes" if spoil else r"missing tensors model\.norm\.weight"
    with pytest.raises(MoesmithError, match=reason):
        verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)


def test_one_near_tie_of_a_router_is_not_a_disagreement(tmp_path: Path) -> None:
    parent = tiny_parent("llama3")
    carving = random_carving(parent)
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    reference = build(parent, carving)
    router, flipped = reference.model.layers[1].mlp.router, IDS.shape[1] + 20  # second row, token 20

    def flip(_module: Any, _args: Any, out: Any) -> Any:
        logits, weights, ids = out
        ids = ids.clone()
        ids[flipped] = (ids[flipped] + 1) % 4
        return logits, weights, ids

    router.register_forward_hook(flip)
    metrics = verify_folder(parent, tmp_path / "moe", reference, IDS)
    assert metrics["compared_tokens"] == IDS.numel() - 4
    assert metrics["logits_difference"] < 1e-4


# --- moesmith's own format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_format_is_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    parent = tiny_parent(family, dtype=dtype)
    carving = random_carving(parent, top_k=2, compensation="bias", ragged=True, noise=True)
    for expert in carving.layers[1].routed:  # layers of different width
        expert.channels = expert.channels[:20]
    write_native(parent, carving, tmp_path / "moe")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = build(parent, carving)
    assert torch.equal(logits_of(model.eval()), logits_of(reference))
    tied = parent.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], **greedy), reference.generate(IDS[:1], **greedy))
    assert torch.equal(model.base_model(IDS).last_hidden_state, reference.base_model(IDS).last_hidden_state)
    assert model.config.vocab_size == 300
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again", dtype)), logits_of(reference))
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").chat_template


@pytest.mark.parametrize("compensation", ["bias", "refit"])
def test_native_model_trains(compensation: str, tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    write_native(parent, random_carving(parent, compensation=compensation), tmp_path / "moe")
    model = load(tmp_path / "moe").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    experts = model.inner.model.layers[0].mlp.experts
    names = {"bias": {"gate_UD", "up_UD", "down_DU", "bias_ED"}, "refit": {"gate_up_proj", "down_proj"}}
    found = dict(experts.named_parameters())
    assert found.keys() == names[compensation]
    assert all(p.grad is not None and p.grad.any() for p in found.values())


@pytest.mark.slow
def test_real_parent_round_trip(tmp_path: Path) -> None:
    parent = load_parent("smollm2-135m")
    carving = random_carving(parent, experts=8, compensation="none")
    for layer in carving.layers:
        layer.router.weight_ED /= 4
    write_stock(parent, carving, tmp_path / "moe")
    metrics = verify_folder(parent, tmp_path / "moe", build(parent, carving), torch.randint(40000, (2, 64)))
    assert metrics["verified"] == "whole"
