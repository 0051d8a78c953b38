"""A plain re-implementation of FLAP's published estimator, quirks included, as an oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def published_fluctuation(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline mean and fluctuation as the published code computes them, one sequence at a time.

    mean becomes the running mean over sequences; fluctuation ignores the first sequence and uses the *new* mean in both
    factors of the cross product: F ← F (n−1)/n + Σ_tokens (x − μ_new)² / (n+1).

    Args:
        sequences: (N, T, F) inputs of ``down_proj``.

    Returns:
        mean (F,) and fluctuation (F,).
    """
    mean = torch.zeros(sequences.shape[-1])
    fluctuation = torch.zeros_like(mean)
    for n, x in enumerate(sequences):
        mean = mean * (n / (n + 1)) + x.mean(0) / (n + 1)
        if n:
            fluctuation = fluctuation * ((n - 1) / n) + (x - mean).square().sum(0) / (n + 1)
    return mean, fluctuation
