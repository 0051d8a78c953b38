"""The same recipes on parents of several sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moesmith.run.settings import Section
from moesmith.studies.bench import Bench, stages_of
from moesmith.studies.figures import lines
from moesmith.studies.study import SIXTEEN, Found, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPES: dict[str, tuple[str, str]] = {
    "static": ("static mask, refitted", "flap-static-refit"),
    "dive-plus": ("dive-plus", "dive-plus"),
    "token": ("token carving", "token"),
    "tomoe-plus": ("tomoe-plus", "tomoe-plus"),
}


@register
class Scale(Study):
    """What half of the channels costs, by the parent's size."""

    name = "scale"
    title = "Do larger parents lose less?"
    paper = "ToMoE, arXiv:2501.15316, and DIVE, arXiv:2506.09351: tables by model"
    question = "At the same active share and the same text, does a larger parent keep more of its quality?"
    expected = "Yes: the papers' ratios fall with size, and larger networks have more channels to spare."
    settings = (
        f"domains.names=[{SIXTEEN}]", "domains.tokens=4096", "affinity.method=scores", "evaluate.tokens=1024",
        "masks.window=512", "masks.batch=1", "masks.micro_batch=1", "masks.tokens=76800", "stage1.tokens=0",
        "stage2.tokens=0",
    )  # fmt: skip

    class Options(Section):
        """Further parents, and which recipes."""

        models: list[str] = Field([], description="further parents, beside --model")
        recipes: list[Literal["static", "dive-plus", "token", "tomoe-plus"]] = Field(
            ["static", "dive-plus", "token", "tomoe-plus"], description="of those known here"
        )

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Every recipe on every parent."""
        found: dict[str, Any] = {}
        for index, other in enumerate([bench, *map(bench.beside, self.options.models)]):
            parent = other.parent
            size = sum(p.numel() for p in parent.model.parameters())
            row: dict[str, Any] = {"parameters": size, "name": str(parent.source), "recipes": {}}
            for name in self.options.recipes:
                title, recipe = RECIPES[name]
                run = other.convert(f"{name}-{index}", recipe, [], f"{title}, {size / 1e6:,.0f} M")
                row["recipes"][name] = stages_of(run)
            found[str(index)] = row
        return found

    def tables(self, found: Found) -> list[Table]:
        """Perplexity over the parent's."""
        rows = list(found.values())
        names = list(rows[0]["recipes"])
        head = ["parent", "parameters", "its perplexity", *(RECIPES[name][0] for name in names)]
        body = []
        for row in rows:
            dense = row["recipes"][names[0]]["parent"]
            cells = [f"{last(row, name) / dense:.2f} ×" for name in names]
            body.append(
                [row["name"].rstrip("/").split("/")[-1], f"{row['parameters'] / 1e6:,.0f} M", f"{dense:.2f}", *cells]
            )
        return [Table("Perplexity ÷ the parent's", head, body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """The same over size."""
        rows = sorted(found.values(), key=lambda row: row["parameters"])
        sizes = [row["parameters"] / 1e6 for row in rows]
        series = {
            RECIPES[name][0]: (sizes, [last(row, name) / row["recipes"][name]["parent"] for row in rows])
            for name in rows[0]["recipes"]
        }
        return {"scale": lines("parameters of the parent, millions", "perplexity ÷ parent's", series, log="x")}


def last(row: Found, name: str) -> float:
    """Return the perplexity of a finished model."""
    return float(list(row["recipes"][name].values())[-1])
