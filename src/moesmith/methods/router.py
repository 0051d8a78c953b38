"""How routers start: at random as published, or in closed form from the statistics of their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesmith.calibration.moments import Second, Sums, merge
from moesmith.parent.accelerator import closed_form_device

CONSTANT_TOKENS = 32  # times D: as many tokens give the constant direction


def random_router(experts: int, d_model: int, generator: torch.Generator) -> Tensor:
    """Draw DIVE's start: a Linear's default, uniform in ±1/√D. Returns (E, D) fp32."""
    return (torch.rand(experts, d_model, generator=generator) * 2 - 1) / d_model**0.5


def constant_direction(inputs: Second, ridge: float = 1e-4) -> tuple[Tensor, float]:
    """Find the v that minimises E(v·x − 1)² over router inputs, (D,) on the CPU, and return it with that error.

    The input of an RMS-normalised layer holds an almost constant direction, so v·x ≈ 1 takes the place of the bias
    that a stock gate or expert has no field for.
    """
    place = closed_form_device(inputs.gram_NN.device)
    gram_DD, mean_D = inputs.gram_NN.to(place).double(), inputs.mean_N.to(place).double()
    damped_DD = gram_DD + ridge * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64, device=place)
    v_D = torch.linalg.solve(damped_DD, mean_D)
    error = 1 - 2 * v_D @ mean_D + v_D @ gram_DD @ v_D
    return v_D.float().cpu(), float(error)


def lda_router(groups: Sequence[Second], ridge: float = 0.01, scale: float = 1.0) -> Tensor:
    """Solve a linear discriminant analysis, "which group is this token from", (E, D) fp32 on the CPU, bias folded in.

    W_k = Σ⁻¹ μ_k and b_k = −½ μ_kᵀ Σ⁻¹ μ_k with Σ the pooled covariance within groups, equal priors. Logits are
    only defined up to a common shift, so the experts' mean is subtracted; b is folded in as W + b vᵀ
    (:func:`constant_direction`). ``scale`` multiplies the logits: with scale t the dense gate at temperature t
    starts exactly at the discriminant's posterior.

    Args:
        groups: one layer's router inputs, one entry per expert.
        ridge: added to Σ, relative to its mean diagonal.
        scale: see above.
    """
    place = closed_form_device(groups[0].gram_NN.device)
    pooled = merge(groups, [1.0] * len(groups))
    means_ED = torch.stack([group.mean_N for group in groups]).to(place).double()
    # E over groups of E[x xᵀ] − μ_k μ_kᵀ: all groups count the same, as their experts do
    within_DD = pooled.gram_NN.to(place).double() - means_ED.T @ means_ED / len(groups)
    within_DD.diagonal().add_(ridge * within_DD.diagonal().mean())
    W_ED = torch.linalg.solve(within_DD, means_ED.T).T
    b_E = -0.5 * (W_ED * means_ED).sum(-1)
    W_ED, b_E = W_ED - W_ED.mean(0), b_E - b_E.mean()
    v_D, _ = constant_direction(pooled)
    return (scale * (W_ED + b_E[:, None] * v_D.to(place).double())).float().cpu()


def fitted_router(x_TD: Tensor, scores_TE: Tensor, ridge: float = 0.01) -> Tensor:
    """Fit the linear router that predicts scores of experts best, by ridge least squares: (E, D) fp32 on the CPU.

    R = argmin E‖s − R x‖² + λ‖R‖² = E[s xᵀ] (E[x xᵀ] + λ I)⁻¹ with λ = ``ridge`` · mean diag E[x xᵀ]. What all experts'
    logits have in common does not decide anything, so their mean is taken off.

    Args:
        x_TD: router inputs.
        scores_TE: s, one number per expert and token.
        ridge: λ, relative to the mean energy of an input.
    """
    place = closed_form_device(x_TD.device)
    sums, cross_ED = Sums(x_TD.shape[1], x_TD.device), scores_TE.T.float() @ x_TD.float() / max(1, len(x_TD))
    sums.add(x_TD)
    gram_DD = sums.result().gram_NN.to(place).double()
    gram_DD.diagonal().add_((ridge * gram_DD.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny))
    router_ED = torch.linalg.solve(gram_DD, cross_ED.to(place).double().T).T
    return (router_ED - router_ED.mean(0)).float().cpu()
