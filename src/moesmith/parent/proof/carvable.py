"""Prove by numbers what carving needs of a decoder that no stock architecture holds.

Networks were found (``parent/structure.py``); nothing is asked of norms, attention and positions, since the finished
model is the parent's own class with other networks in it. What is asked: its config and weights are all that it
computes from, its layers can run one after the other, and its logits are its output matrix times the last hidden state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.parent.checkpoint import rebuilt
from moesmith.parent.head import head_of
from moesmith.parent.hooks import hidden_output
from moesmith.parent.layerwise import Seen, last_hidden, layered, share, starts
from moesmith.parent.network import FFN
from moesmith.parent.proof.witness import OTHER_LOGITS
from moesmith.parent.structure import close, put

LENGTH = 160  # tokens of the text, where the context is as long
MORE = 4  # tokens that follow it, read with a cache
OTHER = "The parent computes something else than its class does with its config and weights"


@torch.no_grad()
def prove_carvable(model: PreTrainedModel, ffns: list[FFN]) -> bool:
    """Prove that a decoder can be carved.

    Returns:
        whether every layer adds its network's output to the rest as it is, which methods that fit to it rely on.

    Raises:
        MoesmithError: it cannot; the property is named.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or LENGTH + MORE
    length = min(LENGTH, longest - MORE)
    ids = torch.randint(model.config.vocab_size, (1, length + MORE), generator=torch.Generator().manual_seed(0))
    first_BS, more_BS = ids.to(model.device).split([length, MORE], 1)
    logits = model(input_ids=first_BS, use_cache=False).logits
    hidden = model.base_model(input_ids=first_BS, use_cache=False).last_hidden_state
    head = head_of(model)
    if head.module is None or not close(head(hidden).to(logits.dtype), logits):
        raise MoesmithError(OTHER_LOGITS)
    (swept,) = last_hidden(layered(model), [first_BS])
    if not close(swept, hidden):
        raise MoesmithError("The parent's layers compute something else one by one than together")
    twin = _rebuilt(model)
    mine = dict(model.named_buffers())
    same = all(name in mine and _same(mine[name], buffer) for name, buffer in twin.named_buffers())
    if not same or not all(map(close, _answers(twin, first_BS, more_BS), _answers(model, first_BS, more_BS))):
        raise MoesmithError(OTHER)
    return _adds(model, ffns, first_BS)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two buffers are equal; fewer bits of a rotation's frequencies would change positions far away."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.allclose(one, other, rtol=1e-5, atol=0) if one.is_floating_point() else (one == other).all())


def _answers(model: PreTrainedModel, first_BS: Tensor, more_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a text, and of tokens that follow it one by one, read with a cache."""
    out: Any = model(input_ids=first_BS, use_cache=True)
    whole, parts, past = out.logits, [], out.past_key_values
    for ids_B1 in more_BS.split(1, 1):
        out = model(input_ids=ids_B1, past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    return whole, torch.cat(parts, 1)


def _rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """Build the parent's class from its config, around the parent's own weights.

    Raises:
        MoesmithError: transformers knows no such class, or it has other weights.
    """
    try:
        twin, wrong = rebuilt(model.config, model.state_dict())
    except Exception as error:  # transformers and torch refuse with errors of their own
        raise MoesmithError(OTHER) from error
    if wrong:
        raise MoesmithError(f"{OTHER}: {', '.join(wrong[:3])}")
    for module in twin.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(model.device))
    return twin


def _adds(model: PreTrainedModel, ffns: list[FFN], ids_BS: Tensor) -> bool:
    """Whether each layer is what it is without its network, plus the network."""
    inner = layered(model)
    ((state, calls),) = starts(inner, [ids_BS])
    for index, ffn in enumerate(ffns):
        layer, (args, options), seen = inner.layer(index), calls[index], Seen()
        rest = share(layer)
        put(rest, ffn.path.removeprefix(f"{inner.place}.{index}."), seen)
        after, without = (hidden_output(one(state, *args, **options)) for one in (layer, rest))
        if not close(after, without + ffn.module(seen.x)):
            return False
        state = after
    return True
