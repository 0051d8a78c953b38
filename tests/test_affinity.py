"""Domain affinity mining."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesmith.errors import MoesmithError
from moesmith.methods import affinity


def test_normalise_and_pearson_by_hand() -> None:
    p = np.array([[2.0, 8.0, 9.0], [2.5, 8.5, 9.5], [4.0, 4.0, 5.0]])
    n = affinity.normalise(p)
    assert np.allclose(n[:, 0], [1, 0.8, 0.5])
    assert np.allclose(n.max(0), 1)
    rows = affinity.perplexity_similarity(p)
    assert np.isclose(rows[0, 1], np.corrcoef(n[0], n[1])[0, 1])
    columns = affinity.perplexity_similarity(p, "columns")
    assert np.isclose(columns[0, 1], np.corrcoef(n[:, 0], n[:, 1])[0, 1])
    assert np.allclose(affinity.perplexity_similarity(p, "both"), (rows + columns) / 2)


def test_blocks_are_found() -> None:
    kin = np.full((6, 6), -0.4)
    for group in ([0, 4], [1, 2, 5], [3]):
        kin[np.ix_(group, group)] = 0.9
    np.fill_diagonal(kin, 1)
    assert affinity.cluster(kin, 3)[1] == [[0, 4], [1, 2, 5], [3]]


@given(st.integers(1, 12), st.data())
def test_any_number_of_clusters_is_exact(n: int, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, n))
    kin = np.corrcoef(np.random.default_rng(n).normal(size=(n, 9))).reshape(n, n)
    if data.draw(st.booleans()):
        kin = np.ones((n, n))  # ties everywhere
    _, groups = affinity.cluster(kin, experts)
    assert len(groups) == experts
    assert sorted(i for group in groups for i in group) == list(range(n))


def test_more_clusters_than_domains_is_refused() -> None:
    with pytest.raises(MoesmithError, match="8 experts need at least as many domains, but there are 3"):
        affinity.cluster(np.eye(3), 8)


def test_scores_of_kin_correlate() -> None:
    common, kin = torch.rand(4, 50) + 0.1, torch.rand(2, 4, 50) + 0.1
    scores = [common * kin[i // 2] * (1 + 0.1 * torch.rand(4, 50)) for i in range(4)]
    similarity = affinity.score_similarity(scores)
    assert similarity[0, 1] > 0.8 > 0 > similarity[0, 2]


@pytest.mark.parametrize("profile", ["rows", "columns", "both"])
def test_a_single_domain_is_like_itself(profile: affinity.Profile) -> None:
    """As one expert's, whichever way domains are compared."""
    scores = [torch.rand(2, 5) + 0.1]
    for similarity in (
        affinity.perplexity_similarity(np.array([[7.0]]), profile),
        affinity.perplexity_similarity(
            np.exp(affinity.predicted_losses(scores, [[torch.tensor([1, 3])] * 2])), profile
        ),
        affinity.score_similarity(scores),
    ):
        assert similarity.tolist() == [[1.0]]
        assert affinity.cluster(similarity, 1)[1] == [[0]]


def test_losses_are_predicted_from_variances() -> None:
    """Where channels are independent: the share of the output's variance that a bias does not make up for."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(2, 1, 12, generator=generator) + 0.1  # of two domains, one layer
    W = torch.randn(5, 12, generator=generator)
    kept = [[spread[i, 0].argsort(descending=True)[:6].sort().values] for i in range(2)]
    found = affinity.predicted_losses([s.square() * W.square().sum(0) for s in spread], kept)
    for i, j in itertools.product(range(2), range(2)):
        a = torch.randn(200_000, 12, generator=generator) * spread[j, 0] + 3
        pruned = torch.ones(12, dtype=torch.bool)
        pruned[kept[i][0]] = False
        lost, whole = ((part - part.mean(0)).square().sum() for part in (a[:, pruned] @ W[:, pruned].T, a @ W.T))
        assert found[i, j] == pytest.approx(float(lost / whole), rel=0.02)


def test_published_clusters_place_the_24_sets() -> None:
    sets = [{d for group in groups for d in group} for groups in affinity.published_clusters().values()]
    assert all(len(s) == 24 and s == sets[0] for s in sets)
    assert all(len(groups) == 8 for groups in affinity.published_clusters().values())


def test_published_by_name() -> None:
    names = ["c4", "race", "logiqa", "gsm8k", "mathqa"]
    groups = affinity.published("tinyllama-50", names, 3)
    assert groups == [["c4", "race"], ["logiqa"], ["gsm8k", "mathqa"]]
    with pytest.raises(MoesmithError, match="no published clusters 'tiny'"):
        affinity.published("tiny", names, 3)
    with pytest.raises(MoesmithError, match="do not place wikipedia"):
        affinity.published("tinyllama-50", [*names, "wikipedia"], 3)
    with pytest.raises(MoesmithError, match="make 3 experts of these domains, not 8"):
        affinity.published("tinyllama-50", names, 8)
