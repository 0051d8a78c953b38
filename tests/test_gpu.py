"""The same on a real accelerator; every test is skipped where there is none. 'make gpu' runs them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversions import arguments, tiny_settings

import moesmith
from moesmith.conversion.convert import predict
from moesmith.files.artefact import read_json
from moesmith.mixture.moe import build
from moesmith.parent.accelerator import free_memory, has_double, release
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.testing.parents import tiny_model
from moesmith.testing.text import save_data
from moesmith.testing.tokenizer import tiny_tokenizer

FOUND = torch.accelerator.current_accelerator(check_available=True)
DEVICE = "cpu" if FOUND is None or FOUND.type == "pretend" else FOUND.type
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="there is no accelerator")]
PRESETS = "dive-1of8 dive-plus flap-static flap-static-refit llama-moe-1of8 token tomoe-50 tomoe-plus".split()
PRESETS += ["llm-pruner", "drop-upcycling", "moefication"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("gpu") / "d")


def convert(
    preset: str, family: str, device: str, data: Path, out: Path, dtype: torch.dtype = torch.float32, *own: str
) -> Run:
    model = tiny_model(family, dtype=dtype).to(device)
    parent = Parent.from_model(model, tiny_tokenizer(), f"tiny-{family}")
    return moesmith.convert(preset, parent, str(data), out, settings=[*tiny_settings(preset), *own])


def perplexities(run: Run) -> dict[str, float]:
    found = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    return {stage: row["geomean"] for stage, row in found.items()}


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_conversion_is_the_cpus(preset: str, family: str, data: Path, tmp_path: Path) -> None:
    """The export is verified on the way. Masks learn from other random numbers, so of them only the budget agrees."""
    there = convert(preset, family, DEVICE, data, tmp_path / "device")
    here = convert(preset, family, "cpu", data, tmp_path / "cpu")
    found, wanted = perplexities(there), perplexities(here)
    assert found["parent"] == pytest.approx(wanted["parent"], rel=0.01)
    if preset != "tomoe-50":
        ours, theirs = (moesmith.Carving.load(run.path("carve")) for run in (there, here))
        for mine, its in zip(ours.layers, theirs.layers, strict=True):
            for a, b in zip(mine.routed, its.routed, strict=True):
                both = len(set(a.channels.tolist()) & set(b.channels.tolist()))
                assert both >= b.width - 1  # but for ties
        assert found["carve"] == pytest.approx(wanted["carve"], rel=0.01)
    assert all(math.isfinite(value) for value in found.values())


# fp16 has no room for gradients: there nothing is trained
@pytest.mark.parametrize(
    ("dtype", "own"), [(torch.bfloat16, ()), (torch.float16, ("stage1.tokens=0", "stage2.tokens=0"))]
)
def test_half_precision(dtype: torch.dtype, own: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    found = perplexities(convert("dive-plus", "llama", DEVICE, data, tmp_path / "half", dtype, *own))
    wanted = perplexities(convert("dive-plus", "llama", DEVICE, data, tmp_path / "whole", torch.float32, *own))
    assert found["parent"] == pytest.approx(wanted["parent"], rel=0.05)
    assert found["carve"] == pytest.approx(wanted["carve"], rel=0.05)
    assert all(math.isfinite(value) for value in found.values())


def test_a_killed_run_is_continued(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesmith.training import loop as train

    monkeypatch.setattr(train, "SAVE_SECONDS", -1.0)
    whole = perplexities(convert("dive-plus", "llama", DEVICE, data, tmp_path / "whole"))
    write, count = train.Log.write, []

    def killed(self: train.Log, record: dict) -> None:
        write(self, record)
        count.append(record)
        if len(count) == 11:  # in the second training stage
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Log, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        convert("dive-plus", "llama", DEVICE, data, tmp_path / "killed")
    monkeypatch.setattr(train.Log, "write", write)
    again = perplexities(convert("dive-plus", "llama", DEVICE, data, tmp_path / "killed"))
    assert again == pytest.approx(whole, rel=0.01)


def test_grouped_products_in_bf16() -> None:
    from moesmith.native import experts
    from moesmith.testing.carvings import random_carving

    model = tiny_model("llama", dtype=torch.bfloat16).to(DEVICE)
    parent = Parent.from_model(model, tiny_tokenizer(), "tiny")
    block = build(parent, random_carving(parent)).model.layers[0].mlp
    if not experts.groupable(torch.zeros(1, device=DEVICE, dtype=torch.bfloat16), 32, 32):
        pytest.skip("this device has no grouped product")
    x_TD = torch.randn(200, parent.D, device=DEVICE, dtype=torch.bfloat16)
    fast_TD = block(x_TD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "groupable", lambda *_: False)
        torch.testing.assert_close(fast_TD, block(x_TD), rtol=2e-2, atol=2e-2)


def test_what_the_device_says_of_itself() -> None:
    device = torch.device(DEVICE)
    assert free_memory(device) > 2**20
    assert has_double(device) == (DEVICE != "mps") or DEVICE == "xpu"
    release(device)


@pytest.mark.parametrize("memory", ["whole", "parts"])
def test_two_processes_with_a_device_each(memory: str, data: Path, tmp_path: Path) -> None:
    """Over nccl: DDP, and FSDP2 where the parent does not fit; the losses are one device's."""
    if DEVICE != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("nccl needs two GPUs")
    model, preset = tmp_path / "m", "dive-plus"
    tiny_model("llama", num_hidden_layers=16, hidden_size=64, intermediate_size=256).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    settings = ["stage2.lora_dropout=0", "router.noise=0", "stage2.lr=0.001"]
    plan = predict(preset, model, data, settings=[*tiny_settings(preset), *settings], dtype="fp32", ranks=2)
    room = ["--memory", str((plan["memory_layerwise"] + plan["memory"]) // 2)] if memory == "parts" else []
    stories = []
    for name, launch in (("one", []), ("two", ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"])):
        words = [*arguments(preset, model, data, tmp_path / name, settings), "--dtype", "fp32", "--device", "cuda"]
        words = [sys.executable, "-m", *launch, "moesmith", *words, *(room if launch else [])]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "stages" / "experts" / "log.jsonl").read_text().splitlines()
        stories.append([json.loads(line)["loss"] for line in lines])
    assert stories[1] == pytest.approx(stories[0], abs=1e-3)
