"""Steps *router* (stage 1: dense router training) and *experts* (stage 2: experts and norms, sparse)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.calibration.moments import Sums
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.methods.router import CONSTANT_TOKENS, constant_direction
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic, Expert, Layer, Linear
from moesmith.mixture.lora import add_lora, lora_tensors
from moesmith.mixture.moe import build, moe_blocks
from moesmith.native.experts import MoEBlock, SlicedExperts
from moesmith.native.gate import Router, added
from moesmith.parent.compute import Choice
from moesmith.parent.hooks import hooked
from moesmith.parent.load import Parent
from moesmith.run.recipe import Recipe
from moesmith.run.settings import TrainSection
from moesmith.run.shapes import BACKWARD, LOSS, SPARSE, Pace, Shapes
from moesmith.run.step import Cost, Job, Step, trained
from moesmith.training.loop import train
from moesmith.training.sharding import gather, spread
from moesmith.training.student import Student
from moesmith.training.tracking import Report
from moesmith.world import crew


def norm_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Copy every norm's weight, and bias if it has one, by parameter name, so that the parent keeps its own."""
    found = {}
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children()):
            for leaf, parameter in list(module.named_parameters()):
                setattr(module, leaf, nn.Parameter(parameter.detach().clone()))
                found[f"{path}.{leaf}"] = getattr(module, leaf)
    return found


def prepare(model: PreTrainedModel, spec: TrainSection, seed: int) -> dict[str, nn.Parameter]:
    """Set gates and adapters as the stage needs them; returns what it trains, by name.

    Router weights are trained if they can receive a gradient: with the dense gate, with a sparse gate of K > 1
    whose experts are averaged, or straight-through (DIVE's published code).
    """
    blocks = moe_blocks(model)
    parameters: dict[str, nn.Parameter] = {}
    if spec.lora_rank:
        add_lora(model, spec.lora_rank, spec.lora_alpha, spec.lora_dropout, seed)
        for index, block in enumerate(blocks):
            lora: Any = block.experts.lora
            parameters |= {f"lora.{index}.{name}": p for name, p in lora.named_parameters()}
    for index, block in enumerate(blocks if spec.whole else ()):
        for name, experts in (("experts", block.experts), ("shared", block.shared)):
            if experts is not None:
                parameters[f"{name}.{index}.gate_up"] = experts.gate_up_proj
                parameters[f"{name}.{index}.down"] = experts.down_proj
    if spec.norms:
        parameters |= {f"norm.{name}": p for name, p in norm_parameters(model).items()}
    for index, block in enumerate(blocks):
        router = block.router
        router.temperature = spec.gate_temperature if spec.gate == "dense" else None
        router.gradient = spec.router_gradient
        weighed = router.spec.top_k > 1 and not added(router.spec)  # a weight that is always 1 has no gradient
        alive = spec.gate == "dense" or weighed or router.gradient == "straight-through"
        if spec.train_router and router.spec.experts > 1 and router.activation is None and alive:
            parameters[f"router.{index}"] = router.weight
            if router.noise is not None:
                parameters[f"noise.{index}"] = router.noise
    return parameters


def harvest(model: PreTrainedModel, carving: Carving, parameters: dict[str, nn.Parameter]) -> Carving:
    """Return the carving with what training changed, on the CPU."""
    blocks = moe_blocks(model)
    whole = "experts.0.down" in parameters
    layers = [
        replace(_whole(layer, block) if whole else layer, router=_router(layer.router, block.router))
        for layer, block in zip(carving.layers, blocks, strict=True)
    ]
    norms = {
        n.removeprefix("norm."): p.detach().to("cpu", copy=True) for n, p in parameters.items() if n.startswith("norm.")
    }
    lora = {} if whole else dict(carving.lora)  # the model was built with the pairs of earlier stages merged
    for name, new in lora_tensors(blocks).items():
        # pairs that an earlier stage trained stay: concatenated, their ranks add up
        old = [lora[name]] if name in lora else []
        lora[name] = torch.cat([*old, new], 1 if name.endswith("A") else 2)
    return replace(carving, layers=layers, lora=lora, norms=norms or carving.norms)


def _whole(layer: Layer, block: MoEBlock) -> Layer:
    """The layer with the block's own matrices as its experts', without the rows that pad narrower ones."""

    def trained(expert: Expert, stacked: SlicedExperts, index: int) -> Expert:
        gate_up_GD, down_DF = stacked.gate_up_proj[index].detach(), stacked.down_proj[index].detach()
        gate_FD, *up = gate_up_GD.chunk(2) if stacked.gated else (gate_up_GD,)
        width = len(expert.channels)
        own = [part[:width].to("cpu", copy=True) for part in (gate_FD, *up)]
        down_DF = down_DF[:, :width].to("cpu", copy=True)
        return replace(expert, down_DF=down_DF, gate_FD=own[0], up_FD=own[1] if up else None)

    routed = [trained(expert, block.experts, index) for index, expert in enumerate(layer.routed)]
    shared = None if layer.shared is None or block.shared is None else trained(layer.shared, block.shared, 0)
    return replace(layer, routed=routed, shared=shared)


def _router(before: Linear | Analytic, trained: Router) -> Linear | Analytic:
    if trained.activation is not None:  # made from the parent's rows, which stay
        return before
    noise = None if trained.noise is None else trained.noise.detach().float().cpu()
    return Linear(trained.weight.detach().float().cpu(), noise)


def constants(model: PreTrainedModel, blocks_NS: Tensor, rows: int, most: int = 2**30) -> list[tuple[Tensor, float]]:
    """Find every layer's constant direction again, in a model that was trained: v (D,) with v·x ≈ 1, and its error.

    Training moves what routers get, most of all through the norms. Where a bias has become a channel that v feeds, a
    direction of before can leave a model that computes something else.

    Args:
        model: as it is trained; every process runs all of the text.
        blocks_NS: training sequences; the first ones are read, as many tokens as a carving takes.
        rows: sequences in a forward pass.
        most: bytes of Gram matrices that are held at once; more layers take another pass.
    """
    layers, D = moe_blocks(model), model.config.hidden_size
    ids_NS = blocks_NS[: max(1, CONSTANT_TOKENS * D // blocks_NS.shape[1])]
    group, found = max(1, most // (4 * D * D)), list[tuple[Tensor, float]]()
    model.eval()
    for first in range(0, len(layers), group):
        some = layers[first : first + group]
        sums = [Sums(D, model.device) for _ in some]
        hooks = [
            (b, lambda _m, args, one=one: one.add(args[0].flatten(0, -2))) for b, one in zip(some, sums, strict=True)
        ]
        with hooked(hooks, before=True), torch.no_grad():
            for ids_BS in ids_NS.split(rows):
                model.base_model(input_ids=ids_BS.long().to(model.device), use_cache=False)
        found += [constant_direction(one.result()) for one in sums]
    return found


class Train(Step):
    """A training step: routers through the dense gate in the masked form, or experts and norms in the sliced form."""

    title, parallel = "trained", True

    def __init__(self, recipe: Recipe, before: str) -> None:
        super().__init__(recipe, before, "corpus")
        self.before, self.spec = before, self.loop

    @staticmethod
    def router(recipe: Recipe, before: str) -> Step | None:
        """Make stage 1 if there are routers and text."""
        spec = getattr(recipe, "stage1", None)
        return TrainRouter(recipe, before) if spec is not None and spec.tokens and recipe.method.experts > 1 else None

    @staticmethod
    def experts(recipe: Recipe, before: str) -> Step | None:
        """Make stage 2 if there is text."""
        return TrainExperts(recipe, before) if recipe.stage2.tokens else None

    def settings(self, job: Job) -> dict[str, Any]:
        """Return the whole section."""
        found = cast(dict[str, Any], self.spec.used())
        return found | ({"constant": "as trained"} if self._constant(job.parent) else {})

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write a carving with what training changed, and ``log.jsonl``."""
        spec, parent, section, seed = self.spec, job.parent, self.trains, self.recipe.seed
        carving = job.run.carving(self.before)
        # of a parent that does not fit, several processes hold a part each; layers go to the device as they are cut
        place = replace(parent, choice=Choice(parent.model.device, parent.dtype, {})) if parent.layerwise else parent
        model = build(place, carving, "masked" if spec.gate == "dense" else "sliced")
        parameters = prepare(model, spec, seed)
        if not parameters:
            raise MoesmithError(
                f"{section} has nothing to train: no experts, no norms, and a router that gets no gradient",
                f"Set {section}.lora_rank, .whole, .norms or .router_gradient, or {section}.tokens=0.",
            )
        count = sum(p.numel() for p in parameters.values())
        say(f"  {count:,} trainable parameters in {len(parameters)} tensors")
        blocks = job.run.training(section)
        teacher = parent.model if spec.loss == "distill" and spec.mix + spec.hidden > 0 else None
        if parent.layerwise:
            model, parameters = spread(model, parameters, parent.dtype, parent.device)
            teacher = None if teacher is None else spread(teacher, {}, parent.dtype, parent.device)[0]
        report = Report.of(self, job)
        student = Student(model, teacher, spec)
        outcome = train(student, parameters, blocks, spec, work, seed=seed, label=self.name, report=report)
        metrics = outcome.metrics()
        if self._constant(parent) and not carving.is_native(parent):
            directions, errors = zip(*constants(model, blocks, spec.micro_batch), strict=True)
            layers = [replace(layer, constant_D=v_D) for layer, v_D in zip(carving.layers, directions, strict=True)]
            carving = replace(carving, layers=layers)
            metrics |= {"constant_direction_error": round(statistics.mean(errors), 6)}
        if parent.layerwise:
            parameters = gather(model, parameters)
        if crew().first:
            harvest(model, carving, parameters).save(work)
        return metrics

    def _constant(self, parent: Parent) -> bool:
        """Whether experts will have biases that a stock file holds as a channel, in a model that training changes."""
        return self.spec.gate != "dense" and self.recipe.method.outline(parent).biased

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how much was trained, and the loss."""
        return trained(metrics)

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count forward and backward passes, the teacher, and what the backward pass keeps."""
        spec, sizes = self.spec, shapes.sizes
        distilled, passes = spec.loss == "distill", 1 + BACKWARD + spec.checkpointing
        if spec.gate == "dense":  # all of gate and up, and every expert's own down if refitted
            extra = sizes.L * sizes.D * (shapes.E * shapes.kept - sizes.F) / sizes.total if shapes.refit else 0.0
            student = (1 + extra) * passes
        else:
            student = shapes.active * passes
        if spec.whole:  # the gradient of an expert's matrices takes as much as its forward pass
            student += SPARSE * sizes.L * sizes.ffn(shapes.used) / sizes.total
        seconds = 0.0
        if pace:
            seconds = spec.tokens * ((student + distilled) / pace.blocks + (2 + distilled) * LOSS / pace.head)
        kept = 10 * sizes.D + 5 * shapes.used  # of a token in a layer; recomputed, what goes in
        kept = sizes.L * sizes.D + kept if spec.checkpointing else sizes.L * kept
        memory = 2 * spec.micro_batch * spec.window * kept
        if spec.gate == "dense" and shapes.refit:
            memory += 2 * sizes.L * sizes.D * sizes.F * shapes.E * shapes.itemsize
        lora = sizes.L * shapes.E * spec.lora_rank * shapes.matrices * (sizes.D + shapes.kept)
        weights = lora + (shapes.experts if spec.whole else 0)
        disk = 4 * lora + 4 * sizes.L * shapes.E * (shapes.kept + 2 * sizes.D)
        disk += shapes.experts * shapes.stored if spec.whole else shapes.own
        passing = 2 * 12 * weights  # fp32 masters and two moments: a checkpoint is written before the last one goes
        # those, gradient and a copy in the model's dtype
        models = ((1 + distilled) * sizes.total + shapes.experts) * shapes.itemsize + 20 * weights
        whole = (2 * shapes.layer + (1 + distilled) * shapes.shell) * shapes.itemsize  # two layers at a time, the ends
        return Cost(
            "training", spec.tokens, seconds, memory + 20 * weights, None, disk, passing, (models, whole + memory)
        )


class TrainRouter(Train):
    """Stage 1 (DIVE): the routers alone, dense gate in the masked form."""

    name, title, trains = "router", "routers trained", "stage1"


class TrainExperts(Train):
    """Stage 2: experts, by LoRA as in DIVE or whole, and norms; sparse gate in the sliced form."""

    name, title, trains = "experts", "experts trained", "stage2"
