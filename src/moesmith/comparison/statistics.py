"""Means over strata (domains, tasks) of paired observations: bootstrap intervals and a permutation test.

The mean of the strata's means, so that a domain with much text counts as one with little. Observations are windows of
text or items of a task; every model sees the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 4000
LEVEL = 0.95
ROOM = 4_000_000  # numbers that are drawn at once


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval at :data:`LEVEL`."""

    mean: float
    low: float
    high: float


def mean(strata: Sequence[ArrayLike]) -> float:
    """Compute the mean of the strata's means."""
    return float(np.mean([np.mean(np.asarray(part, float)) for part in strata]))


def interval(strata: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """Estimate the mean of the strata's means: percentile bootstrap, observations drawn anew within each stratum.

    Of n observations n − 1 are drawn: n would understate the variance of the mean by (n − 1)/n, which shows where
    strata are small (Rao and Wu, 1988). A stratum with one observation adds no variance.

    Args:
        strata: observations of each.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)

    def draw(part_N: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
        return part_N[generator.integers(len(part_N), size=(draws, max(1, len(part_N) - 1)))].mean(1)

    low, high = np.quantile(_drawn(strata, draw), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean(strata), float(low), float(high))


def p_value(differences: Sequence[ArrayLike], seed: int = 0) -> float:
    """Compute how often chance alone makes a mean difference at least as large: two-sided, signs drawn at random.

    Args:
        differences: between two models, by stratum.
        seed: of the draws.

    Returns:
        The share of drawn means at least as far from 0 as the observed one, which counts as a draw itself.
    """
    generator = np.random.default_rng(seed)

    def draw(part_N: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
        return ((generator.integers(0, 2, size=(draws, len(part_N))) * 2 - 1) * part_N).mean(1)

    extreme = np.abs(_drawn(differences, draw)) >= abs(mean(differences)) * (1 - 1e-9)
    return float((1 + extreme.sum()) / (1 + DRAWS))


def _drawn(
    strata: Sequence[ArrayLike], draw: Callable[[NDArray[np.float64], int], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Sum draws of each stratum's mean over their number, (DRAWS,)."""
    parts = [np.asarray(part, float) for part in strata]
    total_R = np.zeros(DRAWS)
    for part_N in parts:
        at_once = max(1, min(DRAWS, ROOM // len(part_N)))
        for start in range(0, DRAWS, at_once):
            some_R = total_R[start : start + at_once]
            some_R += draw(part_N, len(some_R)) / len(parts)
    return total_R
