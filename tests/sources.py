"""What targets are tested on: a tiny parent, a random carving, some text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesmith.export.target import Options, Source, Target
from moesmith.files.outputs import new_file, new_folder
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent

IDS = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(1))


def tiny_source(family: str, run: Path = Path("run"), top_k: int = 2, dtype: Any = torch.float32, **of: Any) -> Source:
    """A family's source; ``of`` goes to the parent's config."""
    parent = tiny_parent(family, dtype=dtype, **of)
    return Source(parent, random_carving(parent, top_k=top_k), run, IDS)


def permuted(source: Source) -> Source:
    """The same with the experts of one layer in another order, and the router as it was."""
    layers = [
        replace(layer, routed=layer.routed[1:] + layer.routed[:1]) if index == 0 else layer
        for index, layer in enumerate(source.carving.layers)
    ]
    return replace(source, carving=replace(source.carving, layers=layers))


def export(target: Target, written: Source, source: Source, out: Path, *, overwrite: bool = False) -> None:
    """Write one source and prove it as another, as ``export_run`` does."""
    place = new_file if target.suffix else new_folder
    with place(out, overwrite=overwrite) as work:
        target.write(written, work, Options(quant="f32" if target.suffix else None))
        target.verify(source, work, IDS)
