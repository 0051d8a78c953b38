"""How many channels each layer's experts get: more where predictions feel their loss, the same on average.

For every layer, on the parent's own activations: channels are eliminated one step after the other with a refit, and
what a step loses is counted in nats of the predictions (:mod:`moesmith.methods.sensitivity`), so that layers compare.
The steps that cost least go, wherever they are; or, for stock architectures, some layers stay dense and all others get
the same width. What several layers lose is taken to add up, and one mask for all tokens to lose in the same proportions
as experts for groups of them.

Shapes: T tokens, D model width, F channels, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from moesmith.arguments import ceil_div
from moesmith.calibration.stream import BATCH, Stream
from moesmith.calibration.view import Tokens
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.methods.groups import SQUARES, Fitting, Groups
from moesmith.methods.refit import eliminate_work, eliminated
from moesmith.methods.scores import kept_channels
from moesmith.methods.sensitivity import information_of, measure
from moesmith.methods.steps import as_fits, evenly, evenly_tokens, waiting_room
from moesmith.mixture.home import ALIGN, aligned
from moesmith.parent.accelerator import closed_form_device
from moesmith.parent.network import Network
from moesmith.run.folder import Run
from moesmith.run.shapes import Pace, Shapes
from moesmith.run.step import Cost, Job, Step
from moesmith.training.local import energy
from moesmith.world import crew

STEPS = 48  # in which all channels of a layer would go
FILE = "widths.json"


class Allocation(Step):
    """The number of channels of every layer's experts.

    Attributes:
        dense: whether layers are either dense or all alike.
        tokens: of all domains together.
        ratio: share of all channels that goes.
        ridge: of the refits.
    """

    name, parallel = "allocation", True

    def __init__(self, recipe: Any, tokens: int, ratio: float, ridge: float, *, dense: bool) -> None:
        super().__init__(recipe, "domains", "sensitivity")
        self.tokens, self.ratio, self.ridge, self.dense = tokens, ratio, ridge, dense

    def settings(self, job: Job) -> dict[str, Any]:
        """Return how much text, how much goes, from where, and how refits are regularised."""
        return {"tokens": self.tokens, "ratio": self.ratio, "ridge": self.ridge, "dense": self.dense}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write the widths, and by layer the nats a token that are lost after each number of steps."""
        parent, found_L, step = job.parent, information_of(job.run), step_of(job.parent.F)
        ids_NS = evenly(job.run, job.names, self.tokens)

        def run(batch: int) -> list[list[float]]:
            generator, device = torch.Generator().manual_seed(self.recipe.seed), parent.device
            options: dict[str, Any] = {"held": True, "folder": work, "room": waiting_room(parent), "batch": batch}
            with Stream(parent, [[ids_NS]], "carved", label=self.name, **options) as stream:
                return [
                    losses(view.network, view.tokens().near(device), found_L[view.index], step, self.ridge)
                    for view in stream.views(generator)
                ]

        curves = as_fits(self.name, parent, BATCH, run)
        choose = dense_or_even if self.dense else widths_of
        widths = choose(curves, parent.F, parent.L * kept_channels(parent.F, self.ratio), step)
        if crew().first:
            write_json(work / FILE, {"widths": widths, "step": step, "losses": curves})
        lost = sum(at(curve, parent.F - width, step) for curve, width in zip(curves, widths, strict=True))
        even = sum(at(curve, parent.F - sum(widths) / len(widths), step) for curve in curves)
        found: dict[str, Any] = {"least": min(widths), "most": max(widths)}
        found |= {"loss": round(lost, 4), "loss_even": round(even, 4)}
        return found | {"layers": {"channels of an expert": {"allocated": widths}}}

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how far widths differ, and what that is expected to give."""
        text = f"{metrics['least']:,} to {metrics['most']:,} channels of an expert"
        return f"{text}; one mask would lose {metrics['loss']:.2f} nats a token, {metrics['loss_even']:.2f} evenly"

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count a pass, and the Gram matrix and elimination of every layer."""
        spec, sizes = self.recipe.domains, shapes.sizes
        tokens = evenly_tokens(spec, shapes.domains, self.tokens)
        seconds = 0.0
        if pace:
            squares = 0.6 * sizes.L * tokens * sizes.F**2 / sizes.total
            seconds = (1.7 * tokens + squares) / pace.blocks + sizes.L * eliminate_work(sizes.F, 0) / pace.solves
        memory = shapes.gram(SQUARES, channels=True) + 3 * tokens * sizes.D * shapes.itemsize
        return Cost(tokens=tokens, seconds=seconds, memory=memory, layerwise=memory)


def allocated(run: Run) -> list[int]:
    """Read the number of channels of an expert, by layer."""
    widths: list[int] = read_json(run.path("allocation") / FILE)["widths"]
    return widths


def step_of(F: int) -> int:
    """How many channels go at once: a multiple of 32, which kernels and small number formats like, if F is not tiny."""
    return min(aligned(max(1, F // STEPS)), max(1, F // 8))


def losses(network: Network, tokens: Tokens, information_DD: Tensor, step: int, ridge: float) -> list[float]:
    """Count what a layer loses without 0, 1, 2, … steps of channels, in nats of the predictions of a token.

    ½ E[eᵀ F e] with e the error of the refitted output, relative to the hidden state as F is.

    Args:
        network: the parent's.
        tokens: of the layer, with the parent's activations.
        information_DD: F, from :func:`moesmith.methods.sensitivity.information`.
        step: channels that go at once.
        ridge: of the refit, relative to a channel's mean energy.
    """
    root_DD = measure(information_DD.to(closed_form_device(tokens.x_TD.device))).to(network.down_DF.device)
    # weights are 1 / ‖h‖² but for a factor: what it is follows from the share of the hidden state that the output is
    factor = float(tokens.share_T.sum()) / energy(tokens, torch.arange(len(tokens.x_TD)))
    unit = 0.5 * float(information_DD.diagonal().mean()) * factor
    nobody = torch.zeros(len(tokens.x_TD), dtype=torch.int64)
    gram_FF, _ = Groups(network, tokens, nobody, 1, Fitting(ridge, most=len(nobody), repair=False), sinks=False).pooled
    down_DF = replace(tokens, root_DD=root_DD).felt(network.down_DF.float().T).T
    found = [0.0]
    for _, cost in eliminated(down_DF, gram_FF, [step] * ((len(gram_FF) - 1) // step), ridge):
        found.append(found[-1] + unit * float(cost))
    return found


def widths_of(curves: Sequence[Sequence[float]], F: int, channels: int, step: int) -> list[int]:
    """Choose every layer's width so that together they lose least and have at most so many channels.

    Args:
        curves: of every layer, what it loses without 0, 1, 2, … steps; taken as convex (isotonic regression of the
            differences), so that the cheapest steps of all layers are the best choice.
        F: channels of a layer of the parent.
        channels: of all layers together.
        step: channels that go at once.
    """
    drop = ceil_div(len(curves) * F - channels, step)
    costs = [(cost, n, layer) for layer, curve in enumerate(curves) for n, cost in enumerate(convex(curve))]
    gone = [0] * len(curves)
    for _, _, layer in sorted(costs)[:drop]:
        gone[layer] += 1
    return [F - step * count for count in gone]


def dense_or_even(curves: Sequence[Sequence[float]], F: int, channels: int, step: int) -> list[int]:
    """Choose which layers stay dense, so that together all lose least; the others get the same width.

    Arguments are those of :func:`widths_of`. Widths are multiples of 32 if ``step`` is and there are so many channels.
    """
    L = len(curves)
    unit = ALIGN if step % ALIGN == 0 and channels // L >= ALIGN else 1
    choices = []
    for count in range(L):
        width = (channels - count * F) // (L - count) // unit * unit
        if width < unit:
            break
        lost = [at(curve, F - width, step) for curve in curves]
        order = sorted(range(L), key=lost.__getitem__, reverse=True)
        dense = order[:count]
        choices.append((sum(lost[layer] for layer in order[count:]), [F if i in dense else width for i in range(L)]))
    return min(choices)[1]


def at(curve: Sequence[float], gone: float, step: int) -> float:
    """What a layer loses without so many channels, between the points of its curve."""
    return float(np.interp(gone, step * np.arange(len(curve)), curve))


def convex(curve: Sequence[float]) -> list[float]:
    """The differences of the largest convex curve below one; they never fall."""
    found: list[float] = isotonic_regression(np.diff(np.asarray(curve, dtype=np.float64))).x.tolist()
    return found
