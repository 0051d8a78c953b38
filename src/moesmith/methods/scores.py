"""Channel scores and the choice of channels (FLAP, arXiv:2312.11983)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesmith.calibration.moments import Moments
from moesmith.errors import MoesmithError
from moesmith.parent.load import Parent
from moesmith.parent.structure import FFN

Score = Literal["wifv", "ifv", "wifn", "magnitude"]
Selection = Literal["uniform", "adaptive"]


def channel_scores(parent: Parent, moments: Moments, score: Score = "wifv") -> Tensor:
    """Score each channel, (L, F) fp32, higher matters more; a is the input of ``down_proj``, W its matrix.

    * ``wifv``: Var(a_j) · ‖W[:, j]‖² — FLAP's and DIVE's score.
    * ``ifv``: Var(a_j).
    * ``wifn``: mean_i |W[i, j]| · sqrt(E a_j²) — structured Wanda.
    * ``magnitude``: ‖gate_j‖ · ‖up_j‖ · ‖W[:, j]‖, without data; a network without a gate has no middle factor.
    """
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
    kept = kept_channels(len(scores_F), ratio)
    return scores_F.argsort(descending=True, stable=True)[:kept].sort().values


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
