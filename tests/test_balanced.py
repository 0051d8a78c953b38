"""Groups of equal size: against all assignments of small cases, scipy's assignment, and what was planted."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moesmith.errors import MoesmithError
from moesmith.methods.balanced import SMALL, balanced_assignment, balanced_graph, balanced_kmeans, equal_size


def cost_of(costs_FE: np.ndarray, ids_F: np.ndarray) -> float:
    return float(costs_FE[np.arange(len(ids_F)), ids_F].sum())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(8))
def test_an_assignment_is_the_cheapest_of_all(seed: int) -> None:
    costs_FE = np.random.default_rng(seed).normal(size=(6, 3))
    every = set(permutations([0, 0, 1, 1, 2, 2]))
    ids_F = balanced_assignment(costs_FE, [2, 2, 2])
    assert np.bincount(ids_F, minlength=3).tolist() == [2, 2, 2]
    assert cost_of(costs_FE, ids_F) == pytest.approx(min(cost_of(costs_FE, np.array(one)) for one in every), abs=1e-12)


@pytest.mark.parametrize("kind", ["uneven", "ties", "same", "one", "each"])
def test_an_assignment_costs_what_scipys_does(kind: str) -> None:
    """The linear sum assignment with every group's places as columns of their own."""
    random = np.random.default_rng(0)
    costs_FE = {
        "uneven": random.normal(size=(120, 8)) + 3 * np.arange(8),  # most rows want the first group
        "ties": random.integers(0, 3, size=(90, 6)).astype(float),
        "same": np.ones((24, 4)),
        "one": random.normal(size=(10, 1)),
        "each": random.normal(size=(30, 30)),
    }[kind]
    F, E = costs_FE.shape
    ids_F = balanced_assignment(costs_FE, [F // E] * E)
    assert np.bincount(ids_F, minlength=E).tolist() == [F // E] * E
    places_FF = np.repeat(costs_FE, F // E, axis=1)
    rows, columns = linear_sum_assignment(places_FF)
    assert cost_of(costs_FE, ids_F) == pytest.approx(places_FF[rows, columns].sum(), abs=1e-9)


def test_rows_are_clustered_in_equal_groups() -> None:
    centres_ED = torch.randn(5, 12, generator=seeded(1)) * 5
    planted_F = torch.arange(5).repeat(8)
    rows_FD = centres_ED[planted_F] + 0.1 * torch.randn(40, 12, generator=seeded(2))
    ids_F = balanced_kmeans(rows_FD, 5, seeded(3))
    assert ids_F.dtype == torch.int64
    assert len({(a, b) for a, b in zip(ids_F.tolist(), planted_F.tolist(), strict=True)}) == 5
    assert torch.equal(ids_F, balanced_kmeans(rows_FD, 5, seeded(3)))


def test_clusters_are_at_rest() -> None:
    """No other assignment is nearer to the means of the groups; sizes are equal where nearest centres' are not."""
    rows_FD = torch.cat([torch.randn(50, 4, generator=seeded(0)) * 0.1, torch.randn(10, 4, generator=seeded(1)) * 5])
    ids_F = balanced_kmeans(rows_FD, 6, seeded(2), rounds=100)
    assert torch.bincount(ids_F).tolist() == [10] * 6
    means_ED = torch.stack([rows_FD[ids_F == group].mean(0) for group in range(6)]).double()
    costs_FE = torch.cdist(rows_FD.double(), means_ED).square().numpy()
    rows, columns = linear_sum_assignment(np.repeat(costs_FE, 10, axis=1))
    assert cost_of(costs_FE, ids_F.numpy()) == pytest.approx(np.repeat(costs_FE, 10, axis=1)[rows, columns].sum())
    assert torch.bincount(torch.from_numpy(costs_FE.argmin(1)), minlength=6).tolist() != [10] * 6
    shuffled = [
        float(costs_FE[np.arange(60), np.random.default_rng(s).permutation(ids_F.numpy())].sum()) for s in (0, 1)
    ]
    assert cost_of(costs_FE, ids_F.numpy()) < min(shuffled)


def test_equal_rows_are_no_trouble() -> None:
    assert torch.bincount(balanced_kmeans(torch.ones(12, 3), 4, seeded(0))).tolist() == [3] * 4
    assert torch.bincount(balanced_graph(torch.zeros(12, 12), 4, seeded(0))).tolist() == [3] * 4
    assert balanced_graph(torch.ones(6, 6), 1, seeded(0)).tolist() == [0] * 6
    assert sorted(balanced_graph(torch.rand(6, 6), 6, seeded(0)).tolist()) == [*range(6)]


def within(weights_FF: torch.Tensor, group: list[int]) -> float:
    rest = [node for node in range(len(weights_FF)) if node not in group]
    return sum(float(weights_FF[a, b]) for side in (group, rest) for a, b in combinations(side, 2))


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_graph_cannot_be_improved_by_an_exchange(seed: int) -> None:
    weights_FF = torch.rand(8, 8, generator=seeded(seed)) ** 3
    weights_FF = weights_FF + weights_FF.T
    ids_F = balanced_graph(weights_FF, 2, seeded(seed))
    group = (ids_F == 0).nonzero().flatten().tolist()
    found, rest = within(weights_FF, group), [node for node in range(8) if node not in group]
    exchanged = [within(weights_FF, [*(x for x in group if x != a), b]) for a in group for b in rest]
    assert len(group) == 4
    assert found >= max(exchanged) - 1e-5
    every = [within(weights_FF, list(four)) for four in combinations(range(8), 4)]
    assert float(np.mean(every)) < found <= max(every) + 1e-6


@pytest.mark.parametrize(("nodes", "groups"), [(24, 4), (SMALL + 16, 4)])
def test_planted_groups_of_a_graph_are_found(nodes: int, groups: int) -> None:
    """With all eigenvectors, and with the leading ones alone."""
    planted_F = torch.arange(groups).repeat(nodes // groups)[torch.randperm(nodes, generator=seeded(0))]
    weights_FF = 0.2 * torch.rand(nodes, nodes, generator=seeded(1)) + (planted_F[:, None] == planted_F).float()
    ids_F = balanced_graph(weights_FF, groups, seeded(2))
    assert len(set(zip(ids_F.tolist(), planted_F.tolist(), strict=True))) == groups
    assert torch.equal(ids_F, balanced_graph(weights_FF, groups, seeded(2)))


def test_parts_that_cannot_be_equal_are_refused() -> None:
    assert equal_size(1536, 8) == 192
    for channels, groups, cure in ((1536, 7, "6 or 8"), (64, 3, "2 or 4"), (7, 0, "1")):
        with pytest.raises(MoesmithError, match=f"cannot be cut into {groups} equal parts.*{cure}"):
            equal_size(channels, groups)
    with pytest.raises(MoesmithError, match="equal parts"):
        balanced_graph(torch.ones(7, 7), 2, seeded(0))
    assert torch.bincount(balanced_kmeans(torch.rand(7, 2), 2, seeded(0))).tolist() == [4, 3]
