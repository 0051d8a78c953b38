"""Train a tiny MoE in several processes. Run as a program: ``python tests/data_parallel.py FOLDER JOB ...``.

A job is ``NAME:PROCESSES:spread|whole:FROM``: so many forked processes that talk over gloo, as ``torchrun`` would start
them, each with all weights or with a part of them; they go on from the working folder of job ``FROM`` if that is not
empty. Each process writes what it has trained to ``FOLDER/NAME-RANK.safetensors``, and how many of the layers' numbers
it held to ``FOLDER/NAME-RANK.json``. A job whose name begins with ``cut`` stops after three steps. A job whose name
begins with ``export`` writes a native and a stock folder instead, and notes which shards each process wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from several import fork
from torch import nn

from moesmith.conversion.steps.training import prepare
from moesmith.export import folder as folders
from moesmith.export.native import write_native
from moesmith.export.stock.write import write_stock
from moesmith.files.write import write_json, write_tensors
from moesmith.mixture.moe import build
from moesmith.parent.structure import decoder_layers
from moesmith.run.settings import TrainSection
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.training import loop
from moesmith.training.loop import train
from moesmith.training.sharding import gather, part, spread
from moesmith.training.student import Student
from moesmith.world import together

LORA = TrainSection(
    tokens=6 * 8 * 16, window=16, batch=8, micro_batch=3, lr=3e-3, lora_rank=2, lora_dropout=0, norms=True,
    loss="distill", mix=0.5, router_gradient="straight-through",
)  # fmt: skip
WHOLE = LORA.model_copy(
    update={"lora_rank": 0, "whole": True, "hidden": 0.5, "checkpointing": True}
)  # the experts themselves


class CutError(Exception):
    """Ends a job that is to be continued."""


def work(folder: Path, name: str, rank: int, divided: bool, before: str) -> None:
    """Train as process ``rank``."""
    torch.set_num_threads(1)
    spec = WHOLE if "experts" in name else LORA
    parent = tiny_parent("llama")
    model, teacher = build(parent, random_carving(parent, compensation="bias"), "sliced"), parent.model
    blocks = torch.randint(0, 300, (40, 16), generator=torch.Generator().manual_seed(0))
    parameters = prepare(model, spec, seed=1)
    place = folder / name
    if before and rank == 0:
        shutil.copytree(folder / before, place)

    def stop(step: int) -> None:
        if name.startswith("cut") and step == 3:
            raise CutError

    with together():
        if divided:
            loop.crew().share(None)  # the folder is there
            model, parameters = spread(model, parameters, torch.float32, torch.device("cpu"))
            teacher = spread(teacher, {}, torch.float32, torch.device("cpu"))[0]
        train(Student(model, teacher, spec), parameters, blocks, spec, place, seed=1, on_step=stop)
        layers: list[nn.Parameter] = list(decoder_layers(model)[1].parameters())
        held = {"held": sum(part(p.data).numel() for p in layers), "all": sum(p.numel() for p in layers)}
        write_json(folder / f"{name}-{rank}.json", held)
        if divided:
            parameters = gather(model, parameters)
    write_tensors(folder / f"{name}-{rank}.safetensors", {name: p.detach() for name, p in parameters.items()})


def export(folder: Path, name: str, rank: int) -> None:
    """Write two folders in many shards as process ``rank``."""
    torch.set_num_threads(1)
    parent, written, write = tiny_parent("llama"), [], folders.write_tensors

    def noted(path: Path, *args: Any) -> None:
        written.append(path.name)
        write(path, *args)

    folders.SHARD_BYTES, folders.write_tensors = 30_000, noted  # type: ignore[assignment]
    carving = random_carving(parent)
    with together():
        write_native(parent, carving, folder / name / "native")
        write_stock(parent, carving, folder / name / "stock")
    write_json(folder / f"{name}-{rank}.json", written)


def forked(folder: Path, job: str) -> int:
    """Fork a job's processes and wait for them; returns the worst exit status."""
    name, processes, how, before = job.split(":")

    def begin(rank: int) -> None:
        loop.SAVE_SECONDS = 0.0  # a checkpoint after every step
        if name.startswith("export"):
            export(folder, name, rank)
            return
        with suppress(CutError):
            work(folder, name, rank, how == "spread", before)

    return fork(int(processes), begin)


def story(folder: Path, name: str) -> list[tuple[int, float, float]]:
    """What a job's log says of its steps."""
    lines = (folder / name / "log.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


if __name__ == "__main__":
    sys.exit(max(forked(Path(sys.argv[1]), job) for job in sys.argv[2:]) and 1)
