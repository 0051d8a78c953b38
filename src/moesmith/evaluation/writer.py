"""Let a model write many answers at the same time: where one ends, the next prompt takes its place.

Transformers' ``generate`` runs a batch until its longest answer ends, and a step costs nearly as much for the last
answer as for all. Here rows that ended leave the batch, and prompts that wait are read and join it. What all prompts
begin with, such as a task's examples, is read once. Layers that keep more of what they read than keys and values, which
can be cut and padded, write one answer after the other.

Shapes: B rows, S positions that are read, N positions that are held, P of what all prompts begin with, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import evaluating, logits_of
from moesmith.parent.structure import attention_window

JOIN = 4  # prompts join when a quarter of the places is free: reading few of them costs nearly as much as many


@dataclass(frozen=True)
class Written:
    """An answer.

    Attributes:
        ids: its token ids, without the end.
        ended: whether it ended by itself.
    """

    ids: list[int]
    ended: bool


def hidden(model: PreTrainedModel, ids_BS: Tensor, cache: DynamicCache | None = None, **options: Any) -> Tensor:
    """Compute the final hidden states (B, S, D), behind what a cache holds."""
    options |= {"use_cache": cache is not None, "past_key_values": cache}
    found: Tensor = model.base_model(input_ids=ids_BS.to(model.device), **options).last_hidden_state
    return found


def empty_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Make a cache with a place for what each layer keeps; ``None`` if transformers knows none for such layers."""
    config = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)][-1]  # the decoder's own
    try:
        return DynamicCache(config=config)
    except (LookupError, TypeError, AttributeError, ValueError):
        return None


def keeps_pairs(model: PreTrainedModel) -> bool:
    """Whether all that layers keep of what they read are keys and values; LFM2's convolutions keep something else."""
    cache = empty_cache(model)
    return cache is not None and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers)


@dataclass
class _Row:
    index: int
    draws: torch.Generator | None
    made: list[int] = field(default_factory=list)


def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    done: Callable[[int, Written], None],
    *,
    ends: Sequence[int],
    new: int,
    rows: int,
    stop: Callable[[list[int]], bool] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Answer prompts of any lengths, ``rows`` at a time.

    Args:
        model: a causal language model.
        prompts: token ids of each.
        done: is told the index of a prompt and its answer, in the order in which they end.
        ends: tokens that end an answer.
        new: most tokens of an answer.
        rows: answers at the same time.
        stop: whether what was written so far is to end there; its last token belongs to the answer.
        temperature: 0 for the most likely token.
        seed: each answer's draws follow from it and the prompt's index alone.

    Raises:
        MoesmithError: transformers has no cache for the model's layers.
    """
    waiting, open_rows, pairs = deque(enumerate(prompts)), list[_Row](), keeps_pairs(model)
    rows = rows if pairs else 1
    with evaluating(model):
        # a sliding window counts places, also those that padding leaves empty between the beginning and the rest
        board = Board(model, [] if has_windows(model) or not pairs else beginning(prompts), pairs=pairs)
        while waiting or open_rows:
            free = rows - len(open_rows)
            if waiting and (not open_rows or free >= max(1, rows // JOIN)):
                taken = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits_BV = board.join([prompt for _, prompt in taken])
                now = [_Row(index, _draws(seed + index) if temperature else None) for index, _ in taken]
                open_rows += now
            else:
                logits_BV, now = board.step([row.made[-1] for row in open_rows]), open_rows
            ended = set[int]()
            for row, token in zip(now, _chosen(logits_BV, now, temperature), strict=True):
                if token in ends:
                    done(row.index, Written(row.made, ended=True))
                    ended.add(row.index)
                    continue
                row.made.append(token)
                if (stopped := stop is not None and stop(row.made)) or len(row.made) == new:
                    done(row.index, Written(row.made, ended=stopped))
                    ended.add(row.index)
            if ended:
                left = [place for place, row in enumerate(open_rows) if row.index not in ended]
                open_rows = [open_rows[place] for place in left]
                board.keep(left)


def has_windows(model: PreTrainedModel) -> bool:
    """Whether any layer attends to less than all that was read; our own format has the parent's model inside."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()}
    return bool(kinds - {"full_attention"}) or any(attention_window(config) for config in configs)


def beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return what several prompts all begin with, at least a token less than each; nothing if that is hardly much.

    Rows that end let go of their padding, unless it is behind what all share: so that has to be half of the longest.
    """
    if len(prompts) < 2:
        return []
    shortest = min(map(len, prompts)) - 1
    columns = zip(*(prompt[:shortest] for prompt in prompts), strict=True)
    shared = next((place for place, tokens in enumerate(columns) if len(set(tokens)) > 1), shortest)
    return list(prompts[0][:shared]) if 2 * shared >= max(map(len, prompts)) else []


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _chosen(logits_BV: Tensor, rows: Sequence[_Row], temperature: float) -> list[int]:
    """The next token of every row."""
    if not temperature:
        return logits_BV.argmax(-1).tolist()
    chances_BV = (logits_BV / temperature).softmax(-1).cpu()
    return [
        int(torch.multinomial(chances_V, 1, generator=row.draws))
        for chances_V, row in zip(chances_BV, rows, strict=True)
    ]


class Board:
    """Keys and values of all rows, padded on the left to the longest.

    All positions are held, also those that a layer's sliding window no longer sees: rows can then be moved.

    Args:
        model: the one that reads.
        begin: token ids that every prompt begins with.
        pairs: whether layers keep keys and values alone (:func:`keeps_pairs`); else there is one row at a time.

    Attributes:
        mask_BN: which positions are a row's own.
    """

    def __init__(self, model: PreTrainedModel, begin: Sequence[int] = (), *, pairs: bool = True) -> None:
        self.model, self.cache, self.begin, self.pairs = model, DynamicCache(), DynamicCache(), pairs
        self.mask_BN = torch.zeros(0, 0, dtype=torch.int64, device=model.device)
        self.P = len(begin)
        if begin:
            hidden(model, torch.tensor([list(begin)]), self.begin)

    def _read(self, ids_BS: Tensor, mask_BN: Tensor, position_BS: Tensor, cache: DynamicCache) -> Tensor:
        """The logits of the next token, (B, V) fp32."""
        found_BSD = hidden(self.model, ids_BS, cache, attention_mask=mask_BN, position_ids=position_BS)
        return torch.cat([logits_CV for _, logits_CV in logits_of(self.model, found_BSD[:, -1])])

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read further prompts, behind which further rows are; their logits (B, V)."""
        rest, device = [prompt[self.P :] for prompt in prompts], self.model.device
        longest = max(map(len, rest))
        rows = [F.pad(torch.tensor(list(prompt)), (longest - len(prompt), 0)) for prompt in rest]
        lengths = torch.tensor([len(prompt) for prompt in rest], device=device)
        mask_BS = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        mask_BN = F.pad(mask_BS, (self.P, 0), value=1)
        position_BS = (mask_BN.cumsum(-1) - 1).clamp_min(0)[:, self.P :]
        cache = self._begun(len(rest))
        logits_BV = self._read(torch.stack(rows), mask_BN, position_BS, cache)
        if not len(self.mask_BN):
            self.mask_BN, self.cache = mask_BN, cache
            return logits_BV
        wide = max(mask_BN.shape[1], self.mask_BN.shape[1])

        def together(ours: Tensor, theirs: Tensor, axis: int) -> Tensor:
            behind = (0, 0) * (-1 - axis)
            return torch.cat([F.pad(part, (*behind, wide - part.shape[axis], 0)) for part in (ours, theirs)])

        pairs = zip(layers_of(self.cache), layers_of(cache), strict=True)
        self.cache = DynamicCache(
            [tuple(together(a, b, -2) for a, b in zip(ours, theirs, strict=True)) for ours, theirs in pairs]
        )
        self.mask_BN = together(self.mask_BN, mask_BN, -1)
        return logits_BV

    def _begun(self, rows: int) -> DynamicCache:
        """A cache for new rows, with what all prompts begin with."""
        if self.pairs:
            begun = layers_of(self.begin) if self.P else []
            return DynamicCache([tuple(part.expand(rows, -1, -1, -1) for part in pair) for pair in begun])
        if (cache := empty_cache(self.model)) is None:
            what = f"transformers has no cache for the layers of {type(self.model.base_model).__name__}"
            raise MoesmithError(f"{what}, so it cannot write here", "Leave out what lets the model write answers.")
        return cache

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of every row; their logits (B, V)."""
        self.mask_BN = F.pad(self.mask_BN, (0, 1), value=1)
        ids_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        return self._read(ids_B1, self.mask_BN, self.mask_BN.sum(-1, keepdim=True) - 1, self.cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Let the other rows go, and positions that are none's."""
        if not rows:
            self.mask_BN, self.cache = self.mask_BN[:0, :0], DynamicCache()
            return
        chosen = torch.tensor(rows, device=self.mask_BN.device)
        mask_BN = self.mask_BN[chosen]
        first = int(mask_BN.any(0).int().argmax())
        self.mask_BN = mask_BN[:, first:]
        self.cache = DynamicCache([tuple(part[chosen, :, first:] for part in pair) for pair in layers_of(self.cache)])


def layers_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer that a cache holds."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
