"""What a model is asked: turns of a conversation put through its chat template, and the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moesmith.errors import MoesmithError
from moesmith.parent.checkpoint import first_line
from moesmith.parent.vocabulary import refuse_ids

Turns = Sequence[dict[str, str]]


def written(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> str:
    """Write a conversation as the chat template does, up to where the model answers.

    Args:
        tokenizer: of a model with a chat template.
        turns: ``role`` (``system``, ``user`` or ``assistant``) and ``content`` of each.

    Raises:
        MoesmithError: the template does not take such turns, such as a system message.
    """
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        what = f"the chat template fails on turns of {roles}: {first_line(error)}"
        raise MoesmithError(what, "Leave the system message or the template out.") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, rows: int, *, templated: bool) -> Tensor:
    """Return a prompt's token ids, (1, S) int64.

    Args:
        tokenizer: the model's.
        text: what :func:`written` made, or any text.
        rows: of the model's embedding.
        templated: whether the template has written the tokens that begin a text.

    Raises:
        MoesmithError: the text is empty, or has tokens that the model does not know.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=not templated)["input_ids"]
    if ids.shape[1] == 0:
        raise MoesmithError("the prompt is empty", "Give some text to continue.")
    ids = ids.long()
    refuse_ids(ids, rows, "the prompt")
    return ids
