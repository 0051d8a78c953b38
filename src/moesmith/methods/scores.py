"""Channel scores and the choice of channels (FLAP, arXiv:2312.11983; LLM-Pruner, arXiv:2305.11627)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesmith.calibration.moments import Moments
from moesmith.errors import MoesmithError
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN

Score = Literal["wifv", "ifv", "wifn", "magnitude"]  # of one layer, from its moments
AnyScore = Literal[Score, "taylor", "random"]  # also of all layers at once
Selection = Literal["uniform", "adaptive"]


def channel_scores(parent: Parent, moments: Moments, score: Literal[Score, "taylor"] = "wifv") -> Tensor:
    """Score each channel, (L, F) fp32, higher matters more; a is the input of ``down_proj``, W its matrix.

    * ``wifv``: Var(a_j) · ‖W[:, j]‖² — FLAP's and DIVE's score.
    * ``ifv``: Var(a_j).
    * ``wifn``: mean_i |W[i, j]| · sqrt(E a_j²) — structured Wanda (Wanda-sp in FLAP's paper and code, whose sum over a
      sequence's tokens is this mean times a constant).
    * ``magnitude``: ‖gate_j‖ · ‖up_j‖ · ‖W[:, j]‖, without data; a network without a gate has no middle factor.
    * ``taylor``: |Σ_i G[j, i] ∂L/∂G[j, i]| + |Σ_i U[j, i] ∂L/∂U[j, i]| + |Σ_i W[i, j] ∂L/∂W[i, j]| with the matrices of
      gate G and up U, and L the next-token loss — LLM-Pruner's vector-wise first-order importance; a network without a
      gate has no middle term.

    Raises:
        MoesmithError: ``taylor``, and the moments hold no slopes (``methods.taylor.slopes``).
    """
    if score == "taylor":
        if moments.slopes_MLF is None:
            raise MoesmithError("score taylor needs gradients, and these moments hold none", "Take their slopes.")
        return moments.slopes_MLF.abs().sum(0)
    pairs = zip(moments.mean_LF, moments.var_LF, strict=True)
    return torch.stack([layer_score(ffn, *pair, score) for ffn, pair in zip(parent.ffns, pairs, strict=True)])


def layer_score(ffn: FFN, mean_F: Tensor, variance_F: Tensor, score: Score = "wifv") -> Tensor:
    """Score the channels of one layer, (F,)."""
    down_DF = ffn.down_DF.float()  # reduced where it is: one number per channel comes to the CPU
    if score == "wifv":
        return variance_F * down_DF.square().sum(0).cpu()
    if score == "ifv":
        return variance_F
    if score == "wifn":
        return down_DF.abs().mean(0).cpu() * (variance_F + mean_F**2).sqrt()
    size_F = ffn.gate_FD.float().norm(dim=1)
    if ffn.up_FD is not None:
        size_F = size_F * ffn.up_FD.float().norm(dim=1)
    return (size_F * down_DF.norm(dim=0)).cpu()


def drawn_scores(layers: int, channels: int, groups: int, seed: int) -> list[Tensor]:
    """Draw scores for ``groups`` experts or domains, (L, F) each, uniform in [0, 1): the control without data.

    Args:
        layers: L.
        channels: F.
        groups: how many are drawn; the first ones are the same for any number.
        seed: of the draws.
    """
    draws = torch.Generator().manual_seed(seed)
    return [torch.rand(layers, channels, generator=draws) for _ in range(groups)]


def kept_channels(d_ff: int, ratio: float) -> int:
    """Count the channels left when a share ``ratio`` is pruned: F - floor(ratio F), as in DIVE's code.

    Raises:
        MoesmithError: nothing is left, or the ratio is not in [0, 1).
    """
    kept = d_ff - int(d_ff * ratio)
    if not 0 <= ratio < 1 or kept < 1:
        raise MoesmithError(
            f"a pruning ratio of {ratio} leaves no channel of {d_ff}", "Give carve.ratio a value in [0, 1)."
        )
    return kept


def top(scores_F: Tensor, ratio: float) -> Tensor:
    """Choose the channels of one layer with the highest scores, sorted; ties by lower index."""
    return most(scores_F, kept_channels(len(scores_F), ratio))


def most(scores_F: Tensor, count: int) -> Tensor:
    """Choose so many channels with the highest scores, sorted; ties by lower index."""
    return scores_F.argsort(descending=True, stable=True)[:count].sort().values


def choose(scores_LF: Tensor, ratio: float, selection: Selection = "uniform") -> list[Tensor]:
    """Choose the kept channels of each layer, sorted, from one expert's scores.

    ``uniform`` keeps the same number in every layer (FLAP's UL, what DIVE uses): an exact top-k, ties by lower index.
    ``adaptive`` (FLAP's AL) standardises each layer's scores and shares one quota over all layers; every layer
    keeps at least one channel, which the published code does not guarantee.
    """
    L, F = scores_LF.shape
    kept = kept_channels(F, ratio)
    if selection == "uniform":
        return [top(scores_F, ratio) for scores_F in scores_LF]
    spread_L1 = scores_LF.std(-1, correction=min(1, F - 1), keepdim=True).clamp_min(1e-12)
    standard_LF = (scores_LF - scores_LF.mean(-1, keepdim=True)) / spread_L1
    standard_LF.scatter_(1, standard_LF.argmax(-1, keepdim=True), torch.inf)
    quota = standard_LF.flatten().argsort(descending=True, stable=True)[: kept * L]
    mask_LF = torch.zeros(L * F, dtype=torch.bool).index_fill_(0, quota, True).view(L, F)
    return [mask_F.nonzero().squeeze(-1) for mask_F in mask_LF]
