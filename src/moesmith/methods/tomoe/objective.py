"""ToMoE's loss: self-distillation under a budget of active parameters (ToMoE, arXiv:2501.15316)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.settings import MasksSection
from moesmith.training.student import token_loss


def log_ratio(x: Tensor, y: float, c: float = 1e-3) -> Tensor:
    """Compute ℓ(x, y) = log(max(x + c, y + c) / min(x + c, y + c)) = |log((x + c) / (y + c))|."""
    return (torch.log(x + c) - math.log(y + c)).abs()


def active_share(masks: Masks, widths: list[Tensor]) -> Tensor:
    """Compute P(Θ) / P_total of the last forward pass (§3.5).

    Args:
        masks: with the attention widths of that pass.
        widths: kept channels of every layer's widest expert.
    """
    sizes = masks.sizes
    total: Tensor | int = 0
    for (_, attention), width in zip(masks.layers(), widths, strict=True):
        total = total + sizes.ffn(width)
        if attention is None:
            total = total + sizes.attention(sizes.h, sizes.h)
        else:
            total = total + sizes.attention(attention.width_qk, attention.width_vo)
    return torch.as_tensor(total / sizes.total)


class MaskObjective(nn.Module):
    """The map from token ids (B, S) to the scalar loss 2·KL + R_P + R_U + R_L; its parameters are Θ.

    Attributes:
        measured: parts of the last loss and what they are computed from, as numbers, for the training log.
    """

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, masks: Masks, spec: MasksSection) -> None:
        super().__init__()
        self.model, self.masks, self.spec = model, masks, spec
        self._teacher = [teacher]
        self._measured: dict[str, Tensor] = {}

    @property
    def measured(self) -> dict[str, float]:
        """Parts of the last loss as numbers, with only one wait for the device."""
        if not self._measured:
            return {}
        values = torch.stack([value.detach().float() for value in self._measured.values()]).tolist()
        return {name: round(value, 5) for name, value in zip(self._measured, values, strict=True)}

    def loads(self) -> list[Tensor]:
        """Return each layer's share of tokens by expert, (E,), in the last forward pass."""
        return [ffn.one_hot_TN.detach().mean(0) for ffn, _ in self.masks.layers()]

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Run one forward pass of teacher and student."""
        self.masks.draw()
        kl = token_loss(self.model, ids_BS, self._teacher[0], mix=1.0)
        penalty, self._measured = self.penalties()
        self._measured["kl"] = kl
        return self.spec.kl_weight * kl + penalty

    def penalties(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute R_P + R_U + R_L of the last forward pass, and its budget, union, load and routing entropy."""
        spec, layers = self.spec, self.masks.layers()
        widths, unions, loads, entropies = [], [], [], []
        for ffn, _ in layers:
            mask_NF = ffn.sample()
            widths.append(mask_NF.sum(-1).amax())
            kept_NF = mask_NF if spec.union == "sampled" else ffn.plain()
            unions.append((1 - (1 - kept_NF).prod(0)).mean())
            share_N = ffn.one_hot_TN.mean(0)  # value: the load; gradient: the softmax's
            load_N = share_N.detach()
            loads.append((load_N * share_N).sum())
            entropies.append(torch.special.entr(load_N).sum())
        share = active_share(self.masks, widths)
        union, load = torch.stack(unions), torch.stack(loads).mean()
        budget_loss = log_ratio(share, spec.budget)
        union_loss = log_ratio(union, 1.0).sum() / (2 * len(layers))  # attention positions count, with 0
        penalty = spec.budget_weight * budget_loss + spec.union_weight * union_loss + spec.balance_weight * load
        entropy = torch.stack(entropies).mean()
        measured = {"active": share.detach(), "union": union.detach().mean(), "load": load.detach(), "entropy": entropy}
        return penalty, measured
