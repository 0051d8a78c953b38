"""Stored and computed dtypes, devices, and the choice between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from conftest import measured_rates
from conversions import UNTRAINED, arguments, convert, weights
from refusals import midway, refused

from moesmith.calibration.moments import pool
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json, read_tensors
from moesmith.methods.scores import channel_scores
from moesmith.methods.steps import moments_of
from moesmith.mixture.carving import Carving
from moesmith.parent import compute
from moesmith.parent.compute import choose_device, choose_dtype, fits_half, move, parse_dtype, short
from moesmith.parent.load import Parent, load_parent
from moesmith.run.folder import open_run
from moesmith.testing.parents import save_tiny, tiny_model
from moesmith.testing.tokenizer import tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float32", torch.float32),
        (torch.float32, torch.float32),
        ("auto", None),
        (None, None),
    ],
)
def test_names_of_dtypes(name: Any, dtype: torch.dtype | None) -> None:
    assert parse_dtype(name) == dtype


@pytest.mark.parametrize("name", ["fp8", "float64", torch.float64, "int8", "", 32])
def test_no_dtypes_to_compute_in(name: Any) -> None:
    with pytest.raises(MoesmithError, match=r"models do not compute in .* Give one of auto, bf16, fp16, fp32"):
        parse_dtype(name)


def test_products_are_timed_in_every_dtype() -> None:
    rates = measured_rates(64, 128, CPU, [torch.bfloat16, torch.float32])
    assert set(rates) == {torch.bfloat16, torch.float32}
    assert all(1e5 < rate < 1e14 for rate in rates.values())


@pytest.mark.parametrize(
    ("rates", "stored", "half", "wanted"),
    [
        ((9, 47, 1), torch.bfloat16, None, torch.float32),  # a CPU without bf16 units
        ((130, 17, 1), torch.float32, None, torch.bfloat16),  # one with them
        ((95, 100, 1), torch.bfloat16, None, torch.bfloat16),  # a near tie: the weights stay as they are
        ((100, 95, 1), torch.float32, None, torch.float32),
        ((10, 50, 400), torch.float16, lambda: True, torch.float16),  # a GPU without bf16
        ((10, 50, 400), torch.bfloat16, lambda: False, torch.float32),  # out of fp16's range
        ((10, 50, 400), torch.bfloat16, None, torch.float32),  # not to be asked for
    ],
)
def test_the_fastest_sound_dtype_is_chosen(
    rates: tuple[float, ...], stored: torch.dtype, half: Any, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    measured = dict(zip(kinds, rates, strict=True))
    monkeypatch.setattr(compute, "product_rates", lambda _D, _F, _device, dtypes: {d: measured[d] for d in dtypes})
    choice = choose_dtype(32, 64, CPU, stored, half)
    assert choice.dtype == wanted
    assert str(choice).startswith(f"{short(wanted)} on cpu (measured, GFLOP/s: ")


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    free = {torch.device("cuda", 0): 5, torch.device("cuda", 1): 9, torch.device("xpu", 0): 7}
    monkeypatch.setattr(compute, "accelerators", lambda: list(free))
    monkeypatch.setattr(compute, "free_memory", lambda device: free[device])
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("xpu") == torch.device("xpu", 0)
    with pytest.raises(
        MoesmithError, match=r"there is no device mps here.* Give one of auto, cpu, cuda:0, cuda:1, xpu:0"
    ):
        choose_device("mps")
    monkeypatch.setattr(compute, "accelerators", list)
    assert choose_device("auto") == CPU
    for name in ("cuda", "cuda:3", "banana", ""):
        with pytest.raises(MoesmithError, match=r"there is no device .* Give one of auto, cpu\."):
            choose_device(name)


def test_the_range_of_fp16_is_checked() -> None:
    model = tiny_model("llama")
    assert fits_half(model, IDS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e4)  # type: ignore[union-attr]
    assert not fits_half(model, IDS)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_moving_a_model_changes_weights_alone(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    before = model(IDS).logits.float()
    frequencies = [b.clone() for n, b in model.named_buffers() if n.endswith("inv_freq")]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    move(model, torch.float32, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    move(model, torch.bfloat16, CPU)
    after = [b for n, b in model.named_buffers() if n.endswith("inv_freq")]
    assert all(torch.equal(a, b) for a, b in zip(frequencies, after, strict=True))
    assert torch.equal(model(IDS).logits.float(), before)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_what_is_stored_does_not_depend_on_what_computes(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, dtype=stored)
    plain = load_parent(str(tmp_path), stored)
    parent = load_parent(str(tmp_path), dtype)
    assert (parent.stored, parent.dtype, parent.digest) == (stored, parse_dtype(dtype), plain.digest)
    again = parent.as_stored()
    assert again.model.dtype == stored
    for (name, ours), (_, theirs) in zip(again.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(again.ffns[1].down_DF, plain.ffns[1].down_DF)
    assert parent.model.dtype == parse_dtype(dtype)  # the one that computes is as it was


def test_weights_that_were_rounded_are_read_again_or_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    parent = load_parent(str(tmp_path), "bf16")
    save_tiny("llama", tmp_path, seed=1)
    with pytest.raises(MoesmithError, match="has changed since it was loaded"):
        parent.as_stored()


@pytest.mark.parametrize("preset", ["llama-moe-1of8", "dive-1of8", "dive-plus"])
def test_results_agree_between_dtypes(preset: str, home: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    settings = [*UNTRAINED, *(["affinity.method=scores"] if "dive" in preset else [])]
    runs = [
        convert(preset, tmp_path / "m", home / "d", tmp_path / dtype, settings, dtype=dtype)
        for dtype in ("fp32", "bf16")
    ]
    assert [run.inputs["dtype"] for run in runs] == ["bfloat16"] * 2
    assert [run.inputs["compute"] for run in runs] == ["float32", "bfloat16"]
    fine, coarse = (Carving.load(run.path("carve")) for run in runs)
    if preset == "dive-1of8":
        parent, clusters = load_parent(str(tmp_path / "m"), "fp32"), fine.provenance["clusters"]
        assert clusters == coarse.provenance["clusters"]
        for expert, names in enumerate(clusters):
            scores_LF = channel_scores(parent, pool([moments_of(runs[0], name) for name in names]))
            for index, score_F in enumerate(scores_LF):
                least = score_F[fine.layers[index].routed[expert].channels].min()
                differ_F = fine.mask(index)[expert] != coarse.mask(index)[expert]
                assert bool(((score_F[differ_F] - least).abs() < 0.02 * least).all())  # the same but for ties
    if preset == "llama-moe-1of8":  # nothing is measured: the same model to the last bit
        assert weights(runs[0].folder)["model/model.safetensors"] == weights(runs[1].folder)["model/model.safetensors"]
    stages = [read_json(run.path("evaluate") / "evaluation.json")["stages"] for run in runs]
    for name, found in stages[0].items():
        assert found["geomean"] == pytest.approx(stages[1][name]["geomean"], rel=0.01), name
    tensors = read_tensors(runs[0].folder / "model" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_layer_by_layer_in_another_dtype_has_the_same_bits(home: Path, tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path / "m", dtype=torch.bfloat16)
    options: Any = {"settings": UNTRAINED, "dtype": "fp32"}
    whole = convert("dive-plus", tmp_path / "m", home / "d", tmp_path / "whole", **options)
    parent = load_parent(str(tmp_path / "m"), "fp32", memory=2**30)
    assert (parent.model.dtype, parent.dtype) == (torch.bfloat16, torch.float32)
    turns = convert("dive-plus", parent, home / "d", tmp_path / "turns", **options)
    assert weights(turns.folder) == weights(whole.folder)


def test_a_run_keeps_the_dtype_that_it_began_in(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    words = arguments("dive-plus", tmp_path / "m", home / "d", tmp_path / "run", UNTRAINED)
    assert moesmith(*words, "--dtype", "bf16").status == 0
    # a machine on which fp32 is faster goes on in bf16
    answer = moesmith(*words)
    assert (answer.status, "computes in bf16 on cpu" in answer.err) == (0, True)
    assert answer.err.count("done before") == 9
    answer = moesmith(*words, "--dtype", "fp32")
    refused(answer, r"holds a run that computes in bf16, not fp32\. Leave --dtype out to continue it")
    # what only reads a run takes the fastest dtype here
    assert (parent := open_run(tmp_path / "run").parent()).dtype == torch.float32
    assert parent.stored == torch.bfloat16


def test_a_run_keeps_the_dtype_that_its_parent_was_stored_in(home: Path, tmp_path: Path) -> None:
    """moesmith 0.1 took an fp32 folder in bf16: such a run is continued as it was begun."""
    save_tiny("llama", tmp_path / "m")
    old = load_parent(tmp_path / "m", "bf16", stored=torch.bfloat16)
    words = arguments("dive-plus", tmp_path / "m", home / "d", tmp_path / "run", UNTRAINED)
    run = convert("dive-plus", old, home / "d", tmp_path / "run", UNTRAINED)
    assert (run.inputs["dtype"], run.inputs["compute"]) == ("bfloat16", "bfloat16")
    answer = moesmith(*words)
    assert (answer.status, answer.err.count("done before")) == (0, 9), answer.err
    assert open_run(tmp_path / "run").parent().stored == torch.bfloat16


def test_half_precision_does_not_train(home: Path, tmp_path: Path) -> None:
    answer = moesmith(*arguments("dive-plus", home / "m", home / "d", tmp_path / "run"), "--dtype", "fp16")
    refused(answer, r"fp16 is too narrow for the gradients of training\. Give --dtype bf16, fp32 or auto\.")


def test_a_parent_in_memory_is_stored_as_it_is() -> None:
    parent = Parent.from_model(tiny_model("llama"), tiny_tokenizer())
    assert (parent.stored, parent.dtype, parent.device) == (torch.float32, torch.float32, CPU)
    assert parent.as_stored().model is parent.model


@pytest.mark.parametrize("command", ["plan", "convert", "eval", "generate", "bench", "export"])
def test_commands_that_run_a_model_take_a_device(command: str, finished: Path, home: Path, tmp_path: Path) -> None:
    words: dict[str, list[Any]] = {
        "plan": ["flap-static", "--model", home / "m", "--data", home / "d"],
        "convert": ["flap-static", "--model", home / "m", "--data", home / "d", "--out", tmp_path / "r"],
        "eval": [finished],
        "generate": [finished, "The fox"],
        "bench": [finished],
        "export": [finished, "--to", "hf", "--out", tmp_path / "e"],
    }
    answer = moesmith(command, *words[command], "--device", "mps")
    midway(answer, answer.err.splitlines()[-1], "there is no device mps here")
    if command not in ("export", "bench"):
        refused(moesmith(command, *words[command], "--dtype", "fp8"), "models do not compute in fp8")
