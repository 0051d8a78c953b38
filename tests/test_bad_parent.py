"""Parents that cannot be converted are refused in one line before anything is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Answer
from conversions import arguments
from refusals import World, convert_is_refused, refused
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedConfig


def save_other(folder: Path, config: PreTrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def without_weights(world: World) -> None:
    (world.own_model() / "model.safetensors").unlink()


def truncated(world: World) -> None:
    path = world.own_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_tensor(world: World) -> None:
    path = world.own_model() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def with_nan(world: World) -> None:
    path = world.own_model() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def without_tokenizer(world: World) -> None:
    for path in world.own_model().glob("tokenizer*"):
        path.unlink()


def with_its_own_code(world: World) -> None:
    path = world.own_model() / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    path.write_text(json.dumps(config))


def broken_config(world: World) -> None:
    (world.own_model() / "config.json").write_text("{")


def gpt2(world: World) -> None:
    world.model = world.out.parent / "gpt2"
    save_other(world.model, GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2))


def mixtral(world: World) -> None:
    world.model = world.out.parent / "mixtral"
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    save_other(world.model, MixtralConfig(**sizes, **heads))


def unknown(world: World) -> None:
    world.model = Path("nobody/no-such-model")


def no_gguf(world: World) -> None:
    world.model = world.out.parent / "model.gguf"


PARENTS: dict[str, tuple[Callable[[World], None], str]] = {
    "unknown": (
        unknown,
        r"nobody/no-such-model is neither a folder .* nor a reachable hub id \(offline\)\. Known by name",
    ),
    "no GGUF file": (no_gguf, r"no file \S+model\.gguf"),
    "unsupported": (gpt2, "no gated feed-forward network .* moesmith converts"),
    "has experts already": (mixtral, "Mixture-of-Experts already. moesmith starts from a dense model"),
    "no weights": (without_weights, "own-m cannot be loaded"),
    "truncated": (truncated, "own-m cannot be loaded"),
    "a tensor is missing": (without_a_tensor, r"incomplete: missing tensors \S+up_proj\.weight\. Fetch or save"),
    "not finite": (with_nan, r"not finite \(NaN or infinity\) in model\.layers\.1\.mlp\.up_proj\.weight"),
    "no tokenizer": (
        without_tokenizer,
        "tokenizer of .*own-m cannot be loaded.* A parent needs its tokenizer beside it",
    ),
    "its own code": (with_its_own_code, r"brings its own Python code.* Give a model whose architecture is part"),
    "broken config": (broken_config, "own-m is neither a folder with a config.json"),
}


@pytest.mark.parametrize("case", PARENTS)
def test_a_bad_parent(world: World, case: str) -> None:
    spoil, says = PARENTS[case]
    spoil(world)
    convert_is_refused(world, says, [], "dive-plus")


@pytest.mark.parametrize("key", ["domains", "evaluate", "stage1", "stage2", "affinity"])
def test_a_window_longer_than_the_model_reads(world: World, key: str) -> None:
    settings = [f"{key}.window=513", f"{key}.tokens=2048", "affinity.method=perplexity"]
    says = rf"{key}\.window is 513, but the model reads 512 tokens\. Lower {key}\.window"
    convert_is_refused(world, says, settings, "dive-plus")


def test_a_bad_parent_as_a_program(world: World) -> None:
    gpt2(world)
    words = arguments("dive-plus", world.model, world.data, world.out)
    done = subprocess.run(
        [sys.executable, "-c", "from moesmith.cli import main; main()", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    refused(Answer(done.returncode, done.stdout, done.stderr), PARENTS["unsupported"][1])
    assert not world.out.exists()
