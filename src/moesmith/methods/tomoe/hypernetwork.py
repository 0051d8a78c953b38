"""What ToMoE trains: a hypernetwork of expert embeddings; per layer a router, a mask decoder and an attention gate.

Shapes: M positions (attention and feed-forward of every layer, in order), N experts, R embedding width, T tokens,
D model width, F channels, h head width, W free entries of a Q/K mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesmith.methods.tomoe.estimators import exponential, gumbel_sigmoid, gumbel_softmax, masked
from moesmith.methods.tomoe.settings import MasksSection
from moesmith.native.heads import expand_pairs
from moesmith.parent.layerwise import Beside
from moesmith.parent.sizes import EMBEDDING, HIDDEN, LATENT, Sizes


class Hypernetwork(nn.Module):
    """E = HN(z): embeddings of every position's experts (ToMoE, arXiv:2501.15316).

    A bidirectional GRU runs over the positions with experts as its batch: layers exchange information, experts of a
    layer do not, and differ because their z differ. z is drawn once and stays fixed (the released code trains it by
    accident).
    """

    z_MNI: Tensor

    def __init__(self, positions: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("z_MNI", torch.randn(positions, experts, LATENT))
        self.gru = nn.GRU(LATENT, HIDDEN, bidirectional=True)

    def forward(self) -> Tensor:
        """Return the embeddings, (M, N, R) fp32."""
        return self.gru(self.z_MNI)[0]


def _sampled(logits: Tensor, spec: MasksSection) -> Tensor:
    """Draw a hard straight-through mask with fresh noise."""
    return gumbel_sigmoid(logits, exponential(*logits.shape, like=logits), spec.temperature, spec.bias)


class ExpertMasks(Beside):
    """Router and channel masks of one feed-forward network (ToMoE, arXiv:2501.15316).

    Attributes:
        router_ND: W_r, top-1, its probability does not multiply the output.
        decoder_FR: W_D; an expert's mask logits are W_D · GELU(LN(embedding)).
        embedding_NR: the experts' embeddings, set by :meth:`Masks.draw` before every forward pass.
        one_hot_TN: routing of the last forward pass, straight-through.
    """

    embedding_NR: Tensor
    one_hot_TN: Tensor

    def __init__(self, sizes: Sizes, experts: int, spec: MasksSection) -> None:
        super().__init__()
        self.spec = spec
        self.router_ND = nn.Parameter(nn.Linear(sizes.D, experts, bias=False).weight.detach())
        self.decoder_FR = nn.Parameter(nn.Linear(EMBEDDING, sizes.F, bias=False).weight.detach())
        self.norm = nn.LayerNorm(EMBEDDING)

    def hidden(self, embedding_NR: Tensor) -> Tensor:
        """Compute the decoder input of embeddings, GELU(LN(e)), same shape."""
        return F.gelu(self.norm(embedding_NR))

    def logits(self) -> Tensor:
        """Compute the mask logits of every expert, (N, F)."""
        return F.linear(self.hidden(self.embedding_NR), self.decoder_FR)

    def sample(self) -> Tensor:
        """Sample a fresh hard straight-through mask of every expert, (N, F); widths and union are counted on it."""
        return _sampled(self.logits(), self.spec)

    def plain(self) -> Tensor:
        """Return every expert's hard straight-through mask without noise, (N, F): kept are those above even odds.

        The published union term counts sampled masks; noise alone brings eight equal ones to a union of nearly 1.
        """
        logits_NF = self.logits()
        return gumbel_sigmoid(logits_NF, torch.full_like(logits_NF, math.log(2)), self.spec.temperature, self.spec.bias)

    def forward(self, x_TD: Tensor, v_TF: Tensor, double: bool) -> Tensor:
        """Route tokens and mask their channels: (T, F). Routing and masks are computed in fp32."""
        spec = self.spec
        logits_TN = F.linear(x_TD.float(), self.router_ND)
        sampled = spec.routing == "sampled"
        noise_TN = exponential(*logits_TN.shape, like=logits_TN) if sampled else torch.ones_like(logits_TN)
        self.one_hot_TN = gumbel_softmax(logits_TN, noise_TN, spec.temperature)
        h_TR = self.hidden(self.one_hot_TN @ self.embedding_NR)
        logits_NF = self.logits().detach()
        return masked(
            v_TF,
            h_TR,
            self.decoder_FR,
            logits_NF,
            self.one_hot_TN.argmax(-1),
            temperature=spec.temperature,
            bias=spec.bias,
            noise_NF=exponential(*logits_NF.shape, like=logits_NF) if spec.noise == "expert" else None,
            double=double,
        )


class AttentionMasks(Beside):
    """Masks over the head dimension of one attention (ToMoE, arXiv:2501.15316): Q/K for all tokens, V/O by token.

    With ``spec.attention`` = ``dynamic`` the Q/K mask depends on the token as well: a score then sums over the
    dimensions that its query and its key both keep.

    Attributes:
        qk, vo: masks of the last :meth:`read`, (h) or (B, S, h); what ``attention.GatedLinear`` multiplies by.
        width_qk, width_vo: kept dimensions, the largest over the tokens of the last forward pass.
    """

    qk: Tensor
    vo: Tensor
    width_qk: Tensor
    width_vo: Tensor
    embedding_NR: Tensor

    def __init__(self, sizes: Sizes, spec: MasksSection) -> None:
        super().__init__()
        self.sizes, self.spec, self.mask_output = sizes, spec, spec.output_mask
        self.proj_in_RD = nn.Parameter(nn.Linear(sizes.D, EMBEDDING, bias=False).weight.detach())
        self.proj_out_WR = nn.Parameter(nn.Linear(EMBEDDING, sizes.h + sizes.static, bias=False).weight.detach())
        self.norm = nn.LayerNorm(EMBEDDING)

    def base(self) -> Tensor:
        """Return ē, the experts' mean embedding (R)."""
        return self.embedding_NR.mean(0)

    def static_logits(self) -> Tensor:
        """Compute o_0, one logit per free entry of the Q/K mask (W)."""
        return F.linear(F.gelu(self.norm(self.base())), self.proj_out_WR[self.sizes.h :])

    def token_logits(self, x_BSD: Tensor) -> Tensor:
        """Compute o_v, followed by the Q/K logits by token: (B, S, h + W)."""
        inner = F.gelu(self.norm(self.base() + F.linear(x_BSD.float(), self.proj_in_RD)))
        return F.linear(inner, self.proj_out_WR)

    def read(self, x_BSD: Tensor) -> None:
        """Sample the masks for the attention's input."""
        spec, h = self.spec, self.sizes.h
        logits = self.token_logits(x_BSD)
        if spec.attention == "hybrid":
            static_W = self.static_logits()
            # the published code draws the static mask's noise anew for every token
            qk_logits = static_W if spec.noise == "expert" else static_W.expand(*x_BSD.shape[:2], -1)
        else:
            qk_logits = logits[..., h:]
        vo = _sampled(logits[..., :h], spec)
        qk = expand_pairs(_sampled(qk_logits, spec), h, self.sizes.rotary)
        self.width_vo, self.width_qk = vo.sum(-1).amax(), qk.sum(-1).amax()
        self.vo, self.qk = vo.to(x_BSD.dtype), qk.to(x_BSD.dtype)


class Masks(Beside):
    """Everything trainable, Θ; the base weights are not part of it.

    Attributes:
        ffn: one :class:`ExpertMasks` per layer.
        attention: one :class:`AttentionMasks` per layer, or none at all.
    """

    def __init__(self, sizes: Sizes, experts: int, spec: MasksSection, seed: int) -> None:
        super().__init__()
        self.sizes, self.spec, self.experts = sizes, spec, experts
        with torch.random.fork_rng(devices=[]):  # the start depends on the seed alone
            torch.manual_seed(seed)
            self.hyper = Hypernetwork(2 * sizes.L, experts)
            self.ffn = nn.ModuleList(ExpertMasks(sizes, experts, spec) for _ in range(sizes.L))
            gated = sizes.L if spec.attention != "none" else 0
            self.attention = nn.ModuleList(AttentionMasks(sizes, spec) for _ in range(gated))

    def draw(self) -> None:
        """Run the hypernetwork and give every module its embeddings."""
        embeddings_MNR = self.hyper()
        for index, module in enumerate(self.attention):
            module.embedding_NR = embeddings_MNR[2 * index]
        for index, module in enumerate(self.ffn):
            module.embedding_NR = embeddings_MNR[2 * index + 1]

    def layers(self) -> list[tuple[Any, Any]]:
        """List (feed-forward masks, attention masks or ``None``) of every layer."""
        return [(ffn, self.attention[i] if len(self.attention) else None) for i, ffn in enumerate(self.ffn)]
