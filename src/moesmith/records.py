"""Records: the JSON objects text comes in, and the text of each.

What a record is (a passage, a question with choices, a program, ...) is told by the fields it has, never by the name
of its set. The formats are listed in ``KINDS``; unknown extra fields are ignored.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moesmith.errors import MoesmithError

Record = dict[str, Any]
Mode = Literal["", "long", "concat"]

# kind → the fields that tell it; the first kind whose fields are all there wins.
KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "multiple_choice": ("question", "choices"),
    "partial_context_choice": ("context_options", "continuation"),
    "cloze": ("context", "target"),
    "pair": ("premise", "hypothesis"),
    "code": ("prompt", "solution"),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "response"),
    "chat": ("turns",),
    "question": ("question",),
}
# What leads from a question to its answer, where a record has it.
REASONING = ("facts", "solution", "equation", "rationale", "long_answer")
BLANK = re.compile(r"(?<!\w)_+(?!\w)")  # the gap of a sentence to complete: "The bee sat on it because _ had pollen."


@dataclass(frozen=True)
class Domain:
    """A named text source.

    Attributes:
        calibration: records for moments and training.
        evaluation: records for perplexity; none of them is a calibration record.
        group: the field the domain belongs to, such as "mathematics"; may be empty.
        mode: how DIVE's sampler takes windows (``sampling.sample_windows``); empty: from the records' lengths.
    """

    name: str
    calibration: tuple[Record, ...]
    evaluation: tuple[Record, ...]
    group: str = ""
    mode: Mode = ""


def kind(record: Record) -> str:
    """The kind of a record, a key of ``KINDS``.

    Raises:
        ValueError: the record has the fields of no kind.
    """
    for name, needed in KINDS.items():
        if all(field in record for field in needed):
            return name
    found = ", ".join(sorted(map(str, record))) or "none"
    raise ValueError(f"no known kind of record has the fields {found}")


def as_text(record: Record) -> str:
    """The whole record as one natural text: passage, question, reasoning and right answer, code, or instruction.

    A multiple-choice record reads with its right choice only; where the answer is unknown (``null``), all choices
    follow the question. The result is what perplexity is measured on and what the model is trained on.

    Raises:
        ValueError: the record is of no known kind, a field has the wrong type, or there is no text in it.
    """
    text = _text(record)
    if not text.strip():
        raise ValueError("the record holds no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from error
    return text


def fields(record: Record) -> list[str]:
    """The texts of a record of which DIVE's sampler draws one (dive.md §4.3).

    A data set's description names them (``fields`` in its YAML); a pair of sentences has two; every other record is
    taken whole, so that calibration sees the text that evaluation measures.

    Raises:
        ValueError: as ``as_text``.
    """
    if isinstance(record.get("fields"), list):
        return [str(text) for text in record["fields"]]
    if kind(record) == "pair":
        return [_string(record, "premise"), _string(record, "hypothesis")]
    return [as_text(record)]


def _text(record: Record) -> str:
    match kind(record):
        case "text":
            return _string(record, "text")
        case "multiple_choice":
            return _multiple_choice(record)
        case "partial_context_choice":
            contexts = _strings(record, "context_options")
            answer = _answer(record, contexts)
            return f"{contexts[answer or 0]} {_string(record, 'continuation')}"
        case "cloze":
            return f"{_string(record, 'context')} {_string(record, 'target')}"
        case "pair":
            return _lines(record, "premise", "hypothesis")
        case "code":
            prompt = _string(record, "prompt")
            return prompt + ("" if prompt.endswith("\n") else "\n") + _string(record, "solution")
        case "instruction":
            return _lines(record, "instruction", "input", "output")
        case "prompt":
            return _lines(record, "prompt", "response")
        case "chat":
            return "\n".join(_strings(record, "turns"))
        case _:
            reasoning, answer_text = _lines(record, *REASONING), _string(record, "answer")
            head = _joined(_lines(record, "context", "question"), reasoning)
            # A worked solution mostly ends with its answer; then it is not said twice.
            said = answer_text in reasoning.rstrip().rpartition("\n")[2]
            return head if said else _joined(head, answer_text)


def _multiple_choice(record: Record) -> str:
    context, question = _string(record, "context"), _string(record, "question")
    choices = _strings(record, "choices")
    answer = _answer(record, choices)
    if answer is None:
        return _joined(context, question, *choices)
    reasoning, choice = _lines(record, *REASONING), choices[answer]
    if len(BLANK.findall(question)) == 1:
        answered = [BLANK.sub(lambda _: choice, question), reasoning]
    elif not (context or reasoning or question.rstrip().endswith(("?", ".", ":", "!", "。", "？"))):
        answered = [f"{question.rstrip()} {choice.lstrip()}"]  # the choice goes on with the sentence
    else:
        answered = [question, reasoning, choice]
    return _joined(context, *answered)


def _answer(record: Record, choices: list[str]) -> int | None:
    """The index of the right choice; ``None`` where it is not known."""
    answer = record.get("answer")
    if answer is None:
        return None
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' must be null or the index of one of {len(choices)} choices, not {answer!r:.40}")
    return answer


def _string(record: Record, field: str) -> str:
    value = record.get(field)
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return "\n".join(_strings(record, field))
    raise ValueError(f"'{field}' must be text, not {value!r:.40}")


def _strings(record: Record, field: str) -> list[str]:
    value = record[field]
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f"'{field}' must be a list of texts, not {value!r:.40}")
    return value


def _lines(record: Record, *names: str) -> str:
    return _joined(*(_string(record, name) for name in names))


def _joined(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def read_jsonl(path: str | Path) -> list[Record]:
    """Read a file of JSON lines, one record per line; blank lines are passed over.

    Raises:
        MoesmithError: the file cannot be read or holds no record, or a line is not a record; file and line are named.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MoesmithError(f"{path} cannot be read: {error.strerror or error}", "Put the file there.") from error
    records = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(line))
        except (ValueError, RecursionError) as error:
            raise MoesmithError(f"{path}:{number}: {error}", "Mend or remove the line.") from error
    if not records:
        raise MoesmithError(f"{path} is empty", "It needs one JSON object per line.")
    return records


def _record(line: bytes) -> Record:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError("the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"the line must be a JSON object, not {type(record).__name__}")
    as_text(record)  # tells what is wrong with it
    return record


def choose(known: Sequence[str], names: Sequence[str] | None, where: str) -> list[str]:
    """The domains asked for, in the order asked; all of them when ``names`` is ``None``.

    Raises:
        MoesmithError: a name is not known (the nearest known one is given) or stands twice, or the list is empty.
    """
    if names is None:
        return list(known)
    if not names:
        raise MoesmithError("no domains are named", f"{where} has {', '.join(known)}.")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            cure = f"Did you mean '{near[0]}'?" if near else f"It has {', '.join(known)}."
            raise MoesmithError(f"{where} has no domain '{name}'", cure)
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise MoesmithError(f"domain '{twice[0]}' is named twice", "Name each domain once.")
    return list(names)
