"""LLM-Pruner's first-order importance (arXiv:2305.11627): what the loss would lose with a channel, by its gradient.

Leaving out weights w changes the loss by about w · ∂L/∂w (the paper's equation 3, its first term). The paper's
vector-wise importance takes this for each structure of a group, as a whole, and adds up the absolute values (its
*summation*). A channel's group is its gate row, its up row and its ``down_proj`` column.

No gradient of a weight is ever made. A factor of 1 in front of a row has the gradient Σ w · ∂L/∂w over the row, so the
factors' gradients are all that a backward pass through the frozen model must give: two numbers per channel.

Shapes: B sequences, S positions, D model width, F channels, L layers, M matrices of a network (3, or 2 without a gate).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesmith.console import meter
from moesmith.errors import MoesmithError
from moesmith.parent.accelerator import Sum, halving
from moesmith.parent.layerwise import share
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN
from moesmith.parent.structure import put
from moesmith.training.loop import refuse_inference
from moesmith.training.student import token_loss

GRADIENTS = 4096  # calibration tokens of each text; LLM-Pruner takes ten short samples
BATCH = 4  # windows per backward pass


class Scaled(nn.Module):
    """A parent's feed-forward network with a factor per channel of every matrix, all 1: it computes the same.

    Attributes:
        inner_F: in front of the gate's rows, before any bias.
        outer_F: in front of the channels, and so of the ``down_proj`` columns.
        up_F: in front of the up rows: ``outer_F`` unless they have a bias.
    """

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self._ffn = [ffn]  # in a list it is no part of the module
        # fp32 whatever the model computes in: their gradients are sums over all tokens
        width, device = len(ffn.gate_FD), ffn.gate_FD.device
        self.inner_F, self.outer_F, own_F = (torch.ones(width, device=device, requires_grad=True) for _ in range(3))
        self.up_F = self.outer_F if ffn.up_bias_F is None else own_F
        self.factors = [self.inner_F, self.outer_F] if ffn.up_FD is None else [self.inner_F, self.up_F, self.outer_F]

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        (ffn,) = self._ffn
        z_BSF = (F.linear(x_BSD, ffn.gate_FD) * self.inner_F).to(x_BSD.dtype)
        a_BSF = ffn.activation(z_BSF if ffn.gate_bias_F is None else z_BSF + ffn.gate_bias_F)
        if ffn.up_FD is not None:
            up_BSF = F.linear(x_BSD, ffn.up_FD)
            if ffn.up_bias_F is not None:
                up_BSF = (up_BSF * self.up_F).to(x_BSD.dtype) + ffn.up_bias_F
            a_BSF = a_BSF * up_BSF
        return F.linear((a_BSF * self.outer_F).to(x_BSD.dtype), ffn.down_DF, ffn.down_bias_D)


def refuse_gradients(parent: Parent, what: str = "score taylor", cure: str = "take another carve.score") -> None:
    """Refuse a parent through which no gradient can go.

    Args:
        parent: the dense model.
        what: needs it.
        cure: how to do without.

    Raises:
        MoesmithError: it is run layer by layer, or computes in fp16.
    """
    if parent.layerwise:
        raise MoesmithError(
            f"{what} takes gradients of the whole model, but the parent is run layer by layer",
            f"Load it without a limit of memory, or {cure}.",
        )
    if parent.dtype == torch.float16:
        raise MoesmithError(f"fp16 is too narrow for the gradients of {what}", f"Give --dtype bf16 or fp32, or {cure}.")


def slopes(parent: Parent, windows: Tensor, label: str = "gradients") -> Tensor:
    """Compute Σ w · ∂L/∂w over each channel's part of each matrix, (M, L, F) fp32 on the CPU.

    L is the next-token loss, its mean over all tokens that have a successor. The order is gate, up (if there is one),
    down. Up and down are equal where up has no bias: both multiply the same activation. A bias belongs to no group. The
    importance of a channel is ``slopes(...).abs().sum(0)``.

    Args:
        parent: the dense model; its parameters are frozen.
        windows: token ids (N, window).
        label: what the progress line says.

    Raises:
        MoesmithError: the parent is run layer by layer, computes in fp16, or its weights were made under
            ``torch.inference_mode``.
    """
    refuse_gradients(parent)
    refuse_inference(parent.model)

    def run(batch: int) -> Tensor:
        model = share(parent.model).requires_grad_(False).eval()
        factors: list[Tensor] = []
        for ffn in parent.ffns:
            scaled = Scaled(ffn)
            put(model, ffn.path, scaled)
            factors += scaled.factors
        total = Sum(torch.zeros(len(factors), parent.F, device=parent.device))
        with torch.enable_grad(), meter(label, windows.numel()) as bar:
            for ids_BS in windows.split(batch):
                loss = token_loss(model, ids_BS.to(parent.device), None, 0.0)
                found_NF = torch.stack(torch.autograd.grad(loss, factors))
                total.add(found_NF * (len(ids_BS) / len(windows)))
                bar.advance(ids_BS.numel())
        return total.value().float().view(parent.L, -1, parent.F).transpose(0, 1).contiguous()

    return halving(label, parent.device, BATCH, run)
