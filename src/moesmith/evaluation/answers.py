"""Let a model answer prompts, several at the same time, and say which answers ended by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import Meter
from moesmith.evaluation.perplexity import evaluating
from moesmith.evaluation.writer import Written, keeps_all, write

PORTION = 4  # batches of prompts that are answered together: where an answer ends, another prompt takes its place


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end an answer: those of the model's generation config, else the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config else None  # type: ignore[union-attr]
    ends = tokenizer.eos_token_id if ends is None else ends
    return sorted({ends} if isinstance(ends, int) else set(ends or ()))


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

        if keeps_all(model):
            options: dict[str, Any] = {"temperature": temperature, "seed": seed + start}
            write(model, part, done, ends=ends, new=new, rows=batch, **options)
        else:
            for first in range(0, len(part), batch):
                made = _generated(model, ends, part[first : first + batch], new, temperature, seed + start + first)
                for index, answer in enumerate(made, first):
                    done(index, answer)
        yield [found[index] for index in range(len(part))]


def _generated(
    model: PreTrainedModel,
    ends: Sequence[int],
    prompts: Sequence[Sequence[int]],
    new: int,
    temperature: float,
    seed: int,
) -> list[Written]:
    """Answer prompts with transformers' ``generate``, which knows caches of every kind."""
    generate: Any = model.generate
    pad, longest = min(ends, default=0), max(map(len, prompts))
    options: dict[str, Any] = {"max_new_tokens": new, "pad_token_id": pad, "eos_token_id": list(ends) or None}
    options |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        made = generate(ids, attention_mask=mask, **options)
    found = []
    for row in made[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        found.append(Written(row if end is None else row[:end], end is not None))
    return found
