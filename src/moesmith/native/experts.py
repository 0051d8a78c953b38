"""Compute experts in their sliced form, and the block that takes a feed-forward network's place.

Shapes: T tokens, D model width, F_e an expert's width, E experts, K active experts, U channels of any expert, P rows
sorted by expert, each expert padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
ALIGN, ALIGN_TRAINING = 16, 64  # rows


def groupable(x: Tensor, *widths: int) -> bool:
    """Whether one kernel can do all experts' products, so that the host need not know how many rows each has.

    On a CPU a product per expert is faster. CUDA has the kernel in bf16, for rows that are a multiple of 16 bytes.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return all(width % 8 == 0 for width in widths) and torch.cuda.get_device_capability(x.device) >= (8, 0)


class SlicedExperts(nn.Module):
    """Experts as stacked slices; each token visits its K experts only.

    Attributes:
        gate_up_proj: (E, 2·F_e, D), gate rows first, or (E, F_e, D) without a gate; experts narrower than the widest
            are padded with zeros, biases too.
        down_proj: (E, D, F_e).
        bias_ED: bias of the output or ``None``.
        gate_bias_EF, up_bias_EF: biases of their rows, or ``None``.
        lora: grouped LoRA (``lora.GroupedLora``) or ``None``.
    """

    def __init__(
        self,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        activation: Activation,
        bias_ED: Tensor | None = None,
        gate_bias_EF: Tensor | None = None,
        up_bias_EF: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.gated = gate_up_EGD.shape[1] == 2 * down_EDF.shape[2]
        self.gate_up_proj = nn.Parameter(gate_up_EGD, requires_grad=False)
        self.down_proj = nn.Parameter(down_EDF, requires_grad=False)
        self.bias_ED = None if bias_ED is None else nn.Parameter(bias_ED, requires_grad=False)
        self.gate_bias_EF = None if gate_bias_EF is None else nn.Parameter(gate_bias_EF, requires_grad=False)
        self.up_bias_EF = None if up_bias_EF is None else nn.Parameter(up_bias_EF, requires_grad=False)
        self.activation = activation
        self.lora: Any = None  # lora.GroupedLora, set by lora.add_lora

    def expert(self, x_ND: Tensor, index: int) -> Tensor:
        """Run one expert on its own tokens: (N, D) to (N, D)."""
        return self._run(x_ND, [len(x_ND) if e == index else 0 for e in range(len(self.gate_up_proj))])

    def _run(self, x_PD: Tensor, counts: list[int] | Tensor, owner_P: Tensor | None = None) -> Tensor:
        """Run rows, sorted by expert, through their experts: (P, D) to (P, D).

        ``counts`` are the rows of each expert; for :func:`groupable` products they are a tensor on the device that says
        where each expert's rows end (int32), with each row's expert ``owner_P``.
        """
        gate_up_PG = self._products(x_PD, self.gate_up_proj, counts, self.gate_up_bias(), owner_P)
        if self.lora is not None:
            if owner_P is None:
                owner_P = torch.repeat_interleave(torch.tensor(counts, device=x_PD.device))
            gate_up_PG = gate_up_PG + self.lora.gate_up(x_PD, owner_P)
        if self.gated:
            gate_PF, up_PF = gate_up_PG.chunk(2, -1)
            a_PF = self.activation(gate_PF) * up_PF
        else:
            a_PF = self.activation(gate_up_PG)
        y_PD = self._products(a_PF, self.down_proj, counts, self.bias_ED, owner_P)
        return y_PD if self.lora is None else y_PD + self.lora.down(a_PF, owner_P)

    def gate_up_bias(self) -> Tensor | None:
        """What is added to the products of ``gate_up_proj``, (E, 2·F_e) or (E, F_e); ``None`` where nothing is."""
        if self.gate_bias_EF is None or self.up_bias_EF is None:
            return self.gate_bias_EF
        return torch.cat([self.gate_bias_EF, self.up_bias_EF], 1)

    @staticmethod
    def _products(
        x_PI: Tensor,
        weight_EOI: Tensor,
        counts: list[int] | Tensor,
        bias_EO: Tensor | None = None,
        owner_P: Tensor | None = None,
    ) -> Tensor:
        if isinstance(counts, Tensor):
            y_PO = F.grouped_mm(x_PI, weight_EOI.mT, offs=counts)
            return y_PO if bias_EO is None else y_PO + bias_EO[owner_P]
        weights = weight_EOI.unbind(0)  # one gradient for all, where picking one expert after the other makes many
        parts = [
            F.linear(x_NI, weights[e], None if bias_EO is None else bias_EO[e])
            for e, x_NI in enumerate(x_PI.split(counts))
            if counts[e]
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum the selected experts' weighted outputs, (T, D): sort by expert, one product per expert, sort back."""
        (experts, rows, D), K = self.gate_up_proj.shape, ids_TK.shape[1]
        ids_S = ids_TK.flatten()
        rows_SD = x_TD if K == 1 else x_TD.repeat_interleave(K, 0)
        if groupable(x_TD, D, rows // (1 + self.gated)):  # the host does not wait for the device
            owner_S, order_S = ids_S.sort(stable=True)
            back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
            ends_E = torch.searchsorted(owner_S, torch.arange(experts, device=ids_S.device), right=True, out_int32=True)
            return self._mix(self._run(rows_SD[order_S], ends_E, owner_S)[back_S], weights_TK)
        counts_E = torch.bincount(ids_S, minlength=experts)
        # a CPU's matrix kernels are built per shape: rounding rows up lets few of them serve every batch. Training
        # makes three products of each shape, and every step brings new shapes; inference loses more to empty rows
        align = (ALIGN_TRAINING if torch.is_grad_enabled() else ALIGN) if x_TD.device.type == "cpu" else 1
        padded_E = (counts_E + align - 1) // align * align
        order_S = ids_S.argsort(stable=True)
        shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
        slot_S = torch.empty_like(ids_S)
        slot_S[order_S] = torch.arange(len(ids_S), device=ids_S.device) + shift_E[ids_S[order_S]]
        counts = padded_E.tolist()
        x_PD = x_TD.new_zeros(sum(counts), x_TD.shape[1]).index_copy(0, slot_S, rows_SD)
        return self._mix(self._run(x_PD, counts).index_select(0, slot_S), weights_TK)

    @staticmethod
    def _mix(y_SD: Tensor, weights_TK: Tensor) -> Tensor:
        """Weight and add each token's K outputs: (T·K, D) to (T, D)."""
        y_SD = y_SD * weights_TK.reshape(-1, 1).to(y_SD.dtype)
        return y_SD if weights_TK.shape[1] == 1 else y_SD.view(*weights_TK.shape, -1).sum(1)


class UnionExperts(SlicedExperts):
    """Experts that are subsets of one network's channels: every channel is stored once, with an index list per expert.

    The slices are picked on first use and kept, since picking them for every call would cost more than the products.

    Attributes:
        gate_UD, up_UD, down_DU: the channels that any expert keeps; no ``up_UD`` without a gate.
        gate_bias_U, up_bias_U: biases of their rows, or ``None``.
        index_EF: each expert's channels, int32, padded with -1.
    """

    index_EF: Tensor

    def __init__(
        self,
        gate_UD: Tensor,
        up_UD: Tensor | None,
        down_DU: Tensor,
        index_EF: Tensor,
        activation: Activation,
        bias_ED: Tensor | None = None,
        gate_bias_U: Tensor | None = None,
        up_bias_U: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.gated = up_UD is not None
        parts = {"gate_UD": gate_UD, "up_UD": up_UD, "down_DU": down_DU, "bias_ED": bias_ED}
        parts |= {"gate_bias_U": gate_bias_U, "up_bias_U": up_bias_U}
        for name, part in parts.items():
            setattr(self, name, None if part is None else nn.Parameter(part, requires_grad=False))
        self.register_buffer("index_EF", index_EF)
        self.activation = activation
        self.lora = None
        self._kept: tuple[Any, tuple[Tensor, Tensor, Tensor | None]] | None = None

    def _slices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        sides: list[Any] = [side for side in (self.gate_UD, self.up_UD) if side is not None]
        down: Any = self.down_DU
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self._pick(sides, down)
        state = (*((p.data_ptr(), p._version, p.dtype) for p in (*sides, down)), self.index_EF.data_ptr())
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # kept slices may be used under autograd later
                self._kept = state, self._pick(sides, down)
        return self._kept[1]

    def _pick(self, sides: list[Tensor], down_DU: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        index_EF = self.index_EF.long()
        within_EF = index_EF >= 0
        index_EF = index_EF.clamp_min(0)
        down_EFD = down_DU.T[index_EF] * within_EF.unsqueeze(-1)
        rows = torch.cat([side[index_EF] for side in sides], 1)
        inner: list[Any] = [bias for bias in (self.gate_bias_U, self.up_bias_U) if bias is not None]
        bias_EG = torch.cat([bias[index_EF] for bias in inner], 1) if inner else None
        return rows, down_EFD.mT.contiguous(), bias_EG

    @property
    def gate_up_proj(self) -> Tensor:  # type: ignore[override]
        """(E, 2·F_e, D), or (E, F_e, D) without a gate."""
        return self._slices()[0]

    @property
    def down_proj(self) -> Tensor:  # type: ignore[override]
        """(E, D, F_e); columns past an expert's width are zero."""
        return self._slices()[1]

    def gate_up_bias(self) -> Tensor | None:
        """(E, 2·F_e), or (E, F_e) without a gate, or ``None``."""
        return self._slices()[2]


class MoEBlock(nn.Module):
    """A router and its experts, which replace a feed-forward network: (…, D) to (…, D).

    Attributes:
        router: maps tokens to weights and ids of experts.
        experts: the routed experts, in any form.
        shared: an expert that every token uses with weight 1, or ``None``.
    """

    def __init__(self, router: Any, experts: Any, shared: SlicedExperts | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        # one pruned FFN is not routed: its weight is 1
        self.alone = router.spec.experts == 1 and isinstance(experts, SlicedExperts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Route every token and mix its experts' outputs."""
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, ids_TK = self.router(x_TD)
        y_TD = self.experts.expert(x_TD, 0) if self.alone else self.experts(x_TD, ids_TK, weights_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared.expert(x_TD, 0)
        return y_TD.view_as(hidden)
