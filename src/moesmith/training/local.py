"""Train one expert of one layer to give what the hidden state lacks, on the tokens that it gets.

No logits and no other layer are needed: the loss is the error of the expert's output, relative to the hidden state
after the layer, so experts are independent. Gate, up and down train together, from a refitted start; a
reconstruction that holds the non-linearity is known to need far less text than training of the whole model
(arXiv:2510.14444).

Shapes: T tokens, N tokens of the expert, D model width, F_e an expert's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from moesmith.calibration.view import Tokens
from moesmith.parent.structure import Network
from moesmith.run.settings import Section
from moesmith.training.loop import ordinary_mode

HELD_OUT = 16  # of so many windows one is not trained on
WARM = 10  # steps in which the learning rate rises


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
    """Sum weight · ‖y − expert(x)‖² over some tokens."""
    total = 0.0
    with torch.no_grad():
        for rows in rows_N.split(chunk):
            x_ND, y_ND, weight_N1 = _taken(expert, tokens, rows)
            total += float((weight_N1 * (y_ND.float() - expert.to(x_ND.dtype).output(x_ND).float()).square()).sum())
    return total


def energy(tokens: Tokens, rows_N: Tensor) -> float:
    """Sum weight · ‖y‖² over some tokens."""
    return sum(
        float((tokens.weight_T[rows, None] * tokens.y_TD[rows].float().square()).sum()) for rows in rows_N.split(4096)
    )


def held_out(tokens: Tokens, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Part an expert's tokens: those to train on, and those of every :data:`HELD_OUT`-th window."""
    kept_N = tokens.sequence_T[rows_N] % HELD_OUT == HELD_OUT - 1
    return rows_N[~kept_N], rows_N[kept_N]


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


@ordinary_mode()
def reconstruct(
    start: Network, tokens: Tokens, rows_N: Tensor, spec: Any, generator: torch.Generator
) -> tuple[Network, Outcome]:
    """Train an expert on its tokens by Adam: Σ weight · ‖y − expert(x)‖² over a step's tokens.

    The learning rate of a matrix is relative to its rms, rises for :data:`WARM` steps and falls linearly to 0. What is
    no better than the start on held-out windows is dropped.

    Args:
        start: the expert, fp32 where the parent computes. Its biases are added as the parent adds them and not trained.
        tokens: of the layer.
        rows_N: the expert's own among them.
        spec: a :class:`LocalSection`.
        generator: draws the order of tokens.
    """
    mine_N, others_N = held_out(tokens, rows_N)
    size = energy(tokens, others_N)
    before = squared_error(start, tokens, others_N)
    order = order_of(tokens, rows_N, spec, generator)
    steps = len(order) // spec.batch
    if not steps:
        return start, Outcome(before, before, size)
    masters = [part.clone().requires_grad_(True) for part in start.weights]
    rates = [spec.lr * float(part.square().mean().sqrt()) for part in start.weights]
    groups: list[dict[str, Any]] = [{"params": [m], "lr": lr} for m, lr in zip(masters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    scale = energy(tokens, mine_N) / len(mine_N)
    expert = start.replaced(masters)
    for step in range(steps):
        rows = mine_N[order[step * spec.batch : (step + 1) * spec.batch]]
        x_ND, y_ND, weight_N1 = _taken(start, tokens, rows)
        error_ND = y_ND.float() - expert.to(x_ND.dtype).output(x_ND).float()
        optimizer.zero_grad()
        ((weight_N1 * error_ND.square()).sum() / (len(rows) * scale)).backward()  # type: ignore[no-untyped-call]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / WARM) * (1 - step / steps)
        optimizer.step()
    found = start.replaced([master.detach() for master in masters])
    after = squared_error(found, tokens, others_N)
    if len(others_N) and not after < before:  # a NaN is not better either
        return start, Outcome(before, before, size)
    return found, Outcome(before, after, size)


def _taken(expert: Network, tokens: Tokens, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens where an expert is: x (N, D), y (N, D), weight (N, 1)."""
    device = expert.gate_FD.device
    x_ND, y_ND = tokens.x_TD[rows].to(device), tokens.y_TD[rows].to(device)
    if x_ND.dtype == torch.float16:  # gradients are too small for it
        x_ND = x_ND.float()
    return x_ND, y_ND, tokens.weight_T[rows, None].to(device)
