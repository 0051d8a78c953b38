"""ToMoE's masks outside the text that they were learned on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from moesmith.run.settings import Section
from moesmith.studies.bench import Bench, key_of, mean
from moesmith.studies.figures import marks
from moesmith.studies.study import Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register
class DomainTransfer(Study):
    """Masks learned on medicine, on other text, and on both; each measured on both."""

    name = "domain-transfer"
    title = "Do masks serve text that they were not learned on?"
    paper = "ToMoE, arXiv:2501.15316, domain experiments"
    question = "What do masks lose outside medicine when they are learned on medicine alone, and the other way round?"
    expected = "Learned on one kind they lose on the other; learned on both they are close to the best on each."
    settings = (
        "evaluate.tokens=1024", "affinity.method=scores", "carve.experts=3", "masks.window=512", "masks.batch=1",
        "masks.micro_batch=1", "masks.tokens=153600",
    )  # fmt: skip

    class Options(Section):
        """Two kinds of text."""

        medicine: list[str] = Field(["pubmedqa", "medmcqa", "clinical_dialogue"], description="the one kind's domains")
        others: list[str] = Field(["wikipedia", "c4", "alpaca"], description="the other's")
        recipe: str = Field("tomoe-plus", description="what learns masks")
        tokens: int = Field(4096, ge=512, description="held-out tokens of every domain")

    def conversions(self) -> list[Planned]:
        """One for each kind of text, and one for both."""
        return [
            Planned(name, self.options.recipe, [f"domains.names=[{','.join(names)}]"], f"learned on {name}")
            for name, names in self.kinds().items()
        ]

    def kinds(self) -> dict[str, list[str]]:
        """Return the domains of each kind of text."""
        one, other = self.options.medicine, self.options.others
        return {"medicine": one, "others": other, "both": [*one, *other]}

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Three conversions, measured on all domains."""
        kinds = self.kinds()
        blocks = bench.blocks(kinds.pop("both"), self.options.tokens)
        rows = {"parent": {"title": "dense parent", "perplexity": bench.perplexity("parent", blocks)}}
        for one in self.conversions():
            run, name, title = bench.make(one), one.name, one.title
            rows[name] = {"title": title, "perplexity": bench.perplexity(name, blocks, run.carving(), key_of(run))}
        return {"rows": rows, "kinds": kinds}

    def tables(self, found: Found) -> list[Table]:
        """Perplexity over the parent's on both kinds."""
        body = []
        for row in found["rows"].values():
            cells = [f"{of_kind(row, names):.2f}" for names in found["kinds"].values()]
            over = [f"{x:.2f}" for x in ratios(found, row)]
            body.append([row["title"], *(cell for pair in zip(cells, over, strict=True) for cell in pair)])
        return [Table("Held-out perplexity", ["", "medicine", "× parent", "others", "× parent"], body)]

    def figures(self, found: Found) -> dict[str, Figure]:
        """The same, drawn."""
        rows = [row for name, row in found["rows"].items() if name != "parent"]
        series = {f"read: {k}": [ratios(found, row)[i] for row in rows] for i, k in enumerate(found["kinds"])}
        return {"transfer": marks("perplexity ÷ parent's (log scale)", [row["title"] for row in rows], series)}


def of_kind(row: Found, names: list[str]) -> float:
    """Return the geometric mean of some domains' perplexities."""
    return mean({name: row["perplexity"][name] for name in names})


def ratios(found: Found, row: Found) -> list[float]:
    """Return a row's perplexity over the parent's, by kind of text."""
    return [of_kind(row, names) / of_kind(found["rows"]["parent"], names) for names in found["kinds"].values()]
