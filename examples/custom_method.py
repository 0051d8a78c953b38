"""A method of your own: choose each expert's channels by your rule, then use everything else as it is.

    python examples/custom_method.py                     # under a minute on a CPU, nothing is downloaded

The rule here: the channels that score best on all text are common to every expert, and the rest of each expert's share
is drawn at random. A method is a function with the signature of ``moesmith.methods.Method``; registered under a name in
``METHODS`` it goes through the whole pipeline: compensation, router, training, export, evaluation. A recipe knows the
names of the package's own methods, so a name from outside comes with a recipe class that knows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from own_text import make_parent, write_domains
from torch import Tensor

import moesmith
from moesmith.files.artefact import read_json
from moesmith.methods import METHODS
from moesmith.methods.moments import Moments
from moesmith.methods.scores import channel_scores, kept_channels
from moesmith.run.recipe import CarveSection, Recipe

COMMON = 0.5  # share of an expert's channels that all experts have in common


def common_core(
    parent: moesmith.Parent, groups: Sequence[Moments], spec: CarveSection, seed: int
) -> list[list[Tensor]]:
    """Channels by layer, then expert: sorted int64 vectors, ``kept_channels`` of them each."""
    generator = torch.Generator().manual_seed(seed)
    kept = kept_channels(parent.F, spec.ratio)
    common = round(COMMON * kept)
    layers = []
    for scores_F in channel_scores(parent, groups[0], spec.score):  # every group is all text, see below
        order_F = scores_F.argsort(descending=True, stable=True)
        core, others = order_F[:common], order_F[common:]
        experts = []
        for _ in range(spec.experts):
            drawn = others[torch.randperm(len(others), generator=generator)[: kept - common]]
            experts.append(torch.cat([core, drawn]).sort().values)
        layers.append(experts)
    return layers


class CoreSection(CarveSection):
    """``carve`` with the new method's name. Only DIVE clusters domains: here each expert's group is all of them."""

    method: Literal["common-core"] = "common-core"  # type: ignore[assignment]


class CoreRecipe(Recipe):
    """A recipe that may name the new method."""

    carve: CoreSection = CoreSection()


def main() -> None:
    """Convert with the new method and with independent random halves, and compare before any training."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/example"))
    options.add_argument("--dtype", default="fp32", help="what models compute in: auto, bf16, fp32")
    options.add_argument("--device", default="auto", help="where: auto, cpu, cuda, mps, xpu")
    given = options.parse_args()
    out = given.out
    if not (out / "parent" / "config.json").is_file():
        write_domains(out / "text")
        make_parent(out / "parent", out / "text")
    parent = moesmith.load_parent(out / "parent", given.dtype, device=given.device)

    METHODS["common-core"] = common_core
    untrained = ["stage1.tokens=0", "stage2.tokens=0", "evaluate.window=256", "carve.compensation=refit"]
    random_halves = moesmith.load_recipe("llama-moe-1of8", "demo", untrained)
    values = random_halves.model_dump() | {"name": "common-core"}
    core = CoreRecipe.model_validate(values | {"carve": values["carve"] | {"method": "common-core"}})

    for recipe in (random_halves, core):
        run = moesmith.convert(recipe, parent, str(out / "text"), out / recipe.name)
        carving = moesmith.Carving.load(run.path("carve"))
        apart = ~torch.eye(carving.experts, dtype=torch.bool)
        stages = read_json(run.path("evaluate") / "evaluation.json")["stages"]
        print(
            f"{recipe.name}: overlap {carving.overlap()[:, apart].mean():.2f}, union {carving.union().mean():.2f},"
            f" perplexity {stages['parent']['geomean']:.2f} -> {stages['carve']['geomean']:.2f}"
        )


if __name__ == "__main__":
    main()
