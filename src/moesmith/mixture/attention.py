"""Masks over the head dimension of attention: where they act, and the gate that a finished carving keeps.

Q and K share one mask and V and O another, both common to all heads of a layer, so grouped and multi-query attention
need nothing special (ToMoE, arXiv:2501.15316). The masks multiply the outputs of the Q, K and V projections (Q and K
before a q/k norm and before the rotation) and the input of the output projection. Scores keep the scale of the unpruned
head.

Shapes: B sequences, S positions, D model width, h head width, R gate width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.parent.hooks import hidden_input
from moesmith.parent.structure import OUTPUTS, attention_of, head_dim, rope_of


def rotary_width(config: Any) -> int:
    """Count the rotating dimensions of a head: all of them, or the leading part with a partial rotary embedding."""
    rope = rope_of(config)
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    return int(head_dim(config) * factor)


class GatedLinear(nn.Module):
    """A projection with masks over the head dimension on its outputs, or on its input for the output projection.

    Args:
        linear: the parent's projection.
        gate: the module with the masks ``qk`` and ``vo`` of the current input, and the switch ``mask_output``.
        parts: (mask, width) of every slice of the outputs; empty when the input is masked.
        h: head width.
    """

    def __init__(self, linear: nn.Module, gate: nn.Module, parts: list[tuple[str, int]], h: int) -> None:
        super().__init__()
        self.linear, self.parts, self.h = linear, parts, h
        self._gate = [gate]  # in a list: it belongs to the attention, not to each of its projections

    def forward(self, x: Tensor) -> Tensor:
        """Apply the projection and the masks."""
        gate: Any = self._gate[0]
        if not self.parts:
            return self.linear(self._times(x, gate.vo) if gate.mask_output else x)
        y = self.linear(x)
        sliced = y.split([width for _, width in self.parts], -1)
        done = [self._times(part, getattr(gate, mask)) for part, (mask, _) in zip(sliced, self.parts, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done, -1)

    def _times(self, y: Tensor, mask: Tensor) -> Tensor:
        return (y.unflatten(-1, (-1, self.h)) * mask.unsqueeze(-2)).flatten(-2)


def _read(module: Any, args: Any, kwargs: Any) -> None:
    module.head_gate.read(hidden_input(args, kwargs))


def install(layer: nn.Module, config: Any, gate: nn.Module) -> None:
    """Put ``gate`` into a decoder layer's attention: it reads the input once and masks the projections.

    Args:
        layer: a decoder layer of a model that may be changed (``layerwise.share``).
        config: the model's config.
        gate: a module with ``read(x_BSD)``, ``qk``, ``vo`` and ``mask_output``.
    """
    attention: Any = attention_of(layer)
    h, kv = head_dim(config), getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    q, k = config.num_attention_heads * h, kv * h
    parts = {"q_proj": [("qk", q)], "k_proj": [("qk", k)], "v_proj": [("vo", k)]}
    parts["qkv_proj"] = [*parts["q_proj"], *parts["k_proj"], *parts["v_proj"]]
    parts |= {name: [] for name in OUTPUTS}
    attention.head_gate = gate
    attention.register_forward_pre_hook(_read, with_kwargs=True)
    for name, module in list(attention.named_children()):
        if name in parts:
            setattr(attention, name, GatedLinear(module, gate, parts[name], h))


@dataclass
class CarvedAttention:
    """What a finished carving keeps of one layer's attention (ToMoE, arXiv:2501.15316).

    The gate of a token x is o = proj_out · GELU(LN(base + proj_in x)): V and O keep the dimensions with o ≥ threshold,
    the ``top_k`` highest of them if there are more, the best one if there is none. Deterministic, without noise.
    Without the gate's tensors every token keeps all of ``vo_h``.

    Attributes:
        qk_h: kept dimensions of Q and K for all tokens, (h) bool; pairs of the rotation stay together.
        vo_h: dimensions of V and O that some token keeps, (h) bool; the others are gone for all.
        proj_in_RD, norm_weight_R, norm_bias_R, base_R, proj_out_hR: the gate, fp32.
        threshold: the keep threshold, fp32 scalar.
        top_k: the most V/O dimensions that a token keeps, int64 scalar.
        output: whether O is masked by the query token as well, bool scalar.
        dynamic_WR: gate rows for Q and K by token (``dynamic`` attention), one per free entry; else ``None``.
        top_k_qk: the most free entries that a token keeps with ``dynamic_WR``.
    """

    qk_h: Tensor
    vo_h: Tensor
    proj_in_RD: Tensor | None = None
    norm_weight_R: Tensor | None = None
    norm_bias_R: Tensor | None = None
    base_R: Tensor | None = None
    proj_out_hR: Tensor | None = None
    threshold: Tensor | None = None
    top_k: Tensor | None = None
    output: Tensor | None = None
    dynamic_WR: Tensor | None = None
    top_k_qk: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name, to save; ``CarvedAttention(**tensors)`` is the reverse."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def gate_parameters(self) -> int:
        """Count the gate's weights, stored next to the projections; the threshold and the limits do not count."""
        return sum(t.numel() for t in self.tensors().values() if t.is_floating_point() and t.dim())

    def removed(self, weights: Mapping[str, Tensor], *, active: bool) -> int:
        """Count a layer's attention parameters that are gone, from the file or from what one token uses.

        Args:
            weights: ``structure.attention_weights`` of the layer.
            active: count the widths of one token instead of the dimensions that any token keeps.
        """
        h = len(self.qk_h)
        qk, vo = (self.width_qk, self.width_vo) if active else (int(self.qk_h.sum()), int(self.vo_h.sum()))
        kept = {name: h if name == "o_proj.bias" else qk if name[0] in "qk" else vo for name in weights}
        return sum(tensor.numel() // h * (h - kept[name]) for name, tensor in weights.items() if kept[name] < h)

    def without_gate(self) -> CarvedAttention:
        """Drop the gate: the rest does not depend on the token, and a stock architecture can hold it, with zeros."""
        return CarvedAttention(self.qk_h, self.vo_h)

    @property
    def width_qk(self) -> int:
        """The most dimensions of a Q/K head that take part in a token's score."""
        if self.dynamic_WR is None or self.top_k_qk is None:
            return int(self.qk_h.sum())
        pairs, entries = len(self.qk_h) - len(self.dynamic_WR), int(self.top_k_qk)
        return min(entries, pairs) + entries  # a pair counts twice, and pairs may come first

    @property
    def width_vo(self) -> int:
        """The most dimensions of a V/O head that a token keeps."""
        return int(self.vo_h.sum()) if self.top_k is None else int(self.top_k)


def narrowed(name: str, tensor: Tensor, carved: CarvedAttention) -> Tensor:
    """Cut the head dimensions that no token keeps out of a projection (``structure.attention_weights``)."""
    kept, by_head, axis = _of_head(name, tensor, carved)
    return by_head.index_select(axis + 1, kept.nonzero()[:, 0]).flatten(axis, axis + 1)


def zeroed(name: str, tensor: Tensor, carved: CarvedAttention) -> Tensor:
    """Zero those dimensions instead, for an architecture that cannot narrow its heads: exact, but saves nothing."""
    if "norm" in name or name == "o_proj.bias":
        return tensor
    kept, by_head, axis = _of_head(name, tensor, carved)
    mask = kept.to(tensor.dtype)
    return (by_head * (mask if axis or tensor.dim() == 1 else mask[:, None])).flatten(axis, axis + 1)


def _of_head(name: str, tensor: Tensor, carved: CarvedAttention) -> tuple[Tensor, Tensor, int]:
    """Return the kept dimensions, the tensor with heads and their dimensions as two axes, and the axis of the heads."""
    kept = (carved.qk_h if name[0] in "qk" else carved.vo_h).to(tensor.device)
    axis = 1 if name == "o_proj.weight" else 0
    return kept, tensor.unflatten(axis, (-1, len(kept))), axis
