"""The finished model beside its dense parent: evaluation tables and continuations of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from moesmith.artefact import read_json
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.evaluate import domain_perplexities, geometric_mean, lambada, wikitext2
from moesmith.harness import find_tasks, run_tasks
from moesmith.parents import Parent, load_parent, tokenizer_digest
from moesmith.stages.finish import load_finished
from moesmith.text import load_domains, read_jsonl
from moesmith.vocabulary import refuse_ids, rows_of


def header_of(folder: Path) -> dict[str, Any]:
    """``run.json`` of a finished run.

    Raises:
        MoesmithError: the folder is no run, or the run is not finished.
    """
    header: dict[str, Any] = read_json(folder / "run.json")
    if not (folder / "model" / "config.json").is_file():
        raise MoesmithError(f"{folder} has no finished model", "Run the same 'moesmith convert' again to finish it.")
    return header


def parent_of(folder: Path) -> Parent:
    """A finished run's dense parent, in the run's dtype.

    Raises:
        MoesmithError: the run is not finished, or its parent is not the one it was made from.
    """
    inputs = header_of(folder)["inputs"]
    parent = load_parent(inputs["model"], getattr(torch, inputs["dtype"]))
    if parent.digest != inputs["model_digest"]:
        raise MoesmithError(
            f"{inputs['model']} is not the parent {folder} was made from (weights {parent.digest},"
            f" not {inputs['model_digest']})",
            "Put the original weights back, or convert again.",
        )
    known = inputs.get("tokenizer_digest")  # runs of moesmith's first days do not say
    if known is not None and tokenizer_digest(parent.tokenizer) != known:
        raise MoesmithError(
            f"the tokenizer of {inputs['model']} is not the one {folder} was made with",
            "Put the original tokenizer back, or convert again.",
        )
    return parent


def models_of(folder: Path) -> tuple[Parent, PreTrainedModel]:
    """A run's dense parent and its finished model.

    Raises:
        MoesmithError: as :func:`parent_of`, or the finished model is damaged.
    """
    parent = parent_of(folder)
    return parent, cast(PreTrainedModel, load_finished(folder / "model", parent))  # a parent loaded whole


def compare(folder: Path, data: str | None, tasks: Sequence[str], limit: int | None, tokens: int) -> dict[str, Any]:
    """Evaluate parent and MoE on the same text and items.

    Args:
        folder: a finished run.
        data: data source; the run's own when ``None``.
        tasks: ``domains``, ``wikitext2``, ``lambada``, or tasks of ``harness.find_tasks``.
        limit: items per task.
        tokens: evaluation tokens per domain, and of WikiText-2.

    Returns:
        ``{"results": [{"task", "metric", "parent", "moe"}, ...], ...}``, JSON-able.

    Raises:
        MoesmithError: as :func:`models_of` and, before any model is loaded, an unknown task, or a file that is missing
            or malformed.
    """
    if not tasks:
        raise MoesmithError("no tasks are named", "Give --tasks, such as domains,wikitext2,lambada,arc_easy.")
    header = header_of(folder)
    source = data or header["inputs"]["data"]
    local = Path(source) if Path(source).is_dir() else None
    for task in sorted({"lambada", "wikitext2"} & set(tasks)):
        if local is None:
            raise MoesmithError(f"{task} needs a file of that name", "Give --data a folder that holds it.")
        read_jsonl(local / f"{task}.test.jsonl")  # a file that will not do is refused now
    names = header["recipe"]["domains"]["names"] if data is None else None
    domains = load_domains(source, names) if "domains" in tasks else []
    rest = [task for task in tasks if task not in ("domains", "wikitext2", "lambada")]
    benchmarks = find_tasks(rest, local) if rest else {}
    parent, moe = models_of(folder)

    def measure(model: PreTrainedModel) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        if domains:
            window = header["recipe"]["evaluate"]["window"]
            values = domain_perplexities(model, parent.tokenizer, domains, tokens, window)
            found |= {(f"domain {name}", "perplexity"): value for name, value in values.items()}
            found["domains, geometric mean", "perplexity"] = geometric_mean(values.values())
        if "wikitext2" in tasks and local:
            for length, value in wikitext2(model, parent.tokenizer, local, tokens=tokens).items():
                found[f"wikitext2, window {length}", "perplexity"] = value
        if "lambada" in tasks and local:
            scores = lambada(model, parent.tokenizer, local, limit)
            found |= {("lambada", key): scores[key] for key in ("perplexity", "acc")}
        if benchmarks:
            for task, metrics in run_tasks(model, parent.tokenizer, benchmarks, limit).items():
                found |= {(task, metric): value for metric, value in metrics.items()}
        return found

    say("dense parent")
    dense = measure(parent.model)
    say("MoE")
    sparse = measure(moe)
    rows = [{"task": t, "metric": m, "parent": v, "moe": sparse[t, m]} for (t, m), v in dense.items()]
    return {"run": str(folder), "data": source, "limit": limit, "tokens": tokens, "results": rows}


def continuations(folder: Path, prompt: str, tokens: int, chat: bool) -> dict[str, str]:
    """Greedy continuations of a prompt by the dense parent and the MoE."""
    parent, moe = models_of(folder)
    tokenizer = parent.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise MoesmithError("the parent has no chat template", "Leave --chat out.")
        turns = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(parent.device)
    if inputs["input_ids"].shape[1] == 0:
        raise MoesmithError("the prompt is empty", "Give some text to continue.")
    refuse_ids(inputs["input_ids"], rows_of(parent.model), "the prompt")

    def go_on(model: PreTrainedModel) -> str:
        generate: Any = model.generate
        ids = generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return {"dense parent": go_on(parent.model), "MoE": go_on(moe)}
