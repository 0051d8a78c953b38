"""Where DIVE's routers send the domains: to the experts that were made for them?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesmith.evaluation.routing import Routing
from moesmith.run.folder import Run
from moesmith.studies.bench import Bench
from moesmith.studies.figures import by_layer, matrix
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = {"random": ("random router, trained as published", []), "lda": ("LDA router", ["router.start=lda"])}


@register
class RoutingDomains(Study):
    """Shares of every domain's tokens by expert, in the finished model on held-out text."""

    name = "routing-domains"
    title = "Do domains go to the experts that were made for them?"
    paper = "DIVE, arXiv:2506.09351, section 5"
    question = "Which experts does each domain use, in which layers, and is it the expert of its own cluster?"
    expected = (
        "The paper's figure: tokens of mathematics go to the mathematics expert, inference tasks to theirs, web text"
        " spreads over all."
    )
    settings = (
        f"domains.names=[{SIXTEEN}]", "affinity.tokens=2048", "evaluate.tokens=2048", "stage1.tokens=40960",
        "stage2.tokens=163840",
    )  # fmt: skip

    def conversions(self) -> list[Planned]:
        """One for each start of the routers."""
        return [Planned(name, "dive-1of8", settings, title) for name, (title, settings) in ROWS.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Two conversions; the evaluation has recorded their routing."""
        return {one.name: {"title": one.title} | routing_of(bench.make(one)) for one in self.conversions()}

    def tables(self, found: Found) -> list[Table]:
        """How often the own expert is chosen, and how much routing says of the domain."""
        head = ["", "own expert chosen", "by chance", "domain known from expert", "load, entropy / log E"]
        body = [
            [row["title"], f"{np.mean(row['own']):.1%}", f"{row['chance']:.1%}", f"{np.mean(row['information']):.1%}",
             f"{np.mean(row['balance']):.2f}"]
            for row in found.values()
        ]  # fmt: skip
        tables = [Table("Mean over layers", head, body)]
        for row in found.values():
            share = np.array(row["share"])
            most = [
                [name, f"E{home}", f"{share[d, home]:.1%}", f"E{int(share[d].argmax())}", f"{share[d].max():.1%}"]
                for d, (name, home) in enumerate(zip(row["domains"], row["home"], strict=True))
            ]
            head = ["domain", "its expert", "goes there", "most used", "goes there"]
            tables.append(Table(f"{row['title']}: all layers together", head, most))
        return tables

    def figures(self, found: Found) -> dict[str, Figure]:
        """Shares by domain and expert; by layer, how often the own expert is chosen."""
        figures = {}
        for name, row in found.items():
            order = np.argsort(row["home"], kind="stable").tolist()
            share = 100 * np.array(row["share"])[order]
            columns = [f"E{e}" for e in range(share.shape[1])]
            figures[f"shares-{name}"] = matrix(
                share, [f"{row['domains'][d]} (E{row['home'][d]})" for d in order], columns, "share of tokens, %",
                lambda x: f"{x:.0f}", xlabel="expert", ylabel="domain (its expert)",
            )  # fmt: skip
        own = {row["title"]: (100 * np.array(row["own"])).tolist() for row in found.values()}
        figures["own-by-layer"] = by_layer("tokens sent to the own expert, %", own)
        return figures


def routing_of(run: Run) -> dict[str, Any]:
    """Return what a run's evaluation says of routing by domain.

    Returns:
        ``domains`` and the ``home`` of each (the expert of its cluster); ``share`` (D, E) over all layers; by layer,
        ``own``: the share of tokens that go home, mean over domains; ``information``: mutual information of domain and
        expert over the domains' entropy; ``balance``: entropy of the load over log E.
    """
    routing = Routing.load(run.path("evaluate") / "routing.npz")
    home = {name: expert for expert, cluster in enumerate(run.clusters) for name in cluster}
    homes = [home[name] for name in routing.domains]
    layers = range(routing.counts_DLE.shape[1])
    own = [float(np.mean([routing.share(layer)[d, e] for d, e in enumerate(homes)])) for layer in layers]
    return {
        "domains": list(routing.domains),
        "home": homes,
        "share": routing.share().tolist(),
        "own": own,
        "chance": 1 / routing.experts,
        "information": [information(routing.counts_DLE[:, layer]) for layer in layers],
        "balance": routing.balance_L.tolist(),
    }


def information(counts: np.ndarray) -> float:
    """Compute mutual information of rows and columns of a table of counts, over the entropy of the rows: in [0, 1]."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    some = joint > 0
    mutual = float((joint[some] * np.log(joint[some] / (rows @ columns)[some])).sum())
    entropy = float(-(rows[rows > 0] * np.log(rows[rows > 0])).sum())
    return mutual / entropy if entropy else 0.0
