"""The command line: help, tables, JSON, and a whole conversion with everything one asks of it afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import moesmith
from conversions import STAGES, TINY, arguments

from moesmith.console import show_table
from moesmith.conversion.plan import COMPANIONS
from moesmith.files.artefact import read_json
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.run.recipe import presets
from moesmith.testing.parents import tiny_parent
from moesmith.testing.text import DIALECTS, save_data

COMMANDS = ("presets", "plan", "convert", "eval", "inspect", "generate", "report", "pack", "unpack")


def test_help_of_everything() -> None:
    top = moesmith("--help")
    assert top.status == 0
    for name in COMMANDS:
        assert f"\n  {name} " in top.out
        answer = moesmith(name, "--help")
        assert answer.status == 0
        assert f"Usage: moesmith {name}" in answer.out
    for option in ("--model", "--data", "--out", "--set", "--budget", "--reuse"):
        assert option in moesmith("convert", "--help").out


def test_nothing_to_do_is_help() -> None:
    answer = moesmith()
    assert "Usage: moesmith" in answer.out + answer.err


def test_presets_as_table_and_json() -> None:
    table, found = moesmith("presets"), moesmith("presets", "--json")
    assert (table.status, table.err) == (found.status, found.err) == (0, "")
    assert json.loads(found.out) == presets()
    for name, description in presets().items():
        lines = [line.rstrip() for line in table.out.splitlines()]
        assert any(line.startswith(name) and line.endswith(description) for line in lines)


def test_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_table("presets", ["name", "what it does"], list(presets().items()))
    printed = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)  # without bold and italics
    assert max(map(len, printed.splitlines())) <= 60
    for description in presets().values():
        assert set(description.split()) <= set(printed.split())


@pytest.mark.parametrize("words", [["presets"], ["--help"], ["convert", "--help"]])
def test_what_needs_no_model_does_not_wait_for_torch(words: list[str]) -> None:
    program = (
        "import sys; sys.argv = ['moesmith', *sys.argv[1:]]\n"
        "from moesmith.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({m.partition('.')[0] for m in sys.modules}), file=open(3, 'w'))"
    )
    command = f'exec 3>&1 >/dev/null 2>&1; exec {sys.executable} -c "$0" "$@"'
    done = subprocess.run(["sh", "-c", command, program, *words], capture_output=True, text=True, check=False)
    loaded = set(done.stdout.split())
    assert {"moesmith", "typer"} <= loaded
    assert not loaded & {"torch", "transformers", "accelerate", "matplotlib", "scipy"}


def test_plan_as_table_and_json(home: Path) -> None:
    words = ["plan", "dive-2of8", "--model", home / "m", "--data", home / "d"]
    words += [word for setting in TINY for word in ("--set", setting)]
    found: dict[str, Any] = json.loads(moesmith(*words, "--json").out)
    assert found["parent_parameters"] == sum(p.numel() for p in tiny_parent("llama").model.parameters())
    assert (found["architecture"], found["expert_width"]) == ("mixtral", 16)
    assert found["calibration_tokens"] == 4 * 512
    assert found["affinity_tokens"] == 4 * 4 * 256
    assert found["training_tokens"] == 2 * 2048
    assert found["evaluation_tokens"] == 4 * 4 * 512
    assert found["parameters_total"] > found["parent_parameters"]
    # two experts of 16 channels and one for the bias, on disk 32, are as wide as the parent's network; and the routers
    assert found["parameters_active"] == found["parent_parameters"] + 2 * 4 * 32
    assert found["memory"] > 0
    assert found["disk"] > 0
    assert found["forward_tokens_per_second"] > 0
    assert set(found["seconds"]) == {"start", "calibration", "affinity", "training", "export", "evaluation"}
    assert found["seconds_total"] == pytest.approx(sum(found["seconds"].values()), abs=0.05)
    table = moesmith(*words).out
    for part in (f"{found['parameters_total']:,}", f"{found['parameters_active']:,}", "GiB", "4,096 tokens, about"):
        assert part in table


def test_a_plan_foretells_the_run(home: Path, finished: Path) -> None:
    words = ["plan", "dive-plus", "--model", home / "m", "--data", home / "d", "--json"]
    found = json.loads(moesmith(*words, *(word for setting in TINY for word in ("--set", setting))).out)
    carved = parameters(tiny_parent("llama"), Carving.load(finished / "stages" / "experts"))
    assert {name: found[name] for name in carved} == carved
    used = sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())
    assert found["disk"] - COMPANIONS == pytest.approx(used, rel=0.3)  # a tiny tokenizer and card are less than those
    trained = [read_json(finished / "stages" / name / "manifest.json")["metrics"] for name in ("router", "experts")]
    assert found["training_tokens"] == sum(metrics["tokens"] for metrics in trained)


def test_convert_ends_with_a_summary(finished: Path) -> None:
    said = (finished.parent / "said").read_text()
    for part in ("dive-plus", "4 experts, top-1", "parameters total", *STAGES, "perplexity parent"):
        assert part in said
    assert read_json(finished / "run.json")["inputs"]["dtype"] == "float32"


def test_inspect_as_table_and_json(finished: Path) -> None:
    table, found = moesmith("inspect", finished), moesmith("inspect", finished, "--json")
    assert (table.status, found.status, found.err) == (0, 0, "")
    value = json.loads(found.out)
    assert value["recipe"] == "dive-plus"
    assert [layer["layer"] for layer in value["layers"]] == [0, 1]
    assert value["stages"]["experts"]["tokens"] == 2048
    for part in ("channels per expert", "32-32", "weights that sum to 1", "expert 3", "trained on 2,048 tokens"):
        assert part in table.out


def test_eval_stands_beside_the_parent(finished: Path, tmp_path: Path) -> None:
    answer = moesmith("eval", finished, "--tokens", 512, "--json", tmp_path / "eval.json")
    assert answer.status == 0
    found = {row["task"]: row for row in read_json(tmp_path / "eval.json")["results"]}
    stages = read_json(finished / "stages" / "evaluate" / "evaluation.json")["stages"]
    for name in DIALECTS:  # the same text as at the end of the conversion, and the same numbers
        row = found[f"domain {name}"]
        assert row["parent"] == pytest.approx(stages["parent"]["domains"][name])
        assert row["moe"] == pytest.approx(stages["experts"]["domains"][name])
        assert f"domain {name}" in answer.out
    mean = found["domains, geometric mean"]
    assert (mean["parent"], mean["moe"]) == pytest.approx((stages["parent"]["geomean"], stages["experts"]["geomean"]))


def test_eval_on_other_text(finished: Path, tmp_path: Path) -> None:
    save_data(tmp_path / "d", domains=2)
    words = ["eval", finished, "--tokens", 256, "--data", tmp_path / "d"]
    assert moesmith(*words, "--json", tmp_path / "eval.json").status == 0
    tasks = [row["task"] for row in read_json(tmp_path / "eval.json")["results"]]
    assert tasks == ["domain beast", "domain count", "domains, geometric mean"]


@pytest.mark.parametrize("chat", [False, True])
def test_generate_shows_both(finished: Path, chat: bool) -> None:
    answer = moesmith("generate", finished, "one two", "--tokens", 5, *(["--chat"] if chat else []))
    assert answer.status == 0
    dense, moe = answer.out.split("--- MoE ---\n")
    assert dense.startswith("--- dense parent ---\n")
    assert moe.strip()


def test_report_goes_beside_the_run_or_where_told(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesmith.report import page

    asked = []

    def write(run: Path, output: Path | None, *, overwrite: bool) -> Path:
        asked.append((run, output, overwrite))
        return output or run / "report.html"

    monkeypatch.setattr(page, "write_report", write)
    answer = moesmith("report", finished)
    assert (answer.status, answer.err.strip()) == (0, f"written: {finished}/report.html")
    moesmith("report", finished, "--output", tmp_path / "x.html", "--overwrite")
    assert asked == [(finished, None, False), (finished, tmp_path / "x.html", True)]


def test_the_same_command_again_says_that_it_is_done(home: Path, finished: Path) -> None:
    answer = moesmith(*arguments("dive-plus", home / "m", home / "d", finished))
    assert answer.status == 0
    assert answer.err.count("done before") == len(STAGES)
