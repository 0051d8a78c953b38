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
from commands import Answer, moesmith
from conversions import arguments
from refusals import World, convert_is_refused, refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, OPTConfig, PreTrainedConfig

from moesmith.parent.load import load_parent
from moesmith.testing.tokenizer import tiny_tokenizer


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


def change(world: World, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> None:
    """Rewrite the tensors of the parent's file, and fields of its config."""
    folder = world.own_model()
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))


def scaled(dtype: torch.dtype, most: float) -> Callable[[World], None]:
    """Weights in eight bits with their scales beside them; the config does not say so."""

    def stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(tensors)
        for name, weight in tensors.items():
            if "_proj" in name:
                scale = weight.abs().max() / most
                found |= {name: (weight / scale).to(dtype), f"{name}_scale": scale.reshape(1)}
        return found

    return lambda world: change(world, stored)


def with_tensors(suffix: str, shape: tuple[int, ...]) -> Callable[[World], None]:
    """More tensors beside each q_proj."""

    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name.removesuffix("weight") + suffix for name in tensors if "q_proj" in name]
        return tensors | {name: torch.ones(shape) for name in names}

    return lambda world: change(world, more)


def fewer_layers(world: World) -> None:
    change(world, dict, num_hidden_layers=1)


def another_head(world: World) -> None:
    change(world, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})


def smaller_vocabulary(world: World) -> None:
    change(world, dict, vocab_size=280)


def padding_beyond(world: World) -> None:
    change(world, dict, pad_token_id=300)


def quantised(world: World) -> None:
    change(world, dict, quantization_config={"quant_method": "awq", "bits": 4})


def in_four_bits(world: World) -> None:
    change(world, dict, quantization_config={"load_in_4bit": True})


def adapter(world: World) -> None:
    world.model = world.out.parent / "adapter"
    world.model.mkdir()
    (world.model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    save_file({"lora_A": torch.ones(2, 2)}, world.model / "adapter_model.safetensors")


def adapter_beside(world: World) -> None:
    (world.own_model() / "adapter_config.json").write_text("{}")


def pickled(world: World) -> None:
    path = world.own_model() / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def sharded(world: World, weight_map: Callable[[str], str], *, keep: bool = False) -> None:
    path = world.own_model() / "model.safetensors"
    tensors = load_file(path)
    index = {name: weight_map(name) for name in tensors}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(tensors, path.with_name("model-00001-of-00002.safetensors"), {"format": "pt"})
    if not keep:
        path.unlink()


def missing_shard(world: World) -> None:
    sharded(world, lambda name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors")


def two_sets(world: World) -> None:
    sharded(world, lambda _: "model-00001-of-00002.safetensors", keep=True)


def a_tensor_twice(world: World) -> None:
    missing_shard(world)
    tensors = load_file(world.model / "model-00001-of-00002.safetensors")
    second = {name: tensor for name, tensor in tensors.items() if "layers.1" in name}
    save_file(second, world.model / "model-00002-of-00002.safetensors", {"format": "pt"})


def end_of_text_beyond(world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.own_model())
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(world.model)


def text_beyond(world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.own_model())
    tokenizer.add_tokens(["fish"])  # a word of the data
    tokenizer.save_pretrained(world.model)


def without_tokenizer(world: World) -> None:
    for path in world.own_model().glob("tokenizer*"):
        path.unlink()


def with_its_own_code(world: World) -> None:
    path = world.own_model() / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    path.write_text(json.dumps(config))


def broken_config(world: World) -> None:
    (world.own_model() / "config.json").write_text("{")


def opt(world: World) -> None:
    world.model = world.out.parent / "opt"
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32}
    save_other(world.model, OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1))


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
    "unsupported": (opt, "no gated feed-forward network .* moesmith converts"),
    "has experts already": (mixtral, "already a Mixture-of-Experts. moesmith starts from a dense model"),
    "no weights": (without_weights, "own-m cannot be loaded"),
    "truncated": (truncated, "own-m cannot be loaded"),
    "a tensor is missing": (without_a_tensor, r"incomplete: missing tensors \S+up_proj\.weight\. Fetch or save"),
    "float8 without its scales": (scaled(torch.float8_e4m3fn, 448), r"as F8_E4M3: \S+proj.* Give the unquantised"),
    "int8 without its scales": (scaled(torch.int8, 127), r"stores weights as I8: \S+proj.* Give the unquantised"),
    "an adapter in the file": (
        with_tensors("lora_A.default.weight", (4, 32)),
        r"2 tensors that LlamaForCausalLM has no place for: \S+lora_A\S+, .*Give the model with the adapter merged",
    ),
    "a bias in the file": (with_tensors("bias", (32,)), r"has no place for: \S+q_proj\.bias, .*Fix config\.json"),
    "scales in the file": (with_tensors("weight_scale", (1,)), r"has no place for: \S+q_proj\.weight_scale.* Give"),
    "layers beyond the count": (fewer_layers, r"9 tensors .*layers\.1\..*Fix config\.json \(num_hidden_layers"),
    "a head of its own, tied": (another_head, "output matrix of its own, .*Set tie_word_embeddings to false"),
    "smaller vocabulary": (
        smaller_vocabulary,
        r"other shapes .*: \S+embed_tokens\.weight is \(300, 32\) and not \(280, 32\)\. Fix config\.json \(vocab_size",
    ),
    "padding beyond": (padding_beyond, r"pads with token 300, .* 300 rows\. Set pad_token_id"),
    "AWQ": (quantised, r"quantised \(awq\)\. Give the unquantised model"),
    "bitsandbytes": (in_four_bits, r"quantised \(bitsandbytes\)\. Give the unquantised model"),
    "an adapter": (adapter, r"an adapter of some/base .*Give the folder that 'moesmith merge' makes"),
    "an adapter beside a model": (adapter_beside, r"holds an adapter .*Give the folder that 'moesmith merge' makes"),
    "pickled": (pickled, r"weights in pytorch_model\.bin, .*Save it as safetensors"),
    "a shard is missing": (missing_shard, r"names model-00002-of-00002\.safetensors, which is not there\. Fetch"),
    "two sets of weights": (two_sets, r"two sets of weights: model\.safetensors, and .*Delete the one"),
    "a tensor twice": (a_tensor_twice, r"has model\.layers\.1\.\S+ twice, in \S+00001\S+ and in \S+00002\S+\. Fetch"),
    "end of text beyond": (
        end_of_text_beyond,
        r"end-of-text token .*'<\|im_end\|>', is number 300, and the embedding has 300 rows\. Set eos_token to '</s>'",
    ),
    "not finite": (with_nan, r"not finite \(NaN or infinity\) in model\.layers\.1\.mlp\.up_proj\.weight"),
    "no tokenizer": (
        without_tokenizer,
        "tokenizer of .*own-m cannot be loaded.* Put the tokenizer's files next to the model's",
    ),
    "its own code": (with_its_own_code, r"brings its own Python code.* Give a model whose architecture is part"),
    "broken config": (broken_config, "own-m is neither a folder with a config.json"),
}


@pytest.mark.parametrize("case", PARENTS)
def test_a_bad_parent(world: World, case: str) -> None:
    spoil, says = PARENTS[case]
    spoil(world)
    convert_is_refused(world, says, [], "dive-plus")


def test_text_with_a_token_beyond_the_embedding(world: World) -> None:
    text_beyond(world)
    answer = moesmith(*arguments("dive-plus", world.model, world.data, world.out))
    assert answer.status == 2
    assert "contains token 300, " in answer.err
    assert "Remove it from the text." in answer.err


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.masked_bias"])
def test_tensors_that_are_known_to_be_harmless(world: World, name: str) -> None:
    change(world, lambda tensors: tensors | {name: torch.ones(4)})
    assert load_parent(str(world.model)).family == "mixtral"


def test_a_head_that_is_the_embedding_is_harmless(world: World) -> None:
    change(world, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert load_parent(str(world.model)).family == "mixtral"


@pytest.mark.parametrize("key", ["domains", "evaluate", "stage1", "stage2", "affinity"])
def test_a_window_longer_than_the_model_reads(world: World, key: str) -> None:
    settings = [f"{key}.window=513", f"{key}.tokens=2048", "affinity.method=perplexity"]
    says = rf"{key}\.window is 513, but the model reads 512 tokens\. Lower {key}\.window"
    convert_is_refused(world, says, settings, "dive-plus")


@pytest.mark.slow
def test_a_bad_parent_as_a_program(world: World) -> None:
    opt(world)
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
