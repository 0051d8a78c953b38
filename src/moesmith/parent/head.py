"""What a model does to the product of its output matrix with the last hidden state before it is the logits.

Most do nothing. Cohere and Granite scale it, Gemma 2 caps it: z = cap · tanh(scale · x / cap). Losses and perplexities
are computed from hidden states, a chunk of tokens at a time, so the same is done there; that it is the same is proved
when a parent is loaded (``parent/proof/carvable.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moesmith.parent.layerwise import Decoder
from moesmith.parent.structure import declares


@dataclass(frozen=True)
class LogitShape:
    """z = cap · tanh(scale · x / cap), or scale · x without a cap.

    Attributes:
        scale: factor of the product.
        cap: the largest logit's bound, or ``None``.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Shape products of any size; may overwrite them."""
        if self.scale != 1:
            product = product.mul_(self.scale)
        return product if self.cap is None else product.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """∂z / ∂x by what the call returned; ``None`` where it is 1."""
        if self.cap is None:
            return None if self.scale == 1 else self.scale
        return (logits / self.cap).square_().mul_(-self.scale).add_(self.scale)


@dataclass(frozen=True)
class Head:
    """A model's output matrix, and what is done to its product.

    Attributes:
        module: holds the matrix (V, D) and perhaps a bias (V,).
        shape: what is done to the product.
    """

    module: Any
    shape: LogitShape

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of last hidden states, (…, D) to (…, V), fp32; without autograd."""
        return self.shape(self.module(hidden).float())


def head_of(model: Decoder) -> Head:
    """Return a model's head, its shape as the config of its class declares it."""

    def field(name: str) -> float | None:
        return getattr(model.config, name, None) if declares(model.config, name) else None

    scale = (field("logit_scale") or 1.0) / (field("logits_scaling") or 1.0)
    return Head(model.get_output_embeddings(), LogitShape(scale, field("final_logit_softcapping")))
