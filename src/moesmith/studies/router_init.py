"""Where DIVE's routers begin, and what a seed decides."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from moesmith.evaluation.routing import Routing
from moesmith.run.folder import Run
from moesmith.run.settings import Section
from moesmith.studies.bench import Bench, stages_of
from moesmith.studies.figures import marks
from moesmith.studies.routing_domains import routing_of
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STARTS: dict[str, tuple[str, list[str]]] = {
    "random": ("random, noise as published", []),
    "wide": ("random, ten times the noise", ["router.noise=0.005"]),
    "lda": ("linear discriminants", ["router.start=lda"]),
}


@register
class RouterInit(Study):
    """Three starts, several seeds, the same stage 1; no stage 2, so that only routers differ."""

    name = "router-init"
    title = "What do a router's start and a seed decide?"
    paper = "DIVE, arXiv:2506.09351, section 4"
    question = "How certain, how balanced and how right are routers after stage 1, by start and by seed?"
    expected = "Random starts end in different routers of similar quality; discriminants agree with each other."
    settings = (
        f"domains.names=[{SIXTEEN}]", "domains.tokens=6144", "affinity.method=scores", "evaluate.tokens=1024",
        "stage1.tokens=40960", "stage2.tokens=0",
    )  # fmt: skip

    class Options(Section):
        """Which seeds."""

        seeds: list[int] = Field([1, 2, 3], min_length=1, description="seeds of every start")

    def conversions(self) -> list[Planned]:
        """One for each start and seed."""
        return [
            Planned(f"{name}-{seed}", "dive-1of8", [*settings, f"seed={seed}"], f"{title}, seed {seed}")
            for name, (title, settings) in STARTS.items()
            for seed in self.options.seeds
        ]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """A conversion for every start and seed, as routers begin and after stage 1."""
        found: dict[str, Any] = {}
        planned = {one.name: one for one in self.conversions()}
        for name, (title, _) in STARTS.items():
            rows, runs = [], []
            for seed in self.options.seeds:
                run = bench.make(planned[f"{name}-{seed}"])
                rows.append({"seed": seed, "stages": stages_of(run), "entropy": entropy_of(run)} | routing_of(run))
                runs.append(run)
            found[name] = {"title": title, "rows": rows, "agreement": agreement(runs)}
        return found

    def tables(self, found: Found) -> list[Table]:
        """Means over seeds and their standard deviations."""
        head = [
            "start", "perplexity before", "after", "own expert chosen", "entropy of a token / log E",
            "load, entropy / log E", "seeds agree on",
        ]  # fmt: skip
        body = []
        for start in found.values():
            rows = start["rows"]
            columns = [
                [row["stages"]["carve"] for row in rows],
                [row["stages"].get("router", row["stages"]["carve"]) for row in rows],
                [100 * np.mean(row["own"]) for row in rows],
                [np.mean(row["entropy"]) for row in rows],
                [np.mean(row["balance"]) for row in rows],
            ]
            agrees = start["agreement"]
            last = "–" if agrees is None else f"{100 * agrees:.0f} %"
            body.append([start["title"], *map(_spread, columns), last])
        return [Table("Mean ± standard deviation over seeds", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """Perplexity of every seed before and after stage 1."""
        rows = [(start["title"], row) for start in found.values() for row in start["rows"]]
        titles = [f"{title}, seed {row['seed']}" for title, row in rows]
        before = [row["stages"]["carve"] for _, row in rows]
        after = [row["stages"].get("router") for _, row in rows]
        return {"seeds": marks("held-out perplexity (log scale)", titles, {"at the start": before, "trained": after})}


def _spread(values: list[Any]) -> str:
    found = f"{np.mean(values):.2f}"
    return found if len(values) < 2 else f"{found} ± {np.std(values, ddof=1):.2f}"


def entropy_of(run: Run) -> list[float]:
    """Return the mean entropy of a token's router probabilities over log E, by layer."""
    return list(map(float, Routing.load(run.path("evaluate") / "routing.npz").entropy_L))


def agreement(runs: list[Run]) -> float | None:
    """Compute the share of tokens and layers on which two runs choose an expert for the same domains.

    Experts are matched by their clusters; the sample that an evaluation keeps of every domain is compared. ``None``
    where the clusters of two runs differ, or there is one run.
    """
    clusters = [sorted(sorted(cluster) for cluster in run.clusters) for run in runs]
    if len(runs) < 2 or any(each != clusters[0] for each in clusters):
        return None
    chosen = []
    for run in runs:
        routing = Routing.load(run.path("evaluate") / "routing.npz")
        names = np.array([clusters[0].index(sorted(cluster)) for cluster in run.clusters])
        chosen.append(np.concatenate([names[sample.ids_LTK[..., 0]].ravel() for sample in routing.samples]))
    return float(np.mean([(a == b).mean() for a, b in itertools.combinations(chosen, 2)]))
