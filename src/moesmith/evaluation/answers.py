"""Let a model answer prompts, several at the same time, and say which answers ended by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import Meter
from moesmith.evaluation.writer import Written, write

PORTION = 4  # batches of prompts that are answered together: where an answer ends, another prompt takes its place


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end an answer: those of the model's generation config, and the tokenizer's end of text."""
    own = model.generation_config.eos_token_id if model.generation_config else None  # type: ignore[union-attr]
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return [int(end) for end in dict.fromkeys(ends) if end is not None]


def write_answers(
    model: PreTrainedModel,
    ends: Sequence[int],
    prompts: Sequence[Sequence[int]],
    new: int,
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
    bar: Meter | None = None,
) -> Iterator[list[Written]]:
    """Answer prompts of any lengths, ``batch`` at a time.

    Args:
        model: the parent, or a mixture made of it.
        ends: tokens that end an answer (:func:`ends_of`).
        prompts: token ids of each.
        new: most tokens of an answer.
        batch: prompts at the same time.
        temperature: 0 for the most likely token.
        seed: of the draws; a portion's do not depend on the portions before it.
        bar: a progress bar that counts answers.

    Yields:
        the answers to the next :data:`PORTION` · ``batch`` prompts, in order.
    """
    for start in range(0, len(prompts), PORTION * batch):
        part = prompts[start : start + PORTION * batch]
        found: dict[int, Written] = {}

        def done(index: int, answer: Written) -> None:
            found[index] = answer  # noqa: B023
            if bar is not None:
                bar.advance(1)

        options: dict[str, Any] = {"temperature": temperature, "seed": seed + start}
        write(model, part, done, ends=ends, new=new, rows=batch, **options)
        yield [found[index] for index in range(len(part))]
