"""Means over strata (domains, tasks) of paired observations: bootstrap intervals and a permutation test.

The mean of the strata's means, so that a domain with much text counts as one with little. Observations are windows of
text or items of a task; every model sees the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with the interval that holds it with probability :data:`LEVEL`."""

    mean: float
    low: float
    high: float


def mean(strata: Sequence[ArrayLike]) -> float:
    """Compute the mean of the strata's means."""
    return float(np.mean([np.mean(np.asarray(part, float)) for part in strata]))


def interval(strata: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """Estimate the mean of the strata's means: percentile bootstrap, observations drawn anew within each stratum.

    Args:
        strata: observations of each.
        seed: of the draws.
    """
    generator, parts = np.random.default_rng(seed), _arrays(strata)
    drawn_R = np.zeros(DRAWS)
    for part_N in parts:
        drawn_R += part_N[generator.integers(len(part_N), size=(DRAWS, len(part_N)))].mean(1) / len(parts)
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean(strata), float(low), float(high))


def p_value(differences: Sequence[ArrayLike], seed: int = 0) -> float:
    """Test whether paired differences are 0 on average: two-sided, their signs drawn at random.

    Args:
        differences: between two models, by stratum.
        seed: of the draws.

    Returns:
        The share of drawn means at least as far from 0 as the observed one, which counts as a draw itself.
    """
    generator, parts = np.random.default_rng(seed), _arrays(differences)
    drawn_R = np.zeros(DRAWS)
    for part_N in parts:
        signs_RN = generator.integers(0, 2, size=(DRAWS, len(part_N))) * 2 - 1
        drawn_R += (signs_RN * part_N).mean(1) / len(parts)
    observed = abs(mean(differences))
    extreme = np.abs(drawn_R) >= observed * (1 - 1e-9)
    return float((1 + extreme.sum()) / (1 + DRAWS))


def _arrays(strata: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    return [np.asarray(part, float) for part in strata]
