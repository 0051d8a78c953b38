"""Refuse tokens that the tokenizer knows and the model's embedding has no row for.

A tokenizer's class may add tokens that no text uses, so only those that end, begin or pad a text are refused at once.
Others are refused when a text contains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.errors import MoesmithError

CURE = (
    "Give the tokenizer that the model was trained with, or resize its embedding "
    "(resize_token_embeddings(len(tokenizer))) and train the new rows."
)


def rows_of(model: Any) -> int:
    """Count the rows of a model's embedding: it can read ids below this number."""
    return int(model.get_input_embeddings().weight.shape[0])


def refuse_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse a tokenizer whose end-of-text, begin-of-text or padding token has no row.

    Raises:
        MoesmithError: one has none. The error names the token with which the generation config ends a text, if any.
    """
    rows = rows_of(model)
    roles = {"end-of-text": "eos_token", "begin-of-text": "bos_token", "padding": "pad_token"}
    for what, field in roles.items():
        index = getattr(tokenizer, f"{field}_id", None)
        if index is None or index < rows:
            continue
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        own = own[0] if isinstance(own, list) and own else own
        cure = CURE
        if isinstance(own, int) and own < rows:
            cure = f"Set {field} to {tokenizer.convert_ids_to_tokens(own)!r}, with which the model ends a text. {CURE}"
        raise MoesmithError(
            f"The {what} token of {source}'s tokenizer, {getattr(tokenizer, field)!r}, is number {index}, and the "
            f"embedding has {rows:,} rows",
            cure,
        )


def refuse_ids(ids: Tensor, rows: int, where: str) -> None:
    """Refuse token ids, of any shape, that an embedding of ``rows`` rows cannot read.

    Raises:
        MoesmithError: there is one.
    """
    if ids.numel() and (worst := int(ids.max())) >= rows:
        raise MoesmithError(
            f"{where} contains token {worst}, which the tokenizer knows and the embedding of {rows:,} rows does not",
            "Remove it from the text. " + CURE,
        )


def readable(texts: Mapping[str, Tensor], model: Any) -> None:
    """Refuse text with tokens that the embedding has no row for.

    Raises:
        MoesmithError: there are some; the domain is named.
    """
    for name, ids in texts.items():
        refuse_ids(ids, rows_of(model), f"the text of {name}")
