"""What a conversion will need, worked out before any work: parameters, memory, disk, tokens, wall time."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from moesmith.carving import CarvedLayer, Carving
from moesmith.errors import MoesmithError
from moesmith.export.gguf import wide_rows
from moesmith.export.stock import ALIGN
from moesmith.gates import GateSpec
from moesmith.parents import Parent
from moesmith.proof import NATIVE
from moesmith.recipe import LoopSection, Recipe, TrainSection
from moesmith.scores import kept_channels
from moesmith.sizes import Sizes
from moesmith.stages.data import stages_to_train
from moesmith.stages.masks import check_masks
from moesmith.tomoe.warm import pruned_share


@dataclass
class Plan:
    """Predictions for one conversion; sizes in bytes, times in seconds on this machine.

    ``warnings`` are lines about what will come out otherwise than one may think, such as widths that do not quantise.
    """

    parent_parameters: int
    parameters_total: int
    parameters_active: int
    architecture: str
    expert_width: int
    memory: int
    disk: int
    calibration_tokens: int
    affinity_tokens: int
    training_tokens: int
    evaluation_tokens: int
    forward_tokens_per_second: float
    seconds: dict[str, float]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"seconds_total": round(sum(self.seconds.values()), 1)}


def make_plan(recipe: Recipe, parent: Parent, domains: int, *, measure: bool = False) -> Plan:
    """Predict what ``recipe`` costs for ``parent`` and a number of domains.

    Args:
        recipe: what would be done.
        parent: the loaded parent.
        domains: how many domains of text.
        measure: time a forward pass on this machine for the wall-time prediction; otherwise times are empty.

    Raises:
        MoesmithError: a budget of learned masks that cannot be met.
    """
    check_masks(recipe, parent)
    spec, L, D, F = recipe.carve, parent.L, parent.D, parent.F
    matrices = parent.ffns[0].matrices
    # learned masks from scratch: as if attention and networks were pruned alike
    kept = kept_channels(F, pruned_share(recipe, parent) if recipe.carved else 1 - recipe.masks.budget)
    layers = [CarvedLayer([torch.arange(kept)] * spec.experts, torch.zeros(0)) for _ in range(L)]
    gate = GateSpec(experts=spec.experts, top_k=spec.top_k)
    counts = Carving(layers, gate, F, spec.compensation).parameters(parent)
    size = parent.model.dtype.itemsize
    experts = L * spec.experts * matrices * D * kept * size
    refit = L * spec.experts * D * kept * size if spec.compensation == "refit" else 0
    training = stages_to_train(recipe)
    # the parent, the sliced experts, their merge in fp32 for one layer, and per step the activations kept for backward
    step = max(
        (
            2 * s.micro_batch * s.window * L * (10 * D + (6 * F if name == "masks" else 5 * kept * max(1, spec.top_k)))
            for name, s in training.items()
        ),
        default=0,
    )
    dense_step = 2 * L * D * F * spec.experts * size if "stage1" in training and refit else 0
    gram = 4 * (spec.experts + 2) * (F**2 if refit else 0) + 4 * (spec.experts + 1) * D**2
    lora = 0
    if "stage2" in training:
        rank = recipe.stage2.lora_rank
        lora = 20 * L * spec.experts * rank * matrices * (D + kept)  # fp32 master, two moments, gradient, bf16 copy
    parent_bytes = counts["parent_parameters"] * size
    memory = round(1.2 * (2 * parent_bytes + 2 * experts + refit + max(step + lora, dense_step + step, gram)) + 5e8)
    total_bytes = counts["parameters_total"] * size
    disk = 2 * total_bytes + (len(training) + 1) * refit + 2 * lora + 8 * domains * L * F
    calibration = domains * recipe.domains.tokens if recipe.carved else 0
    affinity = 0
    if recipe.mined:
        affinity = domains**2 * recipe.affinity.tokens
    trained = sum(s.tokens for s in training.values())
    evaluated = (1 + recipe.carved + len(training)) * domains * recipe.evaluate.tokens
    rate, seconds = 0.0, {}
    if measure:
        rate = forward_rate(parent)
        passes = 2 if refit or recipe.router.start == "lda" or spec.compensation == "bias" else 1
        seconds = {
            "calibration": (1 + passes * (1.0 if passes > 1 else 0.0)) * calibration / rate,
            "affinity": 0.8 * affinity / rate,
            "training": sum(s.tokens * _passes(s, refit > 0) for s in training.values()) / rate,
            "evaluation": evaluated / rate,
        }
        seconds = {name: round(value, 1) for name, value in seconds.items()}
    return Plan(
        **counts,
        architecture=NATIVE if recipe.learned and recipe.masks.attention != "none" else parent.family,
        expert_width=kept,
        memory=memory,
        disk=disk,
        calibration_tokens=calibration,
        affinity_tokens=affinity,
        training_tokens=trained,
        evaluation_tokens=evaluated,
        forward_tokens_per_second=round(rate, 1),
        seconds=seconds,
        warnings=_widths(recipe, parent, kept),
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


def _passes(spec: LoopSection, refit: bool) -> float:
    """Cost of a training step in forward passes: forward, and a backward without the gradients of frozen weights."""
    if isinstance(spec, TrainSection):  # distillation adds the parent's forward pass
        return 3.5 + (spec.loss == "distill") + (refit and spec.gate == "dense")
    return 4.5


def forward_rate(parent: Parent) -> float:
    """Tokens per second of the parent's forward pass, measured for a second or two."""
    ids = torch.randint(0, parent.config.vocab_size, (2, 256), device=parent.device)
    with torch.inference_mode():
        parent.model.base_model(input_ids=ids, use_cache=False)
        started, done = time.monotonic(), 0
        while time.monotonic() - started < 1.0:
            parent.model.base_model(input_ids=ids, use_cache=False)
            done += ids.numel()
    return done / (time.monotonic() - started)


def check_room(plan: Plan, out: Path) -> None:
    """Refuse before work what cannot fit.

    Raises:
        MoesmithError: not enough free memory or disk for the plan.
    """
    free = psutil.virtual_memory().available
    if plan.memory - 2 * plan.parent_parameters > free:  # the parent is already loaded
        raise MoesmithError(
            f"the plan needs about {plan.memory / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free",
            "Lower micro_batch or window of the training stages, or carve.experts.",
        )
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    room = shutil.disk_usage(folder).free
    if plan.disk > room:
        raise MoesmithError(
            f"the plan needs about {plan.disk / 2**30:.1f} GiB of disk and {folder} has {room / 2**30:.1f} GiB",
            "Free space or give an --out on another disk.",
        )
