"""Grouped LoRA: one low-rank pair per expert and projection, next to the sliced experts.

PEFT's own adapter for 3-D expert parameters refuses dropout, which DIVE trains with, and shares
one A between gate and up. Ours keeps DIVE's separate pairs, costs two small products per expert, and merges
exactly: W' = W + (alpha / r) B A.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesmith.mixture.moe import MoEBlock, SlicedExperts, moe_blocks


class GroupedLora(nn.Module):
    """Low-rank updates of all experts of one layer.

    ``A`` starts uniform like a Linear's weight (Kaiming, a = sqrt 5, as PEFT does), ``B`` at zero, so training starts
    at the untouched experts. Shapes: gate and up A (E, r, D), B (E, F_e, r); down A (E, r, F_e), B (E, D, r). Experts
    without a gate have no pair for up.
    """

    def __init__(self, experts: SlicedExperts, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__()
        E, D, F_e = experts.down_proj.shape
        like: dict[str, Any] = {"dtype": experts.down_proj.dtype, "device": experts.down_proj.device}
        self.scale, self.dropout = alpha / rank, dropout

        def pair(inner: int, outer: int) -> tuple[nn.Parameter, nn.Parameter]:
            A_ErI = (torch.rand(E, rank, inner, generator=generator) * 2 - 1) / math.sqrt(inner)
            return nn.Parameter(A_ErI.to(**like)), nn.Parameter(torch.zeros(E, outer, rank, **like))

        self.gate_A, self.gate_B = pair(D, F_e)
        up: tuple[nn.Parameter | None, nn.Parameter | None] = pair(D, F_e) if experts.gated else (None, None)
        self.up_A, self.up_B = up
        self.down_A, self.down_B = pair(F_e, D)
        # a narrower expert's padding must stay out of the sum: with these columns at zero its gradient is zero for good
        padding_EF = (experts.down_proj == 0).all(1)
        with torch.no_grad():
            self.down_A.masked_fill_(padding_EF[:, None, :], 0)

    def gate_up(self, x_PD: Tensor, owner_P: Tensor) -> Tensor:
        """Compute the update of gate and up for rows of experts ``owner_P``: (P, D) to (P, 2·F_e), F_e without up."""
        x_PD = dropout(x_PD, self.dropout, self.training)  # one mask for both, where PEFT draws two
        gate_PF = self._pair(x_PD, owner_P, self.gate_A, self.gate_B)
        if self.up_A is None or self.up_B is None:
            return gate_PF
        return torch.cat([gate_PF, self._pair(x_PD, owner_P, self.up_A, self.up_B)], -1)

    def down(self, a_PF: Tensor, owner_P: Tensor) -> Tensor:
        """Compute the update of the experts' outputs: (P, F_e) to (P, D)."""
        return self._pair(dropout(a_PF, self.dropout, self.training), owner_P, self.down_A, self.down_B)

    def _pair(self, x_PI: Tensor, owner_P: Tensor, A_ErI: Tensor, B_EOr: Tensor) -> Tensor:
        """Apply every A to every row, zero all but the owner's, apply every B: two large products, no loop.

        It computes E·r columns where r would do, which is cheaper than 2·E products with r = 8 columns each.
        """
        E, r, _ = A_ErI.shape
        own_PE1 = F.one_hot(owner_P, E).to(x_PI.dtype).unsqueeze(-1) * self.scale
        low_PEr = F.linear(x_PI, A_ErI.flatten(0, 1)).view(-1, E, r) * own_PE1
        return low_PEr.flatten(1) @ B_EOr.transpose(1, 2).flatten(0, 1)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply dropout like ``F.dropout``; on a CPU four mask elements come from one 64-bit draw.

    There the probability is a multiple of 2⁻¹⁶, within 1e-5 of ``p``. So a CPU and a device draw different masks of the
    same distribution, as two kinds of device do.
    """
    if not training or p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Give every sliced MoE block of ``model`` a :class:`GroupedLora`; the start depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model):
        assert isinstance(block.experts, SlicedExperts), "LoRA trains the sliced form"
        block.experts.lora = GroupedLora(block.experts, rank, alpha, dropout, generator).train(model.training)


def lora_tensors(blocks: list[MoEBlock]) -> dict[str, Tensor]:
    """Return the adapters as a carving stores them: ``"{layer}.{gate|up|down}.{A|B}"``, the scale in B; on the CPU."""
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        lora = getattr(block.experts, "lora", None)
        if lora is None:
            continue
        for name in ("gate", "up", "down") if block.experts.gated else ("gate", "down"):
            tensors[f"{index}.{name}.A"] = getattr(lora, f"{name}_A").detach().to("cpu", copy=True)
            tensors[f"{index}.{name}.B"] = getattr(lora, f"{name}_B").detach().cpu() * lora.scale
    return tensors
