"""Compare the finished model with its dense parent: evaluation tables and continuations of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from moesmith.arguments import path_text, several, takes_paths
from moesmith.console import say
from moesmith.data.overlap import warnings
from moesmith.data.text import Domain, load_domains, overlaps, read_records, records_file
from moesmith.errors import MoesmithError
from moesmith.evaluation.answers import go_on
from moesmith.evaluation.harness import find_tasks, run_tasks
from moesmith.evaluation.health import health
from moesmith.evaluation.likelihoods import lambada
from moesmith.evaluation.perplexity import domain_perplexities, geometric_mean, wikitext2
from moesmith.evaluation.prompt import asked_ids
from moesmith.evaluation.sinks import sinks
from moesmith.parent.compute import AUTO, Device, DType, long_name
from moesmith.parent.load import Parent
from moesmith.parent.vocabulary import rows_of
from moesmith.run.folder import open_run


@takes_paths("folder")
def models_of(folder: Path, dtype: DType = AUTO, device: Device = AUTO) -> tuple[Parent, PreTrainedModel]:
    """Load a run's dense parent and its finished model, with the same dtype and device.

    Raises:
        MoesmithError: as ``Run.parent``, or the finished model is damaged.
    """
    run = open_run(folder)
    parent = run.parent(dtype, device)
    say(f"computes in {parent.choice}")
    return parent, cast(PreTrainedModel, run.load(parent))  # a parent loaded whole


@takes_paths("folder")
def compare(
    folder: Path,
    data: str | Path | None = None,
    tasks: str | Sequence[str] = ("domains",),
    limit: int | None = None,
    tokens: int = 16_384,
    dtype: DType = AUTO,
    device: Device = AUTO,
    run_code: bool = False,
) -> dict[str, Any]:
    """Evaluate parent and MoE on the same text and items.

    Args:
        folder: a finished run, as text or a path.
        data: data source; the run's own when ``None``.
        tasks: ``domains``, ``wikitext2``, ``lambada``, ``health``, ``sinks``, or tasks of ``harness.find_tasks``.
        limit: items per task.
        tokens: evaluation tokens per domain, and of WikiText-2.
        dtype: what both compute in; the fastest here for ``auto``.
        device: where both compute.
        run_code: allow tasks that run what the models write (:func:`moesmith.evaluation.sandbox.passes`).

    Returns:
        ``{"results": [{"task", "metric", "parent", "moe"}, ...], "dtype", "device", ...}``, JSON-able.

    Raises:
        MoesmithError: as :func:`models_of`; and, before any model is loaded, a task is unknown, or a file is missing or
            malformed.
    """
    tasks, data = several("tasks", tasks), None if data is None else path_text("data", data)
    if not tasks:
        raise MoesmithError("no tasks are named", "Give --tasks, such as domains,wikitext2,lambada,arc_easy.")
    run = open_run(folder)
    run.check_finished()
    header = run.header
    source = header["inputs"]["data"] if data is None else data
    if not source.strip():
        raise MoesmithError("no data source is named", "Give a folder, or leave it out for the run's own.")
    local = Path(source) if Path(source).is_dir() else None
    for task in sorted({"lambada", "wikitext2"} & set(tasks)):
        if local is None:
            raise MoesmithError(f"{task} needs a file of that name", "Give --data a folder that holds it.")
        read_records(records_file(local, f"{task}.test"))  # an unusable file is refused now
    names = header["recipe"]["domains"]["names"] if data is None else None
    domains = load_domains(source, names) if {"domains", "sinks"} & set(tasks) else []
    overlap = _overlap(domains, header, data is None) if domains else {}
    rest = [task for task in tasks if task not in ("domains", "wikitext2", "lambada", "health", "sinks")]
    benchmarks = find_tasks(rest, local, run_code) if rest else {}
    parent, moe = models_of(folder, dtype, device)

    def measure(model: PreTrainedModel) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        if "domains" in tasks:
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
        if "health" in tasks:
            found |= {("answers", key): value for key, value in health(model, parent.tokenizer).items()}
        if "sinks" in tasks:
            found |= {("first tokens", key): value for key, value in sinks(model, parent.tokenizer, domains).items()}
        if benchmarks:
            for task, metrics in run_tasks(model, parent.tokenizer, benchmarks, limit).items():
                found |= {(task, metric): value for metric, value in metrics.items()}
        return found

    say("dense parent")
    dense = measure(parent.model)
    say("MoE")
    sparse = measure(moe)
    rows = [{"task": t, "metric": m, "parent": v, "moe": sparse[t, m]} for (t, m), v in dense.items()]
    facts = {"dtype": long_name(parent.dtype), "device": str(parent.device), "overlap": overlap}
    return {"run": str(folder), "data": source, "limit": limit, "tokens": tokens, **facts, "results": rows}


def _overlap(domains: Sequence[Domain], header: Mapping[str, Any], own: bool) -> dict[str, Any]:
    """Measure what the domains' evaluation text shares with what the run was calibrated and trained on; warn of it."""
    try:
        calibrated = domains if own else load_domains(header["inputs"]["data"], header["recipe"]["domains"]["names"])
    except MoesmithError as error:
        say(f"it is not known whether the run was calibrated on this text: {error}")
        return {}
    found = overlaps(domains, calibrated)
    for line in warnings(found):
        say(line)
    return {name: overlap.as_dict() for name, overlap in found.items()}


@takes_paths("folder")
def continuations(
    folder: Path, prompt: str, tokens: int, chat: bool, dtype: DType = AUTO, device: Device = AUTO
) -> dict[str, str]:
    """Continue a prompt with the dense parent and the MoE, each by its most likely tokens.

    Args:
        folder: a finished run, as text or a path.
        prompt: a text, or what a user asks.
        tokens: new ones at most.
        chat: put the prompt through the chat template.
        dtype: what both compute in; the fastest here for ``auto``.
        device: where both compute.

    Returns:
        the new text of the ``dense parent`` and of the ``MoE``.

    Raises:
        MoesmithError: as :func:`models_of`; or there is no chat template, or no room for an answer.
    """
    parent, moe = models_of(folder, dtype, device)
    tokenizer = parent.tokenizer
    if chat and not tokenizer.chat_template:
        raise MoesmithError("the parent has no chat template", "Leave --chat out.")
    turns = [{"role": "user", "content": prompt}]
    ids = asked_ids(tokenizer, turns, rows_of(parent.model), templated=chat)
    made = {
        name: go_on(model, tokenizer, ids, tokens) for name, model in (("dense parent", parent.model), ("MoE", moe))
    }
    return {name: str(tokenizer.decode(new, skip_special_tokens=True)) for name, new in made.items()}
