"""Masks over the head dimension of attention: where they act, and the gate that a finished carving keeps.

Q and K share one mask and V and O another, both common to all heads of a layer, so grouped and multi-query attention
need nothing special (tomoe.md §3.4). The masks multiply the projections' outputs, Q's and K's before a q/k norm and
before the rotation, and the input of the output projection. Scores keep the scale of the unpruned head.

Shapes: B sequences, S positions, D model width, h head width, R gate width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesmith.structure import OUTPUTS, attention_of, head_dim


def rotary_width(config: Any) -> int:
    """Rotating dimensions of a head: all of it, or the leading part of a partial rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    return int(head_dim(config) * factor)


def expand_pairs(free: Tensor, h: int, rotary: int) -> Tensor:
    """Free entries (…, h − rotary/2) of a Q/K mask to the head dimension (…, h).

    With the rotate-half convention dimensions i and i + rotary/2 form one plane, so they share an entry; only then do
    masking and rotating commute. What does not rotate has an entry of its own.
    """
    pairs, rest = free.split([rotary // 2, h - rotary], -1)
    return torch.cat([pairs, pairs, rest], -1)


class GatedLinear(nn.Module):
    """A projection with masks over the head dimension on its outputs, or on its input for the output projection.

    Args:
        linear: the parent's projection.
        gate: what holds the masks ``qk`` and ``vo`` of the current input, and the switches ``on`` and ``mask_output``.
        parts: (mask, width) of every slice of the outputs; empty when the input is masked.
        h: head width.
    """

    def __init__(self, linear: nn.Module, gate: nn.Module, parts: list[tuple[str, int]], h: int) -> None:
        super().__init__()
        self.linear, self.parts, self.h = linear, parts, h
        self._gate = [gate]  # in a list: it belongs to the attention, not to each of its projections

    def forward(self, x: Tensor) -> Tensor:
        """As the projection, masked."""
        gate: Any = self._gate[0]
        if not gate.on:
            return self.linear(x)
        if not self.parts:
            return self.linear(self._times(x, gate.vo) if gate.mask_output else x)
        y = self.linear(x)
        sliced = y.split([width for _, width in self.parts], -1)
        done = [self._times(part, getattr(gate, mask)) for part, (mask, _) in zip(sliced, self.parts, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done, -1)

    def _times(self, y: Tensor, mask: Tensor) -> Tensor:
        return (y.unflatten(-1, (-1, self.h)) * mask.unsqueeze(-2)).flatten(-2)


def _read(module: Any, args: Any, kwargs: Any) -> None:
    module.head_gate.read(args[0] if args else kwargs["hidden_states"])


def install(layer: nn.Module, config: Any, gate: nn.Module) -> None:
    """Put ``gate`` into a decoder layer's attention: its input is read once, its projections are masked.

    Args:
        layer: a decoder layer of a model that may be changed (``moe.share``).
        config: the model's config.
        gate: a module with ``read(x_BSD)``, ``qk``, ``vo``, ``on`` and ``mask_output``.
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
    """What a finished carving keeps of one layer's attention (tomoe.md §9).

    The gate of a token x is o = proj_out · GELU(LN(base + proj_in x)): V and O keep the dimensions with o ≥ threshold,
    the ``top_k`` highest of them if there are more, the best one if there is none. Deterministic, without noise.
    Without the gate's tensors V and O are whole.

    Attributes:
        qk_h: kept dimensions of Q and K for all tokens, (h) bool; pairs of the rotation stay together.
        proj_in_RD, norm_weight_R, norm_bias_R, base_R, proj_out_hR: the gate, fp32.
        threshold: the keep threshold, fp32 scalar.
        top_k: most V/O dimensions of a token, int64 scalar.
        output: whether O is masked by the query token as well, bool scalar.
        dynamic_WR: gate rows for Q and K by token (``dynamic`` attention), one per free entry; else ``None``.
        top_k_qk: most free entries of a token for ``dynamic_WR``.
    """

    qk_h: Tensor
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
        """By field name, to save; ``CarvedAttention(**tensors)`` is the reverse."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def without_gate(self) -> CarvedAttention:
        """The part that a stock architecture can hold: Q and K pruned for all tokens, V and O whole."""
        return CarvedAttention(self.qk_h)

    @property
    def width_qk(self) -> int:
        """Dimensions of a Q/K head that a token's score takes part in at most."""
        if self.dynamic_WR is None or self.top_k_qk is None:
            return int(self.qk_h.sum())
        pairs, entries = len(self.qk_h) - len(self.dynamic_WR), int(self.top_k_qk)
        return min(entries, pairs) + entries  # a pair counts twice, and pairs may come first

    @property
    def width_vo(self) -> int:
        """Dimensions of a V/O head that a token keeps at most."""
        return len(self.qk_h) if self.top_k is None else int(self.top_k)


class HeadGate(nn.Module):
    """The deterministic gate of a :class:`CarvedAttention`; what :func:`install` puts into a model."""

    qk: Tensor
    vo: Tensor

    def __init__(self, carved: CarvedAttention, device: torch.device) -> None:
        super().__init__()
        self.on, self.mask_output = True, carved.output is not None and bool(carved.output)
        self.names = tuple(carved.tensors())
        for name, tensor in carved.tensors().items():
            self.register_buffer(name, tensor.to(device), persistent=False)

    def read(self, x_BSD: Tensor) -> None:
        """Compute the masks of the attention's input."""
        buffers: Any = self
        self.qk = buffers.qk_h.to(x_BSD.dtype)
        self.vo = torch.ones_like(self.qk)
        if "proj_out_hR" not in self.names:
            return
        inner = F.linear(x_BSD.float(), buffers.proj_in_RD.float()) + buffers.base_R.float()
        weight, bias = buffers.norm_weight_R.float(), buffers.norm_bias_R.float()
        inner = F.gelu(F.layer_norm(inner, inner.shape[-1:], weight, bias))
        threshold = buffers.threshold.float()
        self.vo = keep(F.linear(inner, buffers.proj_out_hR.float()), threshold, int(buffers.top_k)).to(x_BSD.dtype)
        if "dynamic_WR" in self.names:
            free = keep(F.linear(inner, buffers.dynamic_WR.float()), threshold, int(buffers.top_k_qk))
            h = len(buffers.qk_h)
            self.qk = expand_pairs(free, h, 2 * (h - free.shape[-1])).to(x_BSD.dtype)


def keep(logits: Tensor, threshold: Tensor, most: int) -> Tensor:
    """Kept dimensions (…, h) bool: logits at or above the threshold, at most ``most``, at least the best one."""
    floor = logits.topk(most, -1).values
    bound = torch.maximum(floor[..., -1:], threshold).minimum(floor[..., :1])
    return logits >= bound
