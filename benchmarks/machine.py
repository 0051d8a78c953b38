"""Does a machine get what it has? Plain forward passes in each dtype beside moesmith's work in the one it chooses.

    python benchmarks/machine.py --label "bf16 units" --out benchmarks/results/machine.json      # three minutes

oneDNN, ATen and MKL can be kept from what a processor has, to see one without bf16 units:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/machine.py --label "AVX2" --out ...

Every ratio is a median over rounds in which the sides take turns. ``--out`` keeps other labels' results and prints one
table of all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from speed import Step, blocks, grouped_lora, peft_lora, void

from moesmith.bench.measure import machine
from moesmith.calibration.moments import channel_moments
from moesmith.evaluation.perplexity import perplexity
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.parent.compute import short
from moesmith.parent.load import Parent, load_parent
from moesmith.run.versions import versions

LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
DTYPES = (torch.bfloat16, torch.float32)
# what is compared: ours, and the plain work beside it
PAIRS = {"moments": "forward", "perplexity": "forward with logits", "stage-2 step": "PEFT's LoRA step"}
BOUNDS = {"moments": 0.75, "perplexity": 0.85, "stage-2 step": 0.85}


def steps(parent: Parent, tokens: int) -> dict[str, Step]:
    """Work on so many tokens, by name."""
    windows, sequences = blocks(parent, tokens, 256), blocks(parent, tokens, 512)

    @torch.inference_mode()
    def forward() -> None:
        for ids in windows.split(8):
            parent.model.base_model(input_ids=ids, use_cache=False)

    @torch.inference_mode()
    def logits() -> None:
        for ids in sequences.split(8):
            parent.model(input_ids=ids, use_cache=False)

    return {
        "forward": forward,
        "forward with logits": logits,
        "PEFT's LoRA step": peft_lora(parent, sequences),
        "moments": lambda: void(channel_moments(parent, windows)),
        "perplexity": lambda: void(perplexity(parent.model, sequences)),
        "stage-2 step": grouped_lora(parent, sequences),
    }


def measure(model: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of everything, and the ratios that count."""
    found: dict[str, Any] = {"machine": machine(), "limits": {n: os.environ[n] for n in LIMITS if n in os.environ}}
    chosen = load_parent(model)
    found |= {"chosen": short(chosen.dtype), "why": str(chosen.choice), "tokens_per_second": {}, "ratios": {}}
    parents = {dtype: chosen if dtype == chosen.dtype else load_parent(model, dtype) for dtype in DTYPES}
    work = {dtype: steps(parent, tokens) for dtype, parent in parents.items()}
    plain = {f"{name}, {short(dtype)}": work[dtype][name] for name in PAIRS.values() for dtype in DTYPES}
    ours = {name: work[chosen.dtype][name] for name in PAIRS}
    times: dict[str, list[float]] = {name: [] for name in (*plain, *ours)}
    for turn in range(rounds + 1):
        for name, step in (plain | ours).items():
            started = time.perf_counter()
            step()
            if turn:  # the first turn makes kernels
                times[name].append(time.perf_counter() - started)
            print(f"  {turn}/{rounds} {name}: {tokens / (time.perf_counter() - started):,.0f} tokens/s", flush=True)
    found["tokens_per_second"] = {name: round(tokens / statistics.median(t), 1) for name, t in times.items()}
    for name, other in PAIRS.items():
        best = min((f"{other}, {short(dtype)}" for dtype in DTYPES), key=lambda n: statistics.median(times[n]))
        ratios = sorted(a / b for a, b in zip(times[best], times[name], strict=True))
        found["ratios"][name] = {"of": best, "ratio": round(statistics.median(ratios), 3), "at_least": BOUNDS[name],
                                 "ratio_min": round(ratios[0], 3), "ratio_max": round(ratios[-1], 3)}  # fmt: skip
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per kind of machine."""
    head = ["machine", "forward bf16", "fp32", "chosen"]
    head += [f"{name} : {other}" for name, other in PAIRS.items()]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|" + "---:|" * len(PAIRS)]
    for label, found in results.items():
        rates, cells = found["tokens_per_second"], [label]
        cells += [f"{rates[f'forward, {short(dtype)}']:,.0f}" for dtype in DTYPES] + [found["chosen"]]
        for name in PAIRS:
            ratio = found["ratios"][name]
            cells.append(f"{rates[name]:,.0f} ({ratio['ratio']:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure this kind of machine and print the table of all."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--label", required=True, help="what kind of machine this is")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    known = read_json(given.out)["results"] if given.out.is_file() else {}
    found = measure(given.model, given.tokens, given.rounds)
    results = known | {given.label: found | {"tokens": given.tokens, "rounds": given.rounds} | versions()}
    write_json(given.out, {"results": results})
    print(table(results))


if __name__ == "__main__":
    main()
