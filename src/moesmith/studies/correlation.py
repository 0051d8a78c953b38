"""DIVE's first observation: masks found on related text serve better; and whether that can be predicted."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from scipy.stats import rankdata, spearmanr

from moesmith.files.artefact import read_text
from moesmith.methods.affinity import cluster, normalise, perplexity_similarity, predicted_losses, score_similarity
from moesmith.methods.scores import channel_scores, choose
from moesmith.methods.steps import moments_of
from moesmith.report.figures import affinity_figure
from moesmith.run.folder import Run
from moesmith.run.settings import Section
from moesmith.studies.bench import Bench
from moesmith.studies.figures import lines, matrix
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register
class Correlation(Study):
    """The matrix of n pruned models on n domains, and two shortcuts that do not run a pruned model."""

    name = "correlation"
    title = "Do masks serve the text that they were found on?"
    paper = "DIVE, arXiv:2506.09351, section 3"
    question = (
        "Does pruning on mathematics serve other mathematics better than pruning on web text does? Can the groups of"
        " domains be found without measuring n × n perplexities?"
    )
    expected = (
        "Related domains serve each other: a mask found on MathQA loses less of GSM8K than one found on C4. Variances"
        " of channels should predict it, since they choose the masks."
    )
    settings = (
        f"domains.names=[{SIXTEEN}]", "affinity.tokens=2048", "evaluate.tokens=512", "stage1.tokens=0",
        "stage2.tokens=0",
    )  # fmt: skip

    class Options(Section):
        """Whose text is served, and by which masks."""

        served: str = Field("gsm8k", description="the domain whose text is read")
        by: list[str] = Field(["mathqa", "c4"], description="domains whose masks are compared on it")

    def conversions(self) -> list[Planned]:
        """The one that measures the matrix."""
        return [Planned("dive", "dive-1of8")]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """One conversion by DIVE has the matrix; the shortcuts need its statistics alone."""
        run = bench.make(self.conversions()[0])
        names, measured = matrix_of(run)
        carve = run.settings["carve"]
        scores, chosen = (
            [channel_scores(bench.parent, moments_of(run, name), kind) for name in names]
            for kind in ("wifv", carve["score"])
        )
        kept = [choose(score, carve["ratio"], carve["selection"]) for score in chosen]
        predicted = predicted_losses(scores, kept)
        # what a domain's mask loses on another one's text beyond what that text's own mask loses
        above = [np.log(measured) - np.log(np.diag(measured)), predicted - np.diag(predicted)]
        other = ~np.eye(len(names), dtype=bool)
        wanted = perplexity_similarity(measured)
        shortcuts = {
            "variances": perplexity_similarity(np.exp(predicted)),
            "correlated scores": score_similarity(scores),
        }
        return {
            "names": names,
            "perplexity": measured.tolist(),
            "rank_correlation": float(spearmanr(above[0][other], above[1][other]).statistic),
            "index": {
                name: [rand_index(labels(wanted, k), labels(found, k)) for k in range(2, len(names))]
                for name, found in shortcuts.items()
            },
            "similarity": wanted.tolist(),
            "linkage": cluster(wanted, min(8, len(names)))[0].tolist(),
            "clusters": run.clusters,
            "served": self.options.served,
            "by": self.options.by,
        }

    def tables(self, found: Found) -> list[Table]:
        """Who serves whom; the shortcuts."""
        names, perplexity = found["names"], np.array(found["perplexity"])
        ranks = np.stack([rankdata(column) for column in perplexity.T], axis=1)
        own = np.diag(ranks)
        body = [
            ["domains whose own mask serves them best", f"{int((own == 1).sum())} of {len(names)}"],
            ["rank of the own mask, mean", f"{own.mean():.2f}"],
        ]
        if found["served"] in names:
            column = names.index(found["served"])
            body += [
                [f"{found['served']} with the mask of {name}", f"{perplexity[names.index(name), column]:.2f}, rank"
                 f" {ranks[names.index(name), column]:.0f}"]
                for name in dict.fromkeys((found["served"], *found["by"])) if name in names
            ]  # fmt: skip
        best = [
            [name, names[int(perplexity[:, j].argmin())], f"{perplexity[j, j]:.2f}", f"{perplexity[:, j].min():.2f}",
             f"{np.median(perplexity[:, j]):.2f}"]
            for j, name in enumerate(names)
        ]  # fmt: skip
        index = [
            [name, f"{np.mean(values):.2f}", f"{values[6]:.2f}" if len(values) > 6 else "–"]
            for name, values in found["index"].items()
        ]
        title = f"Shortcuts (rank correlation of predicted and measured losses: {found['rank_correlation']:.2f})"
        return [
            Table("Who serves whom", ["", ""], body),
            Table("The best mask for each text", ["text", "mask", "own mask", "best mask", "median mask"], best),
            Table(title, ["clusters from", "adjusted Rand index, mean", "at 8 clusters"], index),
        ]

    def figures(self, found: Found) -> dict[str, Figure]:
        """The normalised matrix, the correlation in blocks, agreement by number of clusters."""
        names = found["names"]
        served = normalise(np.array(found["perplexity"]))
        counts = list(range(2, len(names)))
        return {
            "matrix": matrix(
                served, names, names, "best perplexity ÷ this mask's", lambda x: f"{x:.2f}".replace("0.", "."),
                xlabel="text that is read", ylabel="text that the mask was found on",
            ),
            "affinity": affinity_figure(found["similarity"], names, found["linkage"], found["clusters"]),
            "agreement": lines(
                "clusters", "adjusted Rand index with measured clusters",
                {name: (counts, values) for name, values in found["index"].items()},
            ),
        }  # fmt: skip


def matrix_of(run: Run) -> tuple[list[str], np.ndarray]:
    """Read the perplexities of a run's step *affinity*: names, and (n, n), masks by texts."""
    rows = list(csv.reader(read_text(run.path("affinity") / "matrix.csv").splitlines()))
    return rows[0][1:], np.array([[float(x) for x in row[1:]] for row in rows[1:]])


def labels(similarity: np.ndarray, count: int) -> list[int]:
    """Return the cluster of every domain."""
    found = [0] * len(similarity)
    for number, group in enumerate(cluster(similarity, count)[1]):
        for index in group:
            found[index] = number
    return found


def rand_index(one: Sequence[int], other: Sequence[int]) -> float:
    """Compute the adjusted Rand index of two partitions: 1 for the same, 0 for chance (Hubert and Arabie, 1985)."""
    table = np.zeros((max(one) + 1, max(other) + 1))
    np.add.at(table, (np.array(one), np.array(other)), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    same, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / pairs(np.array([len(one)]))
    most = (rows + columns) / 2
    return 1.0 if most == chance else (same - chance) / (most - chance)
