"""Stages *domains*, *held-out*, *corpus* (text becomes tokens, once) and *moments* (statistics by domain)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesmith.console import say
from moesmith.data.text import (
    Domain,
    Overlap,
    Record,
    chat,
    check_chats,
    evaluation_blocks,
    must_hold,
    sample_windows,
    spelled,
    training_blocks,
)
from moesmith.errors import MoesmithError
from moesmith.files.artefact import digest, read_tensors, write_tensors
from moesmith.methods.moments import Moments, channel_moments
from moesmith.parent.load import Parent
from moesmith.parent.vocabulary import refuse_ids, rows_of
from moesmith.run.pipeline import Run
from moesmith.run.recipe import LoopSection, Recipe


def domains_stage(run: Run, parent: Parent, domains: Sequence[Domain]) -> Path:
    """Calibration windows of every domain."""
    recipe = run.recipe
    spec = recipe.domains

    def body(work: Path) -> dict[str, Any]:
        windows = {
            domain.name: sample_windows(domain, parent.tokenizer, spec.tokens, spec.window, recipe.seed)
            for domain in domains
        }
        _readable(windows, parent)
        write_tensors(work / "windows.safetensors", {name: ids.to(torch.int32) for name, ids in windows.items()})
        return {"calibration_tokens": {name: ids.numel() for name, ids in windows.items()}}

    names = [domain.name for domain in domains]
    settings = {"names": names, "tokens": spec.tokens, "window": spec.window}
    settings |= _reading({domain.name: domain.calibration for domain in domains}, parent)
    return run.stage("domains", [], settings, body)


def held_out_stage(run: Run, parent: Parent, domains: Sequence[Domain], overlap: Mapping[str, Overlap]) -> Path:
    """Evaluation blocks of every domain, and how much of it is not held out; no training stage reads them."""
    spec = run.recipe.evaluate

    def body(work: Path) -> dict[str, Any]:
        held_out = {
            domain.name: evaluation_blocks(domain, parent.tokenizer, spec.tokens, spec.window) for domain in domains
        }
        blocks = {name: packed.blocks.to(torch.int32) for name, packed in held_out.items()}
        _readable(blocks, parent)
        write_tensors(work / "evaluation.safetensors", blocks)
        return {
            "evaluation_tokens": {name: packed.blocks.numel() for name, packed in held_out.items()},
            "evaluation_tokens_left_over": {name: packed.dropped for name, packed in held_out.items()},
            "overlap": {name: shared.as_dict() for name, shared in overlap.items()},
        }

    settings = {"names": [domain.name for domain in domains], "evaluate": spec.model_dump()}
    settings |= _reading({domain.name: domain.evaluation for domain in domains}, parent)
    return run.stage("held-out", [], settings, body)


def corpus_stage(run: Run, parent: Parent, domains: Sequence[Domain]) -> Path:
    """The training sequences of each training stage."""
    recipe, training = run.recipe, stages_to_train(run.recipe)

    def body(work: Path) -> dict[str, Any]:
        sequences, epochs = {}, {}
        for offset, (name, spec) in enumerate(training.items()):
            packed = training_blocks(domains, parent.tokenizer, spec.tokens, spec.window, recipe.seed + offset)
            sequences[name], epochs[name] = packed.blocks.to(torch.int32), packed.epochs
        _readable(sequences, parent)
        write_tensors(work / "training.safetensors", sequences)
        return {"training_epochs": epochs}

    settings = {
        "names": [domain.name for domain in domains],
        "training": {name: [spec.tokens, spec.window] for name, spec in training.items()},
    }
    settings |= _reading({domain.name: domain.calibration for domain in domains}, parent)
    return run.stage("corpus", [], settings, body)


def _readable(texts: dict[str, Tensor], parent: Parent) -> None:
    """Refuse text with tokens that the parent has no row for."""
    for name, ids in texts.items():
        refuse_ids(ids, rows_of(parent.model), f"the text of {name}")


def _reading(records: Mapping[str, Sequence[Record]], parent: Parent) -> dict[str, Any]:
    """What else token ids depend on: the template of chats, and that spelled control tokens are plain characters.

    Nothing where there are neither: moesmith once read such tokens as control tokens, all other text as it does today.
    """
    found = {name: spelled(of, parent.tokenizer) for name, of in records.items()}
    settings: dict[str, Any] = {"spelled": found} if any(found.values()) else {}
    if any(chat(record) for of in records.values() for record in of):
        settings["chat_template"] = digest(parent.tokenizer.chat_template)
    return settings


def stages_to_train(recipe: Recipe) -> dict[str, LoopSection]:
    """The training stages a recipe really has: a single expert has no router to train."""
    found = {"masks": recipe.masks, "stage1": recipe.stage1, "stage2": recipe.stage2}
    if recipe.carve.experts == 1:
        found.pop("stage1")
    return {name: spec for name, spec in found.items() if spec.tokens}


def _evaluation_windows(recipe: Recipe) -> dict[str, int]:
    mined = {"affinity.window": recipe.affinity.window} if recipe.mined else {}
    return {"evaluate.window": recipe.evaluate.window} | mined


def check_windows(recipe: Recipe, parent: Parent) -> None:
    """Refuse windows that the parent cannot read."""
    limit = getattr(parent.config, "max_position_embeddings", None) or 1 << 30
    used = {"domains.window": recipe.domains.window} if recipe.carved else {}
    used |= _evaluation_windows(recipe)
    used |= {f"{name}.window": spec.window for name, spec in stages_to_train(recipe).items()}
    for key, window in used.items():
        if window > limit:
            raise MoesmithError(f"{key} is {window}, but the model reads {limit} tokens", f"Lower {key}.")


def check_text(recipe: Recipe, parent: Parent, domains: Sequence[Domain]) -> None:
    """Refuse a domain with less text in a split than one window, or with chats that the parent cannot read."""
    longest = max(_evaluation_windows(recipe).values())
    window = recipe.domains.window if recipe.carved else 1  # masks from a random start take no calibration windows
    for domain in domains:
        check_chats(domain, parent.tokenizer)
        must_hold(domain, parent.tokenizer, window, longest)
        if count := spelled(domain.calibration + domain.evaluation, parent.tokenizer):
            say(f"domain {domain.name}: {count} records spell a control token of the parent; it is read as plain text")


def windows_of(run: Run) -> dict[str, Tensor]:
    """Calibration windows by domain, (N, window) int64."""
    return {name: ids.long() for name, ids in read_tensors(run.path("domains") / "windows.safetensors").items()}


def evaluation_of(run: Run) -> dict[str, Tensor]:
    """Evaluation blocks by domain, (N, window) int64."""
    return {name: ids.long() for name, ids in read_tensors(run.path("held-out") / "evaluation.safetensors").items()}


def moments_tokens(recipe: Recipe) -> int | None:
    """Calibration tokens of each domain whose channel moments are taken beforehand; ``None`` for all.

    A refit passes over the whole text anyway and takes them again (``moments.group_moments``): what is needed before it
    is only what groups the domains.
    """
    if recipe.carve.compensation != "refit" or recipe.learned or recipe.mined:
        return None
    return min(recipe.affinity.tokens, recipe.domains.tokens) if recipe.clustered else 0


def moments_stage(run: Run, parent: Parent, names: Sequence[str]) -> Path:
    """Channel moments of the dense parent, one forward pass per domain; finished domains survive a kill."""
    tokens = moments_tokens(run.recipe)
    count = None if tokens is None else -(-tokens // run.recipe.domains.window)

    def body(work: Path) -> dict[str, Any]:
        windows = {name: ids[:count] for name, ids in windows_of(run).items()}
        for position, name in enumerate(names):
            path = work / f"{name}.safetensors"
            if not path.is_file() and len(windows[name]):
                label = f"moments {position + 1}/{len(names)} {name}"
                write_tensors(path, channel_moments(parent, windows[name], label=label).tensors())
        return {"tokens": sum(w.numel() for w in windows.values())}

    # 0.1 took them over all text: more than is needed
    return run.stage("moments", ["domains"], {} if tokens is None else {"tokens": tokens}, body, was={})


def moments_of(run: Run, name: str) -> Moments:
    """A domain's channel moments."""
    return Moments.from_tensors(read_tensors(run.path("moments") / f"{name}.safetensors"))
