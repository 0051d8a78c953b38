"""ToMoE's union term: what it does as published, and computed from masks without noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesmith.report.figures import running_mean
from moesmith.studies.active_50 import EIGHT
from moesmith.studies.bench import Bench, stages_of
from moesmith.studies.figures import by_layer, lines
from moesmith.studies.study import Found, Planned, Study, Table, register
from moesmith.training.log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS: dict[str, tuple[str, list[str]]] = {
    "none": ("no union term", ["masks.union_weight=0"]),
    "published": ("as published", []),
    "plain": ("of masks without noise", ["masks.union=plain"]),
}
SMOOTH = 7  # steps on both sides


@register
class Union(Study):
    """Three runs at p = 0.4 that differ in the union term alone."""

    name = "union"
    title = "What does ToMoE's union term do?"
    paper = "ToMoE, arXiv:2501.15316, equation of R_U and its ablation"
    question = (
        "The term asks that every channel be kept by some expert. As published it counts sampled masks, whose noise"
        " alone satisfies it. Does it part the experts, and does a term on masks without noise?"
    )
    expected = "The paper: about one perplexity point at p = 0.4. We expect more of the term without noise."
    settings = (
        f"domains.names=[{EIGHT}]", "evaluate.tokens=1024", "masks.budget=0.4", "masks.tokens=76800",
        "masks.window=256", "masks.batch=1", "masks.micro_batch=1",
    )  # fmt: skip

    def conversions(self) -> list[Planned]:
        """One for each form of the term."""
        return [Planned(name, "tomoe-50", settings, title) for name, (title, settings) in ROWS.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Three conversions."""
        found = {}
        for one in self.conversions():
            run, name, title = bench.make(one), one.name, one.title
            steps = read_log(run.path("masks") / "log.jsonl")
            found[name] = {"title": title, "stages": stages_of(run), "layers": run.carving("masks").union().tolist()}
            found[name] |= {key: [step[key] for step in steps] for key in ("step", "union", "kl")}
            metrics = run.metrics("masks")
            found[name] |= {"finished": metrics["union"], "active": metrics["active_share"]}
        return found

    def tables(self, found: Found) -> list[Table]:
        """Unions and perplexity."""
        head = ["union term", "union of sampled masks", "of the finished ones", "active", "perplexity", "parent"]
        body = [
            [row["title"], f"{np.mean(row['union'][-10:]):.3f}", f"{row['finished']:.3f}", f"{row['active']:.3f}",
             f"{row['stages']['masks']:,.2f}", f"{row['stages']['parent']:.2f}"]
            for row in found.values()
        ]  # fmt: skip
        return [Table("After training", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """Unions over training and by layer; KL."""

        def curves(key: str) -> dict[str, Any]:
            return {
                row["title"]: (row["step"], running_mean(np.array(row[key]), SMOOTH).tolist()) for row in found.values()
            }

        return {
            "union": lines("training step", "union of sampled masks", curves("union")),
            "kl": lines("training step", "KL to the parent, nats per token", curves("kl")),
            "layers": by_layer("union of finished masks", {row["title"]: row["layers"] for row in found.values()}),
        }
