"""Files of records in every format: the same records, and the same refusals by file and place."""

from __future__ import annotations

import copy
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import moesmith
from conversions import convert, weights
from golden import ASSETS
from refusals import refused

from moesmith.data import formats
from moesmith.data.formats import FORMATS, read_records
from moesmith.data.text import load_domains, source_digest
from moesmith.errors import MoesmithError

ROWS: list[dict[str, Any]] = [
    {"text": "one\u2028two"},
    {"question": "Q?", "choices": ["a", "b"], "answer": 1},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
]


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(path: Path, rows: Sequence[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


WRITE: dict[str, Callable[[Path, Sequence[Any]], object]] = {
    ".jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows))),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".parquet": parquet,
}


def test_every_format_is_tried() -> None:
    assert tuple(WRITE) == FORMATS


@pytest.mark.parametrize("ending", FORMATS)
def test_the_same_records_in_every_format(tmp_path: Path, ending: str) -> None:
    for number, row in enumerate(ROWS):  # one kind a file: the columns of Parquet are the same in all rows
        path = tmp_path / f"{number}{ending}"
        WRITE[ending](path, [row, row])
        assert read_records(path) == [row, row]


def test_a_value_missing_in_parquet_is_a_field_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet(path, [{"text": "a", "question": None}, {"text": None, "question": "b"}])
    assert read_records(path) == [{"text": "a"}, {"question": "b"}]


@pytest.mark.parametrize(("ending", "where"), [(".jsonl", ":2"), (".jsonl.gz", ":2"), (".json", ", item 2")])
def test_what_is_no_text_is_refused_by_place(tmp_path: Path, ending: str, where: str) -> None:
    path = tmp_path / f"x{ending}"
    WRITE[ending](path, [{"text": "a"}, {"text": float("nan")}])
    with pytest.raises(MoesmithError) as refusal:
        read_records(path)
    assert str(refusal.value).startswith(f"{path}{where}: 'text' must be text, not nan. Fix or remove the ")


@pytest.mark.parametrize("value", [float("nan"), b"bytes", 3])
def test_what_is_no_text_in_parquet_is_refused_by_row(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.parquet"
    parquet(path, [{"text": value}])
    with pytest.raises(MoesmithError, match=r"x\.parquet, row 1: 'text' must be text, not .* Fix or remove the row"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl.gz", b"not packed", "is not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(jsonl(ROWS * 50))[:-9], "is not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("x.json", b'{"text": "a"}', "must hold a list of JSON objects, not dict"),
        ("x.json", b'[{"text": "a"}', "is not JSON"),
        ("x.json", b"[]", "is empty"),
        ("x.json", b"[1]", ", item 1: the item must be a JSON object, not int"),
        ("x.json", b"[" * 100_000, "is not JSON"),
        ("x.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("x.parquet", b"", "cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoesmithError) as refusal:
        read_records(tmp_path / name)
    assert str(refusal.value).startswith(str(tmp_path / name))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MoesmithError, match=r"read with the package pyarrow. Run: pip install 'moesmith\[data\]'"):
        read_records(tmp_path / "x.parquet")


# Folders ------------------------------------------------------------------------------------------------------------


def in_format(data: Path, folder: Path, ending: str) -> Path:
    """A folder of JSON lines in another format."""
    folder.mkdir()
    for path in data.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        WRITE[ending](folder / (path.stem + ending), rows)
    return folder


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_in_any_format_holds_the_same_domains(home: Path, tmp_path: Path, ending: str) -> None:
    folder = in_format(home / "d", tmp_path / "d", ending)
    assert load_domains(str(folder)) == load_domains(str(home / "d"))
    before = source_digest(str(folder))
    assert (before == source_digest(str(home / "d"))) == (ending == ".jsonl")
    WRITE[ending](folder / f"sum.test{ending}", [{"text": "changed"}])
    assert source_digest(str(folder)) != before


def test_splits_may_differ_in_format_but_not_come_in_two(home: Path, tmp_path: Path) -> None:
    folder = in_format(home / "d", tmp_path / "d", ".jsonl")
    in_format(home / "d", tmp_path / "p", ".jsonl.gz")
    (folder / "sum.test.jsonl").unlink()
    (tmp_path / "p" / "sum.test.jsonl.gz").rename(folder / "sum.test.jsonl.gz")
    assert load_domains(str(folder)) == load_domains(str(home / "d"))
    (tmp_path / "p" / "sum.train.jsonl.gz").rename(folder / "sum.train.jsonl.gz")
    for load in (load_domains, source_digest):
        with pytest.raises(MoesmithError, match=r"sum\.train twice, as sum\.train\.jsonl and as sum\.train\.jsonl\.gz"):
            load(str(folder))  # type: ignore[operator]


def test_a_run_is_the_same_from_every_format(home: Path, tmp_path: Path) -> None:
    settings = ["stage1.tokens=0", "stage2.tokens=0"]
    runs = [
        convert("dive-plus", home / "m", in_format(home / "d", tmp_path / f"d{e}", e), tmp_path / f"run{e}", settings)
        for e in (".jsonl", ".parquet")
    ]
    for stage, name in (("domains", "windows"), ("held-out", "evaluation")):
        files = [(run.path(stage) / f"{name}.safetensors").read_bytes() for run in runs]
        assert files[0] == files[1]


def test_a_task_is_found_in_any_format(finished: Path, tmp_path: Path) -> None:
    rows = [{"context": "one two three", "target": "four"}] * 3
    for ending in (".jsonl.gz", ".json"):
        folder = tmp_path / ending[1:]
        folder.mkdir()
        WRITE[ending](folder / f"lambada.test{ending}", rows)
        answer = moesmith("eval", finished, "--data", folder, "--tasks", "lambada", "--json", tmp_path / "found.json")
        assert answer.status == 0, answer.err
        results = json.loads((tmp_path / "found.json").read_text())["results"]
        (tmp_path / "found.json").unlink()
        assert {row["task"] for row in results} == {"lambada"}


@pytest.mark.parametrize(
    "name", ["..", ".hidden", " a", "a\tb", "a\\b", "a\u202eb", "__metadata__", "x" * 121, "a\x1b[31m"]
)
def test_a_name_that_cannot_be_a_files_is_refused(tmp_path: Path, name: str) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{name}.{split}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(MoesmithError, match=r"has a domain called .*, which .*\. Give it another name"):
        load_domains(str(tmp_path))


def test_names_that_differ_in_capitals_alone_are_refused(tmp_path: Path) -> None:
    for name in ("Law", "law"):
        for split in ("train", "test"):
            (tmp_path / f"{name}.{split}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(MoesmithError, match="'law', which differs from 'Law' only in capitals"):
        load_domains(str(tmp_path))
    assert [domain.name for domain in load_domains(str(tmp_path), ["law"])] == ["law"]


# Empty values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--model", "--data", "--out", "--reuse", "--set", "--budget", "--memory"])
@pytest.mark.parametrize("joined", [False, True])
def test_an_empty_option_is_refused(option: str, joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["convert", "dive-plus", "--model", "m", "--data", "d", "--out", "o"]
    if option in words:
        place = words.index(option)
        del words[place : place + 2]
    words += [f"{option}="] if joined else [option, ""]
    refused(moesmith(*words), f"{option} is empty. Give {option} a value, or leave it out")
    assert not list(tmp_path.iterdir())


def test_records_of_a_large_file_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what a small file's are: in order, by index, from the end, as a slice, after a copy."""
    rows = [{"text": f"record {n} é\u2028"} for n in range(9)]
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
    text = "\ufeff" + "\r\n".join(lines[:4]) + "\n\n  \n" + "\n".join(lines[4:])
    path = tmp_path / "large.jsonl"
    path.write_bytes(text.encode())
    small = read_records(path)
    monkeypatch.setattr(formats, "LARGE", 16)
    large = read_records(path)
    assert isinstance(large, formats.Lines)
    assert list(small) == list(large) == [large[n] for n in range(9)] == rows
    assert (len(large), large[-1], large[2:4], next(reversed(large))) == (9, rows[-1], rows[2:4], rows[-1])
    assert copy.deepcopy(large)[3] == rows[3]
    with pytest.raises(IndexError):
        large[9]
    path.write_text("\n".join(lines[:3]) + "\n[1]\n")
    with pytest.raises(MoesmithError, match=r"large\.jsonl:4: the line must be a JSON object"):
        read_records(path)
    path.write_text("\n" * 40)
    with pytest.raises(MoesmithError, match=r"large\.jsonl is empty"):
        read_records(path)


def test_a_conversion_is_the_same_from_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = ASSETS / "parents" / "llama", ASSETS / "text"
    small = convert("dive-plus", model, text, tmp_path / "small")
    monkeypatch.setattr(formats, "LARGE", 16)
    large = convert("dive-plus", model, text, tmp_path / "large")
    assert weights(large.folder) == weights(small.folder)
