"""How many experts: the same parameters, active and in total, cut into 4, 8 or 16."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from moesmith.comparison.facts import facts, parent_facts
from moesmith.comparison.measure import Ruler, right
from moesmith.comparison.spec import Measure
from moesmith.comparison.statistics import interval, mean
from moesmith.evaluation.harness import find_tasks
from moesmith.run.folder import Run
from moesmith.run.settings import Section
from moesmith.studies.bench import Bench, key_of
from moesmith.studies.figures import marks
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register
class Clusters(Study):
    """E experts of 2 F / E channels, a quarter of them active: E/4 of 4, 8, 16, …, so half of the channels for each."""

    name = "clusters"
    title = "How many experts?"
    paper = "DIVE, arXiv:2506.09351, appendix"
    question = (
        "At constant total and active parameters, are few wide experts better than many narrow ones, in LAMBADA and in"
        " accuracy on tasks?"
    )
    expected = "The paper found 1 of 8 half-width experts better than 2 of 8 quarter-width ones: fewer, wider ones."
    settings = (
        f"domains.names=[{SIXTEEN}]", "affinity.tokens=2048", "evaluate.tokens=2048", "stage1.tokens=40960",
        "stage2.tokens=163840",
    )  # fmt: skip

    class Options(Section):
        """Which numbers of experts, and how each is measured."""

        experts: list[Annotated[int, Field(ge=4, multiple_of=4)]] = Field(
            [4, 8, 16], min_length=1, description="numbers of experts, multiples of 4"
        )
        recipe: str = Field("dive-plus", description="what converts")
        lambada: int = Field(500, ge=0, description="passages of LAMBADA")
        tasks: list[str] = Field(
            ["arc_easy", "piqa", "sciq", "boolq", "hellaswag"], description="multiple-choice tasks"
        )
        limit: int = Field(200, ge=1, description="items of each")

    def conversions(self) -> list[Planned]:
        """One for each number of experts."""
        return [
            Planned(
                f"experts-{experts}",
                self.options.recipe,
                [f"carve.experts={experts}", f"carve.top_k={experts // 4}", f"carve.ratio={1 - 2 / experts}"],
                f"{experts // 4} of {experts} experts",
            )
            for experts in self.options.experts
        ]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """A conversion for every number, and the parent."""
        spec, rows, ruler = self.options, {}, None
        find_tasks(spec.tasks, Path(bench.series.data))  # one that is missing is missed now

        def measured(name: str, key: Any, model: Any) -> dict[str, Any]:
            assert ruler is not None
            return bench.once(name, [ruler.digest, key], lambda: dict(ruler.measure(model(), name)))

        for experts, one in zip(spec.experts, self.conversions(), strict=True):
            run = bench.make(one)
            if ruler is None:
                ruler = Ruler(bench.parent, bench.series.data, self.measures(run))
                rows["parent"] = {"title": "dense parent", "facts": parent_facts(bench.parent)}
                rows["parent"] |= measured("parent", None, lambda: bench.parent.model)
            rows[str(experts)] = {"title": f"{experts // 4} of {experts}", "facts": facts(run, bench.parent)}
            rows[str(experts)] |= measured(f"experts-{experts}", key_of(run), partial(run.load, bench.parent))
        return rows

    def measures(self, run: Run) -> Measure:
        """Return what is measured: the domains that a run evaluates, LAMBADA and tasks."""
        spec, section = self.options, run.settings["evaluate"]
        text = {"domains": {"domains": list(run.held_out)}, "tokens": section["tokens"], "window": section["window"]}
        return Measure(**text, lambada=spec.lambada, tasks=spec.tasks, limit=spec.limit)

    def tables(self, found: Found) -> list[Table]:
        """Perplexity, LAMBADA, accuracy with its interval."""
        head = ["", "FFN active", "total parameters", "perplexity", "LAMBADA", "LAMBADA acc", "tasks, acc"]
        body = []
        for row in found.values():
            answers = answers_of(row)
            estimate = interval(answers) if answers else None
            body.append([
                row["title"],
                f"{row['facts']['ffn_active']:.1%}",
                f"{row['facts']['parameters_total'] / 1e6:,.1f} M",
                f"{np.exp(mean(list(row['windows'].values()))):.2f}",
                f"{np.exp(mean([row['lambada']['loss']])):.1f}" if "lambada" in row else "–",
                f"{mean([row['lambada']['right']]):.1%}" if "lambada" in row else "–",
                f"{estimate.mean:.1%} ({estimate.low:.1%}–{estimate.high:.1%})" if estimate else "–",
            ])  # fmt: skip
        return [Table("Experts at constant parameters", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """Perplexity and LAMBADA by number of experts."""
        rows = list(found.values())
        series = {"domains": [float(np.exp(mean(list(row["windows"].values())))) for row in rows]}
        if "lambada" in rows[0]:
            series["LAMBADA"] = [float(np.exp(mean([row["lambada"]["loss"]]))) for row in rows]
        return {"experts": marks("perplexity (log scale)", [row["title"] for row in rows], series)}


def answers_of(row: Found) -> list[list[float]]:
    """Return every task's scores, item by item."""
    return [right(value) for name, value in row.items() if name.startswith("task ")]
