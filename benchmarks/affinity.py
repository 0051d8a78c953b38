"""How well domains are clustered without measuring n × n perplexities.

    python benchmarks/affinity.py --data ../shared/data --out runs/affinity

Measures DIVE's perplexity matrix on the sixteen sets of ``comparison.py`` (a conversion, about a quarter of an hour on
two cores), then clusters the same domains by what channel variances predict and by correlated channel scores. Prints
the rank correlation of the predicted matrix with the measured one, and for every number of clusters the adjusted Rand
index of both shortcuts with the measured clusters: 1 for the same, 0 for chance. Writes ``affinity.json`` into
``--out``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from comparison import DOMAINS
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score

from moesmith.console import show_table
from moesmith.conversion.convert import convert
from moesmith.files.artefact import write_json
from moesmith.methods.affinity import cluster, perplexity_similarity, predicted_losses, score_similarity
from moesmith.methods.scores import channel_scores, choose
from moesmith.methods.steps import moments_of
from moesmith.parent.load import load_parent


def labels(similarity: np.ndarray, count: int) -> list[int]:
    """The cluster of every domain."""
    _, groups = cluster(similarity, count)
    found = [0] * len(similarity)
    for number, group in enumerate(groups):
        for index in group:
            found[index] = number
    return found


def main() -> None:
    """Measure once, predict twice, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--model", default="smollm2-135m")
    given = options.parse_args()
    parent = load_parent(given.model)
    settings = [f"domains.names=[{','.join(DOMAINS)}]", "affinity.tokens=2048", "evaluate.tokens=512"]
    settings += ["stage1.tokens=0", "stage2.tokens=0"]
    run = convert("dive-1of8", parent, given.data, given.out / "run", settings=settings, budget="small")
    rows = list(csv.reader((run.path("affinity") / "matrix.csv").read_text(encoding="utf-8").splitlines()))
    names, measured = rows[0][1:], np.array([[float(x) for x in row[1:]] for row in rows[1:]])
    scores = [channel_scores(parent, moments_of(run, name), "wifv") for name in names]
    predicted = predicted_losses(scores, [choose(score, 0.5) for score in scores])
    # what a domain loses on another one's text beyond what it loses on its own
    above = [np.log(measured) - np.log(np.diag(measured)), predicted - np.diag(predicted)]
    other = ~np.eye(len(names), dtype=bool)
    rank = float(spearmanr(above[0][other], above[1][other]).statistic)
    kinds = {
        "moments": perplexity_similarity(np.exp(predicted)),
        "scores": score_similarity(scores),
    }
    wanted = perplexity_similarity(measured)
    table = {
        count: {
            name: round(float(adjusted_rand_score(labels(wanted, count), labels(kind, count))), 3)
            for name, kind in kinds.items()
        }
        for count in range(2, len(names))
    }
    print(f"rank correlation of the predicted matrix with the measured one: {rank:.3f}")
    show_table("adjusted Rand index", ["clusters", *kinds], [[str(k), *map(str, v.values())] for k, v in table.items()])
    write_json(given.out / "affinity.json", {"domains": names, "rank": round(rank, 3), "index": table})


if __name__ == "__main__":
    main()
