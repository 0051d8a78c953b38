"""How long a conversion takes on this machine, and how much text fits into a given time.

Three speeds are measured, in a second or two: tokens through the parent's blocks, and through its output matrix, and
least squares. The cost of every step is counted in those (``Step.cost``); constants on top of the count were measured,
see docs/lab.md.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from moesmith.conversion.order import steps_of
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import CHUNK
from moesmith.parent.accelerator import closed_form_device
from moesmith.parent.checkpoint import quiet
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.run.recipe import Recipe
from moesmith.run.shapes import Pace

MEASURE = 0.5  # seconds for which each speed is measured
TIMED = 2048  # tokens that go through a layer at once
SOLVED = 2048  # rows of a matrix whose factorisation is timed
START = 12.0  # seconds to start Python, import torch and transformers, choose, measure, and read a small parent


def measure(parent: Parent, recipe: Recipe) -> Pace:
    """Time a layer of the parent's shape and its output matrix; the parent may be a skeleton.

    Sequences are as long as the recipe's longest: attention is slower per token the more of them it looks at.
    """
    fields = parent.config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 512, "pad_token_id": None}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1]
    device = torch.device("cpu") if parent.device.type == "meta" else parent.device
    with quiet(), torch.random.fork_rng(devices=[]):
        config = type(parent.config).from_dict(fields)
        one: Any = AutoModelForCausalLM.from_config(config, dtype=parent.dtype).to(device).eval()
        longest = max((size for step in steps_of(recipe) for size in step.windows().values()), default=256)
        window = min(TIMED, longest, getattr(parent.config, "max_position_embeddings", TIMED) or TIMED)
        ids = torch.randint(0, 512, (TIMED // window, window), device=device)
    D, V = parent.D, parent.config.vocab_size
    head_VD = torch.full((V, D), 0.01, dtype=parent.dtype, device=device)
    hidden_CD = torch.full((CHUNK, D), 0.5, dtype=parent.dtype, device=device)
    targets_C = torch.zeros(CHUNK, dtype=torch.int64, device=device)

    def blocks() -> torch.Tensor:
        out: torch.Tensor = one.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return out.flatten()[0]

    def head() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden_CD, head_VD).float(), targets_C)

    square_SS = torch.eye(min(parent.F, SOLVED), device=closed_form_device(device))

    def solve() -> torch.Tensor:
        return torch.linalg.cholesky(square_SS)[0, 0]

    with torch.inference_mode():
        tokens = _rate(blocks, ids.numel()) / parent.L, _rate(head, CHUNK)
        return Pace(*tokens, _rate(solve, len(square_SS) ** 3 / 3))


# FLOPs per second that training of language models sustains in bf16 on one device: 0.4 of what its maker states
RATES = {"h100": 0.4 * 989e12, "h200": 0.4 * 989e12, "a100": 0.4 * 312e12, "l40s": 0.4 * 362e12}
FP32 = 0.05  # of such a rate: what least squares reach in fp32


def parse_rate(text: str) -> float:
    """Return FLOPs per second for a device's name, or for TFLOP/s as a number.

    Raises:
        MoesmithError: it is neither.
    """
    if text.lower() in RATES:
        return RATES[text.lower()]
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not (math.isfinite(found) and found > 0):
        raise MoesmithError(f"{text!r} is no rate", f"Give TFLOP/s, such as 250, or one of {', '.join(RATES)}.")
    return found * 1e12


def counted(parent: Parent, rate: float) -> Pace:
    """Compute the speeds that a device with a ``rate`` of FLOPs per second has: two for every parameter and token."""
    tokens = rate / (2 * Sizes.of(parent).total), rate / (2 * parent.D * parent.config.vocab_size)
    return Pace(*tokens, FP32 * rate)


def _rate(work: Any, tokens: float) -> float:
    """Measure what is done in a second by the median round: a machine that is busy for a moment does not decide it."""
    float(work())  # compiles kernels
    started = time.perf_counter()
    rounds: list[float] = []
    while not rounds or time.perf_counter() - started < MEASURE:
        begun = time.perf_counter()
        float(work())
        rounds.append(time.perf_counter() - begun)
    return tokens / statistics.median(rounds)


def parse_time(text: str) -> float:
    """Parse seconds from ``15m``, ``1.5h``, ``90s`` or ``1h30m``.

    Raises:
        MoesmithError: the text is not a time.
    """
    units, words = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}, text.lower()
    if not re.fullmatch(r"(\s*\d+(\.\d+)?\s*[smhd])+\s*", words):
        raise MoesmithError(f"{text!r} is not a time", "Write it like 15m, 1h30m or 90s.")
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)\s*([smhd])", words))


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """Scale a recipe's calibration and training text by ``factor``; evaluation text is never increased.

    Counts are whole windows of every domain and whole steps of every training stage, at least one of each.
    """
    training, counts = _training(recipe), {}
    for key, tokens in tokens_of(recipe).items():
        name = key.partition(".")[0]
        unit = training[name].batch * training[name].window if name in training else getattr(recipe, name).window
        scale = min(1.0, factor) if name == "evaluate" else factor
        counts[key] = max(1, round(tokens * scale / unit)) * unit
    return with_tokens(recipe, counts)


def tokens_of(recipe: Recipe) -> dict[str, int]:
    """List the counts that :func:`scaled` changes, as settings: ``section.tokens`` to tokens."""
    calibrated = any("domains.window" in step.windows() for step in steps_of(recipe))
    names = [*(["domains"] if calibrated else []), "affinity", "evaluate", *_training(recipe)]
    return {f"{name}.tokens": getattr(recipe, name).tokens for name in names if hasattr(recipe, name)}


def _training(recipe: Recipe) -> dict[str, Any]:
    """Return the training sections that a recipe runs."""
    return {step.trains: step.loop for step in steps_of(recipe) if step.trains}


def with_tokens(recipe: Recipe, counts: Mapping[str, int]) -> Recipe:
    """Replace the recipe's counts by ``counts``."""
    changed = {}
    for key, tokens in counts.items():
        name = key.partition(".")[0]
        changed[name] = getattr(recipe, name).model_copy(update={"tokens": tokens})
    return recipe.model_copy(update=changed)
