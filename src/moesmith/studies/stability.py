"""Do several seeds of ToMoE find the same experts?"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from moesmith.mixture.carving import Carving
from moesmith.run.settings import Section
from moesmith.studies.active_50 import EIGHT
from moesmith.studies.bench import Bench, randomised, stages_of
from moesmith.studies.figures import by_layer
from moesmith.studies.study import Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register
class Stability(Study):
    """Experts of every two seeds, matched one to one."""

    name = "stability"
    title = "Do three seeds find the same experts?"
    paper = "ToMoE, arXiv:2501.15316; not asked there"
    question = "How much do the channels of matched experts share between seeds, beside random masks as wide?"
    expected = "More than chance, if masks follow the model and not the noise."
    settings = (
        f"domains.names=[{EIGHT}]", "evaluate.tokens=1024", "masks.tokens=76800", "masks.window=256", "masks.batch=1",
        "masks.micro_batch=1",
    )  # fmt: skip

    class Options(Section):
        """Which seeds."""

        seeds: list[int] = Field([42, 43, 44], min_length=2, description="seeds to compare")
        recipe: str = Field("tomoe-50", description="what learns masks")

    def conversions(self) -> list[Planned]:
        """One for each seed."""
        return [Planned(f"seed-{s}", self.options.recipe, [f"seed={s}"], f"seed {s}") for s in self.options.seeds]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """A conversion for every seed; every pair."""
        carvings, stages = [], []
        for run in map(bench.make, self.conversions()):
            carvings.append(run.carving("masks"))
            stages.append(stages_of(run))
        pairs = list(itertools.combinations(range(len(carvings)), 2))
        chance = [matched(randomised(carvings[a], 1), randomised(carvings[b], 2)) for a, b in pairs]
        return {
            "pairs": [f"{self.options.seeds[a]} and {self.options.seeds[b]}" for a, b in pairs],
            "learned": [matched(carvings[a], carvings[b]) for a, b in pairs],
            "chance": chance,
            "perplexity": {str(seed): s["masks"] for seed, s in zip(self.options.seeds, stages, strict=True)},
        }

    def tables(self, found: Found) -> list[Table]:
        """Mean over experts and layers."""
        body = [
            [pair, f"{np.mean(mine):.3f}", f"{np.mean(chance):.3f}"]
            for pair, mine, chance in zip(found["pairs"], found["learned"], found["chance"], strict=True)
        ]
        seeds = [[seed, f"{value:,.2f}"] for seed, value in found["perplexity"].items()]
        return [
            Table("Intersection over union of matched experts", ["seeds", "learned", "random masks as wide"], body),
            Table("Held-out perplexity", ["seed", "perplexity"], seeds),
        ]

    def figures(self, found: Found) -> dict[str, Figure]:
        """By layer, beside chance."""
        curves = {f"seeds {pair}": mine for pair, mine in zip(found["pairs"], found["learned"], strict=True)}
        curves["random masks as wide"] = np.mean(found["chance"], axis=0).tolist()
        return {"overlap": by_layer("intersection over union", curves)}


def matched(one: Carving, other: Carving) -> list[float]:
    """Compute the mean IoU of the best one-to-one matching of experts, by layer."""
    means = []
    for index in range(len(one.layers)):
        a_EF, b_EF = one.mask(index).float(), other.mask(index).float()
        both_EE = a_EF @ b_EF.T
        iou_EE = both_EE / (a_EF.sum(-1)[:, None] + b_EF.sum(-1)[None] - both_EE)
        rows, columns = linear_sum_assignment(iou_EE.numpy(), maximize=True)
        means.append(float(iou_EE[rows, columns].mean()))
    return means
