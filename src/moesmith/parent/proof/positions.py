"""Check a parent's attention far into its context and in cached generation against the reference.

All layers share their code, so only the first and the last are checked: a copy of the model has these two, without
feed-forward networks, in fp32. No text as long as the context is computed: the model's own code is given a cache full
of random keys and values, as after a long text, then some more tokens and one more, at any position. So a sliding
window, a scale or a rotation that changes with the position, and what a cache makes of them, show at little cost.

Shapes: B batch, S positions, P positions already cached, D model width, W head width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.parent.network import FFN
from moesmith.parent.proof.reference import Past, attention
from moesmith.parent.proof.rope import unread
from moesmith.parent.proof.witness import demand_rope, recorded
from moesmith.parent.structure import (
    KINDS,
    attention_of,
    attention_window,
    close,
    decoder_layers,
    head_dim,
    put,
    rope_of,
)

CHUNKS = (5, 1)  # tokens of each call: a piece of a prompt, then one token as in generation
CACHED = 16  # keys before them, where no window needs more
MOST = 2**28  # most bytes of random keys and values at once


@torch.no_grad()
def prove_positions(model: PreTrainedModel, ffns: list[FFN], rope: nn.Module, like: str) -> None:
    """Check the first and last layer's attention against the reference at many positions, with a cache.

    Args:
        model: the parent.
        ffns: its networks, which are left out.
        rope: the reference's rotary embedding.
        like: what a refusal compares the parent with.

    Raises:
        MoesmithError: attention differs at a position; it is named, with the config's fields that no known code reads.
    """
    short, layers = _shallow(model, ffns)
    for cached, first in _probes(model.config):
        _prove_at(short, layers, rope, like, cached, first)


def _probes(config: Any) -> list[tuple[int, int]]:
    """List (keys in the cache, position of the next token): a prompt's start, around every limit, and far out."""
    longest = getattr(config, "max_position_embeddings", None) or 2048
    rope = rope_of(config)
    limits = {rope.get("original_max_position_embeddings"), getattr(config, "original_max_position_embeddings", None)}
    window = attention_window(config)
    firsts = {n - 3 for n in limits if n} | {n + 1 for n in limits if n} | {longest - sum(CHUNKS)}
    firsts |= {2**power for power in range(5, 30, 2) if 2**power < longest}
    if rope.get("rope_type") == "dynamic":  # which goes on beyond the context
        firsts |= {longest - 3, longest + 1, 2 * longest}
    probes = [(0, 0)] + [(CACHED, first) for first in sorted(firsts) if first >= CACHED]
    kv = config.num_key_value_heads * head_dim(config)
    if window is not None and window < longest and 16 * kv * window <= MOST:
        probes += [(max(1, window - 3), max(1, window - 3)), (window + 2, window + 2)]
    return probes


def text_to_compare(config: Any, blocks_NS: Tensor) -> Tensor:
    """Cut token ids (rows, length) from held-out blocks to compare two models on, long enough to see every limit.

    Rows are longer than a sliding window and the original context of scaled positions where these are at most 1,024,
    else 256; never longer than the context or the text. There are enough rows for about 512 tokens, at least one.
    """
    longest = getattr(config, "max_position_embeddings", None) or 2048
    limits = [attention_window(config), rope_of(config).get("original_max_position_embeddings")]
    length = max([256, *(limit + 16 for limit in limits if limit and limit <= 1024)])
    stream = blocks_NS.flatten()
    length = min(length, longest, len(stream))
    rows = max(1, min(512, len(stream)) // length)
    return stream[: rows * length].view(rows, length)


def _shallow(model: PreTrainedModel, ffns: list[FFN]) -> tuple[Any, list[nn.Module]]:
    """Copy the model with its first and last layer only, in fp32 and without feed-forward networks; return both.

    The embedding and the output matrix, which are not used, are the model's own; everything else is a copy.
    """
    place, layers = decoder_layers(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    short: Any = copy.deepcopy(model, {id(layers): nn.ModuleList(), **shared})
    owner: Any = short.get_submodule(place.rpartition(".")[0])
    for child_name, child in list(owner.named_children()):
        if not isinstance(child, nn.Embedding):
            setattr(owner, child_name, copy.deepcopy(child).float())
    kept = []
    for index in sorted({0, len(layers) - 1}):
        network: nn.Module = _Nothing()
        kept.append(copy.deepcopy(layers[index], {id(ffns[index].module): network}).float())
    put(short, place, nn.ModuleList(kept))
    for module in short.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):  # others want half precision
            config._attn_implementation = "sdpa"
    return short, kept


class _Nothing(nn.Module):
    """Takes the place of a feed-forward network and adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _prove_at(short: Any, layers: list[nn.Module], rope: nn.Module, like: str, cached: int, first: int) -> None:
    config = short.config
    attentions = {f"{i}": attention_of(layer) for i, layer in enumerate(layers)}
    generator = torch.Generator().manual_seed(first)
    pasts, cache = [], DynamicCache(config=config)
    for module in attentions.values():
        past = _random_past(config, cached, generator, short.device)
        pasts.append(past)
        if cached:
            cache.update(past.keys, past.values, getattr(module, "layer_idx", 0))
    start = first
    for count in CHUNKS:
        x_BSD = torch.randn(1, count, config.hidden_size, generator=generator).to(short.device)
        positions = torch.arange(start, start + count, device=short.device)[None]
        ours_rope = rope(x_BSD, positions)
        with recorded(attentions) as seen:
            try:
                short.base_model(inputs_embeds=x_BSD, position_ids=positions, past_key_values=cache, use_cache=True)
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
                what = f"The parent's attention cannot be run with a cache at position {start}: {error}"
                raise MoesmithError(what.splitlines()[0], KINDS) from error
        where = f" at position {start} of its context"
        for i, (layer, past) in enumerate(zip(layers, pasts, strict=True)):
            demand_rope(seen[f"rope {i}"], ours_rope, config, like, where)
            ours = attention(layer, config, seen[f"in {i}"], ours_rope, past)
            if not close(seen[f"out {i}"], ours):
                odd = unread(config)
                fields = f" (its config has {', '.join(odd)}, which they do not read)" if odd else ""
                raise MoesmithError(f"The parent's attention{where} differs from {like}{fields}", KINDS)
        start += count


def _random_past(config: Any, cached: int, generator: torch.Generator, device: torch.device) -> Past:
    """Draw ``cached`` keys and values; the values at a window's edges are large, so that one key more shows."""
    shape = (1, config.num_key_value_heads, cached, head_dim(config))
    keys, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    if (window := attention_window(config)) is not None and cached:
        edge = max(0, cached - window)
        values[:, :, max(0, edge - 2) : edge + sum(CHUNKS) + 2] *= cached**0.5
    return Past(keys, values)
