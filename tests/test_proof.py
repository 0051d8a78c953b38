"""The proof: far positions, cached generation, neutral fields, and kernels that widths must suit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert
from transformers import AutoModelForCausalLM, GraniteConfig, Ministral3Config

from moesmith.errors import MoesmithError
from moesmith.export.native import write_native
from moesmith.export.stock.write import write_stock
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.proof.positions import text_to_compare
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, STOCK, save_tiny, tiny_model, tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
PHI3_LONG: dict[str, Any] = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "phi3 longrope": ("phi3", PHI3_LONG),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "qwen3 window": ("qwen3", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}),
}


@pytest.mark.parametrize("name", KINDS)
def test_experts_that_keep_everything_are_the_parent_at_any_length(name: str, tmp_path: Path) -> None:
    family, overrides = KINDS[name]
    parent = tiny_parent(family, **overrides)
    layers = [Layer.of([torch.arange(parent.F)] * 2, torch.zeros(2, parent.D)) for _ in range(parent.L)]
    carving = Carving(layers, parent.F)
    if parent.family == "native":
        write_native(parent, carving, tmp_path / "moe")
    else:
        write_stock(parent, carving, tmp_path / "moe", torch.float32)
    moe: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    for length in (16, 96, 200):
        ids = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            torch.testing.assert_close(moe(ids).logits, parent.model(ids).logits, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(moe.generate(ids[:, :30], **options), parent.model.generate(ids[:, :30], **options))


def test_a_temperature_by_position_is_named() -> None:
    model = AutoModelForCausalLM.from_config(Ministral3Config(**SMALL, head_dim=16, rope_parameters=YARN))
    says = r"attention at position \d+ .*llama_4_scaling_beta, which they do not read"
    parent = Parent.from_model(model.eval(), tiny_tokenizer())
    assert parent.family == NATIVE  # its own code reads it
    assert re.search(says, parent.why)


def _bend_scale(attention: Any, start: int) -> None:
    """Scores halve from a position on."""
    inner, scale = attention.forward, attention.scaling

    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        far = past is not None and past.get_seq_length(attention.layer_idx) >= start
        attention.scaling = scale / 2 if far else scale
        return inner(hidden_states, *args, **kwargs)

    attention.forward = forward


@pytest.mark.parametrize("layer", [0, -1])
def test_what_happens_in_the_cache_only_is_seen(layer: int) -> None:
    model: Any = tiny_model("llama")
    _bend_scale(model.model.layers[layer].self_attn, 16)
    with pytest.raises(MoesmithError, match=r"attention at position \d+ of its context differs"):
        Parent.from_model(model, tiny_tokenizer())


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_is_seen(off: int) -> None:
    model: Any = tiny_model("mistral", sliding_window=100)
    assert Parent.from_model(model, tiny_tokenizer()).family == "mixtral"
    # the decoder that makes the masks has another config than the model that says what it is
    model.model.config = type(model.config)(**model.config.to_dict() | {"sliding_window": 100 + off})
    with pytest.raises(MoesmithError, match=r"attention at position \d+"):
        Parent.from_model(model, tiny_tokenizer())


def test_rotations_are_not_taken_from_the_parent() -> None:
    model: Any = tiny_model("llama3")
    model.model.rotary_emb.inv_freq.mul_(1.01)
    with pytest.raises(MoesmithError, match=r"rotary positions \(llama3\) differ"):
        Parent.from_model(model, tiny_tokenizer())
    rounded = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(MoesmithError, match=r"rotary positions .*give dtype= when you load it"):
        Parent.from_model(rounded, tiny_tokenizer())


def granite(**fields: float) -> Parent:
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, **fields), dtype=torch.float32)
    return Parent.from_model(model.eval(), tiny_tokenizer())


def test_the_neutral_scale_of_scores_is_that_of_the_head() -> None:
    assert granite(attention_multiplier=8**-0.5).family == "mixtral"
    other = granite(attention_multiplier=1.0)
    assert (other.family, "attention_multiplier = 1.0" in other.why) == (NATIVE, True)


@pytest.mark.parametrize("field", ["residual_multiplier", "embedding_multiplier", "logits_scaling"])
def test_other_multipliers_are_neutral_at_one(field: str) -> None:
    assert granite(attention_multiplier=8**-0.5, **{field: 1.0}).family == "mixtral"
    other = granite(attention_multiplier=8**-0.5, **{field: 1.5})
    assert (other.family, f"{field} = 1.5" in other.why) == (NATIVE, True)


def test_a_window_that_only_the_cache_reads_is_refused() -> None:
    with pytest.raises(MoesmithError, match=r"sliding_window = 8, .*Remove sliding_window from config\.json"):
        tiny_parent("llama", sliding_window=8)
    assert tiny_parent("llama", sliding_window=512).family == "mixtral"  # as long as the context


def test_fields_that_nobody_reads_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_parent("llama").family == "mixtral"
    assert "nothing reads" not in "".join(capsys.readouterr())
    tiny_parent("llama", scale_emb=12)
    assert "nothing reads scale_emb in its config" in "".join(capsys.readouterr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", STOCK)
def test_widths_that_the_grouped_kernel_refuses(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    parent = tiny_parent(family, hidden_size=30, num_attention_heads=3, num_key_value_heads=1, head_dim=10)
    write_stock(parent, random_carving(parent), tmp_path / "moe", torch.float32)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["experts_implementation"] == "eager"
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=dtype)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)
    even = tiny_parent(family)
    write_stock(even, random_carving(even), tmp_path / "even", torch.float32)
    assert "experts_implementation" not in json.loads((tmp_path / "even" / "config.json").read_text())


def test_an_odd_width_is_converted(home: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", hidden_size=30, num_attention_heads=3, num_key_value_heads=1)
    run = convert("dive-plus", tmp_path / "m", home / "d", tmp_path / "run")
    model: Any = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_tomoe_on_long_rope(home: Path, tmp_path: Path) -> None:
    save_tiny("phi3", tmp_path / "m", **PHI3_LONG)
    run = convert("tomoe-60", tmp_path / "m", home / "d", tmp_path / "run")
    model: Any = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    assert model.config.head_dim == 8
    ids = torch.randint(2, 300, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        short = model(ids[:, :60]).logits
    assert (whole[:, :60] - short).abs().max() > 1e-2  # beyond 64 tokens all positions turn with the long factors
    assert model.generate(ids[:, :60], max_new_tokens=10, do_sample=False, eos_token_id=None).shape == (1, 70)


@pytest.mark.parametrize(
    ("family", "overrides", "length"),
    [
        ("llama", {}, 256),
        ("llama", {"max_position_embeddings": 64}, 64),
        ("mistral", {"sliding_window": 300}, 316),
        ("phi3", PHI3_LONG, 256),
    ],
)
def test_exports_are_compared_beyond_every_limit(family: str, overrides: dict[str, Any], length: int) -> None:
    blocks = torch.arange(1024).view(8, 128)
    ids = text_to_compare(tiny_model(family, **overrides).config, blocks)
    assert ids.shape == (max(1, 512 // length), length)
    assert torch.equal(ids.flatten(), torch.arange(ids.numel()))
