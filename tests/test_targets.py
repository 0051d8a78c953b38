"""Targets: each family is written and proved, or refused by its one reason; what answers differently does not stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sources import IDS, export, permuted, tiny_source

from moesmith.errors import MoesmithError
from moesmith.export.sglang import misread
from moesmith.export.target import Options, Source
from moesmith.export.targets import TARGETS, check_out
from moesmith.files.artefact import SUMS, read_json, sums_of
from moesmith.files.outputs import new_folder
from moesmith.mixture.home import ALIGN
from moesmith.mixture.layer import Analytic
from moesmith.parent.proof.family import NATIVE
from moesmith.testing.carvings import random_carving
from moesmith.testing.masks import harvested
from moesmith.testing.parents import FAMILIES, LLAMA3_ROPE, tiny_parent

NO_GATE = "The parent's feed-forward networks have no gate, and no stock Mixture-of-Experts has experts without one"
BIASES = "The parent's networks have a gate and biases, and no stock Mixture-of-Experts has that"
HEADS = "SGLang's Qwen2MoeForCausalLM takes hidden_size / heads = 8 for the width of a head, and this model's is 16"
# what is not None in this table must be the reason; everything else must be written and agree
REFUSED = {("sglang", "llama3"): HEADS} | {
    (target, family): why
    for family, why in (("phi", NO_GATE), ("biased", BIASES))
    for target in ("hf", "sglang", "gguf")
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_fits_or_is_refused_by_its_reason(family: str) -> None:
    source = tiny_source(family)
    for name, target in TARGETS.items():
        assert target.explain(source) == REFUSED.get((name, family)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["hf", "sglang", "native"])
def test_folders_compute_the_carving(name: str, family: str, tmp_path: Path) -> None:
    if (name, family) in REFUSED:
        return
    source, target, out = tiny_source(family), TARGETS[name], tmp_path / "out"
    target.write(source, out, Options(shard_bytes=20_000))
    found = target.verify(source, out, IDS)
    assert found["logits_difference"] <= 1e-4
    assert found["argmax_agreement"] == 1.0
    assert found["compared_tokens"] == (16 if (name, family) == ("sglang", "mistral") else IDS.numel())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert all(path.stat().st_size < 45_000 for path in out.glob("*.safetensors"))  # the embedding alone has 38,400


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize(
    ("family", "first"), [("llama", "block_sparse_moe.experts.0.w1"), ("qwen3", "mlp.experts.0.gate_proj")]
)
def test_hf_head_rope_and_one_tensor_per_expert(family: str, first: str, tmp_path: Path) -> None:
    source = tiny_source(family, rope_parameters=LLAMA3_ROPE, head_dim=16, tie_word_embeddings=True)
    for untie in (False, True):
        out = tmp_path / f"untied-{untie}"
        TARGETS["hf"].write(source, out, Options(untie=untie))
        TARGETS["hf"].verify(source, out, IDS)
        config, tensors = json.loads((out / "config.json").read_text()), tensors_of(out)
        assert config["tie_word_embeddings"] is not untie
        assert ("lm_head.weight" in tensors) is untie
        assert config["head_dim"] == 16
        assert config["rope_scaling"] == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
        assert tensors[f"model.layers.0.{first}.weight"].shape == (32, 32)


def test_sglang_dialect_of_scaled_positions(tmp_path: Path) -> None:
    source = tiny_source("llama", rope_parameters=LLAMA3_ROPE)
    found = TARGETS["sglang"].write(source, tmp_path / "out", Options())
    assert found["architecture"] == "Qwen2MoeForCausalLM"
    assert TARGETS["sglang"].verify(source, tmp_path / "out", IDS)["logits_difference"] <= 1e-4
    config, tensors = json.loads((tmp_path / "out" / "config.json").read_text()), tensors_of(tmp_path / "out")
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["norm_topk_prob"] is True
    assert config["shared_expert_intermediate_size"] == ALIGN  # vLLM drops one of width 0
    assert torch.equal(tensors["lm_head.weight"], source.parent.model.get_input_embeddings().weight)
    biases = [tensor for name, tensor in tensors.items() if name.endswith("bias")]
    assert len(biases) == 6
    assert not any(bias.any() for bias in biases)
    assert (
        TARGETS["sglang"].write(tiny_source("llama"), tmp_path / "m", Options())["architecture"] == "MixtralForCausalLM"
    )


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", {"tie_word_embeddings": True}, "head"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "scaling"),
        ("llama", {"head_dim": 16}, "wide"),
        ("qwen2", {"norm_topk_prob": False}, "sum"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "window"),
    ],
)
def test_sglang_config_that_would_be_misread(family: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    TARGETS["sglang"].write(tiny_source(family), tmp_path / "out", Options())
    path = tmp_path / "out" / "config.json"
    assert misread(tmp_path / "out") is None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "out" / SUMS).unlink()  # it would notice first
    assert says in str(misread(tmp_path / "out"))


def test_sglang_misread_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source("llama")
    monkeypatch.setattr("moesmith.export.sglang.misread", lambda _: "of a fault")
    with pytest.raises(MoesmithError, match=r"misread .*out: of a fault"):
        export(TARGETS["sglang"], source, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hf", "sglang", "native"])
def test_wrong_exports_are_caught_and_gone(name: str, tmp_path: Path) -> None:
    source, target = tiny_source("llama"), TARGETS[name]
    based = replace(source, parent=tiny_parent("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    for wrong in (permuted(source), based):
        with pytest.raises(MoesmithError, match="out does not compute what the carving computes"):
            export(target, wrong, source, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_swapped_tensor_on_disk_is_caught(tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "out"
    TARGETS["hf"].write(source, out, Options())
    tensors = load_file(out / "model.safetensors")
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    before = sums_of(out)
    with pytest.raises(MoesmithError, match="does not compute"):
        TARGETS["hf"].verify(source, out, IDS)
    assert sums_of(out) == before  # what is judged is only read: it is no longer what moesmith wrote


def test_an_older_export_outlives_a_failed_one(tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "out"
    TARGETS["hf"].write(source, out, Options())
    before = (out / "model.safetensors").read_bytes()

    with pytest.raises(MoesmithError, match="does not compute") as error:
        export(TARGETS["hf"], permuted(source), source, out, overwrite=True)
    assert str(out) in str(error.value)
    assert ".tmp" not in str(error.value)
    assert (out / "model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]
    with new_folder(out, overwrite=True) as work:
        TARGETS["hf"].write(permuted(source), work, Options())
    assert (out / "model.safetensors").read_bytes() != before
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_lost_is_said_with_its_cost(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    source = Source(parent, harvested(parent), tmp_path, IDS)
    assert TARGETS["native"].lost(source, None) == []
    assert TARGETS["hf"].lost(source, None)[0] == "attention's masks by token (V and O are whole)"
    manifest = tmp_path / "stages" / "evaluate" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"metrics": {"parent": 10.0, "masks": 12.5, "stock": 13.25}}))
    said = TARGETS["sglang"].lost(source, None)
    assert said[0] == "attention's masks by token (V and O are whole): perplexity 12.50 -> 13.25 on held-out text"
    assert [line.split(":")[0] for line in said[1:]] == ["room"]  # experts of different width
    biased = Source(parent, random_carving(parent, compensation="bias"), tmp_path / "none", IDS)
    lost = TARGETS["hf"].lost(biased, None)
    assert lost[0] == "exact biases (a constant channel stands in)"
    assert lost[1:] == ["room: 48% of the experts' channels on disk are zeros, for all must be 64 wide"]
    window = TARGETS["sglang"].lost(tiny_source("mistral"), None)
    assert window == ["text beyond 8 tokens: it knows no sliding window"]


def test_other_refusals() -> None:
    assert "silu" in str(TARGETS["sglang"].explain(tiny_source("llama", hidden_act="gelu")))
    assert "silu" in str(TARGETS["gguf"].explain(tiny_source("llama", hidden_act="gelu")))
    assert TARGETS["hf"].explain(tiny_source("llama", hidden_act="gelu")) is None
    source = tiny_source("llama")
    layers = [replace(x, router=Analytic(torch.arange(4))) for x in source.carving.layers]
    odd = replace(source, carving=replace(source.carving, layers=layers))
    assert [name for name, target in TARGETS.items() if target.explain(odd) is None] == [NATIVE, "delta"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("0.5gb", 5 * 10**8), ("5GiB", 5 * 2**30), ("1KB", 1000), (None, None)],
)
def test_sizes_of_shards(text: str | None, size: int | None) -> None:
    """As every other size (tests/test_plan.py)."""
    assert Options.parse(None, False, text).shard_bytes == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0MB", "1e3MB", "5 bananas"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(MoesmithError, match="is no size of a file"):
        Options.parse(None, False, text)


@pytest.mark.parametrize("text", ["5", "999", "0.9KB", "1B"])
def test_what_is_too_small_for_a_shard(text: str) -> None:
    with pytest.raises(MoesmithError, match=rf"--shard-size {text} is too small\. Give 1KB or more"):
        Options.parse(None, False, text)


def test_export_command(finished: Path, tmp_path: Path) -> None:
    answer = moesmith("export", finished, "--explain", "--json")
    assert answer.status == 0, answer.err
    explained = json.loads(answer.out)
    assert [x["target"] for x in explained] == list(TARGETS)
    assert all(x["fits"] for x in explained)
    table = moesmith("export", finished, "--explain").out
    assert "q4_k_m keeps" in table
    assert "nothing is lost" in table
    out = tmp_path / "moe"
    answer = moesmith("export", finished, "--to", "hf", "--out", out, "--shard-size", "30KB", "--untie", "--json")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["argmax_agreement"] == 1.0
    with safe_open(sorted(out.glob("*.safetensors"))[-1], "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
    again = ["export", finished, "--to", "native", "--out", out]
    before = sums_of(out)
    refused(moesmith(*again), r"moe exists\. Give --overwrite")
    assert sums_of(out) == before
    assert "argmax agreement" in moesmith(*again, "--overwrite").out
    assert read_json(out / "config.json")["model_type"] == "moesmith"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "onnx", "--out", "x"], "there is no target onnx"),
        (["--out", "x"], "no target is given"),
        (["--to", "hf"], "there is no output to write to"),
        (["--to", "hf", "--out", "x", "--quant", "q8_0"], "the target hf has no --quant"),
        (["--to", "native", "--out", "x", "--untie"], "the target native has no --untie"),
        (["--to", "gguf", "--out", "x.gguf", "--shard-size", "5GB"], "the target gguf has no --shard-size"),
        (["--to", "gguf", "--out", "x.gguf", "--quant", "q3"], "--quant q3 is not known"),
        (["--to", "gguf", "--out", "x"], "x is not the name of a .gguf file"),
        (["--to", "hf", "--out", "x", "--shard-size", "big"], "'big' is no size of a file"),
        (["--to", "hf", "--out", "x", "--shard-size", "5"], "--shard-size 5 is too small"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], says: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(moesmith("export", finished, *words), says)
    assert list(tmp_path.iterdir()) == []


def test_what_holds_no_model_is_not_written_over(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for out, says in (
        (tmp_path, "holds something else: it has no SHA256SUMS"),
        (tmp_path / "notes", "is not a folder"),
    ):
        with pytest.raises(MoesmithError, match=says):
            check_out(out, TARGETS["hf"], finished)
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(MoesmithError, match="is not the name of"):
        check_out(tmp_path / "a.gguf", TARGETS["gguf"], finished)
    refused(moesmith("export", tmp_path, "--explain"), "run.json is missing")
