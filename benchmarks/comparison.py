"""The methods beside each other on one parent, one set of domains and one budget.

    python benchmarks/comparison.py --data ../shared/data --out runs/comparison

Needs a folder of domains with calibration and evaluation splits (sixteen names below). Every row is a conversion of its
own; stages that do not differ are taken over from the rows before. About 70 minutes on two cores. Writes
``comparison.json`` and ``comparison.md`` into ``--out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moesmith.conversion.convert import convert
from moesmith.evaluation.perplexity import geometric_mean, perplexities, perplexity
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json, write_text
from moesmith.mixture.moe import build, forced
from moesmith.parent.load import load_parent
from moesmith.run.folder import Run
from moesmith.run.recipe import applicable

DOMAINS = (
    "wikipedia c4 gsm8k mathqa mbpp code_alpaca pubmedqa medmcqa race hellaswag squad boolq alpaca consumer_contracts"
    " arxiv multilingual_wiki"
).split()
ROUTER_TOKENS, EXPERT_TOKENS = 40_960, 163_840  # 204,800 together

UNTRAINED = ["stage1.tokens=0", "stage2.tokens=0"]
TRAINED = [f"stage1.tokens={ROUTER_TOKENS}", f"stage2.tokens={EXPERT_TOKENS}"]
TRAINED_STATIC = ["stage1.tokens=0", f"stage2.tokens={ROUTER_TOKENS + EXPERT_TOKENS}"]

# row title, folder, preset, settings, the stage whose perplexity the row shows
ROWS: list[tuple[str, str, str, list[str]]] = [
    ("static FLAP mask, bias", "static", "flap-static", UNTRAINED),
    ("static mask, refit", "static-refit", "flap-static-refit", UNTRAINED),
    ("LLaMA-MoE start (random halves)", "llama-moe", "llama-moe-1of8", UNTRAINED),
    ("DIVE start, random router", "dive", "dive-1of8", UNTRAINED),
    ("DIVE start, LDA router", "dive-lda", "dive-1of8", [*UNTRAINED, "router.start=lda"]),
    ("dive-plus start", "plus", "dive-plus", UNTRAINED),
    ("DIVE as published, trained", "dive-trained", "dive-1of8", TRAINED),
    ("DIVE, LDA router, trained", "dive-lda-trained", "dive-1of8", [*TRAINED, "router.start=lda"]),
    ("dive-plus, trained", "plus-trained", "dive-plus", TRAINED),
    ("LLaMA-MoE, trained", "llama-moe-trained", "llama-moe-1of8", TRAINED),
    ("static FLAP mask, trained", "static-trained", "flap-static", TRAINED_STATIC),
]
ORACLES = {"DIVE start, right expert forced": "dive-lda", "dive-plus start, right expert forced": "plus"}


def oracle(run: Run, parent: Any) -> dict[str, float]:
    """Perplexity per domain with the expert of the domain's cluster forced for the whole text."""
    carving = run.carving("carve")
    model = build(parent, carving)
    found = {}
    for name, blocks in run.held_out.items():
        expert = next(e for e, names in enumerate(carving.provenance["clusters"]) if name in names)
        with forced(model, expert):
            found[name] = perplexity(model, blocks)
    return found


def main() -> None:
    """Run every row and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=6144, help="evaluation tokens per domain")
    options.add_argument("--only", nargs="*", help="folders of the rows to run")
    given = options.parse_args()
    parent = load_parent(given.model)
    common = [f"domains.names=[{','.join(DOMAINS)}]", f"evaluate.tokens={given.tokens}", "affinity.tokens=2048"]
    before = given.out / "comparison.json"  # a benchmark that was stopped continues
    known = read_json(before)["domains"] if before.is_file() else {}
    table: dict[str, dict[str, float]] = {}
    runs: dict[str, Run] = {}
    for title, folder, preset, settings in ROWS:
        if given.only and folder not in given.only:
            continue
        out = given.out / folder
        reuse = [run.folder for run in runs.values()]
        run = convert(
            preset,
            parent,
            given.data,
            out,
            settings=applicable(preset, common + settings, common + settings),
            budget="small",
            reuse=reuse,
        )
        runs[folder] = run
        stages = run.evaluation["stages"]
        table.setdefault("dense parent", stages["parent"]["domains"])
        table[title] = list(stages.values())[-1]["domains"]
        # a stock file carries a bias in a constant channel; untrained rows are measured with the exact one as well
        if run.settings["carve"]["compensation"] == "bias" and "trained" not in folder:
            exact = f"{title}, exact bias"
            model = build(parent, run.carving("carve"))
            table[exact] = known.get(exact) or perplexities(model, run.held_out, label=exact)
        for oracle_title, source in ORACLES.items():
            if source == folder:
                table[oracle_title] = known.get(oracle_title) or oracle(run, parent)
        write(given.out, known | table)
    print((given.out / "comparison.md").read_text())


def write(out: Path, table: dict[str, dict[str, float]]) -> None:
    """The table so far, as JSON and Markdown."""
    means = {title: geometric_mean(row.values()) for title, row in table.items()}
    write_json(out / "comparison.json", {"geometric_mean": means, "domains": table})
    names = list(next(iter(table.values())))
    lines = ["| | geometric mean | " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) + 1)]
    for title, row in table.items():
        cells = [f"{row[name]:.1f}" for name in names]
        lines.append(f"| {title} | {means[title]:.2f} | " + " | ".join(cells) + " |")
    write_text(out / "comparison.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
