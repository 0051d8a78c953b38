"""Grouped LoRA: one low-rank pair per expert and projection, beside the sliced experts.

PEFT's own adapter for 3-D expert parameters refuses dropout, which DIVE trains with (dive.md §7), and shares
one A between gate and up. Ours keeps DIVE's separate pairs, costs two small products per expert, and merges
exactly: W' = W + (alpha / r) B A.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesmith.moe import MoEBlock, SlicedExperts, moe_blocks


class GroupedLora(nn.Module):
    """Low-rank updates of all experts of one layer.

    ``A`` starts uniform as a Linear's weight (Kaiming, a = sqrt 5, as PEFT does), ``B`` at zero, so training starts
    at the untouched experts. Shapes: gate and up A (E, r, D), B (E, F_e, r); down A (E, r, F_e), B (E, D, r).
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
        self.up_A, self.up_B = pair(D, F_e)
        self.down_A, self.down_B = pair(F_e, D)
        # a narrower expert's padding must stay out of the sum: with these columns at zero its gradient is zero for good
        padding_EF = (experts.down_proj == 0).all(1)
        with torch.no_grad():
            self.down_A.masked_fill_(padding_EF[:, None, :], 0)

    def _apply_pair(self, x_NI: Tensor, A_rI: Tensor, B_Or: Tensor) -> Tensor:
        x_NI = F.dropout(x_NI, self.dropout, self.training)
        return F.linear(F.linear(x_NI, A_rI) * self.scale, B_Or)

    def gate_up(self, x_ND: Tensor, index: int) -> Tensor:
        """The update of an expert's gate and up outputs: (N, D) to (N, 2·F_e)."""
        gate_NF = self._apply_pair(x_ND, self.gate_A[index], self.gate_B[index])
        up_NF = self._apply_pair(x_ND, self.up_A[index], self.up_B[index])
        return torch.cat([gate_NF, up_NF], -1)

    def down(self, a_NF: Tensor, index: int) -> Tensor:
        """The update of an expert's output: (N, F_e) to (N, D)."""
        return self._apply_pair(a_NF, self.down_A[index], self.down_B[index])


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Give every sliced MoE block of ``model`` a :class:`GroupedLora`; the start depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model):
        assert isinstance(block.experts, SlicedExperts), "LoRA trains the sliced form"
        block.experts.lora = GroupedLora(block.experts, rank, alpha, dropout, generator).train(model.training)


def lora_tensors(blocks: list[MoEBlock]) -> dict[str, Tensor]:
    """The adapters as a carving stores them: ``"{layer}.{gate|up|down}.{A|B}"``, the scale folded into B."""
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        lora = getattr(block.experts, "lora", None)
        if lora is None:
            continue
        for name in ("gate", "up", "down"):
            tensors[f"{index}.{name}.A"] = getattr(lora, f"{name}_A").detach().clone()
            tensors[f"{index}.{name}.B"] = getattr(lora, f"{name}_B").detach() * lora.scale
    return tensors
