"""A slice of ``make torture``: damaged files, a moved folder, kills, a small disk, readers and two at once."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conversions import convert, weights
from damage import damage, damaged, problem
from disturbed import Command, Known
from ordeals import Options, clock, company, kills, moved, read_only, readers, room
from tally import Tally, table

from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, commit, read_json
from moesmith.files.seal import beside
from moesmith.files.write import write_json, write_record, write_text
from moesmith.training import loop

Ordeal = Callable[[Options], Iterator[Tally]]


def survived(ordeal: Ordeal, work: Path, **options: Any) -> list[Tally]:
    """Go through an ordeal with one method and nothing wrong."""
    given: dict[str, Any] = {"methods": ("dive-1of8",), "processes": (1,), "seed": 0} | options
    tallies = list(ordeal(Options(work, Known(work / "undisturbed"), **given)))
    assert not any(tally.wrong for tally in tallies), table(tallies)
    return tallies


@pytest.mark.slow
def test_damaged_files_are_noticed_or_without_effect(tmp_path: Path) -> None:
    tallies = survived(damage, tmp_path, trials=40)
    assert sum(tally.tried for tally in tallies) == 40
    assert sum(tally.survived for tally in tallies) > 20


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_record(path, {"a": 1, "b": [0.1, None]})
    assert read_json(path) == {"a": 1, "b": [0.1, None]}
    write_json(path, json.loads(path.read_text()) | {"a": 2})
    with pytest.raises(MoesmithError, match=r"run\.json cannot be read: it has changed since .* Put a copy of it back"):
        read_json(path)


def test_what_a_stage_keeps_while_it_is_made_is_noticed_when_it_changes(tmp_path: Path) -> None:
    work, final = tmp_path / "stages" / ".rows.partial", tmp_path / "stages" / "rows"
    write_json(work / "row.json", [1])
    write_json(work / "row.json", [2])
    assert read_json(work / "row.json") == [2]
    first = (work / "row.json").read_text().replace("2", "1")
    (work / "row.json").write_text(first)  # a process that was killed between the hash and the file
    assert read_json(work / "row.json") == [1]
    (work / "row.json").write_text(first.replace("1", "3"))
    for read in (lambda: read_json(work / "row.json"), lambda: commit(work, final, {"key": "k"})):
        with pytest.raises(MoesmithError, match=r"row\.json is missing or damaged\. Delete \S+\.rows\.partial and run"):
            read()
    write_json(work / "row.json", [3])
    commit(work, final, {"key": "k"})
    assert sorted(path.name for path in final.iterdir()) == [MANIFEST, "row.json"]
    assert not beside(final / "row.json").exists()


def test_a_log_that_changed_while_it_grew_is_noticed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    step, count = loop.Masters.step, []

    def killed(self: Any, lr: float, clip: float | None) -> float:
        count.append(lr)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(self, lr, clip)

    settings = ["stage1.tokens=0"]
    monkeypatch.setattr(loop.Masters, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    log = tmp_path / "run" / "stages" / ".experts.partial" / "log.jsonl"
    kept = log.read_text()
    log.write_text(kept.replace('"step": 2', '"step": 7'))
    with pytest.raises(MoesmithError, match=r"log\.jsonl is missing or damaged\. Delete \S+\.experts\.partial and run"):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    log.write_text(kept + '{"step": 4, "lo')
    convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    lines = (tmp_path / "run" / "stages" / "experts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_a_card_that_is_not_text_any_more_stays(home: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    card = run / "model" / "README.md"
    card.write_bytes(b"\xff" + card.read_bytes())
    convert("dive-plus", home / "m", home / "d", run)
    assert card.read_bytes()[:1] == b"\xff"
    assert weights(run) == weights(finished)


def test_the_table_counts_and_the_judge_judges(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert "of 3" in damaged(tmp_path / "file", random.Random(0))
    assert (tmp_path / "file").read_bytes() != b"abc"
    assert problem({"a": 1}, {"a": 1}) is None
    assert problem({"a": 1}, {"a": 2}) == "another answer: .a was 1, is 2"
    assert problem(1, MoesmithError("x is damaged", "Delete it.")) is None
    assert problem(1, MoesmithError("x is damaged")) == "no cure: x is damaged"
    assert "KeyError" in str(problem(1, KeyError("x")))
    tally = Tally("a")
    for wrong, effect in ((None, True), (None, False), ("bad; seed 3", True)):
        tally.count(wrong, effect=effect)
    lines = table([tally]).splitlines()
    assert [line.split()[-4:] for line in lines[1:3]] == [["3", "1", "1", "1"]] * 2
    assert lines[-1] == "WRONG, a: bad; seed 3"


def test_a_working_file_that_nobody_sealed_is_read(tmp_path: Path) -> None:
    """A stage that an older version began has no hashes beside its files."""
    work = tmp_path / "stages" / ".rows.partial"
    write_text(work / "row.json", "[1]")
    beside(work / "row.json").unlink()
    assert read_json(work / "row.json") == [1]


@pytest.mark.slow
def test_a_folder_that_moved_between_two_tries(tmp_path: Path) -> None:
    survived(moved, tmp_path, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills(processes: int, tmp_path: Path) -> None:
    assert survived(kills, tmp_path, kills=5, processes=(processes,))[0].tried == 5


@pytest.mark.slow
@pytest.mark.parametrize("ordeal", [room, read_only, clock, company, readers])
def test_ordeals(ordeal: Ordeal, tmp_path: Path) -> None:
    tallies = survived(ordeal, tmp_path, times=2)
    assert tallies[0].tried or tallies[0].notes[0].startswith("skipped")


@pytest.mark.slow
def test_damage(tmp_path: Path) -> None:
    survived(damage, tmp_path, trials=200, seed=1)


def test_a_command_says_what_it_is() -> None:
    assert str(Command("token", 2)) == "token, 2 processes"
