"""``moesmith answers``: a parent's own answers to the questions of a data source, as a data source.

OUT/answers.json: what it was made of; OUT/<domain>.train.jsonl and .test.jsonl: chats of one question and one answer,
written when all are answered. Until then they are in OUT/parts, where each batch of answers is added as it is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from moesmith.arguments import path_of, path_text, refuse_many_processes
from moesmith.console import log_to, meter, say
from moesmith.data.records import Chat, Record, asked
from moesmith.data.text import load_domains, source_digest
from moesmith.errors import MoesmithError
from moesmith.evaluation.answers import PORTION, ends_of, write_answers
from moesmith.evaluation.perplexity import context_length
from moesmith.evaluation.prompt import asked_ids
from moesmith.evaluation.writer import Written
from moesmith.files.artefact import read_json
from moesmith.files.lock import folder_lock
from moesmith.files.outputs import check_place, existing
from moesmith.files.write import write_record, write_text
from moesmith.parent.compute import AUTO, Device, DType
from moesmith.parent.load import Parent, load_parent
from moesmith.parent.vocabulary import rows_of

FORMAT = 1
HEAD = "answers.json"
SPLITS = {"train": "calibration", "test": "evaluation"}


def answers(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    domains: Sequence[str] | None = None,
    *,
    records: int = 512,
    tokens: int = 512,
    batch: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    unfinished: bool = False,
    dtype: DType = AUTO,
    device: Device = AUTO,
) -> list[dict[str, Any]]:
    """Let a parent answer what the records of a data source ask, in its chat template; repeat the call to continue.

    Args:
        model: the parent's source.
        data: the data source.
        out: the folder, which is a data source in turn.
        domains: which domains; all if left out.
        records: questions of each domain's calibration split, the first ones; of its evaluation split a quarter.
        tokens: of an answer, at most.
        batch: answers at the same time.
        temperature: 0 for the most likely token.
        seed: of the draws.
        unfinished: keep answers that did not end within ``tokens``.
        dtype: what the parent computes in.
        device: where.

    Returns:
        for each file: ``domain``, ``split``, the questions ``asked``, the answers that ``ended``, those ``kept``, and
        their ``tokens``.

    Raises:
        MoesmithError: the parent has no chat template, a domain asks nothing, nothing was kept of one, or the folder
            holds something else.
    """
    refuse_many_processes()
    source, text, place = path_text("model", model), path_text("data", data), path_of("out", out)
    check_place(place, existing(source, text))
    known = load_domains(text, domains)
    turns = {
        (d.name, s): _questions(d.name, s, getattr(d, field), records) for d in known for s, field in SPLITS.items()
    }
    parent = load_parent(source, dtype, device=device, half=False)
    if not parent.tokenizer.chat_template:
        raise MoesmithError(f"{source} has no chat template, so nothing says how to ask it", "Take a parent for chats.")
    head = {"format": FORMAT, "model": source, "parent": parent.digest, "data": text}
    head |= {"source": source_digest(text, [d.name for d in known]), "domains": [d.name for d in known]}
    head |= {"records": records, "tokens": tokens, "batch": batch, "temperature": temperature, "seed": seed}
    head |= {"unfinished": unfinished}
    _check_begun(place, head)
    with folder_lock(place):
        write_record(place / HEAD, head | {"files": []})
        with log_to(place / "answers.log"):
            kept = {part: _answered(parent, place, *part, found, head) for part, found in turns.items()}
        # only now: a folder with some of them would be a smaller data source, and nothing would say so
        files = [_file(place, *part, *found) for part, found in kept.items()]
        write_record(place / HEAD, head | {"files": files})
    return files


def _questions(domain: str, split: str, found: Sequence[Record], records: int) -> list[Chat]:
    """Return what the first records of a split ask."""
    wanted = records if split == "train" else max(1, records // 4)
    turns = list(islice((turn for record in found if (turn := asked(record)) is not None), wanted))
    if not turns:
        raise MoesmithError(f"no record of {domain} asks anything", "Name domains of questions or instructions.")
    return turns


def _check_begun(out: Path, head: dict[str, Any]) -> None:
    path = out / HEAD
    if path.is_file():
        before = read_json(path)
        apart = ("unfinished",)  # it decides what is kept of the answers, not how they are written
        if odd := [key for key, value in head.items() if key not in apart and before.get(key) != value]:
            raise MoesmithError(f"{out} was begun with another {odd[0]}", "Give the same arguments, or another --out.")
    elif out.exists() and any(not each.name.startswith(".") for each in out.iterdir()):
        raise MoesmithError(f"{out} exists and holds no answers", "Give another --out.")


def _answered(
    parent: Parent, out: Path, name: str, split: str, turns: Sequence[Chat], head: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Answer a split's questions, or those that are left; return the answers to keep, and counts."""
    part = out / "parts" / f"{name}.{split}.jsonl"
    prompts = [_ids(parent, turn) for turn in turns]
    room = context_length(parent.model, parent.tokenizer) - head["tokens"]
    fit = [index for index, ids in enumerate(prompts) if len(ids) <= room]
    if len(fit) < len(turns):
        say(f"{name}: {len(turns) - len(fit)} questions leave no room for an answer")
    done = _kept(part, len(fit), PORTION * head["batch"])
    left, ends = fit[len(done) :], ends_of(parent.model, parent.tokenizer)
    part.parent.mkdir(exist_ok=True)
    with meter(f"{name} {split}", len(left), "answers") as bar, open(part, "a", encoding="utf-8") as file:
        options = (head["tokens"], head["batch"], head["temperature"], head["seed"] + len(done))
        made = write_answers(parent.model, ends, [prompts[i] for i in left], *options, bar)
        for index, answer in zip(left, _flat(made, file), strict=True):
            record = _record(parent, turns[index], answer)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done.append(record)
    kept = [record for record in done if record["text"].strip() and (record["ended"] or head["unfinished"])]
    if not kept:
        raise MoesmithError(
            f"none of {len(done)} answers to {name} ended", "Give --unfinished, or more --tokens and another --out."
        )
    ended = sum(record["ended"] for record in done)
    counts = {"asked": len(done), "ended": ended, "kept": len(kept), "tokens": sum(one["tokens"] for one in kept)}
    return kept, counts


def _file(out: Path, name: str, split: str, kept: Sequence[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
    """Write a split's file, and say what is in it."""
    lines = (json.dumps({"messages": one["messages"]}, ensure_ascii=False) for one in kept)
    write_text(out / f"{name}.{split}.jsonl", "".join(f"{line}\n" for line in lines))
    return {"domain": name, "split": split, **counts}


def _flat(made: Iterator[list[Written]], file: Any) -> Iterator[Written]:
    """Yield answers one by one; what was written of a portion is on the disk before the next one begins."""
    for portion in made:
        yield from portion
        file.flush()


def _ids(parent: Parent, turns: Chat) -> list[int]:
    ids: list[int] = asked_ids(parent.tokenizer, turns, rows_of(parent.model))[0].tolist()
    return ids


def _record(parent: Parent, turns: Chat, answer: Written) -> dict[str, Any]:
    text = str(parent.tokenizer.decode(answer.ids, skip_special_tokens=True))
    messages = [*turns, {"role": "assistant", "content": text}]
    return {"messages": messages, "text": text, "ended": answer.ended, "tokens": len(answer.ids)}


def _kept(path: Path, wanted: int, portion: int) -> list[dict[str, Any]]:
    """Read the answers of whole portions and cut off the rest, so that portions are what they would have been."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break was cut short
    whole = lines if len(lines) >= wanted else lines[: len(lines) // portion * portion]
    with open(path, "rb+") as file:
        file.truncate(sum(len(line) + 1 for line in whole))
    return [json.loads(line) for line in whole]
