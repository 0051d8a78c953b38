"""``moesmith answers``: what a record asks, whose answers are kept, and that a killed command goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesmith.chat import answers as module
from moesmith.chat.answers import answers
from moesmith.data.records import asked, whole
from moesmith.data.text import load_domains
from moesmith.errors import MoesmithError
from moesmith.evaluation.answers import Written
from moesmith.testing.parents import save_tiny

torch.set_num_threads(1)
Record = dict[str, Any]
USER = "user"


def turn(content: str, role: str = USER) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [turn("Be kind.", "system"), turn("Hi"), turn("Hello", "assistant"), turn("Bye")]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [turn("Add.\n1 and 2")]),
        ({"instruction": "Add.", "input": "", "output": "3"}, [turn("Add.")]),
        ({"prompt": "def f():", "solution": "pass"}, [turn("def f():")]),
        ({"prompt": "Hi", "response": "Hello"}, [turn("Hi")]),
        ({"question": "Why?", "answer": "So."}, [turn("Why?")]),
        ({"context": "It rains.", "question": "Why?"}, [turn("It rains.\nWhy?")]),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, [turn("Which?\na\nb")]),
        ({"turns": ["First", "second"]}, [turn("First")]),
        (
            {"messages": [*TALK, turn("Goodbye.", "assistant")]},
            TALK,
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, [turn("Hi")]),
        ({"messages": [turn("Be kind.", "system")]}, None),
        ({"text": "It rains."}, None),
        ({"context": "It", "target": "rains"}, None),
        ({"premise": "a", "hypothesis": "b"}, None),
        ({"instruction": "", "output": "3"}, None),
    ],
)  # fmt: skip
def test_what_a_record_asks(record: Record, turns: list[Record] | None) -> None:
    assert asked(record) == turns


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("parent") / "parent")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 11), ("test", 5)):
        records = [{"question": "Why " * (1 + i % 4) + f"{split} {i}?", "answer": "So."} for i in range(count)]
        (folder / f"asks.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (folder / f"tells.{split}.jsonl").write_text(json.dumps({"text": f"It rains in {split}."}) + "\n")
    return folder


OPTIONS: dict[str, Any] = {"records": 10, "tokens": 8, "batch": 4, "unfinished": True, "dtype": "fp32"}


def test_answers_are_those_of_transformers_and_a_data_source(parent: Path, data: Path, tmp_path: Path) -> None:
    rows = answers(parent, data, tmp_path / "out", "asks", **OPTIONS)
    assert [(row["split"], row["asked"], row["kept"]) for row in rows] == [("train", 10, 10), ("test", 2, 2)]
    (domain,) = load_domains(tmp_path / "out")
    assert (domain.name, len(domain.calibration), len(domain.evaluation)) == ("asks", 10, 2)
    tokenizer, model = AutoTokenizer.from_pretrained(parent), AutoModelForCausalLM.from_pretrained(parent).float()
    for record in domain.calibration[:5]:
        *before, last = whole(record)  # type: ignore[misc]
        text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert last == turn(tokenizer.decode(made, skip_special_tokens=True), "assistant")


@pytest.mark.parametrize("after", [0, 1, 6, 10])  # of ten answers for one file and two for the other
def test_a_killed_command_goes_on_as_if_nothing_had_been(
    after: int, parent: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = OPTIONS | {"temperature": 1.0, "seed": 3}
    rows = answers(parent, data, tmp_path / "whole", "asks", **drawn)
    real, left = module._record, [after]

    def killed(*args: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            answers(parent, data, tmp_path / "out", "asks", **drawn)
    assert not list((tmp_path / "out").glob("*.jsonl"))
    with open(tmp_path / "out" / "parts" / "asks.train.jsonl", "a") as file:
        file.write('{"messages": [{"ro')  # cut short
    assert answers(parent, data, tmp_path / "out", "asks", **drawn) == rows
    assert answers(parent, data, tmp_path / "out", "asks", **drawn) == rows  # nothing is left to do
    for name in ("asks.train.jsonl", "asks.test.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    texts = (tmp_path / "out" / "asks.train.jsonl").read_text().splitlines()
    assert len(set(texts)) == 10


def test_only_answers_that_end_are_kept(
    parent: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(_model: Any, _ends: Any, prompts: list[Any], *_: Any) -> Iterator[list[Written]]:
        yield [Written([40 + i, 41], i % 3 == 0) for i in range(len(prompts))]

    monkeypatch.setattr(module, "write_answers", made)
    options = OPTIONS | {"unfinished": False}
    train, test = answers(parent, data, tmp_path / "out", "asks", **options)
    assert train == {"domain": "asks", "split": "train", "asked": 10, "ended": 4, "kept": 4, "tokens": 8}
    assert test["kept"] == 1
    monkeypatch.setattr(module, "write_answers", lambda *a: ([Written([40], False)] * len(a[2]) for _ in (0,)))
    with pytest.raises(MoesmithError, match=r"none of 10 answers to asks ended"):
        answers(parent, data, tmp_path / "none", "asks", **options)
    rows = answers(parent, data, tmp_path / "none", "asks", **OPTIONS)  # the same answers, all of them kept
    assert [(row["ended"], row["kept"]) for row in rows] == [(0, 10), (0, 2)]


def test_what_cannot_be_asked_is_refused(parent: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match="no record of tells asks anything"):
        answers(parent, data, tmp_path / "out", "tells", **OPTIONS)
    answers(parent, data, tmp_path / "out", "asks", **OPTIONS)
    with pytest.raises(MoesmithError, match="was begun with another tokens"):
        answers(parent, data, tmp_path / "out", "asks", **OPTIONS | {"tokens": 9})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")
    with pytest.raises(MoesmithError, match="exists and holds no answers"):
        answers(parent, data, tmp_path / "other", "asks", **OPTIONS)
    plain = save_tiny("llama", tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(MoesmithError, match="has no chat template"):
        answers(plain, data, tmp_path / "new", "asks", **OPTIONS)


def test_the_command(parent: Path, data: Path, tmp_path: Path) -> None:
    words = ["--model", parent, "--data", data, "--out", tmp_path / "out", "--records", "3", "--tokens", "4"]
    shown = moesmith("answers", *words, "--domains", "asks", "--unfinished", "--json")
    assert [row["kept"] for row in json.loads(shown.out)] == [3, 1]
    again = moesmith("answers", *words)
    assert (again.status, again.out) == (2, "")
    assert "no record of tells asks anything. Name domains" in again.err
