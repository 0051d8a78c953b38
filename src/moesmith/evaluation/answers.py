"""Let a model answer prompts, several at the same time, and say which answers ended by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.evaluation.perplexity import evaluating


@dataclass(frozen=True)
class Written:
    """An answer.

    Attributes:
        ids: its token ids, without the end.
        ended: whether it ended by itself.
    """

    ids: list[int]
    ended: bool


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
) -> Iterator[list[Written]]:
    """Answer prompts of any lengths, ``batch`` at a time.

    Args:
        model: the parent, or a mixture made of it.
        ends: tokens that end an answer (:func:`ends_of`).
        prompts: token ids of each.
        new: most tokens of an answer.
        batch: prompts at the same time.
        temperature: 0 for the most likely token.
        seed: of the draws; a batch's draws do not depend on the batches before it.

    Yields:
        the answers to the next prompts, in order.
    """
    generate: Any = model.generate
    pad = min(ends, default=0)
    options: dict[str, Any] = {"max_new_tokens": new, "pad_token_id": pad, "eos_token_id": list(ends) or None}
    options |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part], device=model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed + start)
            made = generate(ids, attention_mask=mask, **options)
        found = []
        for row in made[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), None)
            found.append(Written(row if end is None else row[:end], end is not None))
        yield found
