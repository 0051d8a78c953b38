"""Compute before any work what a conversion will need: parameters, memory, disk, tokens, wall time.

This is shape arithmetic on the parent's config, without the weights, except for the constants below, which are rough,
and times (``conversion/pace.py``).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesmith.console import duration
from moesmith.conversion.order import steps_of
from moesmith.conversion.pace import START, scaled
from moesmith.errors import MoesmithError
from moesmith.export.gguf.target import wide_rows
from moesmith.methods.scores import kept_channels
from moesmith.mixture.home import aligned
from moesmith.parent.accelerator import free_memory
from moesmith.parent.compute import Choice, long_name
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.run.recipe import Recipe
from moesmith.run.shapes import Pace, Shapes
from moesmith.run.step import Cost

KINDS = ("calibration", "affinity", "training", "evaluation")  # of tokens; exports read none
BASE = 5 * 10**8  # bytes of Python, torch, transformers and SciPy once they are imported
COMPANIONS = 10**6  # bytes of tokenizer, configs, manifests and card


@dataclass
class Plan:
    """Predictions for one conversion; sizes in bytes, times in seconds on this machine.

    ``warnings`` are lines about results that may surprise, such as widths that do not quantise.
    ``device`` and ``dtype`` are what models compute with, ``products`` the FLOPs per second that chose the dtype.
    ``memory`` is the peak with models whole in memory, ``memory_layerwise`` with one layer at a time, mapped weights
    included; ``None`` if a stage needs gradients and there is one process: of several, each holds a part.
    ``disk`` is what a run leaves, ``disk_passing`` the most that a stage has on disk besides while it works.
    """

    parent_parameters: int
    parameters_total: int
    parameters_active: int
    architecture: str
    expert_width: int
    memory: int
    memory_layerwise: int | None
    disk: int
    disk_passing: int
    calibration_tokens: int
    affinity_tokens: int
    training_tokens: int
    evaluation_tokens: int
    device: str
    dtype: str
    products: dict[str, int]
    forward_tokens_per_second: float
    seconds: dict[str, float]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as values for ``--json``."""
        return asdict(self) | {"seconds_total": round(sum(self.seconds.values()), 1)}


def make_plan(recipe: Recipe, parent: Parent, domains: int, pace: Pace | None = None, ranks: int = 1) -> Plan:
    """Predict what ``recipe`` costs for ``parent`` and a number of domains; memory is that of one process.

    Args:
        recipe: what would be done.
        parent: the loaded parent, or its shapes (``load.load_skeleton``).
        domains: how many domains of text.
        pace: what this machine does in a second (``pace.measure``); without it times are empty.
        ranks: how many processes share the work.

    Raises:
        MoesmithError: a budget of learned masks that cannot be met.
    """
    recipe.method.check(parent)
    steps = steps_of(recipe)
    shapes = shapes_of(recipe, parent, domains)
    costs = [step.cost(shapes, pace) for step in steps]
    layers = [cost.one_layer(ranks) for cost in costs]
    choice = parent.choice or Choice(parent.device, parent.dtype, {})
    return Plan(
        **shapes.counts,
        architecture=NATIVE if shapes.native else parent.family,
        expert_width=shapes.kept,
        memory=_memory(shapes, costs),
        memory_layerwise=None if None in layers else _memory_layerwise(shapes, [size or 0 for size in layers]),
        disk=round(sum(cost.disk for cost in costs) + COMPANIONS),
        disk_passing=max(cost.passing for cost in costs),
        **{f"{kind}_tokens": sum(cost.tokens for cost in costs if cost.kind == kind) for kind in KINDS},
        device=str(choice.device),
        dtype=long_name(choice.dtype),
        products={long_name(dtype): round(rate) for dtype, rate in choice.rates.items()},
        forward_tokens_per_second=0.0 if pace is None else round(pace.blocks, 1),
        seconds={} if pace is None else _seconds(costs, ranks),
        warnings=_widths(recipe, parent, shapes),
    )


def shapes_of(recipe: Recipe, parent: Parent, domains: int) -> Shapes:
    """Compute the sizes for predictions; trained experts are not subsets of the parent's channels."""
    return Shapes(recipe, parent, domains, trained=bool(recipe.stage2.tokens))


def _widths(recipe: Recipe, parent: Parent, shapes: Shapes) -> list[str]:
    """Say what q4_k_m will not quantise, and with which ``carve.ratio`` it would; learned widths are not known yet."""
    ratio, sizes = getattr(recipe.carve, "ratio", None), shapes.sizes
    if shapes.native or ratio is None:
        return []
    extra = getattr(recipe.carve, "compensation", "none") == "bias"  # a bias is one more channel
    width = aligned(shapes.kept + extra)
    found = wide_rows(parent.D, sizes.H * sizes.h, width)
    good = aligned(width, 256) - extra
    own = kept_channels(parent.F, ratio) == shapes.kept  # else the ratio is a token's, and does not decide a width
    if width % 256 and own and good <= parent.F:  # kept_channels rounds what is pruned down: this rounds up
        found[0] += f" (carve.ratio={math.ceil(1e4 * (parent.F - good) / parent.F) / 1e4})"
    return found


def _seconds(costs: Sequence[Cost], ranks: int = 1) -> dict[str, float]:
    """Add up seconds by kind; processes share the work on text."""
    order = ("calibration", "affinity", "training", "export", "evaluation")
    found = {kind: sum(cost.seconds for cost in costs if cost.kind == kind) for kind in order}
    found = {kind: seconds / (ranks if kind in KINDS else 1) for kind, seconds in found.items()}
    return {"start": START} | {kind: round(seconds, 1) for kind, seconds in found.items()}


def _memory(s: Shapes, costs: Sequence[Cost]) -> int:
    """Add up parent, sliced model and the most that one step has in memory on top of them."""
    return round(BASE + s.dense * s.itemsize + s.experts * s.itemsize + max(cost.memory for cost in costs))


def _memory_layerwise(s: Shapes, layers: Sequence[int]) -> int:
    """Add up a layer of the mapped parent and the most that one step has on top of it."""
    mapped = (s.sizes.total // s.sizes.L + s.shell) * s.stored
    return round(BASE + mapped + max(layers))


def fit_time(recipe: Recipe, parent: Parent, domains: int, seconds: float, pace: Pace, ranks: int = 1) -> Recipe:
    """Scale the recipe to as much text as takes ``ranks`` processes ``seconds``, each at ``pace``.

    Raises:
        MoesmithError: even one window of each domain and one step of each stage take longer.
    """

    shapes = shapes_of(recipe, parent, domains)  # they do not depend on how much text there is

    def takes(factor: float) -> float:
        steps = steps_of(scaled(recipe, factor))
        return sum(_seconds([step.cost(shapes, pace) for step in steps], ranks).values())

    low, high = 0.0, 1.0
    if takes(low) > seconds:
        raise MoesmithError(
            f"{recipe.name} takes at least {duration(takes(low))} on this machine, however little text it is given",
            "Give a longer --time, fewer domains (domains.names), or a smaller parent.",
        )
    while takes(high) < seconds and high < 2**20:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if takes(middle) <= seconds else (low, middle)
    return scaled(recipe, low)


def check_room(plan: Plan, out: Path, parent: Parent, room: int | None = None) -> None:
    """Refuse before work what cannot fit.

    Args:
        plan: what will be needed.
        out: the run's folder.
        parent: the loaded parent.
        room: bytes of memory that may be used; what is free if ``None``.

    Raises:
        MoesmithError: not enough memory or disk for the plan.
    """
    loaded = 0 if room is not None or parent.layerwise else plan.parent_parameters * parent.dtype.itemsize
    free = free_memory(parent.device) + loaded if room is None else room
    need = plan.memory if plan.memory_layerwise is None or not parent.layerwise else plan.memory_layerwise
    if need > free:
        training = "micro_batch or window of the training stages, or "
        raise MoesmithError(
            f"the plan needs about {need / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free",
            f"Lower {training if plan.training_tokens else ''}carve.experts.",
        )
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    left = shutil.disk_usage(folder).free
    there = sum(path.lstat().st_size for path in out.rglob("*") if path.is_file()) if folder == out.absolute() else 0
    if (disk := plan.disk + plan.disk_passing - there) > left:
        raise MoesmithError(
            f"the plan needs about {disk / 2**30:.1f} GiB of disk, but {folder} has {left / 2**30:.1f} GiB",
            "Free space or give an --out on another disk.",
        )
