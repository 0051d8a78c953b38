"""ToMoE's main result in small: learned experts beside one learned mask, random masks and static ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesmith.methods.tomoe.warm import expert_ratio
from moesmith.mixture.count import active_share
from moesmith.mixture.moe import shuffled
from moesmith.parent.sizes import Sizes
from moesmith.studies.bench import Bench, key_of, mean, randomised
from moesmith.studies.figures import by_layer, marks
from moesmith.studies.study import Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EIGHT = "wikipedia,c4,gsm8k,code_alpaca,pubmedqa,alpaca,race,arxiv"
SHORT = ("masks.window=512", "masks.batch=1", "masks.micro_batch=1")  # steps of 512 tokens
LEARNED: dict[str, tuple[str, str, list[str]]] = {
    "tomoe-50": ("tomoe-50", "tomoe-50", []),
    "one": ("one learned mask (N = 1)", "tomoe-50", ["carve.experts=1"]),
    "argmax": ("tomoe-50, routed without noise", "tomoe-50", ["masks.routing=argmax"]),
    "clusters": (
        "tomoe-50, started from clusters",
        "tomoe-50",
        ["carve.start={method: dive}", "affinity.method=scores", "router.start=lda"],
    ),
    "tomoe-plus": ("tomoe-plus", "tomoe-plus", []),
}
STATIC: dict[str, tuple[str, str]] = {
    "flap": ("static FLAP mask, bias", "flap-static"),
    "flap-refit": ("static mask, refitted", "flap-static-refit"),
    "start": ("the start of tomoe-plus, refitted", "dive-plus"),
}


@register
class Active50(Study):
    """Half of the block parameters active, all weights frozen."""

    name = "active-50"
    title = "ToMoE at half of the parameters"
    paper = "ToMoE, arXiv:2501.15316, tables 1 and 2"
    question = (
        "What do learned experts, their router and their number each bring at 50 % active parameters, and what does it"
        " take for experts to differ?"
    )
    expected = "Learned experts below one learned mask below static masks below random ones; shuffled routing hurts."
    settings = (
        f"domains.names=[{EIGHT}]",
        "evaluate.tokens=4096",
        "affinity.method=scores",
        "stage1.tokens=0",
        "stage2.tokens=0",
        *SHORT,
    )

    def conversions(self) -> list[Planned]:
        """Those that learn masks; the others are as wide as they leave."""
        return [Planned(name, recipe, settings, title) for name, (title, recipe, settings) in LEARNED.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Runs that learn masks, three that do not, and controls on their carvings."""
        rows: dict[str, Any] = {}
        layers: dict[str, Any] = {}
        blocks: Any = None

        def add(name: str, title: str, carving: Any, key: Any, **options: Any) -> None:
            share = 1.0 if carving is None else active_share(bench.parent, carving)
            rows[name] = {"title": title, "active": share}
            rows[name]["perplexity"] = bench.perplexity(name, blocks, carving, [name, key], **options)

        for one in self.conversions():
            run, name, title = bench.make(one), one.name, one.title
            if blocks is None:
                blocks = run.held_out
                add("parent", "dense parent", None, None)
            carving, key = run.carving(), key_of(run)
            add(name, title, carving, key)
            rows[name] |= {k: run.metrics("masks").get(k) for k in ("union", "steps", "tokens")}
            if name != "one":
                add(f"{name}-shuffled", f"{title}, shuffled routing", carving, key, around=shuffled)
            if run.has("refit"):
                add(f"{name}-bare", f"{title}, not refitted", run.carving("masks"), key)
            if name == "tomoe-50":
                add("random", "random masks of its widths", randomised(carving), key)
                layers = {"any expert": carving.union().tolist()}
                layers["widest expert"] = (carving.widths().amax(1) / carving.d_ff).tolist()
        ratio = expert_ratio(Sizes.of(bench.parent), run.settings["masks"]["budget"])
        for name, (title, recipe) in STATIC.items():
            run = bench.convert(name, recipe, [f"carve.ratio={ratio}"], title)
            add(name, title, run.carving(), key_of(run))
        return {"rows": rows, "layers": layers}

    def tables(self, found: Found) -> list[Table]:
        """Perplexity of every row."""
        rows, dense = found["rows"], mean(found["rows"]["parent"]["perplexity"])
        head = ["", "active", "perplexity", "× parent", "union of experts", "steps"]
        body = [
            [r["title"], f"{r['active']:.3f}", f"{mean(r['perplexity']):,.2f}",
             f"{mean(r['perplexity']) / dense:,.2f}", *(_or_none(r.get(k)) for k in ("union", "steps"))]
            for r in rows.values()
        ]  # fmt: skip
        return [Table("Held-out perplexity, geometric mean of domains", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """Rows; kept channels by layer."""
        rows = list(found["rows"].values())
        means = [mean(row["perplexity"]) for row in rows]
        return {
            "rows": marks("held-out perplexity (log scale)", [row["title"] for row in rows], {"": means}),
            "channels": by_layer("share of channels that tomoe-50 keeps", found["layers"]),
        }


def _or_none(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
