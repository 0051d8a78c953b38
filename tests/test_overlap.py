"""What evaluation shares with calibration: counted, said, kept with the run, and refused where it is most of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import moesmith
from conversions import arguments
from refusals import World, convert_is_refused, not_loaded, refused

from moesmith.data import overlap
from moesmith.data.overlap import Overlap, check_splits, overlaps, warnings
from moesmith.data.text import Domain
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"  # 13 words
HELD = "evaluation text is held out:"
SHORT = LONG.removesuffix(" thirteen")


def domain(name: str, calibration: list[str], evaluation: list[str]) -> Domain:
    return Domain(name, tuple({"text": t} for t in calibration), tuple({"text": t} for t in evaluation))


def test_disjoint_splits_share_nothing() -> None:
    assert overlaps([domain("a", ["x y", LONG], ["x z", SHORT])]) == {"a": Overlap(2, 0, 0, 0, 0.0, "")}


@pytest.mark.parametrize(
    "same", ["The cat sat.", "the CAT sat.", "The  cat\n\tsat. ", "Ｔｈｅ cat sat.", "The cat\u00a0sat."]
)
def test_case_white_space_and_unicode_forms_make_no_other_record(same: str) -> None:
    found = overlaps([domain("a", [same], ["The cat sat.", "The dog ran."])])["a"]
    assert (found.copied, found.quoting, found.source) == (1, 0, "a")
    assert found.share == 0.5


def test_copies_are_found_between_domains() -> None:
    domains = [domain("a", ["p q r"], ["new"]), domain("b", ["other"], ["P Q R", "p q s"])]
    found = overlaps(domains)
    assert found["a"].copied == 0
    assert (found["b"].copied, found["b"].source) == (1, "a")


def test_a_line_of_thirteen_words_is_compared_and_one_of_twelve_is_not() -> None:
    for line, quoting in ((LONG, 1), (SHORT, 0)):
        found = overlaps([domain("a", [f"begin\n{line}\nend"], [f"{line.upper()}\nother end"])])["a"]
        assert (found.copied, found.quoting) == (0, quoting)
    assert overlaps([domain("a", [f"begin\n{LONG}"], [f"{LONG}\n{'x' * len(LONG)}"])])["a"].share == 0.5


def test_what_stands_twice_in_evaluation_is_counted_once_less() -> None:
    found = overlaps([domain("a", ["c"], ["x", "X", "y", "x "]), domain("b", ["d"], ["y"])])
    assert (found["a"].repeated, found["b"].repeated) == (2, 1)


def test_other_calibration_text_can_be_compared() -> None:
    evaluated, calibrated = domain("a", ["own"], ["own", "theirs"]), domain("b", ["theirs"], ["z"])
    assert overlaps([evaluated], [calibrated])["a"].source == "b"


def test_the_limit_is_half_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(overlap, "say", lines.append)
    with pytest.raises(MoesmithError, match="50% of the evaluation text of domain 'a' is not held out"):
        check_splits([domain("a", ["abcd"], ["abcd", "efgh"])])
    check_splits([domain("a", ["abcd"], ["abcd", "efghi"])])
    (line,) = lines
    assert line == f"not all {HELD} a 44.4% in calibration text (1 of 2 records whole, 0 in part, most from a)"


def test_a_quoted_licence_is_counted_but_not_said() -> None:
    found = {"a": Overlap(100, 0, 9, 0, 0.009, "a"), "b": Overlap(100, 0, 9, 0, 0.01, "b")}
    (line,) = warnings(found)
    assert line == f"not all {HELD} b 1.0% in calibration text (0 of 100 records whole, 9 in part, most from b)"
    assert warnings({"a": Overlap(100, 0, 0, 7, 0.0, "")}) == ["evaluation text that occurs twice: a 7 of 100 records"]


# Whole commands -----------------------------------------------------------------------------------------------------


def test_splits_that_are_the_same_are_refused_before_the_model_loads(world: World) -> None:
    data = world.own_data()
    shutil.copy(data / "sum.train.jsonl", data / "sum.test.jsonl")
    not_loaded(world)
    says = (
        "100% of the evaluation text of domain 'sum' is not held out: calibration text of 'sum' holds it,"
        " 40 of 40 records word for word. Give other evaluation text, or leave the domain out"
    )
    convert_is_refused(world, says, [], "dive-plus")
    words = ["plan", "dive-plus", "--model", world.model, "--data", data, "--set", "carve.experts=4"]
    refused(moesmith(*words), says)


def test_text_of_another_domain_is_refused_as_well(world: World) -> None:
    data = world.own_data()
    shutil.copy(data / "sum.train.jsonl", data / "count.test.jsonl")
    not_loaded(world)
    convert_is_refused(world, "domain 'count' is not held out: calibration text of 'sum' holds it", [], "dive-plus")


def test_a_few_copies_are_said_kept_and_shown(world: World) -> None:
    data = world.own_data()
    train = (data / "sum.train.jsonl").read_text().splitlines()[:4]
    path = data / "sum.test.jsonl"
    path.write_text("\n".join([*train, *path.read_text().splitlines(), train[0].replace(" ", "  ")]) + "\n")
    answer = moesmith(*arguments("dive-plus", world.model, data, world.out))
    assert answer.status == 0, answer.err
    said = "(5 of 45 records whole, 0 in part, most from sum)"
    assert answer.err.startswith("not all evaluation text is held out: sum 11.1% in calibration text ")
    assert said in answer.err
    assert "evaluation text that occurs twice: sum 1 of 45 records" in answer.err
    facts = read_json(world.out / "stages" / "held-out" / "manifest.json")["metrics"]["overlap"]
    assert facts["sum"]["copied"] == 5
    assert facts["count"] == {"records": 40, "copied": 0, "quoting": 0, "repeated": 0, "share": 0.0, "source": ""}
    assert said in answer.out.replace("\n", " ")
    assert said in (world.out / "model" / "README.md").read_text().replace("\\", "")
    assert moesmith("report", world.out).status == 0
    assert said in (world.out / "report.html").read_text()


def test_eval_compares_new_text_with_what_the_run_has_read(home: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "d", tmp_path / "new")
    shutil.copy(home / "d" / "beast.train.jsonl", tmp_path / "new" / "sum.test.jsonl")
    answer = moesmith("eval", finished, "--data", tmp_path / "new", "--tokens", 128, "--json", tmp_path / "found.json")
    assert answer.status == 0, answer.err
    assert "sum 100.0% in calibration text (40 of 40 records whole, 0 in part, most from beast)" in answer.err
    found = json.loads((tmp_path / "found.json").read_text())["overlap"]
    assert (found["sum"]["copied"], found["beast"]["copied"]) == (40, 0)
