"""Whole conversions with learned masks: stages, folders, reuse, commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from conversions import LEARNED, convert, snapshot, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moesmith.files.artefact import read_json, verify_files
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import active_share
from moesmith.mixture.moe import build
from moesmith.parent.load import load_parent
from moesmith.run.pipeline import Pipeline as Run
from moesmith.testing.parents import save_tiny, tiny_model

WARM = ["carve.start.method=dive", "masks.budget=0.6", "affinity.method=scores", "router.start=lda"]


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of tomoe-50 on a tiny parent of a family, made once."""
    runs: dict[str, Run] = {}

    def make(family: str) -> Run:
        if family not in runs:
            model = home / "m" if family == "llama" else save_tiny(family, tmp_path_factory.mktemp("m"))
            runs[family] = convert("tomoe-50", model, home / "d", tmp_path_factory.mktemp("run") / "run")
        return runs[family]

    return make


def log_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path("masks") / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_stages_and_folders(made: Callable[[str], Run], family: str) -> None:
    run = made(family)
    assert {path.name for path in (run.folder / "stages").iterdir()} == set(LEARNED)
    for stage in LEARNED:
        verify_files(run.path(stage))
    evaluation = read_json(run.path("evaluate") / "evaluation.json")
    stages = ["parent", "masks"] + ["stock"] * (family == "llama")
    assert list(evaluation["stages"]) == stages
    assert all(len(stage["domains"]) == 4 for stage in evaluation["stages"].values())
    assert (run.folder / "stock").exists() is (family == "llama")
    assert (run.folder / "model" / "README.md").is_file()
    parent = load_parent(run.inputs["model"], torch.float32)
    ids = torch.randint(300, (2, 20))
    masked = build(parent, Carving.load(run.path("masks")))
    for folder in ("model", "stock")[: len(stages) - 1]:
        model = AutoModelForCausalLM.from_pretrained(run.folder / folder, dtype=torch.float32)
        assert type(model).__name__ == ("MixtralForCausalLM" if folder == "stock" else "MoesmithForCausalLM")
        difference = (model.eval()(ids).logits - masked(ids).logits).abs().max()
        assert difference <= 1e-4 if folder == "model" else difference > 1e-4


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_masks_stage_says_what_came_out(made: Callable[[str], Run], family: str) -> None:
    run = made(family)
    parent, carving = load_parent(run.inputs["model"], torch.float32), Carving.load(run.path("masks"))
    metrics = run.manifest("masks")["metrics"]
    assert metrics["active_share"] == pytest.approx(active_share(parent, carving))
    assert 0.45 < metrics["active_share"] <= 0.5
    assert metrics["steps"] == len(log_of(run)) == 8
    assert metrics["last_loss"] < metrics["first_loss"]
    assert metrics["trainable"] == sum(
        p.numel() for name, p in load_file(run.path("masks") / "masks.safetensors").items() if "z_MNI" not in name
    )
    for line in log_of(run):
        assert {"kl", "active", "union", "load", "entropy", "grad_norm"} <= line.keys()
        assert 0 < line["active"] <= 1
        assert 0.25 <= line["load"] <= 1
    assert log_of(run)[0]["active"] > 0.99
    assert log_of(run)[0]["loss"] == pytest.approx(11.07 + 2 * log_of(run)[0]["kl"] + log_of(run)[0]["load"], abs=0.1)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_commands_read_the_run(made: Callable[[str], Run], family: str, tmp_path: Path) -> None:
    run = made(family)
    for words in (
        ["inspect", run.folder],
        ["inspect", run.folder, "--json"],
        ["generate", run.folder, "one two", "--tokens", "3"],
        ["eval", run.folder, "--tasks", "domains", "--tokens", "256"],
        ["report", run.folder, "--output", tmp_path / "report.html"],
    ):
        answer = moesmith(*words)
        assert answer.status == 0, answer.err
    plan = ["plan", "tomoe-50", "--model", run.inputs["model"], "--data", run.inputs["data"], "--json"]
    answer = moesmith(*plan, "--set", "masks.window=64", "--set", "masks.tokens=640")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert (found["training_tokens"], found["calibration_tokens"], found["affinity_tokens"]) == (640, 0, 0)


def test_the_second_time_nothing_is_done(home: Path, made: Callable[[str], Run]) -> None:
    folder = made("llama").folder
    before = snapshot(folder)
    convert("tomoe-50", home / "m", home / "d", folder)
    assert snapshot(folder) == before


def test_a_lost_folder_is_written_again(home: Path, made: Callable[[str], Run], tmp_path: Path) -> None:
    other = made("llama").folder
    run = convert("tomoe-50", home / "m", home / "d", tmp_path / "run", reuse=[other])
    assert weights(run.folder) == weights(other)
    shutil.rmtree(run.folder / "stock")
    convert("tomoe-50", home / "m", home / "d", run.folder)
    assert weights(run.folder) == weights(other)
    assert (run.folder / "stock" / "config.json").is_file()


def test_other_evaluation_text_learns_nothing_again(
    home: Path, made: Callable[[str], Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = made("llama").folder
    capfd.readouterr()
    run = convert("tomoe-50", home / "m", home / "d", tmp_path / "run", ["evaluate.tokens=256"], reuse=[other])
    said = [line for line in capfd.readouterr().err.splitlines() if "taken over" in line]
    assert said == [f"[{name}] taken over from {other}" for name in ("corpus", "masks")]
    assert Carving.load(run.path("masks")).widths().equal(Carving.load(other / "stages" / "masks").widths())


@pytest.mark.parametrize("changed", ["masks.budget=0.6", "seed=1", "masks.noise=expert", "carve.experts=2"])
def test_what_masks_depend_on_makes_them_anew(
    home: Path, made: Callable[[str], Run], tmp_path: Path, changed: str
) -> None:
    other = made("llama")
    run = convert("tomoe-50", home / "m", home / "d", tmp_path / "run", [changed], reuse=[other.folder])
    assert run.keys["masks"] != other.keys["masks"]
    assert run.keys["baseline"] == other.keys["baseline"] or changed == "seed=1"


def test_a_start_from_a_carving_has_the_stages_before(home: Path, tmp_path: Path) -> None:
    run = convert("tomoe-50", home / "m", home / "d", tmp_path / "run", WARM)
    stages = [*LEARNED, "domains", "moments", "affinity", "carve"]
    assert {path.name for path in (run.folder / "stages").iterdir()} == set(stages)
    evaluation = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    assert list(evaluation) == ["parent", "carve", "masks", "stock"]
    parent = load_parent(str(home / "m"), torch.float32)
    assert active_share(parent, Carving.load(run.path("carve"))) == pytest.approx(0.6, abs=0.01)
    assert log_of(run)[0]["active"] == pytest.approx(0.6, abs=0.05)


def test_tomoe_plus_refits_on_routed_tokens(home: Path, tmp_path: Path) -> None:
    run = convert("tomoe-plus", home / "m", home / "d", tmp_path / "run", ["masks.budget=0.6"])
    start, before, carving = (Carving.load(run.path(name)) for name in ("carve", "masks", "refit"))
    assert [c.compensation for c in (start, before, carving)] == ["none", "none", "refit"]
    assert all(
        expert.down_DF is None for layer in start.layers for expert in layer.routed
    )  # masks are learned over the parent's weights
    assert (carving.widths() == carving.widths()[:, :1]).all()
    parent, changed = load_parent(str(home / "m"), torch.float32), []
    for index, (one, other) in enumerate(zip(before.layers, carving.layers, strict=True)):
        assert torch.equal(before.mask(index), carving.mask(index))
        assert torch.equal(one.router.weight_ED, other.router.weight_ED)
        assert all(expert.plain for expert in one.routed)
        for expert in other.routed:
            kept_DF = parent.ffns[index].down_DF[:, expert.channels]
            refitted = expert.down_DF is not None  # else its refit was no better and was dropped
            changed.append(refitted and not torch.allclose(expert.down_DF, kept_DF, atol=1e-3))
    assert sum(changed) > len(changed) / 2
    found = run.manifest("refit")["metrics"]
    assert sum(found["share_by_expert"]) == pytest.approx(1, abs=1e-3)
    assert found["error_refitted"] < found["error_learned"]
    stages = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    assert list(stages) == ["parent", "carve", "masks", "refit"]
    assert stages["refit"]["geomean"] < stages["masks"]["geomean"]


@pytest.mark.parametrize("settings", [
    ["carve.experts=1"],
    ["masks.attention=none"],
    ["masks.attention=dynamic", "masks.output_mask=false", "masks.masking=single"],
    ["stage2.tokens=512", "stage2.window=32", "stage2.loss=distill"],
], ids=["one expert", "attention whole", "dynamic", "trained after"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_variants_end_in_a_model(home: Path, tmp_path: Path, family: str, settings: list[str]) -> None:
    settings = ["stage2.norms=true", *settings]
    run = convert("tomoe-50", save_tiny(family, tmp_path / "m"), home / "d", tmp_path / "run", settings)
    last = "experts" if "stage2.tokens=512" in settings else "masks"
    stages = list(read_json(run.path("evaluate") / "evaluation.json")["stages"])
    pruned = "masks.attention=none" not in settings
    wanted = ["parent", "masks", "experts", "stock"]
    assert stages == [
        s for s in wanted if (s != "experts" or last == s) and (s != "stock" or (pruned and family != "phi"))
    ]
    parent = load_parent(str(tmp_path / "m"), torch.float32)
    carving, ids = Carving.load(run.path(last)), torch.randint(300, (2, 20))
    assert bool(carving.attention) is pruned
    with torch.no_grad():
        found, wanted_logits = (m(ids).logits for m in (run.load(parent), build(parent, carving)))
    torch.testing.assert_close(found, wanted_logits, rtol=1e-3, atol=1e-3)
    assert tiny_model(family).config.hidden_size == parent.D
