"""ToMoE and its controls at one budget and one number of steps.

    python benchmarks/tomoe.py --data ../shared/data --out runs/tomoe                        # about 90 minutes
    python benchmarks/tomoe.py --data ../shared/data --out runs/tomoe --study union          # R_U ablation at p = 0.4
    python benchmarks/tomoe.py --data ../shared/data --out runs/tomoe --study stability      # three seeds

Needs a folder of domains (eight names below) with ``wikitext2.test.jsonl`` in it. A benchmark that was stopped
continues with the same command. Writes ``tomoe.json`` and ``tomoe.md``, or a study's files, into ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from tomoe_figures import save, stability_figure, union_figure

from moesmith.conversion.convert import convert
from moesmith.evaluation.perplexity import geometric_mean, perplexities, wikitext2
from moesmith.files.artefact import read_json, write_json, write_text
from moesmith.methods.tomoe.warm import expert_ratio
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import active_share
from moesmith.mixture.moe import build, moe_blocks, shuffled
from moesmith.parent.load import Parent, load_parent
from moesmith.parent.sizes import Sizes
from moesmith.run.folder import Run
from moesmith.run.recipe import applicable

DOMAINS = "wikipedia c4 gsm8k code_alpaca pubmedqa alpaca race arxiv".split()
WIKITEXT = "wikitext2 (512)"

# row title, folder, preset, settings
ROWS: list[tuple[str, str, str, list[str]]] = [
    ("tomoe-50", "published", "tomoe-50", []),
    ("one learned mask (N = 1)", "one", "tomoe-50", ["carve.experts=1"]),
    ("tomoe-plus", "plus", "tomoe-plus", []),
    (
        "tomoe-50, masks start from clusters",
        "published-warm",
        "tomoe-50",
        ["carve.start={method: dive}", "router.start=lda"],
    ),
]


def randomised(carving: Carving, seed: int = 0) -> Carving:
    """Experts of the same widths with random channels; routers and attention stay."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(carving)
    for layer in other.layers:
        for expert in layer.routed:
            expert.channels = torch.randperm(carving.d_ff, generator=generator)[: expert.width].sort().values
    return other


class Bench:
    """The folder of a benchmark: runs in it, numbers measured so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, Path(given.out)
        self.parent: Parent = load_parent(given.model)
        self.runs = [path.parent for path in sorted(self.out.glob("*/run.json"))]
        self.short = [f"masks.tokens={given.study_tokens}", "masks.window=256"]

    def run(self, folder: str, preset: str, settings: list[str]) -> Run:
        """A conversion, re-using what earlier ones made."""
        common = [
            f"domains.names=[{','.join(DOMAINS)}]",
            f"evaluate.tokens={self.given.tokens}",
            "affinity.method=scores",
        ]
        settings = applicable(preset, [*common, *settings], [*common, *settings])
        run = convert(
            preset, self.parent, self.given.data, self.out / folder,
            settings=settings, budget="small", reuse=[x for x in self.runs if x.name != folder],
        )  # fmt: skip
        self.runs.append(run.folder)
        return run

    def text(self, model: Any, blocks: dict[str, Any], label: str) -> dict[str, float]:
        """Perplexity per domain, and of the start of WikiText-2."""
        found = perplexities(model, blocks, label=label)
        wiki = wikitext2(model, self.parent.tokenizer, Path(self.given.data), [512], tokens=self.given.wikitext)
        return found | {WIKITEXT: wiki[512]}


@contextmanager
def loads(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect how often each expert is chosen, per routed layer (E), while the model reads."""
    routers = [block.router for block in moe_blocks(model) if block.router.spec.experts > 1]
    load_LE = [torch.zeros(router.spec.experts) for router in routers]

    def hook(load_E: torch.Tensor) -> Any:
        def see(_module: Any, _args: Any, out: Any) -> None:  # what a hook returns would take the output's place
            load_E.add_(torch.bincount(out[2].flatten(), minlength=len(load_E)))

        return see

    handles = [r.register_forward_hook(hook(load_E)) for r, load_E in zip(routers, load_LE, strict=True)]
    try:
        yield load_LE
    finally:
        for handle in handles:
            handle.remove()


def balance(load_LE: list[torch.Tensor]) -> dict[str, float]:
    """Entropy of the load over log E, mean and least over layers; empty for a model without routers."""
    if not load_LE:
        return {}
    shares = [load_E / load_E.sum() for load_E in load_LE]
    found = [float(torch.special.entr(x).sum()) / math.log(len(x)) for x in shares]
    return {"load_entropy": round(sum(found) / len(found), 4), "load_entropy_least": round(min(found), 4)}


def table(bench: Bench) -> None:
    """Every row; rows measured before are taken from the file."""
    target = bench.out / "tomoe.json"
    rows: dict[str, dict[str, Any]] = read_json(target)["rows"] if target.is_file() else {}

    def measure(title: str, blocks: dict[str, Any], make: Callable[[], Any], facts: dict[str, Any]) -> None:
        if title not in rows:
            model, context = make()
            with context, loads(model) as load_LE:
                perplexity = bench.text(model, blocks, title)
            rows[title] = {**facts, **balance(load_LE), "perplexity": perplexity}
            write(bench.out, rows)

    for title, folder, preset, settings in ROWS:
        if bench.given.only and folder not in bench.given.only:
            continue
        run = bench.run(folder, preset, settings)
        blocks = run.held_out
        measure("dense parent", blocks, lambda: (bench.parent.model, nullcontext()), {"active": 1.0})
        last = "refit" if run.has("refit") else "masks"
        carving = run.carving(last)
        facts = {"active": active_share(bench.parent, carving)} | run.metrics("masks")
        measure(title, blocks, lambda c=carving: (build(bench.parent, c), nullcontext()), facts)
        if folder in ("published", "plus"):

            def mixed(c: Carving = carving) -> Any:
                model = build(bench.parent, c)
                return model, shuffled(model)

            measure(f"{title}, shuffled routing", blocks, mixed, facts)
        if last == "refit":
            learned = run.carving("masks")
            measure(f"{title}, not refitted", blocks, lambda c=learned: (build(bench.parent, c), nullcontext()), facts)
        if folder == "published":
            other = randomised(carving)
            measure(
                "random masks of its widths", blocks, lambda c=other: (build(bench.parent, c), nullcontext()), facts
            )
    ratio = expert_ratio(Sizes.of(bench.parent), 0.5)
    for title, folder, preset in (
        ("static FLAP mask, bias", "flap", "flap-static"),
        ("static mask, refit", "flap-refit", "flap-static-refit"),
        ("start of tomoe-plus, refitted, nothing learned", "start", "dive-plus"),
    ):
        if bench.given.only and folder not in bench.given.only:
            continue
        run = bench.run(folder, preset, ["stage1.tokens=0", "stage2.tokens=0", f"carve.ratio={ratio}"])
        carving = run.carving("carve")
        facts = {"active": active_share(bench.parent, carving)}
        measure(title, run.held_out, lambda c=carving: (build(bench.parent, c), nullcontext()), facts)
    print((bench.out / "tomoe.md").read_text())


def write(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The table so far, as JSON and Markdown."""
    means = {t: geometric_mean(v for n, v in row["perplexity"].items() if n != WIKITEXT) for t, row in rows.items()}
    write_json(out / "tomoe.json", {"geometric_mean": means, "rows": rows})
    names = list(next(iter(rows.values()))["perplexity"])
    lines = ["| | active | mean | " + " | ".join(names) + " |", "|---|---:|---:|" + "---:|" * len(names)]
    for title, row in rows.items():
        cells = [f"{row['perplexity'][name]:,.1f}" for name in names]
        lines.append(f"| {title} | {row['active']:.3f} | {means[title]:,.2f} | " + " | ".join(cells) + " |")
    write_text(out / "tomoe.md", "\n".join(lines) + "\n")


def union(bench: Bench) -> None:
    """The union term's weight at p = 0.4: 0 against the published one."""
    found, logs, by_layer = {}, {}, {}
    for weight in (0.0, 3.0):
        settings = ["masks.budget=0.4", f"masks.union_weight={weight}", *bench.short]
        run = bench.run(f"union-{weight:g}", "tomoe-50", settings)
        metrics, stages = run.metrics("masks"), run.metrics("evaluate")
        kept = {name: metrics[name] for name in ("active_share", "union", "width_ffn", "width_qk", "width_vo", "steps")}
        name = f"{weight:g}"
        found[name] = kept | {"perplexity": stages["masks"], "perplexity_parent": stages["parent"]}
        logs[name] = [json.loads(line) for line in (run.path("masks") / "log.jsonl").read_text().splitlines()]
        by_layer[name] = run.carving("masks").union().tolist()
    write_json(bench.out / "union.json", found)
    save(union_figure(logs, by_layer), bench.out / "union.png")
    print((bench.out / "union.json").read_text())


def stability(bench: Bench) -> None:
    """Mask IoU between seeds, experts matched layer by layer; beside it that of random masks of the same widths."""
    carvings, seeds = [], (42, 43, 44)
    for seed in seeds:
        run = bench.run(f"seed-{seed}", "tomoe-50", [f"seed={seed}", *bench.short])
        carvings.append(run.carving("masks"))
    pairs = list(itertools.combinations(range(len(carvings)), 2))
    learned = [matched(carvings[a], carvings[b]) for a, b in pairs]
    chance = [matched(randomised(carvings[a], 1), randomised(carvings[b], 2)) for a, b in pairs]
    found = {
        "seeds": [(seeds[a], seeds[b]) for a, b in pairs],
        "iou_by_layer": learned,
        "iou": [sum(x) / len(x) for x in learned],
        "iou_of_random_masks": [sum(x) / len(x) for x in chance],
    }
    write_json(bench.out / "stability.json", found)
    save(stability_figure(learned, chance, found["seeds"]), bench.out / "stability.png")
    print({name: found[name] for name in ("iou", "iou_of_random_masks")})


def matched(one: Carving, other: Carving) -> list[float]:
    """Mean IoU of the best one-to-one matching of experts, per layer."""
    means = []
    for index in range(len(one.layers)):
        a_EF, b_EF = one.mask(index).float(), other.mask(index).float()
        both_EE = a_EF @ b_EF.T
        iou_EE = both_EE / (a_EF.sum(-1)[:, None] + b_EF.sum(-1)[None] - both_EE)
        rows, columns = linear_sum_assignment(iou_EE.numpy(), maximize=True)
        means.append(float(iou_EE[rows, columns].mean()))
    return means


def main() -> None:
    """Run the table or a study."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=8192, help="evaluation tokens per domain")
    options.add_argument("--wikitext", type=int, default=32_768, help="tokens of WikiText-2's test text")
    options.add_argument("--study-tokens", type=int, default=76_800, help="training tokens of a study's runs")
    options.add_argument("--study", choices=["table", "union", "stability"], default="table")
    options.add_argument("--only", nargs="*", help="folders of the table's rows to run")
    given = options.parse_args()
    {"table": table, "union": union, "stability": stability}[given.study](Bench(given))


if __name__ == "__main__":
    main()
