"""Parent family × method × target × runtime: how far the runtime is from the source, or why there is no such export.

    python benchmarks/matrix.py --out docs/matrix.md --json benchmarks/results/matrix.json \\
        --transformers clean/bin/python --vllm vllm/bin/python --llama-cpp .venv/bin/python

Parents are random and small, one per family of ``moesmith.testing.parents``, with heads as wide as vLLM asks. A cell
is one run of ``clients.py``'s question in the runtime's own interpreter, against the source in memory; a runtime whose
interpreter is not given is left out of the table. Cells already in the JSON file are kept, so a matrix that was stopped
continues; ``--again`` measures them anew. The exit status is 1 where a cell failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from clients import Question, check

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.export.stock.write import stock_reference
from moesmith.export.target import Options, Source
from moesmith.export.targets import TARGETS
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json, write_text
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.testing.carvings import random_carving
from moesmith.testing.masks import harvested
from moesmith.testing.parents import FAMILIES, tiny_parent

HERE = Path(__file__).parent

# what each target's files are read by here; SGLang has no build for a CPU without its kernels, so its folder is
# checked by config and weights, and its numbers in transformers
RUNTIMES = {"hf": ["transformers", "vllm"], "sglang": ["transformers"], "gguf": ["llama.cpp"]}
RUNTIMES |= {"native": ["transformers", "vllm"]}
WIDE = {"hidden_size": 128, "intermediate_size": 128}  # heads of 32, the narrowest that vLLM's CPU kernels take
OWN_HEADS = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32}  # wider than hidden_size / heads
# longer than the questions: SGLang's and llama.cpp's files stop at the window, since neither has one
WINDOW = {"sliding_window": 64}
METHODS = ("dive top-1", "dive top-2", "dive bias", "tomoe")
Cell = dict[str, Any]


def carving_of(method: str, parent: Parent) -> Carving:
    """Experts of a kind that the method of this name leaves behind, random but for their form."""
    if method == "tomoe":  # subsets of one network, of any width, and attention masked by token
        return harvested(parent)
    kept, top_k = (parent.F // 4, 2) if method == "dive top-2" else (parent.F // 2, 1)
    if method != "dive bias":
        return random_carving(parent, top_k=top_k, kept=kept)
    carving = random_carving(parent, top_k=top_k, kept=kept, compensation="bias")
    for layer in carving.layers:  # what stands in for a bias in a stock expert
        layer.constant_D = torch.randn(parent.D) / parent.D
    return carving


def cells(families: list[str], methods: list[str], pythons: dict[str, Path], known: list[Cell]) -> Iterator[Cell]:
    """Every cell in order, those in ``known`` as they are."""
    before = {key(cell): cell for cell in known}
    for family in families:
        shape: dict[str, Any] = OWN_HEADS if "head_dim" in FAMILIES[family][1] else WIDE
        if "sliding_window" in FAMILIES[family][1]:
            shape = shape | WINDOW
        parent = tiny_parent(family, **shape)
        for method in methods:
            source = Source(parent, carving_of(method, parent), Path(), torch.randint(300, (2, 24)))
            for target in TARGETS.values():
                wanted = [name for name in RUNTIMES.get(target.name, []) if name in pythons]
                missing = [name for name in wanted if (family, method, target.name, name) not in before]
                fresh = {cell["runtime"]: cell for cell in _measured(family, method, source, target, missing, pythons)}
                for name in wanted:
                    yield fresh.get(name) or before[family, method, target.name, name]


def key(cell: Cell) -> tuple[str, str, str, str]:
    """What tells one cell from another."""
    return cell["family"], cell["method"], cell["target"], cell["runtime"]


def _measured(
    family: str, method: str, source: Source, target: Any, runtimes: list[str], pythons: dict[str, Path]
) -> Iterator[Cell]:
    if not runtimes:
        return
    place = {"family": family, "method": method, "target": target.name}
    if (reason := target.explain(source)) is not None:
        yield from (place | {"runtime": name, "refused": reason} for name in runtimes)
        return
    options = Options(quant="f32") if "quant" in target.takes else Options()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"model{target.suffix}"
        try:
            target.write(source, out, options)
        except MoesmithError as error:
            yield from (place | {"runtime": name, "ok": False, "error": str(error)} for name in runtimes)
            return
        native = target.name == NATIVE
        reference = (build if native else stock_reference)(source.parent, source.carving)
        question = Question(reference, source.parent.tokenizer)
        for name in runtimes:
            say(f"{family}, {method}: {target.name} in {name}")
            yield place | {"runtime": name} | check(name, out, question, pythons[name])


def markdown(found: list[Cell]) -> str:
    """The table as a page."""
    columns = list(dict.fromkeys((cell["target"], cell["runtime"]) for cell in found))
    versions = sorted({cell["version"] for cell in found if "version" in cell})
    lines = [
        "# What runs where",
        "",
        "Made by `python benchmarks/matrix.py`; every cell was measured. Parents are random and small, weights and",
        "arithmetic fp32. A cell says by how many nats the log-probabilities of the 20 most likely tokens differ from",
        "the source's at the median position of 48 and, in brackets, at the worst; then how many greedy tokens are the",
        "same. At a worst position rounding may tip a router between two nearly equal experts. Mistral's window is",
        "longer than these questions, so no cell says what a runtime does beyond a window.",
        "",
        f"Runtimes: {', '.join(versions)}.",
        "",
        "| parent | experts | " + " | ".join(f"{target} in {runtime}" for target, runtime in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    reasons: dict[str, int] = {}
    for family, method in dict.fromkeys((cell["family"], cell["method"]) for cell in found):
        row = {(c["target"], c["runtime"]): c for c in found if (c["family"], c["method"]) == (family, method)}
        words = [_words(row[column], reasons) if column in row else "" for column in columns]
        lines.append(f"| {family} | {method} | " + " | ".join(words) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


def _words(cell: Cell, reasons: dict[str, int]) -> str:
    reason = cell.get("refused") or cell.get("error")
    if reason is None:
        typical, worst = cell["logprob_typical_difference"], cell["logprob_difference"]
        return f"{'' if cell['ok'] else '**wrong** '}{typical:.0e} ({worst:.0e}), {cell['greedy_match']}"
    number = reasons.setdefault(reason.replace("|", "/"), len(reasons) + 1)
    return f"{'refused' if 'refused' in cell else '**failed**'} ({number})"


def main() -> None:
    """Measure what is missing, keep every cell as it comes, and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="the page")
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    options.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options.add_argument("--again", action="store_true", help="measure known cells anew")
    for flag in ("--transformers", "--vllm", "--llama-cpp"):
        options.add_argument(flag, type=Path, help="interpreter that has it")
    given = options.parse_args()
    named = {"transformers": given.transformers, "vllm": given.vllm, "llama.cpp": given.llama_cpp}
    pythons = {name: path for name, path in named.items() if path is not None}
    known = read_json(given.json)["cells"] if given.json.is_file() and not given.again else []
    found = {key(cell): cell for cell in known}
    for cell in cells(given.families, given.methods, pythons, known):
        found[key(cell)] = cell
        write_json(given.json, {"cells": list(found.values())})
    order = {(f, m): n for n, (f, m) in enumerate((f, m) for f in FAMILIES for m in METHODS)}
    everything = sorted(found.values(), key=lambda c: order[c["family"], c["method"]])
    write_text(given.out, markdown(everything))
    bad = [key(cell) for cell in everything if not cell.get("ok", "refused" in cell)]
    for place in bad:
        say(f"failed: {' / '.join(place)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
