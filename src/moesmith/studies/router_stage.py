"""DIVE's stage 1: what training routers alone is worth, from either start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesmith.report.figures import running_mean
from moesmith.run.folder import Run
from moesmith.studies.bench import Bench, stages_of
from moesmith.studies.figures import lines, marks
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register
from moesmith.training.log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRAIGHT = ["stage1.gate=sparse", "stage1.router_gradient=straight-through"]
ROWS: dict[str, tuple[str, list[str]]] = {
    "random": ("random router, no stage 1", ["stage1.tokens=0"]),
    "dense": ("random router, stage 1 as published", []),
    "straight": ("random router, stage 1 straight through", STRAIGHT),
    "lda": ("LDA router, no stage 1", ["router.start=lda", "stage1.tokens=0"]),
    "lda-dense": ("LDA router, stage 1 as published", ["router.start=lda"]),
}


@register
class RouterStage(Study):
    """The same experts and the same stage 2 behind five routers, beside a static mask."""

    name = "router-stage"
    title = "What is DIVE's router stage worth?"
    paper = "DIVE, arXiv:2506.09351, section 4"
    question = (
        "How good must routers be before the experts are trained? Stage 1 as published (all experts run, dense gate),"
        " straight through one expert, a start by linear discriminants, or no stage at all."
    )
    expected = (
        "With a random router and no stage 1 the mixture is worse than one static mask; the published stage brings it"
        " below, as the paper's order says; a discriminant needs no stage."
    )
    settings = (
        f"domains.names=[{SIXTEEN}]", "affinity.tokens=2048", "evaluate.tokens=2048", "stage1.tokens=204800",
        "stage2.tokens=204800",
    )  # fmt: skip

    def conversions(self) -> list[Planned]:
        """The mixtures; how long the mask is trained follows from them."""
        return [Planned(name, "dive-1of8", settings, title) for name, (title, settings) in ROWS.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Five conversions by DIVE, one static mask trained on as many tokens as the longest of them."""
        found: dict[str, Any] = {}
        for one in self.conversions():
            run, name, title = bench.make(one), one.name, one.title
            found[name] = {"title": title, "stages": stages_of(run), "losses": losses_of(run, "router")}
            found[name]["tokens"] = sum(run.metrics(step).get("tokens", 0) for step in ("router", "experts"))
        most = max(row["tokens"] for row in found.values())
        run = bench.convert("static", "flap-static", [f"stage2.tokens={most}"], "static FLAP mask")
        found["static"] = {"title": "static FLAP mask", "stages": stages_of(run), "losses": [], "tokens": most}
        return found

    def tables(self, found: Found) -> list[Table]:
        """Perplexity after every stage."""
        parent = next(iter(found.values()))["stages"]["parent"]
        head = ["", "carved", "routers trained", "experts trained", "× parent", "training tokens"]
        body = [["dense parent", "", "", f"{parent:.2f}", "1.00", "0"]]
        for row in found.values():
            stages = row["stages"]
            cells = [f"{stages[name]:.2f}" if name in stages else "–" for name in ("carve", "router", "experts")]
            last = list(stages.values())[-1]
            body.append([row["title"], *cells, f"{last / parent:.2f}", f"{row['tokens']:,}"])
        return [Table("Held-out perplexity, geometric mean of domains", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """Perplexity by stage; the loss of stage 1."""
        names = {"carve": "carved", "router": "routers trained", "experts": "experts trained"}
        series = {title: [row["stages"].get(step) for row in found.values()] for step, title in names.items()}
        curves = {
            row["title"]: (range(len(row["losses"])), running_mean(np.array(row["losses"]), 2).tolist())
            for row in found.values()
            if row["losses"]
        }
        figures = {"stages": marks("held-out perplexity (log scale)", [r["title"] for r in found.values()], series)}
        if curves:
            figures["stage-1"] = lines("step of stage 1", "loss, nats per token", curves, log="y")
        return figures


def losses_of(run: Run, step: str) -> list[float]:
    """Return the training loss of every step of a training stage; empty if there was none."""
    path = run.path(step) / "log.jsonl"
    if not path.is_file():
        return []
    return [step["loss"] for step in read_log(path)]
