"""Groups of given sizes: of rows, by k-means, and of a graph's nodes, by what connects them.

Methods that divide a network's channels among experts group its channels with these. They are computed on the CPU, so
that groups are the same wherever a parent computes; random numbers come from the generator that is handed over.

Shapes: F rows or nodes, D numbers of a row, E groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.methods.clusters import distant

Numbers = NDArray[Any]
ROUNDING = 1e-12  # of the largest cost: smaller differences between two ways are rounding
SMALL = 1024  # nodes, up to which all eigenvectors are computed
TRIED = 32  # nodes of each of two groups whose exchanges are compared


def equal_size(channels: int, groups: int) -> int:
    """Return the size of ``groups`` equal groups of channels.

    Raises:
        MoesmithError: they cannot be equal.
    """
    if groups < 1 or channels % groups:
        near = [n for n in range(1, channels + 1) if channels % n == 0 and n <= 4 * max(1, groups)]
        best = " or ".join(map(str, sorted(sorted(near, key=lambda n: abs(n - groups))[:2])))
        raise MoesmithError(
            f"{channels:,} channels cannot be cut into {groups} equal parts", f"Set carve.experts to {best}."
        )
    return channels // groups


def even_sizes(rows: int, groups: int) -> list[int]:
    """Return sizes of groups that differ by one at most, the larger ones first."""
    return [rows // groups + (group < rows % groups) for group in range(groups)]


def balanced_assignment(costs_FE: Numbers, widths: Sequence[int]) -> NDArray[np.int64]:
    """Give every group its number of rows at the least total cost, exactly: group of each row, (F,).

    It is the linear sum assignment in which a group has as many places as it is wide, solved on the groups: every row
    starts at its cheapest group, and then rows move along the cheapest chain of moves from a group with too many to one
    with too few. A chain is a shortest path between E nodes, and as long as only shortest ones are taken the total is
    the least for the sizes reached. At most F chains, each O(F + E²) times its length, where the assignment of rows to
    places takes O(F³).

    Args:
        costs_FE: cost of each row in each group, finite.
        widths: rows of every group, F together.
    """
    costs_FE = np.asarray(costs_FE, dtype=np.float64)
    E, width_E = len(widths), np.asarray(widths)
    ids_F: NDArray[np.int64] = costs_FE.argmin(1)
    counts_E = np.bincount(ids_F, minlength=E)
    moves_EE = np.stack([_moves(costs_FE, ids_F, group) for group in range(E)])
    while (counts_E > width_E).any():
        path = _cheapest(moves_EE, counts_E - width_E)
        going = []  # a row leaves each group of the path but the last: all are chosen before any moves
        for source, target in pairwise(path):
            mine_N = np.flatnonzero(ids_F == source)
            going.append((mine_N[(costs_FE[mine_N, target] - costs_FE[mine_N, source]).argmin()], target))
        for row, target in going:
            ids_F[row] = target
        counts_E[path[0]] -= 1
        counts_E[path[-1]] += 1
        for group in path:
            moves_EE[group] = _moves(costs_FE, ids_F, group)
    return ids_F


def _moves(costs_FE: Numbers, ids_F: Numbers, group: int) -> Numbers:
    """What it costs least to move a row of a group to each other one, (E,)."""
    own_NE = costs_FE[ids_F == group]
    found_E = np.full(costs_FE.shape[1], np.inf) if not len(own_NE) else (own_NE - own_NE[:, group, None]).min(0)
    found_E[group] = np.inf
    return found_E


def _cheapest(moves_EE: Numbers, over_E: Numbers) -> list[int]:
    """The cheapest chain of groups from any that has rows over to any that lacks some (Bellman and Ford)."""
    cost_E = np.where(over_E > 0, 0.0, np.inf)
    before_E = np.full(len(cost_E), -1)
    finite = moves_EE[np.isfinite(moves_EE)]
    least = ROUNDING * float(np.abs(finite).max(initial=0.0))
    for _ in range(len(cost_E)):
        reached_EE = cost_E[:, None] + moves_EE
        nearer_E = reached_EE.min(0) < cost_E - least
        if not nearer_E.any():
            break
        before_E[nearer_E] = reached_EE.argmin(0)[nearer_E]
        cost_E[nearer_E] = reached_EE.min(0)[nearer_E]
    path = [int(np.where(over_E < 0, cost_E, np.inf).argmin())]
    while before_E[path[0]] >= 0:
        path.insert(0, int(before_E[path[0]]))
    return path


def balanced_kmeans(rows_FD: Tensor, groups: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Cluster rows into groups whose sizes differ by one at most, as k-means-constrained does; each row's, (F,) int64.

    Lloyd's algorithm from distant rows (k-means++), with :func:`balanced_assignment` in place of the nearest centre.
    Neither step lets the sum of squared distances grow, and it ends when no row moves.

    Args:
        rows_FD: the rows, on any device.
        groups: E, at most F.
        generator: draws the first centres; a CPU generator.
        rounds: the most assignments.
    """
    widths = even_sizes(len(rows_FD), groups)
    x_FD = rows_FD.detach().to("cpu", torch.float64)
    ids_F = torch.full((len(x_FD),), -1)
    centres_ED = distant(x_FD, groups, generator)
    for _ in range(rounds):
        costs_FE = centres_ED.square().sum(-1) - x_FD @ (2 * centres_ED).T  # ‖x‖² is the same in every group
        fresh_F = torch.from_numpy(balanced_assignment(costs_FE.numpy(), widths))
        if torch.equal(fresh_F, ids_F):
            break
        ids_F = fresh_F
        sums_ED = torch.zeros_like(centres_ED).index_add_(0, ids_F, x_FD)
        centres_ED = sums_ED / torch.tensor(widths, dtype=torch.float64)[:, None]
    return ids_F


def balanced_graph(weights_FF: Tensor, groups: int, generator: torch.Generator, rounds: int = 8) -> Tensor:
    """Cut a graph into groups of exactly equal size that keep much of its edges' weight; each node's group, (F,) int64.

    The start is spectral: balanced k-means of the nodes' places in the E leading eigenvectors of D^-½ W D^-½, each of
    length 1 (Ng, Jordan and Weiss, 2001). Then pairs of nodes change places as long as that lets the weight within
    groups grow (Kernighan and Lin, 1970): for two groups, the best exchange among :data:`TRIED` nodes of each side.

    Args:
        weights_FF: how strongly two nodes are connected, not negative; its diagonal does not count.
        groups: E; divides F.
        generator: draws first centres and vectors; a CPU generator.
        rounds: how often all pairs of groups are gone through at most.

    Raises:
        MoesmithError: F is not a multiple of E.
    """
    F = len(weights_FF)
    equal_size(F, groups)
    w_FF = weights_FF.detach().to("cpu", torch.float32).numpy()
    w_FF = (w_FF + w_FF.T) / 2
    np.fill_diagonal(w_FF, 0.0)
    places_FE = _places(w_FF, groups, torch.rand(F, generator=generator).numpy())
    ids_F = balanced_kmeans(torch.from_numpy(places_FE), groups, generator).numpy()
    kept_FE = (w_FF @ np.eye(groups, dtype=w_FF.dtype)[ids_F]).astype(np.float64)
    for _ in range(rounds):
        if not sum(_exchange(w_FF, ids_F, kept_FE, pair) for pair in combinations(range(groups), 2)):
            break
    return torch.from_numpy(ids_F)


def _places(w_FF: Numbers, groups: int, start_F: Numbers) -> Numbers:
    """The nodes' places in the leading eigenvectors, (F, E) float64."""
    root_F = np.sqrt(w_FF.sum(1).clip(np.finfo(w_FF.dtype).tiny))
    normal_FF = w_FF / root_F[:, None] / root_F
    places_FE = None
    if len(w_FF) > SMALL and groups < len(w_FF) // 4:
        with suppress(ArpackNoConvergence):  # the slow way then
            places_FE = eigsh(normal_FF, k=groups, which="LA", v0=start_F)[1]
    if places_FE is None:
        places_FE = np.linalg.eigh(normal_FF)[1][:, -groups:]
    places_FE = places_FE.astype(np.float64)
    return places_FE / np.linalg.norm(places_FE, axis=1, keepdims=True).clip(1e-12)


def _exchange(w_FF: Numbers, ids_F: Numbers, kept_FE: Numbers, pair: tuple[int, int]) -> int:
    """Let nodes of two groups change places while the weight within groups grows; return how often that was.

    ``kept_FE`` is the weight between each node and each group; it and ``ids_F`` are changed.
    """
    one, other = pair
    least = 1e-6 * max(float(kept_FE.max()), float(np.finfo(np.float32).tiny))
    for done in range(len(ids_F)):
        sides = []
        for here, there in (pair, pair[::-1]):
            mine_N = np.flatnonzero(ids_F == here)
            gains_N = kept_FE[mine_N, there] - kept_FE[mine_N, here]
            best_N = (-gains_N).argsort(kind="stable")[:TRIED]
            sides.append((mine_N[best_N], gains_N[best_N]))
        (a_N, gain_N), (b_M, gain_M) = sides
        gains_NM = gain_N[:, None] + gain_M - 2 * w_FF[np.ix_(a_N, b_M)]
        row, column = np.unravel_index(gains_NM.argmax(), gains_NM.shape)
        if gains_NM[row, column] <= least:
            return done
        a, b = int(a_N[row]), int(b_M[column])
        ids_F[a], ids_F[b] = other, one
        kept_FE[:, one] += w_FF[b] - w_FF[a]  # rows: the matrix is symmetric
        kept_FE[:, other] += w_FF[a] - w_FF[b]
    return len(ids_F)
