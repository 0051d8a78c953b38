"""Attention sinks: does a model still make the huge activations of a text's first token on which attention rests?

One or two networks of a decoder make them, and the attention of all later tokens leans on them (arXiv:2309.17453,
arXiv:2402.17762). A carved model that loses them for some first tokens reads those texts far worse, and its mean
perplexity hardly says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import meter
from moesmith.data.text import Domain, evaluation_blocks
from moesmith.evaluation.perplexity import evaluating

WINDOW, WINDOWS, BATCH = 64, 16, 8  # tokens of a window, windows of a domain, windows at once
LOST = 0.1  # of the median window's sink, below which a window has lost its own


def first_tokens(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """Compute ‖h‖ of each window's first token over the median of its others, in the layer where that is largest, (N,).

    Args:
        model: a decoder that returns its hidden states.
        ids_NS: windows of text.
    """
    found = []
    with meter("sinks", ids_NS.numel()) as bar, evaluating(model):
        for ids_BS in ids_NS.split(BATCH):
            states = model(input_ids=ids_BS.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
            norm_LBS = torch.stack([state.float().norm(dim=-1) for state in states])
            found.append((norm_LBS[..., 0] / norm_LBS[..., 1:].median(-1).values).amax(0).cpu())
            bar.advance(ids_BS.numel())
    return torch.cat(found)


def sinks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domains: Sequence[Domain]) -> dict[str, float]:
    """Measure a model's sinks on held-out text.

    Returns:
        ``norm``: of the first token over the others' (:func:`first_tokens`), the median window's; about 1 for a model
        without sinks. ``lost``: the share of windows where it is below a tenth of that.
    """
    blocks = [evaluation_blocks(domain, tokenizer, WINDOWS * WINDOW, WINDOW).blocks for domain in domains]
    norm_N = first_tokens(model, torch.cat(blocks))
    middle = norm_N.median()
    return {"norm": float(middle), "lost": float((norm_N < LOST * middle).float().mean())}
