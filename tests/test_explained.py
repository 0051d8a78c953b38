"""What a target refuses to write it has said in ``explain``, and what it says it holds is written and proved."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from refusals import refused
from sources import IDS

from moesmith.errors import MoesmithError
from moesmith.export.gguf.converter import NAME
from moesmith.export.target import Options, Source
from moesmith.export.targets import TARGETS
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic
from moesmith.parent.load import Parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, LLAMA3_ROPE, tiny_parent

pytest.importorskip("xllamacpp")
pytest.importorskip("conversion")

BASE = {"rope_theta": 10000.0}
YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 2.0, 4.0, 8.0]}
LONGROPE = BASE | FACTORS | {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 256}
PARENTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "wide heads": ("qwen2", {"head_dim": 16}),
    "odd width": ("llama", {"hidden_size": 40}),
    "linear": ("llama", {"rope_parameters": BASE | {"rope_type": "linear", "factor": 2.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn's betas": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}),
    "yarn's attention": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    "llama3 in qwen3": ("qwen3", {"rope_parameters": LLAMA3_ROPE}),
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "a window of two": ("mistral", {"sliding_window": 2}),
    "a window beyond all": ("mistral", {"sliding_window": 4096}),
    "more tokens than rows": ("llama", {"vocab_size": 299}),
}


def raw(parent: Parent) -> Carving:
    """A gate that is not linear."""
    carving = random_carving(parent, top_k=2)
    return replace(carving, layers=[replace(x, router=Analytic(torch.arange(4))) for x in carving.layers])


CARVINGS: dict[str, Callable[[Parent], Carving]] = {
    "biases without a direction": lambda parent: random_carving(parent, compensation="bias"),
    "refitted": lambda parent: random_carving(parent, compensation="refit"),
    "ragged": lambda parent: random_carving(parent, ragged=True, top_k=2),
    "one expert": lambda parent: random_carving(parent, experts=1),
    "another gate": raw,
}
OPTIONS = {
    "hf": [Options(), Options(untie=True), Options(shard_bytes=20_000)],
    "sglang": [Options()],
    "gguf": [Options(quant="f32")],
    "native": [Options()],
}


def agree(name: str, source: Source, options: Options, out: Path) -> str | None:
    """Explain, write and verify; the reason of a refusal."""
    target = TARGETS[name]
    reason, said = target.explain(source), None
    try:
        target.write(source, out, options)
        if reason is None:
            target.verify(source, out, source.ids)
    except MoesmithError as error:
        said = str(error)
    assert said is None or reason is not None, f"explain knew nothing of: {said}"
    return reason


def source_of(parent: str, run: Path, carve: Callable[[Parent], Carving] | None = None) -> Source:
    """A source of one of :data:`PARENTS`."""
    family, overrides = PARENTS[parent]
    made = tiny_parent(family, **overrides)
    carving = random_carving(made, top_k=2) if carve is None else carve(made)
    return Source(made, carving, run, IDS.clamp(max=made.config.vocab_size - 1))


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_of_every_parent(name: str, parent: str, tmp_path: Path) -> None:
    source = source_of(parent, tmp_path / "run")
    for number, options in enumerate(OPTIONS[name]):
        agree(name, source, options, tmp_path / f"out{number}{TARGETS[name].suffix}")


@pytest.mark.parametrize("carving", CARVINGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_of_every_carving(name: str, carving: str, tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "phi") if name != "gguf" else ("llama",):
        source = source_of(family, tmp_path / "run", CARVINGS[carving])
        agree(name, source, OPTIONS[name][0], tmp_path / f"{family}{TARGETS[name].suffix}")


@pytest.mark.parametrize("options", [Options(quant=q) for q in ("bf16", "q8_0", "q4_k_m")] + [Options("f32", True)])
@pytest.mark.parametrize("parent", ["qwen3", "odd width"])
def test_of_every_gguf(parent: str, options: Options, tmp_path: Path) -> None:
    source = source_of(parent, tmp_path / "run")
    assert agree("gguf", source, options, tmp_path / "out.gguf") is None


@pytest.mark.parametrize("name", ["hf", "sglang", "gguf"])
def test_of_phi3_longrope(name: str, tmp_path: Path) -> None:
    made = tiny_parent("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=256)
    source = Source(made, random_carving(made, top_k=2), tmp_path / "run", IDS)
    agree(name, source, OPTIONS[name][0], tmp_path / f"out{TARGETS[name].suffix}")


def test_reasons_that_only_llamacpp_knows() -> None:
    def reason(parent: str) -> str | None:
        return TARGETS["gguf"].explain(source_of(parent, Path("run")))

    assert reason("yarn's betas") == (
        "llama.cpp's graph 'llama' computes YaRN with its own beta_fast of 32 where this model has 16"
    )
    assert "attention_factor of 1.13863 where this model has 1" in str(reason("yarn's attention"))
    assert reason("yarn") is reason("linear") is None
    assert "window" in str(reason("a window of two"))
    assert reason("more tokens than rows") == "the tokenizer has a token 299 and the model has 299 rows of embedding"


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = source_of("llama", Path("run")), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else real(name))
    assert "xllamacpp" in str(TARGETS["gguf"].explain(source))


def test_the_commands_agree(finished: Path, tmp_path: Path) -> None:
    """A finished run, and one that is not: each target is explained and written, or both refuse in the same line."""
    for name, target in TARGETS.items():
        answer = moesmith("export", finished, "--to", name, "--out", tmp_path / f"{NAME}-{name}{target.suffix}")
        assert answer.status == 0, answer.err
    for words in (["--explain"], ["--to", "delta", "--out", tmp_path / "d"]):
        refused(moesmith("export", tmp_path, *words), "run.json is missing")
