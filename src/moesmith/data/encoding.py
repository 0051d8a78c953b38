"""Turn texts and chats into token ids: control tokens where a chat template writes them, and nowhere else.

A text that spells a control token (``<|im_end|>`` on a web page, ``<filename>`` in a program's help) is read as the
characters it is made of. A chat goes through the parent's own chat template, whose control tokens are the real ones;
those that a message spells are characters here as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.tokenization_mistral_common import MistralCommonBackend

from moesmith.data.records import Chat, Domain, Record, as_text, chat
from moesmith.errors import MoesmithError
from moesmith.files.seal import digest

BATCH = 64  # texts per tokenizer call
# what replaces a spelled control token while the template is filled in begins and ends with: private-use characters
OPENS, CLOSES = "\ue000", "\ue001"
TODAY = datetime(2024, 7, 26)  # for templates that write the date (Llama 3's own fallback): text must not change by day


def encoded(
    sources: Iterable[str | Chat], tokenizer: PreTrainedTokenizerBase, eos: bool = False
) -> Iterator[list[int]]:
    """Yield the token ids of texts and chats, each by itself.

    Args:
        sources: texts get the special tokens that the tokenizer adds; chats those that their template writes.
        tokenizer: the parent's.
        eos: end each with the end-of-text token, if there is one, and if a chat's template wrote none.

    Raises:
        MoesmithError: the tokenizer has no chat template for a chat, or its template refuses the chat.
    """
    rest = iter(sources)
    end: int | None = tokenizer.eos_token_id if eos else None
    while batch := list(islice(rest, BATCH)):
        texts = [source for source in batch if isinstance(source, str)]
        plain = iter(_plain(texts, tokenizer) if texts else ())
        for source in batch:
            ids = next(plain) if isinstance(source, str) else chat_ids(source, tokenizer)
            ended = ids[-1:] == [end] if isinstance(source, str) else end in ids
            yield ids if end is None or ended else [*ids, end]


def _plain(texts: list[str], tokenizer: PreTrainedTokenizerBase, special: bool = True) -> list[list[int]]:
    # verbose=False: records longer than the model's context are intended; they are cut into windows afterwards.
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False, "add_special_tokens": special}
    if not isinstance(tokenizer, MistralCommonBackend):  # that one never reads control tokens in a text
        options["split_special_tokens"] = True
    return tokenizer(texts, **options)["input_ids"]


def chat_ids(
    messages: Chat, tokenizer: PreTrainedTokenizerBase, *, answer: bool = False, today: bool = False
) -> list[int]:
    """Return the token ids of a chat as its parent's template lays it out.

    Where a message spells a control token, the text before, in and after it is tokenised separately.

    Args:
        messages: the chat.
        tokenizer: the parent's.
        answer: end where the model is to answer.
        today: let a template that asks for the date have the real one.

    Raises:
        MoesmithError: as :func:`encoded`.
    """
    ids: list[int] = []
    for index, piece in enumerate(_laid_out(messages, tokenizer, answer, today)):
        if index % 2:
            ids += _plain([piece], tokenizer, special=False)[0]
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _laid_out(
    messages: Chat, tokenizer: PreTrainedTokenizerBase, answer: bool = False, today: bool = False
) -> list[str]:
    """Lay out a chat by its template, cut at the control tokens that messages spell: every second piece is one."""
    if not getattr(tokenizer, "chat_template", None):
        what = "the data holds chats, and the parent has no chat template to read them with"
        raise MoesmithError(what, "Give a parent with a template, or records with the field text.")
    spelled: list[str] = []
    pattern = control_pattern(tokenizer)
    # a message may hold these characters: the mark has one more of them in a row than any
    runs = re.findall(f"{OPENS}+", json.dumps(messages, ensure_ascii=False, default=str))
    opening = OPENS * (1 + max(map(len, runs), default=0))

    def hide(found: re.Match[str]) -> str:
        spelled.append(found[0])
        return f"{opening}{len(spelled) - 1}{CLOSES}"

    if pattern is not None:
        messages = [{**message, "content": pattern.sub(hide, message["content"])} for message in messages]
    try:
        template = tokenizer.get_chat_template() if today else _dated(tokenizer.get_chat_template())
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": answer}
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, **options))
        text.encode()  # refuses half of a surrogate pair in a role or a tool's name
    except Exception as error:  # jinja's, the template's own, or one about a type that it did not expect
        reason = str(error).partition("\n")[0] or type(error).__name__
        if answer:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            what = f"the chat template fails on turns of {roles}: {reason}"
            raise MoesmithError(what, "Leave the system message or the template out.") from error
        what = f"the parent's chat template refuses a chat that begins {messages[0]['content'][:40]!r}: {reason}"
        raise MoesmithError(what, "Fix or leave out records like it.") from error
    pieces = re.split(rf"{opening}(\d+){CLOSES}", text)
    return [spelled[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces)]


def _dated(template: str) -> str:
    """Give a template that asks for the date a clock that always says :data:`TODAY`."""
    formats = re.findall(r"""strftime_now\(\s*["']([^"']+)["']""", template)
    dates = json.dumps({form: TODAY.strftime(form) for form in formats})
    clock = "{% macro strftime_now(format) %}{{ " + dates + "[format] }}{% endmacro %}\n"
    return clock + template if formats else template


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Return a pattern for the spelling of any control token, the longest first; ``None`` where there are none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))) if names else None


def spelled(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the records that spell a control token in their text, chats not counted."""
    pattern = control_pattern(tokenizer)
    if pattern is None:
        return 0
    return sum(chat(record) is None and pattern.search(as_text(record)) is not None for record in records)


def check_chats(domain: Domain, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the template can be filled in for every chat of a domain.

    Raises:
        MoesmithError: it cannot; domain, split and record are named.
    """
    for split, records in (("calibration", domain.calibration), ("evaluation", domain.evaluation)):
        for number, record in enumerate(records, start=1):
            messages = chat(record)
            if messages is None:
                continue
            try:
                laid_out = _laid_out(messages, tokenizer)
            except MoesmithError as error:
                raise MoesmithError(f"domain {domain.name}, {split} record {number}: {error}") from error
            if not "".join(laid_out).strip():
                raise MoesmithError(
                    f"domain {domain.name}, {split} record {number}: the chat template makes no text of it",
                    "Fix or leave out records like it.",
                )


def reading(records: Mapping[str, Sequence[Record]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Say what else token ids depend on: the template of chats, and that spelled control tokens are plain characters.

    Empty where there are neither: older versions read such tokens as control tokens, and all other text as today.
    """
    counts = {name: spelled(of, tokenizer) for name, of in records.items()}
    settings: dict[str, Any] = {"spelled": counts} if any(counts.values()) else {}
    if any(chat(record) for of in records.values() for record in of):
        settings["chat_template"] = digest(tokenizer.chat_template)
    return settings
