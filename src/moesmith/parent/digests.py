"""Compute digests of a parent's weights and tokenizer, and refuse weights that are not finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.errors import MoesmithError
from moesmith.parent.mapped import give_back


def _weights(model: PreTrainedModel, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter; if they are mapped, drop the pages of one before the next."""
    for named in model.named_parameters():
        yield named
        if mapped:
            give_back()


def refuse_not_finite(model: PreTrainedModel, source: str, *, mapped: bool = False) -> None:
    """Refuse weights with NaN or infinity; the error names the tensor."""
    for name, tensor in _weights(model, mapped):
        low, high = tensor.detach().aminmax()  # NaN spreads to both
        if not (low.isfinite() and high.isfinite()):
            raise MoesmithError(
                f"{source} holds values that are not finite (NaN or infinity) in {name}",
                "Fetch or save the model again.",
            )


def model_digest(model: PreTrainedModel, *, mapped: bool = False) -> str:
    """Return a short sha256 of a model's weights (names, dtypes, bytes) and config."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in UNHASHED}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in _weights(model, mapped):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(_bytes(tensor))
    return whole.hexdigest()[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short sha256 of what a tokenizer does: its vocabulary, and the ids that it gives a mixed text."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    text = json.dumps([vocabulary, tokenizer(PROBE)["input_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


PROBE = "The quick brown fox,\n\n\tdef f(x): return 3.14 * x  # na\u00efve \u4f60\u597d \U0001f642 don't  STOP"
UNHASHED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
