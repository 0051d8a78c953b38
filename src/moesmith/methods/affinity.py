"""Domain affinity mining: which domains belong to one expert (DIVE, arXiv:2506.09351).

DIVE prunes the parent on every domain, measures each pruned model's perplexity on every domain, and clusters the
domains whose pruned models behave alike. Two shortcuts are ours: ``moments`` predicts that matrix without running a
pruned model, ``scores`` clusters domains whose channel scores correlate.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
import yaml
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moesmith.errors import MoesmithError

Profile = Literal["rows", "columns", "both"]
Linkage = Literal["average", "single", "complete"]

Array = np.ndarray


def normalise(perplexity: Array) -> Array:
    """Normalise: norm(p)_ij = min over calibration sets i' of p_i'j, divided by p_ij: in (0, 1], higher is better."""
    return perplexity.min(axis=0, keepdims=True) / perplexity


def perplexity_similarity(perplexity: Array, profile: Profile = "rows") -> Array:
    """Correlate domains (Pearson) by the normalised perplexity matrix (n, n).

    ``rows`` compares domains as calibration sets, as DIVE does, ``columns`` as test sets, ``both`` is the mean.
    """
    normal = normalise(perplexity)
    rows, columns = _pearson(normal), _pearson(normal.T)
    return {"rows": rows, "columns": columns, "both": (rows + columns) / 2}[profile]


def predicted_losses(variances: Sequence[Tensor], kept: Sequence[Sequence[Tensor]]) -> Array:
    """Predict the matrix (n, n) of what the channels of domain i lose of domain j: log-perplexities up to scale.

    With a compensation bias a pruned channel loses its variance in the network's output: Σ over pruned channels of
    var_f ‖W[:, f]‖², relative to the sum over all of them, the mean over layers.

    Args:
        variances: by domain, var_f ‖W[:, f]‖² of every layer and channel, (L, F).
        kept: by domain and layer, the channels that its pruned model keeps; as many domains.
    """
    share_NLF = torch.stack([v.double() / v.double().sum(-1, keepdim=True).clamp_min(1e-30) for v in variances])
    kept_NLF = torch.zeros_like(share_NLF)
    for keeps_LF, layers in zip(kept_NLF, kept, strict=True):
        for keeps_F, kept_F in zip(keeps_LF, layers, strict=True):
            keeps_F[kept_F] = 1
    return (1 - torch.einsum("ilf,jlf->ij", kept_NLF, share_NLF) / share_NLF.shape[1]).numpy()


def score_similarity(scores: Sequence[Tensor]) -> Array:
    """Correlate domains (Pearson) by log channel scores, less the mean over domains.

    What all domains share (a channel's size) says nothing about similarity; what is left is where they differ.

    Args:
        scores: one (L, F) tensor per domain.
    """
    logs = np.stack([score.double().clamp_min(1e-30).log().flatten().numpy() for score in scores])
    return _pearson(logs - logs.mean(axis=0))


def _pearson(profiles: Array) -> Array:
    """Correlate every two rows; a row that does not vary has correlation 0 with the others.

    A domain that is the best calibration set for every other one has such a row: all ones.
    """
    if len(profiles) == 1:  # NumPy gives a number, not a matrix
        return np.ones((1, 1))
    flat = np.ptp(profiles, axis=1) == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(profiles)
    found[flat, :] = found[:, flat] = 0
    np.fill_diagonal(found, 1)
    return found


def cluster(similarity: Array, experts: int, method: Linkage = "average") -> tuple[Array, list[list[int]]]:
    """Cluster domain indices hierarchically on d = 1 − r into exactly ``experts`` clusters.

    Returns:
        SciPy's linkage (n-1, 4), and the clusters in the order of their first domains.

    Raises:
        MoesmithError: more clusters than domains, or similarities that are not finite.
    """
    n = len(similarity)
    if experts > n:
        raise MoesmithError(f"{experts} experts need at least as many domains, but there are {n}",
                            "Add domains or lower carve.experts.")  # fmt: skip
    if not np.isfinite(similarity).all():
        raise MoesmithError("two domains have no defined correlation", "Check for a constant or repeated one.")
    if n == 1:
        return np.zeros((0, 4)), [[0]]
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method)
    labels = cut_tree(tree, n_clusters=[experts])[:, 0]
    groups = [np.flatnonzero(labels == label).tolist() for label in range(experts)]
    return tree, sorted(groups)


def published_clusters() -> dict[str, list[list[str]]]:
    """Read the clusters of DIVE's published code by name, e.g. ``tinyllama-50``."""
    text = (files("moesmith.data") / "sets" / "clusters.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def published(name: str, names: Sequence[str], experts: int) -> list[list[str]]:
    """Return a published clustering, restricted to the given domains, in the published expert order.

    Raises:
        MoesmithError: unknown name, a domain that it does not place, or another number of experts.
    """
    known = published_clusters()
    if name not in known:
        raise MoesmithError(f"there are no published clusters '{name}'", f"Choose one of {', '.join(known)}.")
    placed = {domain for group in known[name] for domain in group}
    if strangers := [domain for domain in names if domain not in placed]:
        raise MoesmithError(
            f"the published clusters '{name}' do not place {', '.join(strangers)}",
            "Leave those domains out with domains.names, or set affinity.method to perplexity.",
        )
    groups = [[domain for domain in group if domain in set(names)] for group in known[name]]
    groups = [group for group in groups if group]
    if len(groups) != experts:
        raise MoesmithError(
            f"the published clusters '{name}' make {len(groups)} experts of these domains, not {experts}",
            f"Set carve.experts to {len(groups)}, or add domains of the empty clusters.",
        )
    return groups
