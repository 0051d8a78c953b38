"""Read the text of records, the JSON objects that text comes in.

The fields of a record say what it is (a passage, a question with choices, a program, ...), never the name of its set.
The formats are listed in ``KINDS``; unknown extra fields are ignored.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesmith.errors import MoesmithError

Record = dict[str, Any]
Chat = list[dict[str, Any]]  # messages, each with at least "role" and "content", both texts
Mode = Literal["", "long", "concat"]

# kind → the fields that identify it; the first kind whose fields are all there wins.
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
    "messages": ("messages",),
    "conversations": ("conversations",),
}
NUMERIC = ("answer", "target", "solution", "output", "response")  # fields that may hold a number instead of text
# the speaker in ShareGPT's "from" → a role that chat templates know
SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
# What leads from a question to its answer, where a record has it.
REASONING = ("facts", "solution", "equation", "rationale", "long_answer")
BLANK = re.compile(r"(?<!\w)_+(?!\w)")  # the gap of a sentence to complete: "The bee sat on it because _ had pollen."


@dataclass(frozen=True)
class Domain:
    """A named text source.

    Attributes:
        calibration: records for moments and training.
        evaluation: records for perplexity; ``overlap`` counts how many of them calibration has too.
        group: the field the domain belongs to, such as "mathematics"; may be empty.
        mode: how DIVE's sampler takes windows (``sampling.sample_windows``); if empty, the records' lengths decide.
    """

    name: str
    calibration: Sequence[Record]
    evaluation: Sequence[Record]
    group: str = ""
    mode: Mode = ""


def kind(record: Record) -> str:
    """Return the kind of a record, a key of ``KINDS``.

    Raises:
        ValueError: the record has the fields of no kind.
    """
    for name, needed in KINDS.items():
        if all(field in record for field in needed):
            return name
    names = ", ".join(sorted(map(str, record))) or "none"
    raise ValueError(f"no known kind of record has the fields {names}")


def as_text(record: Record) -> str:
    """Write the whole record as one natural text: passage, question, reasoning and right answer, code, or instruction.

    A multiple-choice record reads with its right choice only; where the answer is unknown (``null``), all choices
    follow the question. The result is what perplexity is measured on and what the model is trained on, except
    that a chat is read through the parent's chat template (``encoding``); here it is its messages, one per line.

    Raises:
        ValueError: the record is of no known kind, a field has the wrong type, or there is no text in it.
    """
    text = _text(record)
    if not text.strip():
        raise ValueError("the record holds no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair, which is not a character") from error
    return text


def fields(record: Record) -> list[str | Chat]:
    """Return a record's texts; DIVE's sampler draws one of them.

    A data set's description names them (``fields`` in its YAML); a pair of sentences has two; every other record is
    taken whole, so that calibration sees the text that evaluation measures.

    Raises:
        ValueError: as ``as_text``.
    """
    named = record.get("fields")
    if isinstance(named, list) and named and all(isinstance(text, str) for text in named):
        return list(named)
    if kind(record) == "pair":
        return [_string(record, "premise"), _string(record, "hypothesis")]
    return [whole(record)]


def whole(record: Record) -> str | Chat:
    """Return what a model reads of a record: its text, or the messages of a chat.

    Raises:
        ValueError: as ``as_text``.
    """
    return chat(record) or as_text(record)


def chat(record: Record) -> Chat | None:
    """Return the messages of a record that is a chat; ``None`` for every other record.

    ``messages`` as chat APIs have them (``role``, ``content``: text, or a list of parts of type text) and ShareGPT's
    ``conversations`` (``from``, ``value``) come out alike. Further entries of a message (``tool_calls``, ...) are left
    as they are, for the template.

    Raises:
        ValueError: it is not a list of such messages.
    """
    name = kind(record)
    if name not in ("messages", "conversations"):
        return None
    messages = record[name]
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise ValueError(f"'{name}' must be a list of messages, not {messages!r:.40}")
    return [_message(message, name) for message in messages]


def asked(record: Record) -> Chat | None:
    """Return the turns that a model may answer: a chat's up to its last answer, else one question of a user.

    ``None`` for a record that asks nothing: running text, a cloze, a pair of sentences.

    Raises:
        ValueError: as ``as_text``.
    """
    match kind(record):
        case "messages" | "conversations":
            turns = chat(record) or []
            last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
            return turns[: last + 1] or None
        case "chat":
            question = _strings(record, "turns")[0]
        case "instruction":
            question = _lines(record, "instruction", "input")
        case "code" | "prompt":
            question = _string(record, "prompt")
        case "multiple_choice":
            question = _lines(record, "context", "question", "choices")
        case "question":
            question = _lines(record, "context", "question")
        case _:
            return None
    return [{"role": "user", "content": question}] if question.strip() else None


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"a message of '{name}' is from {speaker!r:.40}, not one of {', '.join(SPEAKERS)}")
        return {"role": SPEAKERS[speaker], "content": _content(message.get("value"), name)}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"a message of '{name}' has no 'role'")
    if "content" not in message and "tool_calls" not in message:
        raise ValueError(f"a message of '{name}' has no 'content'")
    return {**message, "content": _content(message.get("content", ""), name)}


def _content(content: Any, name: str) -> str:
    """Return a message's text; parts are joined by line breaks, as servers do for templates that take texts only."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "\n".join(map(str, parts))
    raise ValueError(f"the content of a message of '{name}' must be text, not {content!r:.40}")


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
        case "messages" | "conversations":
            return "\n".join(message["content"] for message in chat(record) or ())
        case _:
            reasoning, answer_text = _lines(record, *REASONING), _string(record, "answer")
            head = _joined(_lines(record, "context", "question"), reasoning)
            # A worked solution mostly ends with its answer, which is then not repeated.
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
        answered = [f"{question.rstrip()} {choice.lstrip()}"]  # the choice continues the sentence
    else:
        answered = [question, reasoning, choice]
    return _joined(context, *answered)


def _answer(record: Record, choices: list[str]) -> int | None:
    """Return the index of the right choice; ``None`` where it is not known."""
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and field in NUMERIC and math.isfinite(value):
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


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names of domains that cannot also name files, tensors and a table's columns.

    Raises:
        MoesmithError: a name is empty or long, begins with a dot, holds a slash or a character that is not printable,
            or differs from another one only in capitals.
    """
    seen: dict[str, str] = {}
    for name in names:
        what = ""
        if not name.strip() or name != name.strip() or len(name.encode(errors="replace")) > 120:
            what = "is empty, begins or ends with white space, or is longer than 120 bytes"
        elif name.startswith(".") or "/" in name or "\\" in name or not _printable(name) or name == "__metadata__":
            what = "begins with a dot, holds a slash or a character that cannot be printed, or is reserved"
        elif (other := seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            what = f"differs from {other!r} only in capitals, which some file systems ignore"
        if what:
            raise MoesmithError(f"{where} has a domain called {name!r:.80}, which {what}", "Give it another name.")


def _printable(name: str) -> bool:
    return name.replace("\u200c", "").replace("\u200d", "").isprintable()  # joiners belong to words of some scripts


def choose(known: Sequence[str], names: Sequence[str] | None, where: str) -> list[str]:
    """Return the domains asked for, in the order asked; all of them when ``names`` is ``None``.

    Raises:
        MoesmithError: a name is not known (the nearest known one is given) or is given twice, or the list is empty.
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
