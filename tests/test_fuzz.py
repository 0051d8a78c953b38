"""Readers of files that somebody else may have made: whatever they are given is read, or refused in one line.

``tests/fuzz.py`` looks further: for as long as it is told, with changes that atheris chooses by what they reach.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS, Reader, altered, every_change

from moesmith.errors import MoesmithError
from moesmith.files import parse
from moesmith.files.parse import parse_json, parse_yaml

# examples in the fast suite: what a second or two is enough for
SLOW = ("evaluation",)  # a report is seconds of drawing
FEW = dict.fromkeys(SLOW, 2) | dict.fromkeys(
    ("GGUF", "delta.json", "delta's carving.json", "delta's tensors", "delta's config", "generation config"), 15
)
FEW |= dict.fromkeys(
    ("tokenizer", "tokenizer config", "config", "parent's safetensors", "comparison", "recipe", "setting", "data sets"),
    30,
)
FIELDS = 60  # of a config's changes in the fast suite
LOOK = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to read from, which is also where relative names lead."""
    before = Path.cwd()
    (tmp_path / "in").mkdir()
    os.chdir(tmp_path)
    yield tmp_path / "in"
    os.chdir(before)


def look(reader: Reader, folder: Path, examples: int, options: settings = LOOK) -> None:
    """Give a reader so many altered contents."""
    starts = reader.starts()
    reader.place(folder)
    refusal = reader.give(starts[0], folder)
    assert not refusal or reader.file == "adapter_config.json", refusal  # which is refused whatever it says

    @settings(options, max_examples=examples)
    @given(st.integers(0, 2**64))
    def give(seed: int) -> None:
        draw = random.Random(seed)
        reader.give(altered(draw.choice(starts), reader.file, draw), folder)

    give()


@pytest.mark.parametrize("name", [name for name in READERS if name not in SLOW])
def test_a_reader_reads_or_refuses(name: str, place: Path) -> None:
    look(READERS[name], place, FEW.get(name, 100))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_or_refuses_more(name: str, place: Path) -> None:
    look(READERS[name], place, 10 * FEW.get(name, 100), settings(LOOK, derandomize=False))


@pytest.mark.parametrize("name", ["config", "config for plan"])
def test_a_config_with_any_field_changed(name: str, place: Path) -> None:
    reader = READERS[name]
    changes = every_change(reader.starts()[0])
    reader.place(place)
    for content in random.Random(0).sample(changes, FIELDS):
        reader.give(content, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.file.endswith(".json")])
def test_every_field_set_to_every_hostile_value(name: str, place: Path) -> None:
    reader = READERS[name]
    changes = every_change(reader.starts()[0])
    if name == "tokenizer" or name == "manifest":  # a vocabulary of hundreds of words
        changes = random.Random(0).sample(changes, min(len(changes), 600))
    reader.place(place)
    refusals = sum(bool(reader.give(content, place)) for content in changes)
    print(f"{name}: {len(changes)} changes, {refusals} refused")


# Parsers -------------------------------------------------------------------------------------------------------------


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_json_is_parsed_as_it_was_written(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["[" * 100_000, b"\xff", "", "{", '{"a": 1'])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]", "&a {b: *a}"], ids=["laughs", "a circle", "a circle of keys"])
def test_yaml_that_unfolds_into_gigabytes_is_refused(text: str) -> None:
    with pytest.raises(MoesmithError, match=r"^x\.yaml unfolds into more than 100,000 values\. Write it without alias"):
        parse_yaml(text, "x.yaml")


def test_aliases_that_stay_small_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a", "x.yaml") == {"a": [1, 2], "b": [1, 2]}


NO_YAML: list[str | bytes] = [
    *("a: [", '!!int ""', "!!bool x", "!!timestamp x", "2026-02-31", "[" * 5000, "? [a]\n: b", b"\xff", "a: \x00"),
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system"),
]


@pytest.mark.parametrize("text", NO_YAML)
def test_what_is_no_yaml_is_one_line(text: str | bytes) -> None:
    with pytest.raises(MoesmithError, match=r"^x\.yaml(:\d+)?: not YAML: .*\. Fix the file\.$"):
        parse_yaml(text, "x.yaml")


def test_the_number_of_values_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "MOST", 4)
    assert parse_yaml("[1, [2]]", "x") == [1, [2]]
    with pytest.raises(MoesmithError):
        parse_yaml("[1, [2, 3]]", "x")
