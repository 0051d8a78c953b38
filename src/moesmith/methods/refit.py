"""Make up in closed form for what pruned channels computed.

``bias`` is FLAP's compensation (arXiv:2312.11983): the pruned channels' mean output. ``refit`` is ours: the
``down_proj`` that reproduces the dense output best, in the least-squares sense, from the kept channels alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compensation_bias(down_DF: Tensor, mean_F: Tensor, kept: Tensor) -> Tensor:
    """Compute b = W[:, P] μ_P over the pruned channels P, (D,) fp32 on the CPU; exact if they are constant."""
    pruned_F = torch.ones(len(mean_F), dtype=torch.bool)
    pruned_F[kept] = False
    return (down_DF.float()[:, pruned_F.to(down_DF.device)] @ mean_F[pruned_F].float().to(down_DF.device)).cpu()


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
    cross_FS = gram_FF[:, kept]
    square_SS = cross_FS[kept].clone()
    damping = (ridge * square_SS.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    target_DS = W_DF @ cross_FS + damping * W_DF[:, kept]
    square_SS.diagonal().add_(damping)
    return torch.cholesky_solve(target_DS.T, torch.linalg.cholesky(square_SS)).T
