"""Who answers in a chat: a model in transformers, or a GGUF file (``chat/llamacpp.py``); and an answer as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moesmith.console import say
from moesmith.evaluation.answers import go_on
from moesmith.evaluation.prompt import Turns, asked_ids
from moesmith.parent.checkpoint import BUILTIN, builtin_file, from_folder, refuse_remote_code, stored_dtype
from moesmith.parent.compute import Device, DType, choose_device, move
from moesmith.parent.load import choose_compute
from moesmith.parent.vocabulary import rows_of
from moesmith.run.folder import open_run


@dataclass
class Answer:
    """What a model has written so far; it is shown as it comes, and stays when it is stopped.

    Attributes:
        show: gets every piece of text.
        text: all of them.
        tokens: how many were made, the end among them.
        times: seconds, on one clock, of the question and of the first and last token.
    """

    show: Callable[[str], None]
    text: str = ""
    tokens: int = 0
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def count(self, tokens: int) -> None:
        """Note that tokens were made just now."""
        self.tokens += tokens
        self.times[1:] = [*self.times[1:2], time.perf_counter()] if self.tokens > tokens else [time.perf_counter()] * 2

    def add(self, piece: str) -> None:
        """Show some more text."""
        self.text += piece
        if piece:
            self.show(piece)

    def __str__(self) -> str:
        """Say how many tokens there were and how fast they came after the first, which waits for the prompt."""
        if not self.tokens:
            return "no tokens"
        asked, first, last = self.times
        rate = f", {(self.tokens - 1) / (last - first):,.1f} tokens/s" if last > first else ""
        return f"{self.tokens:,} token{'s' * (self.tokens > 1)}{rate}, the first after {first - asked:.2f} s"


class Speaker(Protocol):
    """A model that answers.

    Attributes:
        name: what it is called.
        templated: whether it has a chat template; without one it continues text.
    """

    name: str
    templated: bool

    def answer(self, turns: Turns, tokens: int, temperature: float, answer: Answer) -> None:
        """Answer a conversation, or continue the text of its last turn if there is no template.

        Args:
            turns: ``role`` and ``content`` of each.
            tokens: new ones at most.
            temperature: 0 for the most likely token.
            answer: filled as tokens come; interrupted, it has what there was.

        Raises:
            MoesmithError: the conversation cannot be answered.
        """

    def close(self) -> None:
        """Free what it holds."""


class Pieces(TextStreamer):
    """Hands generated tokens to an answer, as whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer: Answer) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answer = answer

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        if not self.next_tokens_are_prompt:
            self.answer.count(1)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on."""
        self.answer.add(text)


class Model:
    """A model in transformers."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.templated = bool(tokenizer.chat_template)

    @classmethod
    def load(cls, name: str, source: str, dtype: DType, device: Device) -> Model:
        """Load any folder or hub id that transformers loads, without asking whether it could be carved.

        Raises:
            MoesmithError: it cannot be loaded.
        """
        where = choose_device(device)
        refuse_remote_code(source)
        model, tokenizer = from_folder(source, stored_dtype(source), where)
        choice = choose_compute(model, dtype, where)
        say(f"computes in {choice}")
        return cls(name, move(model.eval(), choice.dtype, choice.device), tokenizer)

    def answer(self, turns: Turns, tokens: int, temperature: float, answer: Answer) -> None:
        """As :meth:`Speaker.answer` (:func:`moesmith.evaluation.answers.go_on`)."""
        rows = rows_of(self.model)
        ids = asked_ids(self.tokenizer, turns, rows, templated=self.templated, today=True)
        pieces = Pieces(self.tokenizer, answer)
        try:
            go_on(self.model, self.tokenizer, ids, tokens, temperature, pieces)
        finally:
            pieces.end()  # an interrupted word

    def close(self) -> None:
        """Nothing to do: the memory is freed with the model."""


def speaker_of(source: str, dtype: DType, device: Device, name: str | None = None) -> Speaker:
    """Load what answers: a finished run, a GGUF file, or a folder or hub id that transformers loads.

    Raises:
        MoesmithError: it cannot be loaded.
    """
    path = builtin_file(source) if source in BUILTIN else Path(source)
    if path.suffix == ".gguf":
        from moesmith.chat.llamacpp import LlamaCpp

        return LlamaCpp(name or path.name, path)
    if (path / "run.json").is_file():
        run = open_run(path)
        run.check_finished()
        run.check_files()
        return Model.load(name or "MoE", str(run.model), dtype, device)
    return Model.load(name or path.name or source, source, dtype, device)
