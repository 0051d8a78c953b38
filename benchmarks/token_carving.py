"""Token carving beside a static mask with the same text and training: experts, active share, distillation.

    python benchmarks/token_carving.py --data ../shared/data --out runs/tokens --only token-8 static

Every row is a conversion of its own on the sixteen sets of ``comparison.py``; stages that do not differ are taken over
from the rows before, and the same command goes on where it was stopped. Besides the sets that rows are carved on, seven
are measured that no row has seen. An hour per row on two cores with bf16 units. Writes ``tokens.json`` and
``tokens.md`` into ``--out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from comparison import DOMAINS

from moesmith.conversion.convert import convert
from moesmith.data.sampling import evaluation_blocks
from moesmith.data.text import load_domains
from moesmith.evaluation.perplexity import geometric_mean, perplexities
from moesmith.files.artefact import read_json, write_json, write_text
from moesmith.parent.load import load_parent
from moesmith.run.folder import Run, finished_of

LEFT_OUT = "sciq openbookqa cnn_dailymail legalbench tinystories samsum piqa".split()
DISTILLED = 983_040  # tokens

# row title, folder, settings on top of the preset
ROWS: list[tuple[str, str, list[str]]] = [
    ("static", "static", ["carve.experts=1"]),
    ("8 experts", "token-8", []),
    ("8 experts, earlier losses left alone", "alone-8", ["carve.repair=false"]),
    ("8 experts, refitted only", "refitted-8", ["carve.passes=0"]),
    ("16 experts", "token-16", ["carve.experts=16"]),
    ("32 experts", "token-32", ["carve.experts=32"]),
    ("static, 75 % active", "static-75", ["carve.experts=1", "carve.ratio=0.25"]),
    ("8 experts, 75 % active", "token-8-75", ["carve.ratio=0.25"]),
    ("static, distilled", "static-distilled", ["carve.experts=1", f"stage2.tokens={DISTILLED}"]),
    ("8 experts, distilled", "token-8-distilled", [f"stage2.tokens={DISTILLED}"]),
]


def main() -> None:
    """Run the rows and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=65_536, help="calibration tokens per domain, at most")
    options.add_argument("--only", nargs="*", help="folders of the rows to run")
    options.add_argument("--set", nargs="*", default=[], help="further settings for every row")
    given = options.parse_args()
    parent = load_parent(given.model)
    unseen = {
        domain.name: evaluation_blocks(domain, parent.tokenizer, 6144, 512).blocks
        for domain in load_domains(given.data, LEFT_OUT)
    }
    common = [f"domains.names=[{','.join(DOMAINS)}]", f"domains.tokens={given.tokens}", "evaluate.tokens=6144"]
    table = read_json(given.out / "tokens.json") if (given.out / "tokens.json").is_file() else {}
    if "dense parent" not in table:
        table["dense parent"] = {"unseen": perplexities(parent.decoder, unseen, label="dense parent")}
    runs: list[Run] = []
    for title, folder, settings in ROWS:
        if given.only and folder not in given.only:
            continue
        out = given.out / folder
        runs.append(
            convert(
                "token", parent, given.data, out,
                settings=[*common, *given.set, *settings], reuse=[run.folder for run in runs],
            )
        )  # fmt: skip
        stages = runs[-1].evaluation["stages"]
        table["dense parent"]["domains"] = stages["parent"]["domains"]
        row = {name: stage["domains"] for name, stage in stages.items() if name != "parent"}
        carve = runs[-1].metrics("carve")
        known = table.get(title, {}).get("unseen")
        table[title] = {
            "stages": row,
            "domains": row[finished_of(row)],
            "unseen": known or perplexities(runs[-1].load(parent), unseen, label=f"{title}, unseen"),
            "seconds": runs[-1].manifests()["carve"]["seconds"],
            "error": carve["error"],
            "parameters": {key: value for key, value in carve.items() if key.startswith("parameters")},
        }
        write(given.out, table)
    print((given.out / "tokens.md").read_text())


def write(out: Path, table: dict) -> None:
    """The table so far, as JSON and Markdown."""
    write_json(out / "tokens.json", table)
    parent = table["dense parent"]
    lines = ["| | perplexity | × parent | unseen sets, × parent | active | total | carve |", "|---|" + "---:|" * 6]
    base, new = geometric_mean(parent["domains"].values()), geometric_mean(parent["unseen"].values())
    lines.append(f"| dense parent | {base:.2f} | 1.000 | 1.000 | | | |")
    for title, row in table.items():
        if title == "dense parent":
            continue
        seen, unseen = (geometric_mean(row[part].values()) for part in ("domains", "unseen"))
        active, total = (row["parameters"][f"parameters_{part}"] / 1e6 for part in ("active", "total"))
        cells = [f"{seen:.2f}", f"{seen / base:.3f}", f"{unseen / new:.3f}", f"{active:.0f}M", f"{total:.0f}M"]
        lines.append(f"| {title} | {' | '.join(cells)} | {row['seconds']:.0f} s |")
    write_text(out / "tokens.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
