"""Speed and memory of the core, each as a ratio within one run on SmolLM2-135M.

    python benchmarks/speed.py --out benchmarks/results/speed.json        # about 8 minutes on two idle cores
    python benchmarks/speed.py --rounds 2 --tokens 512 --only moments     # a quick look

The two sides of a ratio take turns (A B A B …), and the ratio is the median of the rounds' ratios, so a machine whose
speed drifts does not decide it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from moesmith.calibration.moments import channel_moments, fast_products
from moesmith.conversion.steps.training import prepare
from moesmith.evaluation.perplexity import perplexity
from moesmith.files.write import write_json
from moesmith.mixture.lora import dropout
from moesmith.mixture.moe import build, share
from moesmith.parent.load import Parent, load_parent
from moesmith.run.settings import TrainSection
from moesmith.run.versions import versions
from moesmith.testing.carvings import random_carving
from moesmith.training.loop import Masters
from moesmith.training.student import Student

Step = Callable[[], None]


def ratio(a: Step, b: Step, rounds: int) -> dict[str, float]:
    """Median seconds of both sides and the median of their ratios, rounds interleaved, one warm-up each."""
    times: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        pair = []
        for side in (a, b):
            started = time.perf_counter()
            side()
            pair.append(time.perf_counter() - started)
        if number:
            times.append((pair[0], pair[1]))
    ratios = sorted(x / y for x, y in times)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "seconds_ours": round(statistics.median(x for x, _ in times), 3),
        "seconds_other": round(statistics.median(y for _, y in times), 3),
    }


def blocks(parent: Parent, tokens: int, window: int) -> torch.Tensor:
    """Random token ids: the work does not depend on them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, parent.config.vocab_size, (max(1, tokens // window), window), generator=generator)


def train_step(student: Student, masters: Masters, ids: torch.Tensor) -> Step:
    """One whole training step: forward, loss, backward, optimiser."""

    def step() -> None:
        student(ids).backward()
        masters.step(1e-4, 1.0)

    return step


def routed(parent: Parent, compensation: str, form: str, ids: torch.Tensor) -> Step:
    """A stage-1 step: dense gate over eight experts, routers trained."""
    spec = TrainSection(gate="dense", gate_temperature=0.05, tokens=1024)
    model = build(parent, random_carving(parent, 8, compensation=compensation), form).train()  # type: ignore[arg-type]
    parameters = prepare(model, spec, 0)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return train_step(Student(model, None, spec), Masters(parameters, spec), ids)


def frozen_dense(parent: Parent, ids: torch.Tensor) -> Step:
    """A training step through the frozen parent: the gradient reaches one vector added to the embeddings."""
    model = share(parent.model).requires_grad_(False).train()
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: out + nudge)
    nudge = torch.nn.Parameter(torch.zeros(parent.D, dtype=parent.model.dtype))
    spec = TrainSection(tokens=1024)
    return train_step(Student(model, None, spec), Masters({"nudge": nudge}, spec), ids)


def grouped_lora(parent: Parent, ids: torch.Tensor) -> Step:
    """A stage-2 step: LoRA on the experts and norms, top-1 of eight."""
    spec = TrainSection(tokens=1024, lora_rank=8, norms=True)
    model = build(parent, random_carving(parent, 8, compensation="refit"), "sliced").train()
    parameters = prepare(model, spec, 0)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return train_step(Student(model, None, spec), Masters(parameters, spec), ids)


def peft_lora(parent: Parent, ids: torch.Tensor) -> Step:
    """A LoRA step on the dense parent with PEFT, same rank, dropout and projections."""
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["gate_proj", "up_proj", "down_proj"])
    wrapped = get_peft_model(share(parent.model).requires_grad_(False), config, autocast_adapter_dtype=False).train()
    parameters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    spec = TrainSection(tokens=1024)
    return train_step(Student(wrapped.get_base_model(), None, spec), Masters(parameters, spec), ids)


def peak_memory(work: Step) -> int:
    """Growth of the resident set's high-water mark while ``work`` runs, in bytes (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(parent: Parent, tokens: int, rounds: int, only: list[str] | None) -> dict[str, Any]:
    """Every ratio, by name, with the bound it is held against."""
    window = blocks(parent, tokens, 256)
    sequences = blocks(parent, tokens, 512)
    pruned = build(parent, random_carving(parent, 1, compensation="bias"))

    def plain() -> None:
        with torch.no_grad():
            for ids in window.split(8):
                parent.model(input_ids=ids, use_cache=False)

    def ours() -> None:
        channel_moments(parent, window)

    def close(a: Step, b: Step, bound: float) -> dict[str, Any]:
        found: dict[str, Any] = ratio(a, b, rounds)
        return found | {"at_most": bound}

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "moments: time over a plain forward pass": lambda: close(ours, plain, round(1 / 0.9, 3)),
        "moments: peak memory over a plain forward pass": lambda: _memory(parent, ours, plain),
        "perplexity of a pruned model: time over the dense model's": lambda: close(
            lambda: void(perplexity(pruned, sequences)), lambda: void(perplexity(parent.model, sequences)), 0.85
        ),
        "stage 1, bias, masked: step over a frozen dense step": lambda: close(
            routed(parent, "bias", "masked", sequences), frozen_dense(parent, sequences), 1.35
        ),
        "stage 1, refit, masked: step over a frozen dense step": lambda: close(
            routed(parent, "refit", "masked", sequences), frozen_dense(parent, sequences), 2.2
        ),
        "stage 1, bias, all eight experts run (as published): step over a frozen dense step": lambda: ratio(
            routed(parent, "bias", "sliced", sequences), frozen_dense(parent, sequences), rounds
        ),
        "stage 2: step over PEFT's LoRA step on the dense parent": lambda: close(
            grouped_lora(parent, sequences), peft_lora(parent, sequences), 0.95
        ),
    }
    cases |= {
        "Gram matrix: bf16 products with fp32 sums over fp32 products": lambda: ratio(
            lambda: gram(parent, fast=True), lambda: gram(parent, fast=False), rounds
        ),
        "picking eight experts' channels: rows of the transpose over columns": lambda: ratio(
            lambda: pick(parent, rows=True), lambda: pick(parent, rows=False), rounds
        ),
        "dropout: ours over torch's": lambda: ratio(
            lambda: void(dropout(activation(parent), 0.1, True)),
            lambda: void(torch.nn.functional.dropout(activation(parent), 0.1, True)),
            rounds,
        ),
    }
    found = {}
    for name, case in cases.items():
        if only and not any(word in name for word in only):
            continue
        found[name] = case()
        print(name, json.dumps(found[name]), flush=True)
        gc.collect()
    return found


def activation(parent: Parent) -> torch.Tensor:
    """A ``down_proj`` input of 2,048 tokens, (T, F)."""
    return torch.ones(2048, parent.F, dtype=parent.model.dtype)


def gram(parent: Parent, fast: bool) -> None:
    """Ten Gram matrices of an activation in fp32."""
    a_TF = activation(parent).float()
    with fast_products(torch.bfloat16 if fast else torch.float32):
        for _ in range(10):
            void(a_TF.T @ a_TF)


def pick(parent: Parent, rows: bool) -> None:
    """Ten times eight halves of the channels, with or without the transpose."""
    a_TF = activation(parent)
    channels = torch.arange(parent.F).view(2, -1)[0].repeat(8)
    for _ in range(10):
        void(a_TF.T.contiguous().index_select(0, channels) if rows else a_TF.index_select(1, channels))


def void(_value: object) -> None:
    """Throw a result away."""


def _memory(parent: Parent, ours: Step, plain: Step) -> dict[str, Any]:
    weights = sum(p.numel() * p.element_size() for p in parent.model.parameters())
    plain()
    mine, other = peak_memory(ours), peak_memory(plain)
    return {
        "ratio": round((weights + mine) / (weights + other), 3),
        "at_most": 1.15,
        "bytes_weights": weights,
        "bytes_ours": mine,
        "bytes_other": other,
    }


def main() -> None:
    """Measure and write JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", nargs="*", help="words of the cases to run")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    results = measure(load_parent(given.model), given.tokens, given.rounds, given.only)
    setting = {"model": given.model, "tokens": given.tokens, "rounds": given.rounds, "threads": torch.get_num_threads()}
    if given.out:
        write_json(given.out, {"setting": setting | versions(), "results": results})


if __name__ == "__main__":
    main()
