"""Run lm-evaluation-harness in process: tasks from local JSONL through our templates, and its own registry.

The harness gets the model in memory as it is. Local tasks reach the harness as task configurations whose data set is
already loaded, so nothing is downloaded, cached or written for them.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import Meter, meter, say
from moesmith.errors import MoesmithError
from moesmith.evaluation.answers import ends_of
from moesmith.evaluation.likelihoods import token_likelihoods
from moesmith.evaluation.sandbox import check_sandbox, passes
from moesmith.evaluation.templates import COMPLETION, Task, load_task, share, task_names
from moesmith.evaluation.writer import Written, write
from moesmith.parent.checkpoint import quiet

WRITERS = 16  # answers that a model writes at the same time: each step reads all weights once for all of them
FEWSHOT_SEED = 1234  # the harness's own default
# a local task's parts, or a registered one as the harness loads it
Found = Mapping[str, list[Task] | dict[str, Any]]


def find_tasks(tasks: Sequence[str], data: Path | None = None, run_code: bool = False) -> Found:
    """Load tasks; needs no model.

    A task with a template and a local file ``<task>.test.jsonl`` in ``data`` runs from there (few-shot examples from
    ``<task>.train.jsonl``); any other name is looked up in the harness's registry, whose data sets it may download.

    Args:
        tasks: their names.
        data: folder of local records.
        run_code: allow tasks that run what a model writes.

    Raises:
        MoesmithError: the harness is not installed, a task is unknown (the nearest is named), its data cannot be
            loaded, a local file is malformed, or a task runs code and that is not allowed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise MoesmithError("lm-evaluation-harness is not installed", "Run: pip install 'moesmith[eval]'") from error
    local = {name: load_task(name, data) for name in tasks}
    with silenced():
        registered = _registered([name for name in tasks if not local[name]])
    found = {name: local[name] or registered[name] for name in tasks}
    if unsafe := [name for name, task in found.items() if _runs_code(task)]:
        if not run_code:
            raise MoesmithError(
                f"{unsafe[0]} runs what the models write",
                "Add --run-code (measure.run_code in a comparison), best in a container, or leave the task out.",
            )
        check_sandbox()
    return found


def _runs_code(task: list[Task] | dict[str, Any]) -> bool:
    if isinstance(task, list):
        return any(part.runs_code for part in task)
    return any(getattr(one, "UNSAFE_CODE", False) for one in task["tasks"].values())


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Found,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Run tasks through lm-evaluation-harness; the same ones may be run again with another model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: what :func:`find_tasks` returned.
        limit: run only this many items of each task, the first ones (of a task in parts: an equal number of each part).
        batch: sequences of 512 tokens per forward pass; more if they are shorter.

    Returns:
        for each task its metrics and the number of ``items``; a registered tag gives a row for each of its tasks.
    """
    result: dict[str, dict[str, float]] = {}
    for name, found, task in _answered(model, tokenizer, tasks, limit, batch):
        if isinstance(task, list):
            result[name] = _pooled(found, task)
        else:
            rows = [name] if name in found["results"] else list(found["results"])
            result |= {row: _metrics(found["results"][row]) for row in rows}
    return result


def run_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Found,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, list[float]]]:
    """Run tasks as :func:`run_tasks` does, and return each item's score by task and metric, in the items' order.

    Of a task that reads answers in several ways (the harness's filters), such as the registered ``gsm8k``, the first
    one counts.
    """
    result: dict[str, dict[str, list[float]]] = {}
    for name, found, _ in _answered(model, tokenizer, tasks, limit, batch):
        parts = found["samples"].values()  # each has all items by one filter, then all by the next
        samples = [sample for part in parts for sample in part if sample["filter"] == part[0]["filter"]]
        metrics = [name for name in samples[0]["metrics"] if isinstance(samples[0][name], int | float)]
        result[name] = {key: [float(sample[key]) for sample in samples] for key in metrics}
    return result


def _answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Found, limit: int | None, batch: int
) -> Iterator[tuple[str, dict[str, Any], list[Task] | dict[str, Any]]]:
    """Yield every task's name, the harness's raw result, and the task."""
    training = model.training
    with silenced():
        lm = language_model(model, tokenizer, batch)
        try:
            for name, task in tasks.items():
                lm.label = name
                if isinstance(task, list):
                    yield name, run(lm, {"tasks": local_tasks(task)}, share(limit, len(task))), task
                else:
                    yield name, run(lm, task, limit), task
        finally:
            model.train(training)


def run(lm: Any, tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Return the harness's raw result, samples included; ``tasks`` as its ``TaskManager.load`` returns them."""
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return evaluate(lm, tasks, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=True)  # find_tasks asked


def local_tasks(parts: Sequence[Task]) -> dict[str, Any]:
    """Make the harness's task objects of a local task, by name."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    tasks = {}
    for part in parts:
        splits = {"test": Dataset.from_list(list(part.test))}
        config = {**copy.deepcopy(part.template), "task": part.name, "test_split": "test", "num_fewshot": part.shots}
        if part.shots:
            splits["train"] = Dataset.from_list(list(part.train))
            config["fewshot_split"] = "train"
        config["custom_dataset"] = lambda splits=splits, **_: splits
        if program := part.template["metadata"].get("program"):
            config["process_results"] = partial(_pass_at_1, program)
        tasks[part.name] = ConfigurableTask(config=config)
    return tasks


def _pass_at_1(program: str, record: dict[str, Any], completions: Sequence[str]) -> dict[str, float]:
    """Score what a model wrote: does the program that a template makes of it pass its tests?"""
    from lm_eval.utils import apply_template

    return {"pass@1": float(passes(apply_template(program, {**record, COMPLETION: completions[0]})))}


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> Any:
    """Wrap a model in memory for the harness, with our progress bar and fp32 probabilities.

    The tokenizer is copied, because the harness may give it a padding token.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]
        label = "lm-eval"
        bar: Meter | None = None
        together = False  # whether all answers are written by one call, where one ends the next prompt joins

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            if override_bs is not None or not requests:  # rolling windows: the caller shows progress
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = token_likelihoods(self.model, pairs, self.max_length, batch, label=self.label)
            if cut := sum(one.truncated > 0 for one in found):
                say(f"{self.label}: {cut} prompts were longer than the model's context and lost tokens on their left")
            return [(one.total, one.greedy) for one in found]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            sampled = any(request.args[1].get("do_sample") for request in requests)
            self.together, most = not sampled, self.max_length // 2
            self.batch_size_per_gpu = len(requests) if self.together else WRITERS
            for options in (request.args[1] for request in requests):  # a short context is half the prompt's
                options["max_gen_toks"] = min(options.get("max_gen_toks", self.max_gen_toks), most)
            with meter(self.label, len(requests), "prompts") as self.bar:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.together:
                return self._written(context, *args, **kwargs)
            made = super()._model_generate(context, *args, **kwargs)
            if self.bar is not None:
                self.bar.advance(len(context))
            return made

        def _written(
            self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **_: Any
        ) -> torch.Tensor:
            """The most likely answers as the harness wants them: behind their prompts, padded on the right."""
            longest, pad = context.shape[1], self.tokenizer.pad_token_id
            made = torch.full((len(context), max_length), pad)
            made[:, :longest] = context
            look = 2 + max(len(self.tokenizer.encode(text, add_special_tokens=False)) for text in stop)

            def done(index: int, answer: Written) -> None:
                made[index, longest : longest + len(answer.ids)] = torch.tensor(answer.ids)
                if self.bar is not None:
                    self.bar.advance(1)

            def stops(ids: list[int]) -> bool:
                text = self.tokenizer.decode(ids[-look:])
                return any(sequence in text for sequence in stop)

            prompts = [ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)]
            given: dict[str, Any] = {"ends": ends_of(self.model, self.tokenizer), "new": max_length - longest}
            write(self.model, prompts, done, rows=WRITERS, stop=stops, **given)
            return made

    return Model(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        batch_size=batch,
        softmax_dtype=torch.float32,
    )


def _registered(names: Sequence[str]) -> dict[str, Any]:
    """Load the harness's own tasks, by the names asked for; its registry is read only when there is a name."""
    if not names:
        return {}
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, {*known, *task_names()}, 1)
            cure = f"Did you mean {near[0]!r}?" if near else "See: lm-eval ls tasks"
            raise MoesmithError(f"There is no task {name!r}, neither local nor in lm-evaluation-harness", cure)
    return {name: _load(manager, name) for name in names}


def _load(manager: Any, name: str) -> Any:
    say(f"{name}: loading its data set")
    try:
        return manager.load([name])
    except Exception as error:  # whatever a data set's loader raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MoesmithError(
            f"The data of task {name!r} cannot be loaded: {reason}",
            f"Go online, or put {name}.test.jsonl into the --data folder.",
        ) from error


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return a row of the harness's results without aliases and standard errors."""
    kept = {
        (metric if name == "none" else f"{metric} ({name})"): float(value)
        for key, value in row.items()
        for metric, _, name in [key.partition(",")]
        if name and not metric.endswith("_stderr")
    }
    return {**kept, "items": int(row["sample_len"])}


def _pooled(found: dict[str, Any], parts: Sequence[Task]) -> dict[str, float]:
    """Compute the metrics of a local task: the mean over its parts, weighted by their items."""
    rows = [_metrics(found["results"][part.name]) for part in parts]
    total = sum(row["items"] for row in rows)
    return {m: sum(row[m] * row["items"] for row in rows) / total for m in parts[0].metrics} | {"items": total}


@contextmanager
def silenced() -> Iterator[None]:
    """Silence the log lines of the harness and the hub, and a progress bar per set of prompts.

    Errors still arrive as exceptions.
    """
    import lm_eval.api.task as prompts

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, bar = [logger.level for logger in loggers], prompts.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    prompts.tqdm = lambda documents, **_: documents
    try:
        with quiet():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        prompts.tqdm = bar
