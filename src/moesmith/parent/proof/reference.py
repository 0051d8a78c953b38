"""Compute a decoder's parts by plain formulas, to check a parent's activations against (``parent/proof/family.py``).

Shapes: B batch, S positions, P positions already cached, D model width, H heads, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesmith.errors import MoesmithError
from moesmith.parent.structure import KINDS, attention_of, attention_weights, attention_window, head_dim

Rope = tuple[Tensor, Tensor]  # cosines and sines, (B, S, rotary)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return (x − mean) / deviation, times weight, plus bias."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def rms_norm(x: Tensor, norm: Any, config: Any) -> Tensor:
    """Divide x by its root mean square, in fp32, and multiply by the weight."""
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    weight: Tensor = norm.weight
    return weight * scaled.to(x.dtype)


@dataclass
class Past:
    """Keys (rotated) and values of earlier positions, (B, H_kv, P, W) each."""

    keys: Tensor
    values: Tensor


def attention(layer: nn.Module, config: Any, x_BSD: Tensor, rope: Rope, past: Past | None = None) -> Tensor:
    """Compute causal rotary attention as Mixtral, Qwen2-MoE and Qwen3-MoE do, (B, S, D) to (B, S, D).

    Dimensions of a head beyond the rope's are not rotated. The positions of ``x_BSD`` follow those of ``past``, which
    gets their keys and values.

    Raises:
        MoesmithError: a q/k norm is over all heads at once.
    """
    weights, width = attention_weights(layer, config), head_dim(config)
    module = attention_of(layer)

    def project(name: str) -> Tensor:
        y_BSN = F.linear(x_BSD, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))
        y_BSHW = y_BSN.unflatten(-1, (-1, width))
        if f"{name}_norm.weight" in weights:
            if weights[f"{name}_norm.weight"].numel() != width:
                raise MoesmithError(f"The parent's {name}_norm spans all heads", KINDS)
            y_BSHW = rms_norm(y_BSHW, getattr(module, f"{name}_norm"), config)
        return y_BSHW.transpose(1, 2)

    def rotate(y_BHSW: Tensor) -> Tensor:
        turned, passed = y_BHSW.tensor_split([rope[0].shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        turned = turned * rope[0][:, None] + torch.cat((-second, first), -1) * rope[1][:, None]
        return torch.cat((turned, passed), -1)

    groups = config.num_attention_heads // config.num_key_value_heads
    q, k, v = rotate(project("q")), rotate(project("k")), project("v")
    if past is not None:
        past.keys, past.values = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        k, v = past.keys, past.values
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    newest = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    distance = newest[:, None] - torch.arange(k.shape[2])
    visible = (distance >= 0) & (distance < (attention_window(config) or k.shape[2]))
    y_BHSW = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.to(q.device), scale=width**-0.5)
    return F.linear(y_BHSW.transpose(1, 2).flatten(2), weights["o_proj.weight"], weights.get("o_proj.bias"))
