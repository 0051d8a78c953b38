"""Scoring of multiple-choice tasks: our reader beside lm-evaluation-harness's own, in one process.

    python benchmarks/scoring.py --data ../shared/data --items 20

Both answer the same prompts, made by the harness. Ours reads what the choices of a question share once, and computes
logits for the choices' tokens alone. Prints seconds, their ratio, and how far log-likelihoods are apart at most.
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


def timed(lm: Any, tasks: Any, limit: int) -> tuple[float, list[float]]:
    """Seconds, and the log-likelihoods of all choices."""
    started = time.perf_counter()
    found = harness.run(lm, tasks, limit)
    seconds = time.perf_counter() - started
    samples = [sample for part in found["samples"].values() for sample in part]
    return seconds, [likelihood for sample in samples for likelihood, _ in sample["filtered_resps"]]


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
    rows = []
    for name, parts in harness.find_tasks(given.tasks.split(","), given.data).items():
        limit = max(1, given.items // len(parts))
        ours.label = name
        with harness.silenced():
            seconds, found = timed(ours, {"tasks": harness.local_tasks(parts)}, limit)  # type: ignore[arg-type]
            before, known = timed(theirs, {"tasks": harness.local_tasks(parts)}, limit)  # type: ignore[arg-type]
        apart = max(abs(a - b) for a, b in zip(found, known, strict=True))
        rows.append(
            [name, len(found), round(seconds, 1), round(before, 1), round(before / seconds, 2), round(apart, 3)]
        )
    head = ["task", "choices", "ours, s", "the harness's own, s", "ratio", "log-likelihoods apart, nats"]
    show_table(f"{given.model} in {str(parent.dtype).removeprefix('torch.')}", head, rows)
    if given.out:
        lines = [dict(zip(head, row, strict=True)) for row in rows]
        write_json(given.out, {"model": given.model, "dtype": str(parent.dtype), "rows": lines})


if __name__ == "__main__":
    main()
