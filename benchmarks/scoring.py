"""Benchmark tasks: our reader and writer beside lm-evaluation-harness's own, in one process.

    python benchmarks/scoring.py --data ../shared/data --items 20
    python benchmarks/scoring.py --data ../shared/data --items 64 --tasks humaneval,mbpp

Both answer the same prompts, made by the harness. Our reader reads what the choices of a question share once, and
computes logits for the choices' tokens alone. Our writer takes the next prompt where an answer ends, 16 at a time, as
many as the other has in a batch. Prints seconds, their ratio, and how far log-likelihoods are apart at most, or how
many texts are the same. What models write is not run.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from moesmith.console import show_table
from moesmith.evaluation import harness
from moesmith.files.write import write_json
from moesmith.parent.load import load_parent


def timed(lm: Any, tasks: Any, limit: int) -> tuple[float, list[Any]]:
    """Seconds, and the log-likelihoods of all choices, or the texts."""
    started = time.perf_counter()
    found = harness.run(lm, tasks, limit)
    seconds = time.perf_counter() - started
    samples = [sample for part in found["samples"].values() for sample in part]
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    return seconds, [answer if isinstance(answer, str) else answer[0] for answer in answers]


def main() -> None:
    """Time every task both ways."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--tasks", default="hellaswag,mmlu,arc_challenge,winogrande,arc_easy")
    options.add_argument("--items", type=int, default=20)
    options.add_argument("--dtype", default=None)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    parent = load_parent(given.model, given.dtype)
    model, tokenizer = parent.model, parent.tokenizer
    ours = harness.language_model(model, tokenizer, 8)
    theirs = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=8,
        softmax_dtype=torch.float32,
    )  # fmt: skip
    harness._pass_at_1 = lambda *_: {"pass@1": 0.0}  # nothing is run
    rows = []
    for name, parts in harness.find_tasks(given.tasks.split(","), given.data, run_code=True).items():
        limit = max(1, given.items // len(parts))
        ours.label = name
        written = any(getattr(part, "template", {}).get("output_type") == "generate_until" for part in parts)
        theirs.batch_size_per_gpu = harness.WRITERS if written else 8
        with harness.silenced():
            seconds, found = timed(ours, {"tasks": harness.local_tasks(parts)}, limit)  # type: ignore[arg-type]
            before, known = timed(theirs, {"tasks": harness.local_tasks(parts)}, limit)  # type: ignore[arg-type]
        if isinstance(found[0], str):
            agree = f"{sum(a == b for a, b in zip(found, known, strict=True))} of {len(found)} the same"
        else:
            agree = f"{max(abs(a - b) for a, b in zip(found, known, strict=True)):.3f} nats apart"
        rows.append([name, len(found), round(seconds, 1), round(before, 1), round(before / seconds, 2), agree])
    head = ["task", "answers", "ours, s", "the harness's own, s", "ratio", "agreement"]
    show_table(f"{given.model} in {str(parent.dtype).removeprefix('torch.')}", head, rows)
    if given.out:
        lines = [dict(zip(head, row, strict=True)) for row in rows]
        write_json(given.out, {"model": given.model, "dtype": str(parent.dtype), "rows": lines})


if __name__ == "__main__":
    main()
