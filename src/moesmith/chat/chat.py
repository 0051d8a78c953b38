"""``moesmith chat``: questions from a terminal or a pipe, answers as they are written, with their speed."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from moesmith.chat.speaker import Answer, Model, Speaker, speaker_of
from moesmith.console import say, show_piece, show_text
from moesmith.errors import MoesmithError
from moesmith.evaluation.compare import models_of
from moesmith.parent.compute import AUTO, Device, DType

COMMANDS = {
    "/reset": "forget the conversation",
    "/help": "say this",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass
class Talk:
    """A conversation with one model.

    Attributes:
        speaker: the model.
        system: what it is told before anything else.
        turns: what was said since.
    """

    speaker: Speaker
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, prompt: str, tokens: int, temperature: float) -> Answer:
        """Show the answer to a prompt while it is written; one that is stopped by Ctrl-C stays as it is.

        Raises:
            MoesmithError: it cannot be answered; the prompt is forgotten.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = {"role": "user", "content": prompt}
        answer, stopped = Answer(show_piece), ""
        try:
            self.speaker.answer([*system, *self.turns, asked], tokens, temperature, answer)
        except KeyboardInterrupt:
            stopped = "stopped; "
        show_text(f"{'' if answer.text.endswith(chr(10)) else chr(10)}[{stopped}{answer}]\n")
        self.turns += [asked, {"role": "assistant", "content": answer.text}]
        return answer


def chat(
    source: str,
    beside: str | None = None,
    *,
    parent: bool = False,
    tokens: int = 512,
    temperature: float = 0.0,
    system: str | None = None,
    dtype: DType = AUTO,
    device: Device = AUTO,
) -> None:
    """Answer prompts from standard input until it ends, line by line.

    Args:
        source: a finished run, a GGUF file (in llama.cpp), or a folder or hub id that transformers loads.
        beside: another of these, which answers every prompt first.
        parent: take the run's dense parent for that.
        tokens: of an answer, at most.
        temperature: 0 for the most likely token.
        system: a system message.
        dtype: what models in transformers compute in.
        device: where these compute.

    Raises:
        MoesmithError: a model cannot be loaded or has no place for a system message; of input that is no terminal, a
            prompt that cannot be answered.
    """
    if parent and beside is not None:
        raise MoesmithError("--parent and --beside name the same", "Give one of them.")
    if temperature < 0:
        raise MoesmithError(f"the temperature is {temperature:g}", "Give 0 or more.")
    with ExitStack() as held:
        talks = []
        for speaker in _speakers(source, beside, parent, dtype, device, held):
            if not speaker.templated:
                what = f"{speaker.name} has no chat template"
                if system is not None:
                    raise MoesmithError(f"{what}, so no place for a system message", "Leave --system out.")
                say(f"{what}: it continues each text by itself, and remembers nothing")
            talks.append(Talk(speaker, system))
        say(f"{', '.join(COMMANDS)}; Ctrl-C stops an answer", logging.INFO if sys.stdin.isatty() else logging.DEBUG)
        for prompt in _prompts():
            if re.fullmatch(r"/[a-z]+", prompt):
                if prompt == "/quit":
                    break
                _obey(prompt, talks)
                continue
            for talk in talks:
                if len(talks) > 1:
                    show_text(f"--- {talk.speaker.name} ---")
                try:
                    talk.ask(prompt, tokens, temperature)
                except MoesmithError as error:
                    if not sys.stdin.isatty():
                        raise
                    say(str(error), logging.ERROR)


def _speakers(
    source: str, beside: str | None, parent: bool, dtype: DType, device: Device, held: ExitStack
) -> list[Speaker]:
    """Load the models, the one to compare with first; ``held`` closes them."""
    if parent:
        if not (Path(source) / "run.json").is_file():
            raise MoesmithError(f"{source} is no run, so its parent is not known", "Give --beside PARENT.")
        dense, moe = models_of(Path(source), dtype, device)
        return [Model("dense parent", dense.model, dense.tokenizer), Model("MoE", moe, dense.tokenizer)]
    found = []
    for name in (source,) if beside is None else (beside, source):
        found.append(speaker_of(name, dtype, device))
        held.callback(found[-1].close)
    if len(found) > 1 and found[0].name == found[1].name:
        found[0].name, found[1].name = str(beside), source
    return found


def _obey(command: str, talks: list[Talk]) -> None:
    """Do what a word that begins with a slash says."""
    if command == "/reset":
        for talk in talks:
            talk.turns.clear()
        say("forgotten")
        return
    if command != "/help":
        say(f"there is no {command}")
    for name, what in COMMANDS.items():
        say(f"{name}: {what}")


def _prompts() -> Iterator[str]:
    """Yield what is asked, without empty lines: from a terminal with its line editing, or line by line."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrows and history for input()
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            show_text("")
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            say("\n/quit or Ctrl-D ends")
            continue
        except UnicodeDecodeError as error:
            raise MoesmithError("standard input is not UTF-8 text", "Give text, one prompt a line.") from error
        if not typed and not line:
            return
        if prompt := line.encode("utf-8", "replace").decode("utf-8").strip():
            if not typed:
                show_text(f"> {prompt}")
            yield prompt
