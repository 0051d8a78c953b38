"""Let a model answer: one prompt, or several at the same time, saying which answers ended by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moesmith.console import Meter
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import evaluating
from moesmith.evaluation.writer import Written, write
from moesmith.parent.checkpoint import quiet

TOO_LONG = "Give a shorter prompt; in a chat, write /reset to begin anew."
PORTION = 4  # batches of prompts that are answered together: where an answer ends, another prompt takes its place


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end an answer: those of the model's generation config, and the tokenizer's end of text."""
    own = model.generation_config.eos_token_id if model.generation_config else None  # type: ignore[union-attr]
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return [int(end) for end in dict.fromkeys(ends) if end is not None]


def go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_1S: Tensor,
    tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[int]:
    """Continue a text with transformers' ``generate``.

    Only the temperature shapes the choice, whatever the model's generation config says (it may hold a penalty for
    repetition, or how to draw).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids_1S: the text, (1, S).
        tokens: new ones at most; fewer where the model's context ends before.
        temperature: 0 for the most likely token.
        streamer: gets the text's ids, then every new one.

    Returns:
        the new token ids, with the end if there is one.

    Raises:
        MoesmithError: the text leaves no room in the model's context.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    room = tokens if longest is None else min(tokens, longest - ids_1S.shape[1])
    if room < 1:
        raise MoesmithError(f"{ids_1S.shape[1]:,} tokens leave no room for an answer in {longest:,}", TOO_LONG)
    ids_1S, ends, own = ids_1S.to(model.device), ends_of(model, tokenizer), model.generation_config
    options: dict[str, Any] = {"max_new_tokens": room, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    generate: Any = model.generate
    # what an argument leaves out, generate takes from the model's own config: so that is put aside
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.eos_token_id)
    try:
        with quiet(), evaluating(model):
            made: Tensor = generate(ids_1S, attention_mask=torch.ones_like(ids_1S), streamer=streamer, **options)
    finally:
        model.generation_config = own
    return made[0, ids_1S.shape[1] :].tolist()


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
