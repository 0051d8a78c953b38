"""Stages *domains* (all text becomes token windows, once) and *moments* (statistics of the parent per domain)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesmith.artefact import read_tensors, write_tensors
from moesmith.errors import MoesmithError
from moesmith.moments import Moments, channel_moments
from moesmith.parents import Parent
from moesmith.pipeline import Run
from moesmith.recipe import Recipe, TrainSection
from moesmith.text import Domain, evaluation_blocks, sample_windows, training_blocks


def domains_stage(run: Run, parent: Parent, domains: Sequence[Domain]) -> Path:
    """Tokenise: calibration windows, evaluation blocks and training sequences of every domain.

    Raises:
        MoesmithError: a window longer than the model reads, or a domain too short for one window.
    """
    recipe = run.recipe
    check_windows(recipe, parent)

    def body(work: Path) -> dict[str, Any]:
        windows, evaluation, counts = {}, {}, {}
        for domain in domains:
            window = sample_windows(domain, parent.tokenizer, recipe.domains.tokens, recipe.domains.window, recipe.seed)
            packed = evaluation_blocks(domain, parent.tokenizer, recipe.evaluate.tokens, recipe.evaluate.window)
            windows[domain.name], evaluation[domain.name] = window.to(torch.int32), packed.blocks.to(torch.int32)
            counts[domain.name] = {
                "calibration_tokens": window.numel(),
                "evaluation_tokens": packed.blocks.numel(),
                "evaluation_tokens_left_over": packed.dropped,
            }
        write_tensors(work / "windows.safetensors", windows)
        write_tensors(work / "evaluation.safetensors", evaluation)
        training, epochs = {}, {}
        for name, spec in stages_to_train(recipe).items():
            offset = 0 if name == "stage1" else 1
            packed = training_blocks(domains, parent.tokenizer, spec.tokens, spec.window, recipe.seed + offset)
            training[name] = packed.blocks.to(torch.int32)
            epochs[name] = packed.epochs
        write_tensors(work / "training.safetensors", training)
        return {"domains": counts, "training_epochs": epochs}

    settings = {
        "names": [domain.name for domain in domains],
        "domains": recipe.domains.model_dump(),
        "evaluate": recipe.evaluate.model_dump(),
        "training": {name: [spec.tokens, spec.window] for name, spec in stages_to_train(recipe).items()},
    }
    return run.stage("domains", [], settings, body)


def stages_to_train(recipe: Recipe) -> dict[str, TrainSection]:
    """The training stages a recipe really has: a single expert has no router to train."""
    both = {"stage1": recipe.stage1, "stage2": recipe.stage2}
    if recipe.carve.experts == 1:
        both.pop("stage1")
    return {name: spec for name, spec in both.items() if spec.tokens}


def check_windows(recipe: Recipe, parent: Parent) -> None:
    """Refuse windows that the parent cannot read."""
    limit = getattr(parent.config, "max_position_embeddings", None) or 1 << 30
    used = {"domains.window": recipe.domains.window, "evaluate.window": recipe.evaluate.window}
    used |= {f"{name}.window": spec.window for name, spec in stages_to_train(recipe).items()}
    for key, window in used.items():
        if window > limit:
            raise MoesmithError(f"{key} is {window}, but the model reads {limit} tokens", f"Lower {key}.")


def windows_of(run: Run) -> dict[str, Tensor]:
    """Calibration windows by domain, (N, window) int64."""
    return {name: ids.long() for name, ids in read_tensors(run.path("domains") / "windows.safetensors").items()}


def moments_stage(run: Run, parent: Parent, names: Sequence[str]) -> Path:
    """Channel moments of the dense parent, one forward pass per domain; finished domains survive a kill."""

    def body(work: Path) -> dict[str, Any]:
        windows = windows_of(run)
        for position, name in enumerate(names):
            path = work / f"{name}.safetensors"
            if not path.is_file():
                label = f"moments {position + 1}/{len(names)} {name}"
                write_tensors(path, channel_moments(parent, windows[name], label=label).tensors())
        return {"tokens": sum(w.numel() for w in windows.values())}

    return run.stage("moments", ["domains"], {}, body)


def moments_of(run: Run, name: str) -> Moments:
    """A domain's channel moments."""
    return Moments.from_tensors(read_tensors(run.path("moments") / f"{name}.safetensors"))
