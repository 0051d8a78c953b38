"""Groups of tokens within a layer, and the linear router that tells them apart."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from moesmith.parent.accelerator import closed_form_device
from moesmith.parent.network import Network

SMALL = 0.02  # of a cluster's fair share of tokens: below, it starts again within the largest one


def kmeans(
    x_TD: Tensor, clusters: int, generator: torch.Generator, rounds: int = 12, *, angles: bool = False
) -> Tensor:
    """Cluster rows by Lloyd's algorithm from distant rows (k-means++); returns the centres (E, D) fp32.

    A cluster that holds nearly nothing starts again at a row of the largest one. With ``angles`` rows and centres have
    length 1 (spherical k-means): the nearest centre has the largest product, and so is what a linear router finds.
    """
    x_TD = functional.normalize(x_TD.float()) if angles else x_TD.float()
    centres_ED = distant(x_TD, clusters, generator)
    for _ in range(rounds):
        ids_T = nearest(x_TD, centres_ED)
        counts_E = torch.bincount(ids_T, minlength=clusters)
        sums_ED = torch.zeros_like(centres_ED).index_add_(0, ids_T, x_TD)
        centres_ED = torch.where(counts_E[:, None] > 0, sums_ED / counts_E[:, None].clamp_min(1), centres_ED)
        centres_ED = functional.normalize(centres_ED) if angles else centres_ED
        for small in (counts_E < SMALL * len(x_TD) / clusters).nonzero().flatten().tolist():
            largest = int(counts_E.argmax())
            rows = (ids_T == largest).nonzero().flatten()
            pick = int(torch.randint(len(rows), (1,), generator=generator))
            centres_ED[small : small + 1] = x_TD[rows[pick : pick + 1]]
            counts_E[largest] //= 2
    return centres_ED


def distant(x_TD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows one after the other, each with the probability of its squared distance to the nearest one so far."""
    rows = [int(torch.randint(len(x_TD), (1,), generator=generator))]
    far_T = torch.full((len(x_TD),), torch.inf, device=x_TD.device)
    while len(rows) < count:
        last_1D = x_TD[rows[-1] : rows[-1] + 1]
        far_T = torch.minimum(far_T, (x_TD - last_1D).square().sum(-1))
        up_to_T = far_T.cpu().double().cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * up_to_T[-1]
        rows.append(int(torch.searchsorted(up_to_T, drawn).clamp_max(len(x_TD) - 1)))
    return x_TD[torch.tensor(rows).to(x_TD.device)]


def nearest(x_TD: Tensor, centres_ED: Tensor) -> Tensor:
    """The nearest centre's index for every row, (T,): argmax of 2 c·x − ‖c‖²."""
    return (x_TD.float() @ (2 * centres_ED).T - centres_ED.square().sum(-1)).argmax(-1)


def root(network: Network) -> Tensor:
    """The metric in which angles between a network's inputs are taken, (D, D) fp32: the fourth root of GᵀG + UᵀU.

    G and U are the gate and up matrices. It is half-way between x itself and what they make of it, √(GᵀG + UᵀU) x: in
    the first, inputs may be near that use other channels, and in the second a few directions outshine all others.
    """
    rows_ND = torch.cat([part.float() for part in (network.gate_FD, network.up_FD) if part is not None])
    square_DD = (rows_ND.T @ rows_ND).to(closed_form_device(rows_ND.device)).double()
    values_D, vectors_DD = torch.linalg.eigh(square_DD)
    return ((vectors_DD * values_D.clamp_min(0) ** 0.25) @ vectors_DD.T).float().to(rows_ND.device)


def centre_router(centres_ED: Tensor, constant_D: Tensor) -> Tensor:
    """The linear router whose largest logit is the nearest centre's, (E, D) fp32 on the CPU.

    2 c·x − ‖c‖², the centres' mean taken off, which moves all logits alike. A stock router has no bias: the constant
    direction v, v·x ≈ 1 (:func:`moesmith.methods.router.constant_direction`), carries it.
    """
    place = closed_form_device(centres_ED.device)
    centres_ED = centres_ED.to(place).double()
    bias_E = -centres_ED.square().sum(-1)
    weight_ED = 2 * (centres_ED - centres_ED.mean(0))
    return (weight_ED + (bias_E - bias_E.mean())[:, None] * constant_D.to(place).double()).float().cpu()
