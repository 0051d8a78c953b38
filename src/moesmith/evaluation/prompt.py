"""What a model is asked, as token ids: a conversation up to where the model answers, or a text that it continues."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moesmith.data.encoding import chat_ids
from moesmith.errors import MoesmithError
from moesmith.parent.vocabulary import refuse_ids

Turns = Sequence[dict[str, str]]


def asked_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, rows: int, *, templated: bool = True, today: bool = False
) -> Tensor:
    """Return a conversation's token ids as data lays out chats (``data.encoding``), up to where the model answers.

    Args:
        tokenizer: the model's.
        turns: ``role`` (``system``, ``user`` or ``assistant``) and ``content`` of each.
        rows: of the model's embedding.
        templated: through the chat template; else the text of the last turn, with the tokens that begin a text.
        today: let a template that writes the date write the real one.

    Returns:
        (1, S) int64.

    Raises:
        MoesmithError: the template does not take such turns, such as a system message; there is nothing to read, or a
            token that the model does not know.
    """
    if templated:
        ids = chat_ids(list(turns), tokenizer, answer=True, today=today)
    else:
        ids = list(tokenizer(turns[-1]["content"])["input_ids"])
    if not ids:
        raise MoesmithError("the prompt is empty", "Give some text to continue.")
    ids_1S = torch.tensor([ids])
    refuse_ids(ids_1S, rows, "the prompt")
    return ids_1S
