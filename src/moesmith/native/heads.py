"""Compute attention with fewer dimensions per head: the deterministic gate, and the attention that is narrower.

Shapes: B sequences, S positions, D model width, H query heads, h head width, w and u kept dimensions of Q/K and V/O,
R gate width, W free entries of a Q/K mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def expand_pairs(free: Tensor, h: int, rotary: int) -> Tensor:
    """Expand the free entries (…, h − rotary/2) of a Q/K mask to the head dimension (…, h).

    With the rotate-half convention dimensions i and i + rotary/2 form one plane, so they share an entry; only then do
    masking and rotating commute. A dimension that does not rotate has an entry of its own.
    """
    pairs, rest = free.split([rotary // 2, h - rotary], -1)
    return torch.cat([pairs, pairs, rest], -1)


def keep(logits: Tensor, threshold: Tensor, most: int) -> Tensor:
    """Choose the kept dimensions (…, h) bool: logits at or above the threshold, at most ``most``, at least the best."""
    if logits.device.type == "cpu":  # checking is free here, and selecting in short rows slow: only where needed
        kept = logits >= threshold
        counts = kept.sum(-1)
        wrong = (counts == 0) | (counts > most)
        if bool(wrong.any()):
            kept[wrong] = _select(logits[wrong], threshold, most)
        return kept
    return _select(logits, threshold, most)


def _select(logits: Tensor, threshold: Tensor, most: int) -> Tensor:
    floor = logits.topk(most, -1).values
    bound = torch.maximum(floor[..., -1:], threshold).minimum(floor[..., :1])
    return logits >= bound


class HeadGate(nn.Module):
    """Decides which dimensions of a head a token keeps; ``attention.CarvedAttention`` says what the tensors are.

    Attributes:
        qk, vo: masks from the last :meth:`read`, (h) or (B, S, h).
        mask_output: whether O is masked by the query token as well.
    """

    qk: Tensor
    vo: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.mask_output = False
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def read(self, x_BSD: Tensor) -> None:
        """Compute the masks for the attention's input, in fp32."""
        own: Any = self
        self.qk, self.vo = own.qk_h.to(x_BSD.dtype), own.vo_h.to(x_BSD.dtype)
        self.mask_output = "output" in self.names and bool(own.output)
        if "proj_out_hR" not in self.names:
            return
        inner = F.linear(x_BSD.float(), own.proj_in_RD.float()) + own.base_R.float()
        inner = F.gelu(F.layer_norm(inner, inner.shape[-1:], own.norm_weight_R.float(), own.norm_bias_R.float()))
        threshold = own.threshold.float()
        logits = F.linear(inner, own.proj_out_hR.float()).masked_fill(~own.vo_h, -torch.inf)
        self.vo = keep(logits, threshold, int(own.top_k)).to(x_BSD.dtype)
        if "dynamic_WR" in self.names:
            free = keep(F.linear(inner, own.dynamic_WR.float()), threshold, int(own.top_k_qk))
            h = len(own.qk_h)
            self.qk = expand_pairs(free, h, 2 * (h - free.shape[-1])).to(x_BSD.dtype)


class PrunedAttention(nn.Module):
    """Causal rotary attention with w dimensions per Q/K head and u per V/O head, scaled as for the whole head.

    Attributes:
        head_gate: masks by token, over the whole head; only kept dimensions are used.
        q_proj, k_proj, v_proj, o_proj: the parent's projections without the dropped dimensions.
        q_norm, k_norm: weights (w) of an RMS norm over the head, or ``None``; it divides by the whole head's h.
    """

    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(self, config: Any, index: int, shape: dict[str, Any]) -> None:
        """Make it empty, to be filled by ``from_pretrained``.

        Args:
            config: the parent's config.
            index: the layer's number.
            shape: ``qk`` (w), ``vo`` (u), ``pairs`` (kept planes of the rotation), ``biases`` (letters of the
                projections with a bias), ``norms`` (bool) and ``gate`` (tensor name to shape and dtype).
        """
        super().__init__()
        heads, kv, D = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.h = getattr(config, "head_dim", None) or D // heads
        self.config, self.layer_idx, self.pairs = config, index, shape["pairs"]
        self.scaling, self.is_causal, self.num_key_value_groups = self.h**-0.5, True, heads // kv
        self.attention_dropout = getattr(config, "attention_dropout", 0.0)
        w, u, biases = shape["qk"], shape["vo"], shape["biases"]
        self.q_proj = nn.Linear(D, heads * w, bias="q" in biases)
        self.k_proj = nn.Linear(D, kv * w, bias="k" in biases)
        self.v_proj = nn.Linear(D, kv * u, bias="v" in biases)
        self.o_proj = nn.Linear(heads * u, D, bias="o" in biases)
        for name in ("q_norm", "k_norm"):
            setattr(self, name, nn.Parameter(torch.empty(w)) if shape["norms"] else None)
        tensors = {
            name: torch.empty(size, dtype=getattr(torch, dtype)) for name, (size, dtype) in shape["gate"].items()
        }
        self.head_gate = HeadGate(tensors)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the parent's attention does: output (B, S, D), and scores where the implementation gives them."""
        gate: Any = self.head_gate
        gate.read(hidden_states)
        kept_qk, kept_vo = gate.qk_h.nonzero()[:, 0], gate.vo_h.nonzero()[:, 0]

        def heads(linear: nn.Linear, mask: Tensor, kept: Tensor, by_token: bool) -> Tensor:  # (B, S, H, w or u)
            y: Tensor = linear(hidden_states).unflatten(-1, (-1, len(kept)))
            return y * mask[..., kept].unsqueeze(-2) if by_token else y

        dynamic = gate.qk.dim() > 1
        q = self._norm(heads(self.q_proj, gate.qk, kept_qk, dynamic), self.q_norm).transpose(1, 2)
        k = self._norm(heads(self.k_proj, gate.qk, kept_qk, dynamic), self.k_norm).transpose(1, 2)
        v = heads(self.v_proj, gate.vo, kept_vo, gate.vo.dim() > 1).transpose(1, 2)
        cos, sin = (part[..., kept_qk[: 2 * self.pairs]].unsqueeze(1) for part in position_embeddings)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # kernels need one width, and vLLM's cache the whole head's: zeros change no score
        width = self.h if self.config._attn_implementation == "vllm" else max(q.shape[-1], v.shape[-1])
        q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, scores = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1, width)[..., : len(kept_vo)]  # some kernels flatten heads
        if gate.mask_output:
            out = out * gate.vo[..., kept_vo].unsqueeze(-2)
        return self.o_proj(out.flatten(-2)), scores

    def _norm(self, y: Tensor, weight: Tensor | None) -> Tensor:
        """Apply the parent's RMS norm to a head whose dropped dimensions are zero."""
        if weight is None:
            return y
        scale = torch.rsqrt(y.float().pow(2).sum(-1, keepdim=True) / self.h + self.config.rms_norm_eps)
        return weight * (y.float() * scale).to(y.dtype)

    def _rotate(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turning, rest = y.split([2 * self.pairs, y.shape[-1] - 2 * self.pairs], -1)
        first, second = turning.chunk(2, -1)
        return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def _eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention, (B, S, H, width), and its scores."""
    k, v = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (k, v))
    scores = q @ k.mT * scaling
    if mask is not None:
        scores = scores + mask[..., : k.shape[-2]]
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout, module.training)
    return (weights @ v).transpose(1, 2), weights
