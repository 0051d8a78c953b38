"""Make up in closed form for what pruned channels computed.

``bias`` is FLAP's compensation (arXiv:2312.11983): the pruned channels' mean output. ``refit`` is ours: the
``down_proj`` that reproduces the dense output best, in the least-squares sense, from the kept channels alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def compensation_bias(down_DF: Tensor, mean_F: Tensor, kept: Tensor) -> Tensor:
    """Compute b = W[:, P] μ_P over the pruned channels P, (D,) fp32 on the CPU; exact if they are constant."""
    pruned_F = torch.ones(len(mean_F), dtype=torch.bool)
    pruned_F[kept] = False
    return (down_DF.float()[:, pruned_F.to(down_DF.device)] @ mean_F[pruned_F].float().to(down_DF.device)).cpu()


def _root(own_FF: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of C + λ I, and λ = ``ridge`` · mean diag C, never 0; λ is added in place.

    C is the caller's to lose: matrices of this size are most of the memory that a layer takes, so that nobody keeps one
    for longer than it is needed.
    """
    damping = (ridge * own_FF.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    own_FF.diagonal().add_(damping)
    return torch.linalg.cholesky(own_FF), damping


def refit_down(down_DF: Tensor, gram_FF: Tensor, kept: Tensor, ridge: float = 0.01) -> Tensor:
    """Refit ``down_proj`` on the kept channels S by ridge least squares, (D, F_e) fp32 on the device of ``gram_FF``.

    W' = argmin E‖W a − W' a_S‖² + λ‖W' − W_S‖² = (W C[:, S] + λ W_S)(C_SS + λ I)⁻¹ with C = E[a aᵀ] and
    λ = ``ridge`` · mean diag C_SS. With all channels kept W' = W.

    Args:
        down_DF: the parent's matrix W.
        gram_FF: C over calibration tokens, fp32.
        kept: S, sorted channel indices.
        ridge: the pull towards the parent's columns, relative to the mean energy of a kept channel.
    """
    W_DF = down_DF.to(gram_FF.device, torch.float32)
    kept = kept.to(gram_FF.device)
    target_DS = W_DF @ gram_FF[:, kept]
    root_SS, damping = _root(gram_FF[kept[:, None], kept], ridge)
    target_DS += damping * W_DF[:, kept]
    return torch.cholesky_solve(target_DS.T, root_SS).T


def refit_work(D: int, F: int, kept: int) -> float:
    """Count the floating-point operations of :func:`refit_down`."""
    return 2 * D * F * kept + kept**3 / 3 + 2 * kept**2 * D


def fit_down(down_DF: Tensor, gram_FF: Tensor, cross_DF: Tensor, ridge: float = 0.01) -> Tensor:
    """Fit ``down_proj``, all channels kept, to other outputs y than the parent's W a; (D, F) fp32.

    W* = argmin E‖y − W* a‖² + λ‖W* − W‖² = (B + λ W)(C + λ I)⁻¹. What W* stands for can then be kept by fewer channels
    like the parent's own matrix (:func:`refit_down`, :func:`eliminate`).

    Args:
        down_DF: the parent's matrix W.
        gram_FF: C = E[a aᵀ].
        cross_DF: B = E[y aᵀ].
        ridge: λ, relative to the mean diagonal of C.
    """
    W_DF = down_DF.to(gram_FF.device, torch.float32)
    root_FF, damping = _root(gram_FF.clone(), ridge)
    return torch.cholesky_solve((cross_DF + damping * W_DF).T, root_FF).T


def fit_work(D: int, F: int) -> float:
    """Count the floating-point operations of :func:`fit_down`."""
    return F**3 / 3 + 2 * F**2 * D


def eliminate(down_DF: Tensor, gram_FF: Tensor, keep: int, ridge: float = 0.01, rounds: int = 8) -> Tensor:
    """Choose channels by backward elimination with a refit: sorted indices (F_e,) on the CPU.

    After a refit, dropping channel j of those that are left costs ‖W[:, j]‖² / (H⁻¹)_jj with H = C + λI (optimal brain
    surgeon, for whole columns). In each round the cheapest channels go, and the others are refitted: two channels that
    can do each other's work do not both look dispensable, as they do by their energy alone.

    Args:
        down_DF: the parent's matrix W.
        gram_FF: C over calibration tokens, fp32.
        keep: how many channels stay.
        ridge: λ, relative to the mean diagonal of C.
        rounds: in how many steps the others go.
    """
    left, drops = len(gram_FF), []
    for number in range(rounds, 0, -1):
        drops.append((left - keep) // number)
        left -= drops[-1]
    return [left_F for left_F, _ in eliminated(down_DF, gram_FF, drops, ridge)][-1].cpu()


def eliminated(
    down_DF: Tensor, gram_FF: Tensor, drops: Sequence[int], ridge: float = 0.01
) -> Iterator[tuple[Tensor, Tensor]]:
    """Eliminate as :func:`eliminate` does, so many channels in each round.

    Yields:
        the channels that are left, sorted, and what the round costs, a number: by how much
        E‖W a − W' a_S‖² + λ‖W − W'‖² grows, W' refitted on the channels S that are left and 0 elsewhere.
    """
    W_DF = down_DF.to(gram_FF.device, torch.float32)
    inverse_FF = torch.cholesky_inverse(_root(gram_FF.clone(), ridge)[0])
    left_F = torch.arange(len(gram_FF), device=gram_FF.device)
    for drop in drops:
        order = (W_DF.square().sum(0) / inverse_FF.diagonal()).argsort(stable=True)
        gone, stay = order[:drop], order[drop:].sort().values
        root_RR = torch.linalg.cholesky(inverse_FF[gone][:, gone])
        beside_RS, lost_DR = inverse_FF[gone][:, stay], W_DF[:, gone]
        solved_RS = torch.cholesky_solve(beside_RS, root_RR)
        cost = (torch.cholesky_solve(lost_DR.T, root_RR) * lost_DR.T).sum()
        W_DF = W_DF[:, stay] - lost_DR @ solved_RS
        inverse_FF = inverse_FF[stay[:, None], stay]  # the larger one goes before there is a third
        inverse_FF -= beside_RS.T @ solved_RS
        left_F = left_F[stay]
        yield left_F, cost  # not read here: an accelerator would have to finish each round


def eliminate_work(F: int, kept: int) -> float:
    """Count the floating-point operations of :func:`eliminate`: an inverse, and what its rounds take from it."""
    return F**3 + 2 * (F**3 - kept**3) / 3
