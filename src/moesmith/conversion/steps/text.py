"""Steps *held-out* and *corpus*: text becomes tokens, once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesmith.console import say
from moesmith.data.encoding import check_chats, reading, spelled
from moesmith.data.overlap import found_in, warnings
from moesmith.data.sampling import evaluation_blocks, must_hold, training_blocks
from moesmith.errors import MoesmithError
from moesmith.files.write import mapped_tensors, settle, write_tensors
from moesmith.parent.vocabulary import readable
from moesmith.run.recipe import Recipe
from moesmith.run.settings import LoopSection
from moesmith.run.shapes import Pace, Shapes
from moesmith.run.step import Cost, Job, Step


class HeldOut(Step):
    """Evaluation blocks of every domain, and how much of them is not held out; no training step reads them."""

    name, tokenises = "held-out", True
    reads = ("text_digest", "chat_digest")

    def settings(self, job: Job) -> dict[str, Any]:
        """Return names, counts, and how text is read."""
        records = {domain.name: domain.evaluation for domain in job.domains}
        found: dict[str, Any] = {"names": job.names, "evaluate": self.recipe.evaluate.used()}
        return found | reading(records, job.parent.tokenizer)

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write ``evaluation.safetensors``: int32 (N, window) by domain."""
        spec, tokenizer = self.recipe.evaluate, job.parent.tokenizer
        held_out = {d.name: evaluation_blocks(d, tokenizer, spec.tokens, spec.window) for d in job.domains}
        blocks = {name: packed.blocks.to(torch.int32) for name, packed in held_out.items()}
        readable(blocks, job.parent.model)
        write_tensors(work / "evaluation.safetensors", blocks)
        return {
            "evaluation_tokens": {name: packed.blocks.numel() for name, packed in held_out.items()},
            "evaluation_tokens_left_over": {name: packed.dropped for name, packed in held_out.items()},
            "overlap": {name: shared.as_dict() for name, shared in job.overlap.items()},
        }

    def windows(self) -> dict[str, int]:
        """Return the window of the evaluation text."""
        return {"evaluate.window": self.recipe.evaluate.window}

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say what is not held out."""
        return "; ".join(warnings(found_in(metrics)))

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the token ids on disk."""
        return Cost("evaluation", disk=4 * shapes.domains * self.recipe.evaluate.tokens)


class Corpus(Step):
    """The training sequences of each training step."""

    name, tokenises = "corpus", True
    reads = ("text_digest", "chat_digest")

    def __init__(self, recipe: Recipe, training: Mapping[str, LoopSection]) -> None:
        super().__init__(recipe)
        self.training = training

    def settings(self, job: Job) -> dict[str, Any]:
        """Return names, counts, and how text is read."""
        training = {name: [spec.tokens, spec.window] for name, spec in self.training.items()}
        records = {domain.name: domain.calibration for domain in job.domains}
        fitted = {} if self.calibrated is None else {"calibrated": self.calibrated}
        return {"names": job.names, "training": training} | fitted | reading(records, job.parent.tokenizer)

    @property
    def calibrated(self) -> int | None:
        """The seed of calibration windows that read whole records; other windows say nothing of what was read."""
        return self.recipe.seed if self.recipe.domains.reading == "once" else None

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write ``training.safetensors``: int32 (N, window) by section."""
        shapes = {name: (spec.tokens // spec.window, spec.window) for name, spec in self.training.items()}
        sequences, epochs = mapped_tensors(work / "training.safetensors", shapes), {}
        for offset, (name, spec) in enumerate(self.training.items()):
            seed, places = self.recipe.seed + offset, (spec.tokens, spec.window)
            packed = training_blocks(
                job.domains, job.parent.tokenizer, *places, seed, self.calibrated, out=sequences[name]
            )
            epochs[name] = packed.epochs
        readable(sequences, job.parent.model)
        settle(work / "training.safetensors")
        return {"training_epochs": epochs}

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the token ids on disk."""
        return Cost("training", disk=4 * sum(spec.tokens for spec in self.training.values()))


def check_windows(steps: list[Step], config: Any) -> None:
    """Refuse windows that the parent cannot read.

    Raises:
        MoesmithError: there is one; the message names its setting.
    """
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    for step in steps:
        for key, window in step.windows().items():
            if window > limit:
                raise MoesmithError(f"{key} is {window}, but the model reads {limit} tokens", f"Lower {key}.")


def check_batches(steps: list[Step], processes: int) -> None:
    """Refuse batches that several processes cannot share evenly.

    Raises:
        MoesmithError: there is one; the message names its setting.
    """
    for step in steps:
        if step.trains and step.loop.batch % processes:
            key = f"{step.trains}.batch"
            raise MoesmithError(
                f"{key} is {step.loop.batch}, which {processes} processes cannot share evenly",
                f"Give a multiple of {processes}, or start another number of processes.",
            )


def check_text(steps: list[Step], job: Job) -> None:
    """Refuse a domain with less text in a split than one window, or with chats that the parent cannot read.

    Raises:
        MoesmithError: there is one.
    """
    windows: dict[str, int] = {}
    for step in steps:
        windows |= {} if step.trains else step.windows()
    calibration = windows.pop("domains.window", 1)  # masks from a random start take no calibration windows
    for domain in job.domains:
        check_chats(domain, job.parent.tokenizer)
        must_hold(domain, job.parent.tokenizer, calibration, max(windows.values()))
        if count := sum(spelled(split, job.parent.tokenizer) for split in (domain.calibration, domain.evaluation)):
            say(f"domain {domain.name}: {count} records spell a control token of the parent; it is read as plain text")
