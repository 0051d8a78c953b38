"""One layer of a carving: routed experts, an expert that every token uses, a router, and how outputs are added up.

    y = Σ over the K chosen experts of w_k · expert_k(x), plus shared(x)

The chosen experts' weights w sum to 1 (``average``), or each is 1 (``sum``). Everything that reads a carving knows this
algebra and nothing else: both forms of the model, LoRA, counts, files and exports.

Shapes: D model width, F_e an expert's width, E experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.mixture.gates import GateSpec, Logits, Mix
from moesmith.parent.network import FFN

Reads = Literal["gate", "hidden"]


@dataclass
class Expert:
    """Channels of the parent's network, and what was changed in them. Its tensors are on the CPU.

    Attributes:
        channels: sorted int64 (F_e), the kept rows of gate and up and columns of down.
        down_DF: a ``down_proj`` of its own (D, F_e), refitted or trained; ``None`` for the parent's columns.
        gate_FD, up_FD: matrices of its own (F_e, D), trained; ``None`` for the parent's rows.
        bias_D: added to the output (D,), fp32, such as FLAP's compensation; ``None`` for nothing.
    """

    channels: Tensor
    down_DF: Tensor | None = None
    gate_FD: Tensor | None = None
    up_FD: Tensor | None = None
    bias_D: Tensor | None = None

    @property
    def width(self) -> int:
        """F_e."""
        return len(self.channels)

    @property
    def changed(self) -> int:
        """How many of its matrices are not the parent's."""
        return sum(part is not None for part in (self.gate_FD, self.up_FD, self.down_DF))

    @property
    def plain(self) -> bool:
        """Whether its matrices are the parent's own."""
        return self.changed == 0

    @property
    def trained(self) -> bool:
        """Whether its gate or up rows differ from the parent's."""
        return self.gate_FD is not None or self.up_FD is not None


@dataclass
class Linear:
    """The ordinary router: logits = W x, without a bias.

    Attributes:
        weight_ED: W, fp32.
        noise_ED: noise matrix of DIVE's training gate, or ``None``.
    """

    weight_ED: Tensor
    noise_ED: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weight_ED)


@dataclass
class Analytic:
    """A router made of the parent's own rows: each expert's logit is what the one channel that represents it computes.

    Attributes:
        channels: int64 (E,), the channel of each expert.
        reads: ``gate``: the gate's row times x, which is a linear router; ``hidden``: the absolute value of the channel
            after activation and up, |act(gate x) · (up x)| (CMoE, arXiv:2502.04416), which is not linear.
    """

    channels: Tensor
    reads: Reads = "hidden"

    def __len__(self) -> int:
        return len(self.channels)

    def linear(self, ffn: FFN) -> bool:
        """Whether a linear router without a bias computes the same."""
        return self.reads == "gate" and ffn.gate_bias_F is None

    def folded(self, ffn: FFN) -> Linear | None:
        """Return the linear router that computes the same; ``None`` if there is none."""
        if not self.linear(ffn):
            return None
        return Linear(ffn.gate_FD[self.channels.to(ffn.gate_FD.device)].float().cpu())


@dataclass
class Layer:
    """A layer's experts, and the router that sends tokens to them.

    Attributes:
        routed: E experts, of any widths.
        router: one logit per routed expert.
        top_k: K, how many of them a token visits.
        mix: how their outputs are added up.
        noise: factor of DIVE's training noise, where the router has a noise matrix.
        shared: an expert that every token uses with weight 1, or ``None``.
        constant_D: v with v·x ≈ 1 on router inputs (``router.constant_direction``); carries a bias in a stock file.
    """

    routed: list[Expert]
    router: Linear | Analytic
    top_k: int = 1
    mix: Mix = "average"
    noise: float = 0.0
    shared: Expert | None = None
    constant_D: Tensor | None = None

    @classmethod
    def of(cls, channels: Sequence[Tensor], router_ED: Tensor, top_k: int = 1) -> Layer:
        """Make a layer of experts that are plain subsets of the parent's channels."""
        return cls([Expert(kept) for kept in channels], Linear(router_ED), top_k)

    @property
    def experts(self) -> list[Expert]:
        """The routed experts, then the shared one."""
        return [*self.routed, *([] if self.shared is None else [self.shared])]

    @property
    def widths(self) -> list[int]:
        """F_e of every routed expert."""
        return [expert.width for expert in self.routed]

    @property
    def active_width(self) -> int:
        """The most channels that a token uses: those of the K widest experts, and the shared expert's."""
        return sum(sorted(self.widths)[-self.top_k :]) + (0 if self.shared is None else self.shared.width)

    def gate(self, ffn: FFN | None = None) -> GateSpec:
        """Describe the gate's semantics as a file or a module needs them."""
        logits: Logits = "linear"
        if isinstance(self.router, Analytic) and self.router.reads == "hidden":
            logits = "hidden"
        elif isinstance(self.router, Analytic) and ffn is not None and ffn.gate_bias_F is not None:
            logits = "biased"
        return GateSpec(experts=len(self.routed), top_k=self.top_k, mix=self.mix, noise=self.noise, logits=logits)

    def mask(self, d_ff: int) -> Tensor:
        """Return the channel masks of the routed experts, (E, F) bool."""
        mask_EF = torch.zeros(len(self.routed), d_ff, dtype=torch.bool)
        for index, expert in enumerate(self.routed):
            mask_EF[index, expert.channels] = True
        return mask_EF

    def check(self, D: int, d_ff: int) -> None:
        """Refuse a layer whose parts do not fit together.

        Args:
            D: model width.
            d_ff: channels of the parent's network.

        Raises:
            MoesmithError: the router has another number of experts, there are fewer than K experts, a channel is out of
                range, a matrix has another shape, or only some of the routed experts have a bias.
        """
        experts = len(self.routed)
        if not experts or len(self.router) != experts:
            raise MoesmithError(f"has {experts} experts, and its router chooses among {len(self.router)}")
        if not 1 <= self.top_k <= experts or self.mix not in get_args(Mix):
            raise MoesmithError(f"has top_k {self.top_k} of {experts} experts and mix {self.mix}")
        if isinstance(self.router, Linear) and self.router.weight_ED.shape[-1] != D:
            raise MoesmithError(f"has a router of model width {self.router.weight_ED.shape[-1]}, not {D}")
        kept = [expert.channels for expert in self.experts]
        kept += [self.router.channels] if isinstance(self.router, Analytic) else []
        if any(len(channels) and not 0 <= int(channels.min()) <= int(channels.max()) < d_ff for channels in kept):
            raise MoesmithError("keeps channels that the parent does not have")
        if len({expert.bias_D is None for expert in self.routed}) > 1:
            raise MoesmithError("has a bias_D for some experts only", "Give the others zeros.")
        for expert in self.experts:
            F = expert.width
            shapes = {"down_DF": (D, F), "gate_FD": (F, D), "up_FD": (F, D), "bias_D": (D,)}
            for name, shape in shapes.items():
                if (tensor := getattr(expert, name)) is not None and tuple(tensor.shape) != shape:
                    raise MoesmithError(f"has a {name} of shape {tuple(tensor.shape)}, not {shape}")
