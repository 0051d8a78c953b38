"""A recorder's whole pass over text: what evaluation does together with perplexity, alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moesmith.evaluation.perplexity import evaluating
from moesmith.evaluation.routing import Recorder, Routing
from moesmith.parent.layerwise import Decoder, last_hidden


def record_routing(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts_by_domain: Mapping[str, Tensor],
    batch: int = 8,
    scales: Sequence[float] = (),
) -> Routing:
    """The experts' choices on blocks of token ids (N, window) by domain, ``batch`` blocks per forward pass.

    ``scales``: of the recorder.
    """
    recorder, texts = Recorder(scales), list(texts_by_domain.values())
    recorder.begin(texts, batch)
    with evaluating(model):  # the language-model head has no part in routing
        for _ in last_hidden(model, [rows for blocks in texts for rows in blocks.split(batch)], visit=recorder.visit):
            pass
    return recorder.result(tokenizer, list(texts_by_domain))
