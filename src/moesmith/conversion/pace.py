"""How long a conversion takes on this machine, and how much text fits into a given time.

Two speeds are measured, for a second or two: tokens through the parent's blocks, and through its output matrix. What
every stage costs is counted in those (:func:`seconds_of`); constants beside the count were measured, see docs/lab.md.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from moesmith.conversion.stages.data import moments_tokens, stages_to_train
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import CHUNK
from moesmith.parent.checkpoint import quiet
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.run.recipe import LoopSection, Recipe, TrainSection

MEASURE = 0.5  # seconds that each speed is measured for
COPY = 5e8  # bytes per second at which a model is sliced, cast, hashed, written and read
START = 12.0  # seconds to start Python, import torch and transformers, choose, measure, and read a small parent
# measured costs beside counted ones
SPARSE = 1.15  # of sorting tokens and of many small products
BACKWARD = 1.35  # backward pass through frozen matrices, with its low-rank ones, over the forward pass
LOSS = 1.2  # softmax over the vocabulary beside the products with the output matrix


@dataclass(frozen=True)
class Pace:
    """Tokens per second of this machine, in the parent's dtype on its device: through all blocks, and the head."""

    blocks: float
    head: float


def measure(parent: Parent) -> Pace:
    """Time a layer of the parent's shape and its output matrix; the parent may be a skeleton."""
    fields = parent.config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 512, "pad_token_id": None}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1]
    device = torch.device("cpu") if parent.device.type == "meta" else parent.device
    with quiet(), torch.random.fork_rng(devices=[]):
        config = type(parent.config).from_dict(fields)
        one: Any = AutoModelForCausalLM.from_config(config, dtype=parent.dtype).to(device).eval()
        ids = torch.randint(0, 512, (8, 256), device=device)
    D, V = parent.D, parent.config.vocab_size
    head_VD = torch.full((V, D), 0.01, dtype=parent.dtype, device=device)
    hidden_CD = torch.full((CHUNK, D), 0.5, dtype=parent.dtype, device=device)
    targets_C = torch.zeros(CHUNK, dtype=torch.int64, device=device)

    def blocks() -> torch.Tensor:
        out: torch.Tensor = one.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return out.flatten()[0]

    def head() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden_CD, head_VD).float(), targets_C)

    with torch.inference_mode():
        return Pace(_rate(blocks, ids.numel()) / parent.L, _rate(head, CHUNK))


def _rate(work: Any, tokens: int) -> float:
    """Tokens per second of the median round, so that a machine busy for a moment does not decide it."""
    float(work())  # makes kernels
    started = time.perf_counter()
    rounds: list[float] = []
    while not rounds or time.perf_counter() - started < MEASURE:
        begun = time.perf_counter()
        float(work())
        rounds.append(time.perf_counter() - begun)
    return tokens / statistics.median(rounds)


def seconds_of(recipe: Recipe, sizes: Sizes, kept: int, model_bytes: int, domains: int, pace: Pace) -> dict[str, float]:
    """Predicted seconds by kind of work.

    Args:
        recipe: what would be done.
        sizes: the parent's shapes.
        kept: channels of an expert.
        model_bytes: size of the finished model.
        domains: how many domains of text.
        pace: what the machine does in a second.
    """
    spec, training = recipe.carve, stages_to_train(recipe)
    refit = spec.compensation == "refit"
    share = 1 - sizes.L * sizes.ffn(sizes.F - spec.top_k * kept) / sizes.total  # of the blocks, active per token
    active = SPARSE * share

    calibration = 0.0
    if recipe.carved:
        first = moments_tokens(recipe)
        calibration += domains * (recipe.domains.tokens if first is None else first) / pace.blocks
        if refit and not recipe.learned:
            gram = sizes.L * (0.6 * sizes.F**2 + sizes.D**2) / sizes.total
            calibration += domains * recipe.domains.tokens * (1 + gram) / pace.blocks
        elif recipe.router.start == "lda":
            calibration += domains * recipe.domains.tokens * (1 + sizes.L * sizes.D**2 / sizes.total) / pace.blocks
        elif spec.compensation == "bias":
            calibration += min(domains * recipe.domains.tokens, 32 * sizes.D) / pace.blocks
    pruned = domains**2 * recipe.affinity.tokens if recipe.mined else 0
    held_out = domains * recipe.evaluate.tokens
    models = recipe.carved + recipe.learned + len([name for name in training if name != "masks"])
    return {
        "start": START,
        "calibration": calibration,
        "affinity": pruned * (active / pace.blocks + LOSS / pace.head),
        "training": sum(s.tokens * _step(s, sizes, kept, spec.experts, active, refit, pace) for s in training.values()),
        "export": 6 * model_bytes / COPY,
        "evaluation": held_out * ((1 + models * active) / pace.blocks + (1 + models) * LOSS / pace.head),
    }


def _step(spec: LoopSection, sizes: Sizes, kept: int, experts: int, active: float, refit: bool, pace: Pace) -> float:
    """Seconds of a training step, per token."""
    distilled = not isinstance(spec, TrainSection) or spec.loss == "distill"
    if not isinstance(spec, TrainSection):
        student = 2.0  # masks: the whole parent, as much again for sampling and the masks' gradient
    elif spec.gate == "dense":  # all of gate and up, and every expert's own down where they are refitted
        dense = sizes.L * sizes.D * (experts * kept - sizes.F) / sizes.total if refit else 0.0
        student = (1 + dense) * (1 + BACKWARD)
    else:
        student = active * (1 + BACKWARD)
    return (student + distilled) / pace.blocks + (2 + distilled) * LOSS / pace.head


def parse_time(text: str) -> float:
    """Seconds from ``15m``, ``1.5h``, ``90s`` or ``1h30m``.

    Raises:
        MoesmithError: it is no time.
    """
    units, words = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}, text.lower()
    if not re.fullmatch(r"(\s*\d+(\.\d+)?\s*[smhd])+\s*", words):
        raise MoesmithError(f"{text!r} is no time", "Write it like 15m, 1h30m or 90s.")
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)\s*([smhd])", words))


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """A recipe with its calibration and training text times ``factor``, evaluation text at most as it is.

    Whole windows of every domain, whole steps of every training stage, at least one of each.
    """
    training, counts = stages_to_train(recipe), {}
    for key, tokens in tokens_of(recipe).items():
        name = key.partition(".")[0]
        unit = training[name].batch * training[name].window if name in training else getattr(recipe, name).window
        scale = min(1.0, factor) if name == "evaluate" else factor
        counts[key] = max(1, round(tokens * scale / unit)) * unit
    return with_tokens(recipe, counts)


def tokens_of(recipe: Recipe) -> dict[str, int]:
    """The counts that :func:`scaled` changes, as settings: ``section.tokens`` to tokens."""
    names = ["domains", "affinity", "evaluate", *stages_to_train(recipe)]
    return {f"{name}.tokens": getattr(recipe, name).tokens for name in names}


def with_tokens(recipe: Recipe, counts: Mapping[str, int]) -> Recipe:
    """The recipe with such counts in place of its own."""
    changed = {}
    for key, tokens in counts.items():
        name = key.partition(".")[0]
        changed[name] = getattr(recipe, name).model_copy(update={"tokens": tokens})
    return recipe.model_copy(update=changed)
