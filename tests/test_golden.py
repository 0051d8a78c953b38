"""Conversions of version 0.1: made again as they were, and what it left is read, continued and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import ASSETS, FAMILIES, METHODS, convert, numbers, settings_of_old
from safetensors.torch import load_file

import moesmith
from moesmith.evaluation.compare import compare
from moesmith.export.delta import unpack
from moesmith.export.target import Options
from moesmith.export.targets import export_run
from moesmith.files.seal import file_digest
from moesmith.report.overview import describe
from moesmith.report.page import write_report

EVALUATION = Path("stages", "evaluate", "evaluation.json")
GOLDEN = json.loads((ASSETS / "golden.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversions_are_those_of_version_0_1(family: str, method: str, tmp_path: Path) -> None:
    parent = moesmith.load_parent(ASSETS / "parents" / family, "fp32", device="cpu")
    found, known = numbers(convert(method, family, tmp_path / "run"), parent), GOLDEN["runs"][f"{family} {method}"]
    assert found["channels"] == known["channels"]
    assert found["logits"].keys() == known["logits"].keys()
    for stage, logits in known["logits"].items():
        assert found["logits"][stage] == pytest.approx(logits, abs=1e-3), stage
    assert found["perplexity"] == pytest.approx(known["perplexity"], rel=1e-4)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What version 0.1 left, in a folder that may be changed; its runs name parent and text from there."""
    shutil.copytree(ASSETS, tmp_path / "assets")
    monkeypatch.chdir(tmp_path / "assets")
    return tmp_path / "assets" / "old"


def go_on(method: str, out: Path) -> None:
    """The command that began a run of version 0.1, in this version."""
    settings = settings_of_old(method)
    moesmith.convert(method, "parents/llama", "text", out, settings=settings, dtype="fp32", device="cpu")


def test_a_run_that_version_0_1_began_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = {path.name: path.stat().st_mtime_ns for path in (old / "killed" / "stages").iterdir()}
    go_on("dive-plus", old / "killed")
    said = capsys.readouterr().err
    assert "experts: continuing at step 2 of 4" in said
    assert said.count("done before") == 8
    after = {name: (old / "killed" / "stages" / name).stat().st_mtime_ns for name in done if not name.startswith(".")}
    assert after.items() <= done.items()
    new, was = (load_file(run / "model" / "model.safetensors") for run in (old / "killed", old / "run"))
    assert new.keys() == was.keys()
    for name, tensor in was.items():  # its later steps drop out other channels than 0.1 would have
        torch.testing.assert_close(new[name], tensor, atol=1e-2, rtol=1e-2)
    ends = [
        json.loads((old / run / EVALUATION).read_text())["stages"]["experts"]["geomean"] for run in ("killed", "run")
    ]
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)
    go_on("dive-plus", old / "killed")
    assert "[experts] done before" in capsys.readouterr().err


AGAIN = {"dive-plus": (), "tomoe-plus": ("refit", "export", "evaluate")}  # what another version of a method makes anew


@pytest.mark.parametrize(("method", "name"), [("dive-plus", "run"), ("tomoe-plus", "learned")])
def test_a_finished_run_is_done(method: str, name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_digest(old / name / "model" / "model.safetensors")
    go_on(method, old / name)
    said = capsys.readouterr().err
    stages = {path.name for path in (old / name / "stages").iterdir() if path.is_dir()}
    assert {stage for stage in stages if f"[{stage}] done before" in said} == stages - set(AGAIN[method])
    assert (file_digest(old / name / "model" / "model.safetensors") == before) == (not AGAIN[method])


@pytest.mark.parametrize("name", ["run", "learned"])
def test_it_is_read_by_every_command(name: str, old: Path, tmp_path: Path) -> None:
    found = describe(old / name)
    assert found["recipe"] == {"run": "dive-plus", "learned": "tomoe-plus"}[name]
    page = write_report(old / name).read_text(encoding="utf-8")
    assert "could not be read" not in page
    values = {row["metric"]: row for row in compare(old / name, tokens=512, dtype="fp32", device="cpu")["results"]}
    known = json.loads((old / name / "stages" / "evaluate" / "evaluation.json").read_text())["stages"]
    assert values["perplexity"]["parent"] == pytest.approx(known["parent"]["geomean"], rel=1e-4)
    for target in ("hf", "native", "delta"):
        export_run(old / name, target, tmp_path / target, Options(), "cpu")


def test_its_delta_gives_the_same_files(old: Path, tmp_path: Path) -> None:
    unpack(old / "delta", "parents/llama", tmp_path / "again")
    for path in (old / "run" / "model").iterdir():
        assert (tmp_path / "again" / "model" / path.name).read_bytes() == path.read_bytes() or path.name == "README.md"


def test_its_stages_are_taken_over(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*settings_of_old("dive-plus"), "stage2.lr=0.02"]
    given = {"settings": settings, "dtype": "fp32", "device": "cpu", "reuse": old / "run"}
    moesmith.convert("dive-plus", "parents/llama", "text", tmp_path / "new", **given)
    assert capsys.readouterr().err.count("taken over from") == 8
