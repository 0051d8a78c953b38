"""Whole conversions of tiny parents in about a second."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import moesmith
from moesmith.errors import MoesmithError
from moesmith.run.pipeline import Pipeline as Run
from moesmith.run.recipe import keys, load_recipe

# four domains, four experts, eight steps per stage at a rate that moves weights
TRAINING = ("tokens=2048", "window=32", "batch=8", "micro_batch=4", "lr=0.01")
TINY = [
    *("domains.tokens=512", "domains.window=32", "carve.experts=4", "affinity.tokens=256", "affinity.window=32"),
    *(f"{stage}.{setting}" for stage in ("stage1", "stage2") for setting in TRAINING),
    *("stage2.checkpointing=false", "evaluate.tokens=512", "evaluate.window=64"),
]
UNTRAINED = ["stage1.tokens=0", "stage2.tokens=0"]
MASKS = ("tokens=512", "window=32", "batch=2", "micro_batch=1", "lr=0.01")  # eight steps of learned masks and no others
MASKED = [*UNTRAINED, *(f"masks.{setting}" for setting in MASKS)]
SHARED = ("held-out", "corpus", "baseline", "domains", "moments", "affinity", "carve", "router")  # before stage 2
STAGES = (*SHARED, "experts", "export", "evaluate")
LEARNED = ("held-out", "corpus", "baseline", "masks", "export", "evaluate")  # of masks from a random start


def tiny_settings(preset: str, settings: Sequence[str] = ()) -> list[str]:
    """What makes a preset tiny: of the settings above those that its method has; ``settings`` may decide the method."""
    return fitting([*TINY, *(MASKED if "tomoe" in preset else [])], preset, settings)


def fitting(given: Sequence[str], preset: str, settings: Sequence[str] = ()) -> list[str]:
    """Of given settings those that a preset's method has."""
    methods = [setting for setting in settings if setting.startswith(("carve.method=", "carve.start"))]
    for deciding in (methods, []):
        with suppress(MoesmithError):  # what is going to be refused decides nothing
            known = keys(type(load_recipe(preset, None, deciding)))
            return [setting for setting in given if setting.partition("=")[0] in known]
    return list(given)


def convert(preset: str, model: Any, data: Path, out: Path, settings: Sequence[str] = (), **options: Any) -> Run:
    """A conversion with tiny settings, in fp32 so that results are the same on every machine to many digits."""
    options = {"dtype": torch.float32} | options
    model = str(model) if isinstance(model, Path) else model
    return moesmith.convert(
        preset, model, str(data), out, settings=[*tiny_settings(preset, settings), *settings], **options
    )


def arguments(preset: str, model: Path, data: Path, out: Path, settings: Sequence[str] = ()) -> list[str]:
    """The same as words of a command line."""
    words = ["convert", preset, "--model", str(model), "--data", str(data), "--out", str(out)]
    return [*words, *(word for setting in [*tiny_settings(preset, settings), *settings] for word in ("--set", setting))]


def weights(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights and of results that a run must reproduce bit for bit."""
    names = (
        "model/*.safetensors",
        "stock/*.safetensors",
        "stages/*/*.safetensors",
        "stages/*/*.csv",
        "stages/*/*.json",
    )
    found = {path for name in names for path in folder.glob(name)}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(found)
        if path.name not in ("manifest.json", "carving.json") and not path.parts[-2].startswith(".")
    }


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and sha256 of every file below a folder, lock and log apart."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.log")
    }
