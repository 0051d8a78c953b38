"""Stages *router* (stage 1: dense router training) and *experts* (stage 2: LoRA and norms, sparse); dive.md §7."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_tensors
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic, Linear
from moesmith.mixture.lora import add_lora, lora_tensors
from moesmith.mixture.moe import build, moe_blocks
from moesmith.native.gate import Router
from moesmith.parent.load import Parent
from moesmith.run.pipeline import Run
from moesmith.run.recipe import TrainSection
from moesmith.training.loop import Student, train


def norm_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every norm's weight, and bias where it has one, by parameter name; copies, so that the parent keeps its own."""
    found = {}
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children()):
            for leaf, parameter in list(module.named_parameters()):
                setattr(module, leaf, nn.Parameter(parameter.detach().clone()))
                found[f"{path}.{leaf}"] = getattr(module, leaf)
    return found


def prepare(model: PreTrainedModel, spec: TrainSection, seed: int) -> dict[str, nn.Parameter]:
    """Set gates and adapters as the stage wants them; returns what it trains, by name.

    Router weights are trained where they can receive a gradient: with the dense gate, with a sparse gate of K > 1,
    or straight-through (dive.md §6.2).
    """
    blocks = moe_blocks(model)
    parameters: dict[str, nn.Parameter] = {}
    if spec.lora_rank:
        add_lora(model, spec.lora_rank, spec.lora_alpha, spec.lora_dropout, seed)
        for index, block in enumerate(blocks):
            lora: Any = block.experts.lora
            parameters |= {f"lora.{index}.{name}": p for name, p in lora.named_parameters()}
    if spec.norms:
        parameters |= {f"norm.{name}": p for name, p in norm_parameters(model).items()}
    for index, block in enumerate(blocks):
        router = block.router
        router.temperature = spec.gate_temperature if spec.gate == "dense" else None
        router.gradient = spec.router_gradient
        alive = spec.gate == "dense" or router.spec.top_k > 1 or router.gradient == "straight-through"
        if spec.train_router and router.spec.experts > 1 and router.activation is None and alive:
            parameters[f"router.{index}"] = router.weight
            if router.noise is not None:
                parameters[f"noise.{index}"] = router.noise
    return parameters


def harvest(model: PreTrainedModel, carving: Carving, parameters: dict[str, nn.Parameter]) -> Carving:
    """The carving with what training changed, on the CPU."""
    blocks = moe_blocks(model)
    layers = [
        replace(layer, router=_router(layer.router, block.router))
        for layer, block in zip(carving.layers, blocks, strict=True)
    ]
    norms = {
        n.removeprefix("norm."): p.detach().to("cpu", copy=True) for n, p in parameters.items() if n.startswith("norm.")
    }
    lora = dict(carving.lora)
    for name, new in lora_tensors(blocks).items():
        # pairs that an earlier stage trained stay: side by side their ranks add up
        old = [lora[name]] if name in lora else []
        lora[name] = torch.cat([*old, new], 1 if name.endswith("A") else 2)
    return replace(carving, layers=layers, lora=lora, norms=norms or carving.norms)


def _router(before: Linear | Analytic, trained: Router) -> Linear | Analytic:
    if trained.activation is not None:  # made of the parent's rows, which stay
        return before
    noise = None if trained.noise is None else trained.noise.detach().float().cpu()
    return Linear(trained.weight.detach().float().cpu(), noise)


def _train_stage(run: Run, parent: Parent, name: str, section: str, before: str, spec: TrainSection) -> Path:
    form = "masked" if spec.gate == "dense" else "sliced"
    distilled = spec.loss == "distill" and spec.mix > 0

    def body(work: Path) -> dict[str, Any]:
        carving = Carving.load(run.path(before))
        model = build(parent, carving, form)  # type: ignore[arg-type]
        parameters = prepare(model, spec, run.recipe.seed)
        if not parameters:
            raise MoesmithError(
                f"{section} has nothing to train: no LoRA, no norms, and a router that gets no gradient",
                f"Set {section}.lora_rank, {section}.norms or {section}.router_gradient, or {section}.tokens=0.",
            )
        count = sum(p.numel() for p in parameters.values())
        say(f"  {count:,} trainable parameters in {len(parameters)} tensors")
        blocks = read_tensors(run.path("corpus") / "training.safetensors")[section]
        teacher = parent.model if distilled else None
        student = Student(model, teacher, spec)
        outcome = train(student, parameters, blocks, spec, work, seed=run.recipe.seed, label=name)
        harvest(model, carving, parameters).save(work)
        return outcome.metrics()

    return run.stage(name, [before, "corpus"], spec.model_dump(), body)


def router_stage(run: Run, parent: Parent, before: str) -> Path:
    """Stage 1: the routers alone, dense gate in the masked form (dive.md §7)."""
    return _train_stage(run, parent, "router", "stage1", before, run.recipe.stage1)


def experts_stage(run: Run, parent: Parent, before: str) -> Path:
    """Stage 2: LoRA on the experts and all norms, sparse gate in the sliced form (dive.md §7)."""
    return _train_stage(run, parent, "experts", "stage2", before, run.recipe.stage2)
