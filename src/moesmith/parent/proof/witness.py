"""Record a decoder's activations on a short random text, and demand that they are what a formula gives.

Shapes: B batch, S positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.parent.hooks import hidden_input, hooked
from moesmith.parent.network import FFN
from moesmith.parent.proof.reference import Rope, attention
from moesmith.parent.structure import KINDS, attention_of, close, decoder_layers, rope_of

LENGTH = 48  # tokens of the text; what happens further on is proved by ``parent/proof/positions.py``
OTHER_LOGITS = "The parent's logits are not its output matrix times the last hidden state"


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Inside the ``with``, record each module's hidden-state input (``in name``), output (``out name``) and rope."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[f"in {name}"] = hidden_input(args, kwargs)
            seen[f"out {name}"] = output[0] if isinstance(output, (tuple, dict)) else output
            seen[f"rope {name}"] = kwargs.get("position_embeddings")

        return record

    with hooked(((module, hook(name)) for name, module in modules.items()), kwargs=True):
        yield seen


class Witness:
    """A decoder's activations on a short random text, and what they are checked against.

    Attributes:
        layers: the decoder layers.
        like: what a refusal compares the parent with.
        stream: the embedding of the text, (B, S, D): what the first layer must get.
        hidden: the last hidden state, (B, S, D).
        seen: ``in name`` and ``out name`` for every ``layer i``, ``attention i``, ``ffn i``, ``final norm``, and the
            norms of the layers.
        rope: cosines and sines of the text's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ffns: list[FFN],
        norms: list[dict[str, nn.Module]],
        final: nn.Module,
        rope: nn.Module,
        like: str,
    ) -> None:
        """Run the text; ``norms`` are each layer's by name, ``rope`` is the reference's, ``like`` names the reference.

        Raises:
            MoesmithError: the logits are not head(last hidden state), which training and evaluation rely on.
        """
        self.config, self.layers, self.like = model.config, decoder_layers(model)[1], like
        modules: dict[str, nn.Module] = {"final norm": final, "base": model.base_model}
        for i, (layer, ffn) in enumerate(zip(self.layers, ffns, strict=True)):
            modules |= {f"layer {i}": layer, f"attention {i}": attention_of(layer), f"ffn {i}": ffn.module}
            modules |= {f"{name} {i}": norm for name, norm in norms[i].items()}
        ids = torch.randint(model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        ids = ids.to(model.device)
        with recorded(modules) as self.seen:
            logits = model(input_ids=ids, use_cache=False).logits
        self.hidden = self.seen["out base"]
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        if head is None or not close(F.linear(self.hidden, head.weight, head.bias), logits):
            raise MoesmithError(OTHER_LOGITS, KINDS)
        self.stream = F.embedding(ids, embedding.weight)
        self.rope: Rope = rope(self.stream, torch.arange(LENGTH, device=ids.device)[None])

    def demand(self, what: str, theirs: Tensor | None, ours: Tensor) -> None:
        """Refuse the parent unless two activations agree."""
        if theirs is None or not close(theirs, ours):
            raise MoesmithError(f"The parent's {what} differs from {self.like}", KINDS)

    def demand_rope(self, i: int) -> None:
        """Refuse the parent unless layer ``i`` was given the reference's cosines and sines."""
        demand_rope(self.seen[f"rope attention {i}"], self.rope, self.config, self.like)

    def demand_attention(self, i: int) -> None:
        """Refuse the parent unless layer ``i``'s attention is causal rotary attention on its input."""
        ours = attention(self.layers[i], self.config, self.seen[f"in attention {i}"], self.rope)
        self.demand(f"attention of layer {i}", self.seen[f"out attention {i}"], ours)


def demand_rope(theirs: Any, ours: Rope, config: Any, like: str, where: str = "") -> None:
    """Refuse a parent whose cosines and sines of some positions are not the reference's.

    Raises:
        MoesmithError: it has none, rotates another part of a head, or rotates differently.
    """
    if not isinstance(theirs, tuple) or not all(isinstance(part, Tensor) for part in theirs):
        raise MoesmithError("The parent's attention has no rotary position embedding", KINDS)
    if (rotated := theirs[0].shape[-1]) != ours[0].shape[-1]:
        raise MoesmithError(f"The parent rotates {rotated} dimensions of a head and not {ours[0].shape[-1]}", KINDS)
    if all(_same(mine, other) for mine, other in zip(theirs, ours, strict=True)):
        return
    kind = rope_of(config).get("rope_type", "default")
    raise MoesmithError(
        f"The parent's rotary positions ({kind}){where} differ from {like}",
        "If its model was moved to another dtype by .to(dtype), which rounds them, give dtype= when you load it. "
        + KINDS,
    )


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether they are equal within the rounding of the first one's dtype; cosines and sines are of order 1."""
    tolerance = 1e-4 if theirs.dtype == torch.float32 else 8e-3
    return bool((theirs.float() - ours.float()).abs().max() <= tolerance)
