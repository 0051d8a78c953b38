"""ToMoE's attention: masked for all tokens, by token, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesmith.studies.active_50 import EIGHT, SHORT
from moesmith.studies.bench import Bench, stages_of
from moesmith.studies.figures import by_layer, marks
from moesmith.studies.study import Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = {
    "hybrid": "hybrid: Q/K the same for all tokens, V/O by token (published)",
    "dynamic": "dynamic: Q/K by token too",
    "none": "none: attention stays whole",
}


@register
class DynamicAttention(Study):
    """Three runs of tomoe-50 that differ in which attention masks are learned."""

    name = "dynamic-attention"
    title = "Which attention masks should be learned?"
    paper = "ToMoE, arXiv:2501.15316, hybrid attention"
    question = "Is a static Q/K mask as good as one by token, and what does pruning attention cost at equal budget?"
    expected = "The paper chose hybrid because it is as good as dynamic and can be stored smaller."
    settings = (f"domains.names=[{EIGHT}]", "evaluate.tokens=2048", "masks.tokens=153600", *SHORT)

    def conversions(self) -> list[Planned]:
        """One for each choice of masks."""
        return [Planned(name, "tomoe-50", [f"masks.attention={name}"], title) for name, title in ROWS.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Three conversions."""
        found = {}
        for one in self.conversions():
            run, name, title = bench.make(one), one.name, one.title
            metrics, carving = run.metrics("masks"), run.carving("masks")
            found[name] = {"title": title, "stages": stages_of(run), "active": metrics["active_share"]}
            found[name] |= {key: metrics.get(key) for key in ("width_ffn", "width_qk", "width_vo")}
            found[name]["layers"] = carving.widths().amax(1).tolist()
        return found

    def tables(self, found: Found) -> list[Table]:
        """Perplexity and widths."""
        head = ["attention masks", "perplexity", "parent", "active", "FFN channels", "Q/K width", "V/O width"]
        body = [
            [r["title"], f"{r['stages']['masks']:,.2f}", f"{r['stages']['parent']:.2f}", f"{r['active']:.3f}",
             *("whole" if r[key] is None else f"{r[key]:.1f}" for key in ("width_ffn", "width_qk", "width_vo"))]
            for r in found.values()
        ]  # fmt: skip
        return [Table("At one budget; widths are those of the widest expert, mean over layers", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """Perplexity; FFN widths by layer."""
        titles = [row["title"] for row in found.values()]
        means = [row["stages"]["masks"] for row in found.values()]
        return {
            "perplexity": marks("held-out perplexity (log scale)", titles, {"": means}),
            "widths": by_layer("channels of the widest expert", {n: row["layers"] for n, row in found.items()}),
        }
