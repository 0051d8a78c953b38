"""A GGUF parent is the folder's model to the last bit and llama.cpp's, or it is refused by the name of what is odd."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import BASE, changed, tiny_gguf

import moesmith.parent.gguf.load as parent_module
import moesmith.parent.gguf.proof as proof_module
from moesmith.errors import MoesmithError
from moesmith.export.gguf.converter import NAME
from moesmith.parent.gguf.load import load_gguf
from moesmith.parent.gguf.rope import _divisor, llama3
from moesmith.parent.load import load_parent
from moesmith.testing.parents import LLAMA3_ROPE, tiny_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("conversion")

YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = BASE | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 256,
}
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "linear": ("llama", {"rope_parameters": BASE | {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3-wide-heads": ("llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "head_dim": 16}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {"vocab_size": 320}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "phi3-window": (
        "phi3",
        {"rope_parameters": BASE | {"original_max_position_embeddings": 512}, "sliding_window": 24},
    ),
}


def logits(model: Any, length: int) -> torch.Tensor:
    """Of a fixed random text."""
    ids = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SAME)
def test_equal_to_the_folder_and_to_llamacpp(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, overrides = SAME[name]
    file = tiny_gguf(family, tmp_path / "a.gguf", monkeypatch, **overrides)
    folder, parent = load_parent(str(tmp_path / "a"), torch.float32), load_parent(str(file), torch.float32)
    for length in (20, 100, 300):  # beyond the window, and beyond every original context
        assert torch.equal(logits(folder.model, length), logits(parent.model, length))
    assert parent.family == folder.family


def test_no_window_is_in_the_file_of_a_mistral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its converter writes none, and llama.cpp computes none; the file's model is what llama.cpp makes of it."""
    file = tiny_gguf("mistral", tmp_path / "mistral.gguf", monkeypatch)
    folder, parent = load_parent(str(tmp_path / "mistral"), torch.float32), load_parent(str(file), torch.float32)
    assert torch.equal(logits(folder.model, 8), logits(parent.model, 8))
    assert not torch.allclose(logits(folder.model, 20), logits(parent.model, 20))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a setting": ({"llama.logit_scale": 0.5}, r"the key llama\.logit_scale = 0\.5"),
    "a scale": ({"llama.attention.scale": 0.5}, r"the key llama\.attention\.scale = 0\.5"),
    "softcap": ({"llama.final_logit_softcapping": 30.0}, r"the key llama\.final_logit_softcapping = 30"),
    "a window": ({"llama.attention.sliding_window": 16}, r"the key llama\.attention\.sliding_window = 16"),
    "no causality": ({"llama.attention.causal": False}, r"the key llama\.attention\.causal = False"),
    "a key of the future": ({"llama.attention.frobnicate": 1}, r"the key llama\.attention\.frobnicate = 1"),
    "a stranger": ({"adapter.lora.alpha": 1.0}, r"the key adapter\.lora\.alpha = 1\.0"),
    "rotation of a part": (
        {"llama.rope.dimension_count": 4},
        r"llama\.rope\.dimension_count = 4 where heads are 8 wide",
    ),
    "a scaling of the future": ({"llama.rope.scaling.type": "warp"}, r"the key llama\.rope\.scaling\.type = warp"),
    "layers that differ": ({"llama.attention.head_count_kv": [2, 1]}, r"layers that differ: llama\.attention\.head"),
    "yarn's betas": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "llama.rope.scaling.yarn_beta_fast": 8.0},
        r"the key llama\.rope\.scaling\.yarn_beta_fast = 8",
    ),
    "an adapter": ({"general.type": "adapter"}, "is a file of the type 'adapter', not a model"),
    "a part": ({"split.count": 2}, "is one of 2 parts of a model.*Join them"),
    "another architecture": ({"llama.context_length": None}, r"has no key llama\.context_length"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's file."""
    with pytest.MonkeyPatch.context() as patch:
        return tiny_gguf("llama", tmp_path_factory.mktemp("plain") / "plain.gguf", patch)


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_is_not_understood_is_refused(name: str, plain: Path, tmp_path: Path) -> None:
    keys, says = REFUSED[name]
    with pytest.raises(MoesmithError, match=says) as error:
        load_gguf(changed(plain, tmp_path / "x.gguf", keys), torch.float32)
    assert "\n" not in str(error.value)


LONG = np.array([1.5, 2, 4, 8], np.float32)
READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # keys and tensors; llama.cpp is the judge
    "yarn with a factor": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.attn_factor": 1.25,
        },
        {},
    ),
    "a factor without a type": ({"llama.rope.scaling.factor": 2.0}, {}),
    "an old factor": ({"llama.rope.scale_linear": 4.0}, {}),
    "no scaling, whatever its factor": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, {}),
    "longrope": (
        {
            "llama.rope.scaling.type": "longrope",
            "llama.rope.scaling.original_context_length": 256,
            "llama.rope.scaling.attn_factor": 1.1,
        },
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": np.sqrt(LONG)},
    ),
    "no base": ({"llama.rope.freq_base": None}, {}),
    "another base and eps": ({"llama.rope.freq_base": 500.0, "llama.attention.layer_norm_rms_epsilon": 0.01}, {}),
    "divisors of one": ({}, {"rope_freqs.weight": np.ones(4, np.float32)}),
    "neutral settings": ({"llama.attention.scale": 8**-0.5, "llama.attention.causal": True}, {}),
}


@pytest.mark.parametrize("name", READ)
def test_a_key_is_read_as_llamacpp_reads_it(name: str, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    keys, tensors = READ[name]
    load_gguf(changed(plain, tmp_path / "x.gguf", keys, extra=tensors), torch.float32)


def test_a_tensor_that_is_not_understood_or_missing_is_refused(plain: Path, tmp_path: Path) -> None:
    for name in ("blk.1.attn_q.scale", "blk.0.attn_q.bias", "blk.2.ffn_up.weight", "rope_factors_long.weight"):
        file = changed(plain, tmp_path / "x.gguf", extra={name: np.ones(4, np.float32)})
        with pytest.raises(MoesmithError, match=rope_or(name)):
            load_gguf(file, torch.float32)
    file = changed(plain, tmp_path / "x.gguf", edit=lambda name, x: None if name == "blk.1.ffn_up.weight" else x)
    with pytest.raises(MoesmithError, match=r"lacks the tensor blk\.1\.ffn_up\.weight"):
        load_gguf(file, torch.float32)
    file = changed(plain, tmp_path / "x.gguf", extra={"rope_freqs.weight": np.array([1, 3, 1, 2], np.float32)})
    with pytest.raises(MoesmithError, match=r"rope_freqs\.weight, whose divisors are not"):
        load_gguf(file, torch.float32)


def rope_or(name: str) -> str:
    return r"lacks rope_factors_long" if "rope" in name else rf"has the tensor {name}".replace(".", r"\.")


@pytest.mark.parametrize(
    ("width", "theta", "factor", "original", "high"),
    [
        (64, 5e5, 32.0, 8192, 4.0),
        (128, 5e5, 8.0, 8192, 4.0),
        (64, 1e4, 4.0, 3000, 2.5),
        (16, 1e4, 8.0, 64, 4.0),
        (8, 1e4, 8.0, 64, 4.0),
        (8, 1e4, 2.0, 100, 1.01),
    ],
)
def test_the_rule_is_found_from_its_divisors(
    width: int, theta: float, factor: float, original: int, high: float
) -> None:
    waves = [2 * np.pi * theta ** (2 * i / width) for i in range(width // 2)]
    divisors = [float(np.float32(_divisor(w, factor, original, high))) for w in waves]
    found = llama3("x", theta, width, 4096, divisors)
    made = [
        _divisor(w, found["factor"], found["original_max_position_embeddings"], found["high_freq_factor"])
        for w in waves
    ]
    assert made == pytest.approx(divisors, rel=1e-5)
    if sum(1 < d < factor for d in divisors) > 1:
        assert found["original_max_position_embeddings"] == original
        assert found["high_freq_factor"] == pytest.approx(high)
    with pytest.raises(MoesmithError, match="not those of Llama 3"):
        llama3("x", theta, width, 4096, divisors[::-1])


# Held against llama.cpp ----------------------------------------------------------------------------------------------

FAULTS: dict[str, Any] = {
    "lost scaling": {"rope_parameters": BASE | {"rope_type": "default"}},
    "wrong theta": {"rope_parameters": BASE | {"rope_type": "linear", "factor": 2.0, "rope_theta": 10100.0}},
    "wrong factor": {"rope_parameters": BASE | {"rope_type": "linear", "factor": 2.1}},
    "wrong eps": {"rms_norm_eps": 1e-3},
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's file with linear scaling and rows that every type of weights takes."""
    pytest.importorskip("xllamacpp")
    rope = BASE | {"rope_type": "linear", "factor": 2.0}
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("scaled") / "scaled.gguf"
        return tiny_gguf("llama", out, patch, rope_parameters=rope, hidden_size=256, intermediate_size=256)


def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the proof will have measured: three lengths of the twin, then the whole file."""
    found, real = [], proof_module.difference

    def difference(*args: Any) -> float:
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(proof_module, "difference", difference)
    return found


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_right_files_of_every_type_are_well_inside(
    kind: str, scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = changed(scaled, tmp_path / "x.gguf", kind=kind), measured(monkeypatch)
    load_gguf(file, torch.bfloat16)
    assert len(found) == len(proof_module.LENGTHS) + 1
    assert max(found[:-1]) < proof_module.TIGHT / 5
    assert found[-1] < proof_module.WIDE / 3


def test_a_sum_in_fp32_over_the_vocabulary_is_no_difference() -> None:
    model, ids = tiny_model("llama"), [1, 2, 3]
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
    top = logits_V.log_softmax(-1).topk(32)
    room = len(logits_V) * 2.0**-24

    def apart(shift: float) -> float:
        shifted = zip(top.indices.tolist(), (top.values + shift).tolist(), strict=True)
        return proof_module.difference(model, ids, list(shifted)) * float(logits_V.std())

    assert apart(0.9 * room) < 1e-6
    assert apart(room + 1e-3) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_far_outside(name: str, scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, found, real = (
        changed(scaled, tmp_path / "x.gguf", kind="Q4_K"),
        measured(monkeypatch),
        parent_module.config_of,
    )

    def config_of(*args: Any) -> Any:
        config = real(*args)
        for field, value in FAULTS[name].items():
            setattr(config, field, value)
        return config

    monkeypatch.setattr(parent_module, "config_of", config_of)
    with pytest.raises(MoesmithError, match=r"x\.gguf answers differently in llama\.cpp than as it was read"):
        load_gguf(file, torch.bfloat16)
    assert found[-1] > 10 * proof_module.TIGHT


def test_a_tensor_unpacked_wrongly_beyond_the_twin_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    file, real = tiny_gguf("llama", tmp_path / "x.gguf", monkeypatch, num_hidden_layers=3), parent_module._weight
    load_gguf(file, torch.float32)
    monkeypatch.setattr(
        parent_module,
        "_weight",
        lambda name, *rest: real(name, *rest).flip(0) if "2.ffn_up" in name else real(name, *rest),
    )
    with pytest.raises(MoesmithError, match="answers differently"):
        load_gguf(file, torch.float32)


def test_without_llamacpp_it_is_said(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else real(name))
    load_gguf(plain, torch.float32)
    assert "plain.gguf was not compared with llama.cpp" in capsys.readouterr().err


def test_tokens_that_transformers_invents_are_not_there(plain: Path) -> None:
    _, tokenizer = load_gguf(plain, torch.float32)
    assert max(tokenizer.get_vocab().values()) == 299
    assert "<|endoftext|>" not in tokenizer.get_vocab()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_no_name_of_the_users_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf("llama", tmp_path / "my-phi3-notes.gguf", monkeypatch)
    assert (tmp_path / "my-phi3-notes" / "config.json").is_file()
    fields = gguf.GGUFReader(str(file)).fields
    assert fields["general.name"].contents() == NAME
    texts = [str(field.contents()) for name, field in fields.items() if name.startswith("general.")]
    assert not [text for text in texts if "phi3" in text.lower()]
    load_gguf(file, torch.float32)
