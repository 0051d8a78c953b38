"""Count parameters from the widths of a decoder's blocks: shape arithmetic, no weights needed.

Only block matrices count: embeddings, head, norms and the masks' own parameters do not (ToMoE, arXiv:2501.15316).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from moesmith.mixture.attention import rotary_width
from moesmith.parent.load import Parent
from moesmith.parent.structure import head_dim

EMBEDDING, HIDDEN, LATENT = 128, 64, 32  # expert embedding; GRU width per direction; its fixed random input
Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True)
class Sizes:
    """Shapes of a decoder.

    Attributes:
        L: decoder layers.
        D: model width.
        F: channels of the feed-forward network.
        H: query heads.
        H_kv: key/value heads.
        h: width of a head.
        rotary: rotating dimensions of a head; h unless the rotary embedding is partial.
        matrices: matrices of the feed-forward network: 3 when gated, 2 when not.
    """

    L: int
    D: int
    F: int
    H: int
    H_kv: int
    h: int
    rotary: int
    matrices: int = 3

    @classmethod
    def of(cls, parent: Parent) -> Sizes:
        """Return the sizes of a loaded parent."""
        config: Any = parent.config
        h, heads = head_dim(config), config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        return cls(parent.L, parent.D, parent.F, heads, kv, h, rotary_width(config), parent.ffns[0].matrices)

    @property
    def static(self) -> int:
        """Free entries of a Q/K mask: one per rotated pair, one per dimension that does not rotate."""
        return self.h - self.rotary // 2

    def attention(self, qk: Number, vo: Number) -> Number:
        """Count active parameters of one attention with ``qk`` dimensions of a Q/K head and ``vo`` of a V/O head."""
        return self.D * (self.H + self.H_kv) * (qk + vo)

    def ffn(self, width: Number) -> Number:
        """Count active parameters of one feed-forward network with ``width`` channels."""
        return self.matrices * self.D * width

    @property
    def total(self) -> int:
        """P_total: parameters of all blocks."""
        return self.L * (self.attention(self.h, self.h) + self.ffn(self.F))

    def trained(self, experts: int) -> int:
        """Count the parameters that training changes: the GRU and every head (ToMoE, arXiv:2501.15316)."""
        gru = 2 * 3 * HIDDEN * (LATENT + HIDDEN + 2)
        ffn = self.D * experts + self.F * EMBEDDING + 2 * EMBEDDING
        attention = EMBEDDING * self.D + (self.h + self.static) * EMBEDDING + 2 * EMBEDDING
        return gru + self.L * (ffn + attention)
