"""Stages *masks* (ToMoE's hypernetwork trained over the frozen parent, and the carving that it ends in) and *refit*."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moesmith.console import say
from moesmith.conversion.stages.carve import layer_groups, refit_layer
from moesmith.files.artefact import read_tensors, write_tensors
from moesmith.methods.moments import routed_moments
from moesmith.methods.tomoe.harvest import check_budget, harvest
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.objective import MaskObjective
from moesmith.methods.tomoe.student import masked_model
from moesmith.methods.tomoe.warm import expert_ratio, start_from
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.run.pipeline import Run
from moesmith.run.recipe import Recipe
from moesmith.training.loop import train

CALIBRATION = 8192  # training tokens on which the widths of V/O are taken
REFIT = 131_072  # training tokens whose activations a refit sees


def check_masks(recipe: Recipe, parent: Parent) -> None:
    """Refuse a budget that cannot be met.

    Raises:
        MoesmithError: no masks of this parent are so narrow, or no carving is.
    """
    if recipe.learned:
        check_budget(Sizes.of(parent), recipe.masks.budget, recipe.masks.attention)
        if recipe.carved:
            expert_ratio(Sizes.of(parent), recipe.masks.budget)


def masks_stage(run: Run, parent: Parent, before: Sequence[str]) -> Path:
    """Train masks from scratch or from the carving of stage ``before``; all base weights stay as they are."""
    recipe = run.recipe
    spec, experts = recipe.masks, recipe.carve.experts

    def body(work: Path) -> dict[str, Any]:
        masks = Masks(Sizes.of(parent), experts, spec, recipe.seed).to(parent.device)
        for name in before:
            start_from(masks, Carving.load(run.path(name)))
        model = masked_model(parent, masks)
        trained = {f"masks.{name}": p for name, p in masks.named_parameters()}
        say(f"  {sum(p.numel() for p in trained.values()):,} trainable parameters, none of them the parent's")
        blocks = read_tensors(run.path("corpus") / "training.safetensors")["masks"]
        objective = MaskObjective(model, parent.model, masks, spec)
        outcome = train(objective, trained, blocks, spec, work, seed=recipe.seed, label="masks")
        few = blocks[: max(1, CALIBRATION // spec.window)].long()
        carving, facts = harvest(masks, parent, few, {"method": "tomoe", "parent": run.inputs})
        write_tensors(work / "masks.safetensors", masks.state_dict())
        carving.save(work)
        return outcome.metrics() | facts | parameters(parent, carving)

    settings = spec.model_dump() | {"experts": experts}
    return run.stage("masks", [*before, "corpus"], settings, body)


def refit_stage(run: Run, parent: Parent) -> Path:
    """Refit every expert's ``down_proj`` on the tokens that its router sends to it (ours; the published way is none).

    Statistics are the dense parent's, as everywhere, over training text.
    """
    recipe = run.recipe

    def body(work: Path) -> dict[str, Any]:
        carving = Carving.load(run.path("masks"))
        blocks = read_tensors(run.path("corpus") / "training.safetensors")["masks"]
        ids_NS = blocks[: max(1, REFIT // recipe.masks.window)].long()
        routers, tokens = [layer.router.weight_ED for layer in carving.layers], torch.zeros(carving.experts)  # type: ignore[union-attr]
        for layers in layer_groups(parent, carving.experts, gram=True):
            for index, grams in zip(layers, routed_moments(parent, routers, ids_NS, layers), strict=True):
                layer, counts = carving.layers[index], [float(gram.count) for gram in grams]
                refit_layer(parent, index, layer.routed, grams, counts, recipe)
                tokens += torch.tensor(counts)
        carving.save(work)
        return {"tokens": ids_NS.numel(), "share_by_expert": (tokens / tokens.sum()).tolist()}

    settings = {"ridge": recipe.carve.ridge, "pool": recipe.carve.pool}
    return run.stage("refit", ["masks", "corpus"], settings, body)
