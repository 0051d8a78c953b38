"""What a conversion will need, worked out before any work: parameters, memory, disk, tokens, wall time.

Shape arithmetic on the parent's config: the weights need not be there. What is not arithmetic are the constants below,
which are rough, and times (``conversion/pace.py``).
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moesmith.conversion.pace import Pace, scaled, seconds_of
from moesmith.conversion.stages.carve import gram_bytes
from moesmith.conversion.stages.data import stages_to_train
from moesmith.conversion.stages.masks import check_masks
from moesmith.errors import MoesmithError
from moesmith.export.folder import SHARD_BYTES
from moesmith.export.gguf.target import wide_rows
from moesmith.methods.scores import kept_channels
from moesmith.methods.tomoe.warm import pruned_share
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.home import ALIGN
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.accelerator import free_memory
from moesmith.parent.compute import Choice, long_name
from moesmith.parent.layerwise import HELD
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.sizes import Sizes
from moesmith.run.recipe import Recipe

BASE = 5 * 10**8  # bytes of Python, torch, transformers and SciPy once they are imported
COMPANIONS = 10**6  # bytes of tokenizer, configs, manifests and card


@dataclass
class Plan:
    """Predictions for one conversion; sizes in bytes, times in seconds on this machine.

    ``warnings`` are lines about what will come out otherwise than one may think, such as widths that do not quantise.
    ``device`` and ``dtype`` are what models compute in, ``products`` the FLOPs per second that chose the dtype.
    ``memory`` is the peak with models whole in memory, ``memory_layerwise`` with one layer at a time, mapped weights
    included; ``None`` where a stage trains.
    """

    parent_parameters: int
    parameters_total: int
    parameters_active: int
    architecture: str
    expert_width: int
    memory: int
    memory_layerwise: int | None
    disk: int
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
        """For ``--json``."""
        return asdict(self) | {"seconds_total": round(sum(self.seconds.values()), 1)}


def make_plan(recipe: Recipe, parent: Parent, domains: int, pace: Pace | None = None) -> Plan:
    """Predict what ``recipe`` costs for ``parent`` and a number of domains.

    Args:
        recipe: what would be done.
        parent: the loaded parent, or its shapes (``parents.load_skeleton``).
        domains: how many domains of text.
        pace: what this machine does in a second (``pace.measure``); without it times are empty.

    Raises:
        MoesmithError: a budget of learned masks that cannot be met.
    """
    check_masks(recipe, parent)
    shapes = _Shapes(recipe, parent)
    training = stages_to_train(recipe)
    tokens = _tokens(recipe, domains)
    seconds = {} if pace is None else _seconds(recipe, shapes, domains, pace)
    choice = parent.choice or Choice(parent.device, parent.dtype, {})
    return Plan(
        **shapes.counts,
        architecture=NATIVE if shapes.masked_attention else parent.family,
        expert_width=shapes.kept,
        memory=_memory(recipe, shapes),
        memory_layerwise=None if training else _memory_layerwise(recipe, shapes, parent, tokens),
        disk=_disk(recipe, shapes, domains, tokens),
        **{f"{name}_tokens": count for name, count in tokens.items()},
        device=str(choice.device),
        dtype=long_name(choice.dtype),
        products={long_name(dtype): round(rate) for dtype, rate in choice.rates.items()},
        forward_tokens_per_second=0.0 if pace is None else round(pace.blocks, 1),
        seconds={name: round(value, 1) for name, value in seconds.items()},
        warnings=_widths(recipe, parent, shapes.kept),
    )


def _widths(recipe: Recipe, parent: Parent, kept: int) -> list[str]:
    """What q4_k_m will not quantise, and the ``carve.ratio`` with which it would; learned widths are not known yet."""
    if parent.family == NATIVE or recipe.learned:
        return []
    sizes, extra = Sizes.of(parent), recipe.carve.compensation == "bias"  # a bias is one more channel
    width = -(-(kept + extra) // ALIGN) * ALIGN
    found = wide_rows(parent.D, sizes.H * sizes.h, width)
    good = -(-width // 256) * 256 - extra
    if width % 256 and good <= parent.F:  # kept_channels rounds what is pruned down: this rounds up
        found[0] += f" (carve.ratio={math.ceil(1e4 * (parent.F - good) / parent.F) / 1e4})"
    return found


class _Shapes:
    """The sizes that every prediction is made of."""

    def __init__(self, recipe: Recipe, parent: Parent) -> None:
        spec, self.sizes = recipe.carve, Sizes.of(parent)
        L, D, F = parent.L, parent.D, parent.F
        self.E, self.K, self.refit = spec.experts, spec.top_k, spec.compensation == "refit"
        self.itemsize, self.stored = parent.dtype.itemsize, parent.stored.itemsize
        self.matrices = self.sizes.matrices
        self.masked_attention = recipe.learned and recipe.masks.attention != "none"
        # learned masks from scratch: as if attention and networks were pruned alike
        self.kept = kept_channels(F, pruned_share(recipe, parent) if recipe.carved else 1 - recipe.masks.budget)
        # our own format stores a channel once: as if experts had as few in common as their widths allow
        channels = [(torch.arange(self.kept) + e * self.kept).remainder(F).sort().values for e in range(self.E)]
        refit, bias = (torch.zeros(0) if spec.compensation == kind else None for kind in ("refit", "bias"))
        routed = [Expert(kept, refit, bias_D=bias) for kept in channels]
        carving = Carving([Layer(routed, Linear(torch.zeros(self.E, 0)), self.K)] * L, F)
        if "stage2" in stages_to_train(recipe):  # trained experts are subsets of nothing
            carving.lora = {"to come": torch.zeros(0)}
        native = parent.family == NATIVE or self.masked_attention
        self.counts = parameters(parent, carving, native)
        self.stock_total = parameters(parent, carving, native=False)["parameters_total"]
        self.dense = self.counts["parent_parameters"]
        self.total = self.counts["parameters_total"]
        self.experts = L * self.E * self.matrices * D * self.kept
        self.layer = self.sizes.attention(self.sizes.h, self.sizes.h) + self.experts // L
        self.shell = max(0, self.dense - self.sizes.total)
        self.down = L * self.E * D * self.kept * self.stored if self.refit else 0


def _tokens(recipe: Recipe, domains: int) -> dict[str, int]:
    training = stages_to_train(recipe)
    return {
        "calibration": domains * recipe.domains.tokens if recipe.carved else 0,
        "affinity": domains**2 * recipe.affinity.tokens if recipe.mined else 0,
        "training": sum(s.tokens for s in training.values()),
        "evaluation": (1 + recipe.carved + len(training)) * domains * recipe.evaluate.tokens,
    }


def _memory(recipe: Recipe, s: _Shapes) -> int:
    """Parent and sliced model, and the most that one of training, verification and closed forms has beside them."""
    sizes, training = s.sizes, stages_to_train(recipe)
    # activations kept for backward
    step = max(
        (
            2 * t.micro_batch * t.window * sizes.L
            * (10 * sizes.D + (6 * sizes.F if name == "masks" else 5 * s.kept * max(1, s.K)))
            for name, t in training.items()
        ),
        default=0,
    )  # fmt: skip
    dense_step = 2 * sizes.L * sizes.D * sizes.F * s.E * s.itemsize if "stage1" in training and s.refit else 0
    # second moments of one layer at least; verification loads the folder's file and an fp32 copy of it
    gram = gram_bytes(sizes.D, sizes.F, s.E + 2, gram=s.refit)
    again = s.dense * s.stored if s.stored != s.itemsize else 0  # the parent as it is stored, to export from
    verify = (4 + s.stored) * s.total + again
    work = max(step + _lora(recipe, s), dense_step + step, gram, verify)
    return round(BASE + s.dense * s.itemsize + s.experts * s.itemsize + s.down + work)


def _lora(recipe: Recipe, s: _Shapes) -> int:
    """fp32 master, two moments, gradient and a copy in the model's dtype."""
    if "stage2" not in stages_to_train(recipe):
        return 0
    return 20 * s.sizes.L * s.E * recipe.stage2.lora_rank * s.matrices * (s.sizes.D + s.kept)


def _memory_layerwise(recipe: Recipe, s: _Shapes, parent: Parent, tokens: dict[str, int]) -> int:
    """A layer of the mapped parent, and the most that second moments, export, verification or evaluation adds."""
    sizes = s.sizes
    gram = gram_bytes(sizes.D, sizes.F, s.E + 1, gram=s.refit)
    if parent.memory is not None:
        gram *= min(sizes.L, max(1, parent.memory // 4 // gram))
    shard = min(SHARD_BYTES, s.total * s.stored) + 8 * s.matrices * sizes.D * s.kept
    # a layer sliced and copied, and in fp32 beside the shell
    verify = (4 + 2 * s.itemsize) * s.layer + 4 * s.shell
    held = min(HELD, max(tokens.values()) * sizes.D * s.itemsize)
    evaluate = 2 * s.layer * s.itemsize + s.shell * s.itemsize + held
    mapped = (s.sizes.total // sizes.L + s.shell) * s.stored
    return round(BASE + mapped + s.down + max(gram, shard, verify, evaluate))


def _disk(recipe: Recipe, s: _Shapes, domains: int, tokens: dict[str, int]) -> int:
    """The model, what stays of every carving, moments, token ids; before the model a checkpoint of training."""
    sizes, training = s.sizes, stages_to_train(recipe)
    carvings = (
        recipe.carved + recipe.learned + (recipe.learned and s.refit) + ("stage1" in training) + ("stage2" in training)
    )
    carving = 4 * sizes.L * s.E * (s.kept + sizes.D * (1 + (recipe.carve.compensation == "bias")))
    models = s.total + (s.stock_total if s.masked_attention else 0)
    # of fp32 masters and two moments the masters stay
    trained = max(_lora(recipe, s) // 20, sizes.trained(s.E) if recipe.learned else 0)
    text = 4 * (tokens["calibration"] + tokens["training"] + domains * recipe.evaluate.tokens)
    moments = 8 * domains * sizes.L * sizes.F if recipe.carved else 0
    refitted = max(1, carvings - (recipe.learned and recipe.carved)) * s.down
    beside = max(models * s.stored, 8 * trained)
    return round(beside + 4 * trained + carvings * carving + refitted + text + moments + COMPANIONS)


def fit_time(recipe: Recipe, parent: Parent, domains: int, seconds: float, pace: Pace) -> Recipe:
    """The recipe with as much text as is worked through in ``seconds`` at ``pace``.

    Raises:
        MoesmithError: not even a window of each domain and a step of each stage are.
    """

    shapes = _Shapes(recipe, parent)  # how much text there is changes none of them

    def takes(factor: float) -> float:
        return sum(_seconds(scaled(recipe, factor), shapes, domains, pace).values())

    low, high = 0.0, 1.0
    if takes(low) > seconds:
        raise MoesmithError(
            f"{recipe.name} takes at least {takes(low) / 60:.0f} min on this machine, whatever little text it is given",
            "Give a longer --time, fewer domains (domains.names), or a smaller parent.",
        )
    while takes(high) < seconds and high < 2**20:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if takes(middle) <= seconds else (low, middle)
    return scaled(recipe, low)


def _seconds(recipe: Recipe, s: _Shapes, domains: int, pace: Pace) -> dict[str, float]:
    return seconds_of(recipe, s.sizes, s.kept, s.total * s.stored, domains, pace)


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str | float | None) -> int | None:
    """``4GB``, ``3.5 GiB`` or a number of bytes; ``None`` stays ``None``.

    Raises:
        MoesmithError: it is no size.
    """
    if text is None:
        return None
    if isinstance(text, int | float) and not isinstance(text, bool) and 0 < text < math.inf:
        return int(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper() if isinstance(text, str) else "")
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise MoesmithError(f"{text!r} is no size of memory", "Write it like 4GB or 3.5GiB.")
    return int(float(found[1]) * UNITS[found[2]])


def check_room(plan: Plan, out: Path, parent: Parent, room: int | None = None) -> None:
    """Refuse before work what cannot fit.

    Args:
        plan: what will be needed.
        out: the run's folder.
        parent: the loaded parent.
        room: bytes of memory that may be used, what is free if ``None``.

    Raises:
        MoesmithError: not enough memory or disk for the plan.
    """
    loaded = 0 if room is not None or parent.layerwise else plan.parent_parameters * parent.dtype.itemsize
    free = free_memory(parent.device) + loaded if room is None else room
    need = plan.memory if plan.memory_layerwise is None or not parent.layerwise else plan.memory_layerwise
    if need > free:
        training = "micro_batch or window of the training stages, or "
        raise MoesmithError(
            f"the plan needs about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free",
            f"Lower {training if plan.training_tokens else ''}carve.experts.",
        )
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    left = shutil.disk_usage(folder).free
    if plan.disk > left:
        raise MoesmithError(
            f"the plan needs about {plan.disk / 2**30:.1f} GiB of disk and {folder} has {left / 2**30:.1f} GiB",
            "Free space or give an --out on another disk.",
        )
