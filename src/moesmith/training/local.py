"""Train experts of one layer to give what the hidden state lacks, each on the tokens that it gets.

No logits and no other layer are needed: the loss is the error of the expert's output, relative to the hidden state
after the layer, so experts are independent. Gate, up and down train together, from a refitted start; a
reconstruction that holds the non-linearity is known to need far less text than training of the whole model
(arXiv:2510.14444).

A step of one small expert does not keep an accelerator busy, so there several are trained side by side, in batched
products; each ends where it would have ended alone.

Shapes: T tokens, N tokens of the expert, S steps, B tokens per step, E experts side by side, A of them with steps left,
D model width, F_e an expert's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moesmith.calibration.view import Tokens, held_out
from moesmith.parent.accelerator import free_memory
from moesmith.parent.network import Network
from moesmith.run.settings import Section
from moesmith.training.loop import ordinary_mode

WARM = 10  # steps in which the learning rate rises
BETAS = (0.9, 0.95)  # of Adam
Advance = Callable[[float], None]
COPIES = 8  # of an expert's matrices while it trains: itself, gradient, two moments, what a step makes of them


class LocalSection(Section):
    """Local reconstruction of every layer's experts."""

    passes: float = Field(1.0, ge=0, description="times that an expert reads its tokens; 0 trains nothing")
    batch: int = Field(256, ge=1, description="tokens of an expert per step")
    lr: float = Field(0.015, gt=0, description="learning rate relative to the rms of each matrix")


@dataclass(frozen=True)
class Outcome:
    """Squared errors of an expert, summed over tokens with their weights, on windows that it did not train on.

    Attributes:
        before: of its start.
        after: of what was kept: the trained matrices, or the start where they are no better.
        energy: the same sum for the parent's outputs, which errors are relative to.
    """

    before: float
    after: float
    energy: float


def squared_error(expert: Network, tokens: Tokens, rows_N: Tensor, chunk: int = 4096) -> float:
    """Sum weight · ‖R (y − expert(x))‖² over some tokens, R being ``tokens.root_DD``."""
    total = 0.0
    with torch.no_grad():
        for rows in rows_N.split(chunk):
            x_ND, y_ND, weight_N1 = _taken(expert, tokens, rows)
            error_ND = tokens.felt(y_ND.float() - expert.to(x_ND.dtype).output(x_ND).float())
            total += float((weight_N1 * error_ND.square()).sum())
    return total


def energy(tokens: Tokens, rows_N: Tensor) -> float:
    """Sum weight · ‖R y‖² over some tokens."""
    total = 0.0
    for rows in rows_N.to(tokens.y_TD.device).split(4096):
        y_ND, weight_N1 = tokens.y_TD[rows], tokens.weight_T[rows][:, None]
        total += float((weight_N1 * tokens.felt(y_ND.float()).square()).sum())
    return total


def order_of(tokens: Tokens, rows_N: Tensor, spec: Any, generator: torch.Generator) -> Tensor:
    """Draw the order in which an expert's tokens are trained on: places among them, one for every token of every step.

    Empty, and nothing is drawn, if they are fewer than a step takes.
    """
    mine_N, _ = held_out(tokens, rows_N)
    steps = int(spec.passes * len(mine_N) / spec.batch)
    if not steps:
        return torch.zeros(0, dtype=torch.int64)
    order = torch.cat([torch.randperm(len(mine_N), generator=generator) for _ in range(math.ceil(spec.passes))])
    return order[: steps * spec.batch]


def at_once(network: Network, experts: int) -> int:
    """How many of so many experts to train side by side: on a CPU, which one keeps busy, one after the other.

    On an accelerator as many as a quarter of its free memory holds, with gradients and Adam's moments.
    """
    device = network.gate_FD.device
    if device.type == "cpu":
        return 1
    each = COPIES * sum(4 * part.numel() for part in network.weights)
    return max(1, min(experts, free_memory(device) // 4 // each))


@ordinary_mode()
def reconstruct(
    starts: Sequence[Network],
    tokens: Tokens,
    rows: Sequence[Tensor],
    orders: Sequence[Tensor],
    spec: Any,
    advance: Advance = lambda _share: None,
) -> list[tuple[Network, Outcome]]:
    """Train experts on their tokens by Adam: Σ weight · ‖y − expert(x)‖² over a step's tokens.

    The learning rate of a matrix is relative to its rms, rises for :data:`WARM` steps and falls linearly to 0. What is
    no better than the start on held-out windows is dropped, and so is what no token there speaks for.

    Args:
        starts: the experts, fp32 where the parent computes. Biases are added as the parent adds them and not trained.
        tokens: of the layer.
        rows: each expert's own among them.
        orders: of each, from :func:`order_of`.
        spec: a :class:`LocalSection`.
        advance: is told of every step which share of the steps it is.
    """
    parted = [held_out(tokens, rows_N) for rows_N in rows]
    found = list(starts)
    busy = [number for number, order in enumerate(orders) if len(order)]
    if busy:
        texts_SB = [parted[n][0][orders[n]].view(-1, spec.batch) for n in busy]
        scales = [energy(tokens, parted[n][0]) / len(parted[n][0]) for n in busy]
        given = [starts[n] for n in busy]
        if len(busy) == 1:
            trained = [alone(given[0], tokens, texts_SB[0], scales[0], spec, advance)]
        else:
            trained = side_by_side(given, tokens, texts_SB, scales, spec, advance)
        for number, network in zip(busy, trained, strict=True):
            found[number] = network
    results = []
    for start, network, (_, others_N) in zip(starts, found, parted, strict=True):
        before = squared_error(start, tokens, others_N)
        after = before if network is start else squared_error(network, tokens, others_N)
        if not after < before:  # nor is a NaN less, or 0 of no tokens
            network, after = start, before
        results.append((network, Outcome(before, after, energy(tokens, others_N))))
    return results


def alone(start: Network, tokens: Tokens, text_SB: Tensor, scale: float, spec: Any, advance: Advance) -> Network:
    """Train one expert.

    Args:
        start: the expert.
        tokens: of the layer.
        text_SB: the tokens of every step.
        scale: what a token's error is relative to.
        spec: a :class:`LocalSection`.
        advance: as for :func:`reconstruct`.
    """
    masters = [part.clone().requires_grad_(True) for part in start.weights]
    rates = [spec.lr * float(rms(part)) for part in start.weights]
    groups: list[dict[str, Any]] = [{"params": [m], "lr": lr} for m, lr in zip(masters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    expert = start.replaced(masters)
    for step, rows in enumerate(text_SB):
        x_ND, y_ND, weight_N1 = _taken(start, tokens, rows)
        error_ND = tokens.felt(y_ND.float() - expert.to(x_ND.dtype).output(x_ND).float())
        optimizer.zero_grad()
        ((weight_N1 * error_ND.square()).sum() / (len(rows) * scale)).backward()  # type: ignore[no-untyped-call]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * pace(step, len(text_SB))
        optimizer.step()
        advance(1 / len(text_SB))
    return start.replaced([master.detach() for master in masters])


def side_by_side(
    starts: Sequence[Network],
    tokens: Tokens,
    texts_SB: Sequence[Tensor],
    scales: Sequence[float],
    spec: Any,
    advance: Advance,
) -> list[Network]:
    """Train several experts at once: what :func:`alone` makes of each, up to rounding.

    Those with most steps come first, so that those that have steps left are always the first A.
    """
    device = starts[0].gate_FD.device
    order = sorted(range(len(starts)), key=lambda n: -len(texts_SB[n]))
    steps = [len(texts_SB[n]) for n in order]
    text_SEB = pad_sequence([texts_SB[n] for n in order]).to(tokens.x_TD.device)
    scale_E11 = torch.tensor([scales[n] * spec.batch for n in order], device=device)[:, None, None]
    masters = [torch.stack(parts) for parts in zip(*(starts[n].weights for n in order), strict=True)]
    rates = [spec.lr * torch.stack([rms(part) for part in master])[:, None, None] for master in masters]
    moments = [(torch.zeros_like(master), torch.zeros_like(master)) for master in masters]
    biases = [
        None if parts[0] is None else torch.stack(parts)[:, None]
        for parts in zip(*(starts[n].biases for n in order), strict=True)
    ]
    pace_SE11 = torch.tensor([[pace(step, count) for count in steps] for step in range(steps[0])])[..., None, None]
    pace_SE11 = pace_SE11.to(device)
    first, second = BETAS
    for step in range(steps[0]):
        A = sum(count > step for count in steps)
        x_ABD, y_ABD, weight_AB1 = _taken(starts[0], tokens, text_SEB[step, :A])
        leaves = [master[:A].detach().requires_grad_(True) for master in masters]
        weights = [leaf.to(x_ABD.dtype) for leaf in leaves]
        some = [None if bias is None else bias[:A].to(x_ABD.dtype) for bias in biases]
        error_ABD = tokens.felt(y_ABD.float() - _outputs(starts[0], weights, some, x_ABD).float())
        loss = (weight_AB1 * error_ABD.square() / scale_E11[:A]).sum()  # experts share nothing: each gets its own
        for master, rate_E11, (mean, square), gradient in zip(
            masters, rates, moments, torch.autograd.grad(loss, leaves), strict=True
        ):
            mean[:A].lerp_(gradient, 1 - first)
            square[:A].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            root = (square[:A] / (1 - second ** (step + 1))).sqrt_().add_(1e-8)
            master[:A].sub_(rate_E11[:A] * pace_SE11[step, :A] / (1 - first ** (step + 1)) * mean[:A] / root)
        advance(1 / steps[0])
    found = dict(zip(order, zip(*masters, strict=True), strict=True))
    return [start.replaced(found[number]) for number, start in enumerate(starts)]


def _outputs(kind: Network, weights: Sequence[Tensor], biases: Sequence[Tensor | None], x_ABD: Tensor) -> Tensor:
    """:meth:`Network.output` of experts side by side, (A, B, D) to (A, B, D)."""

    def product(x_ABN: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x_ABN @ weight.mT if bias is None else torch.baddbmm(bias, x_ABN, weight.mT)

    a_ABF = kind.activation(product(x_ABD, weights[0], biases[0]))
    if kind.up_FD is not None:
        a_ABF = a_ABF * product(x_ABD, weights[1], biases[1])
    return product(a_ABF, weights[-1], biases[2])


def rms(weight: Tensor) -> Tensor:
    """Root mean square of a matrix."""
    return weight.square().mean().sqrt()


def pace(step: int, steps: int) -> float:
    """The share of the learning rate in a step."""
    return min(1.0, (step + 1) / WARM) * (1 - step / steps)


def _taken(expert: Network, tokens: Tokens, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens where an expert is: x (…, D), y (…, D), weight (…, 1)."""
    x_ND, y_ND, weight_N1 = tokens.take(rows, expert.gate_FD.device)
    if x_ND.dtype == torch.float16:  # gradients are too small for it
        x_ND = x_ND.float()
    return x_ND, y_ND, weight_N1
