"""A small scorer of our own for multiple-choice tasks, for quick looks without lm-evaluation-harness.

Prompts come from the templates in ``tasks/*.yaml``, the very ones the harness is given (``harness.py``), rendered as
it renders them; a test holds the two to the same log-likelihoods on the same items.
"""

from __future__ import annotations

import ast
import difflib
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import say
from moesmith.data.text import Record, read_records, records_file
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import log_likelihoods

FEWSHOT_SEED = 1234  # the harness's own default
TEMPLATES = resources.files("moesmith.evaluation") / "tasks"


@dataclass(frozen=True)
class Task:
    """A task with its records.

    Attributes:
        name: as the user says it; a part of a task has its subject behind it (``mmlu_anatomy``).
        template: its YAML, a task configuration of lm-evaluation-harness without the data set.
        test: records to answer.
        train: records to draw examples from; empty for a zero-shot task.
    """

    name: str
    template: dict[str, Any]
    test: tuple[Record, ...]
    train: tuple[Record, ...]

    @property
    def shots(self) -> int:
        """Examples before each question: what the task asks for, or all there are."""
        return min(self.template.get("num_fewshot", 0), len(self.train))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics the task is reported in."""
        return [entry["metric"] for entry in self.template["metric_list"]]


@dataclass(frozen=True)
class Item:
    """One question, ready for the model.

    Attributes:
        pairs: (context, continuation) of each choice.
        lengths: characters of each choice, by which ``acc_norm`` divides.
        answer: index of the right choice.
    """

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Scores:
    """What the model made of an item: the choices' log-likelihoods (nats), and whether it chose right.

    ``acc``: the most likely choice is right; ``acc_norm``: the same per character of the choice.
    ``truncated``: choices whose context lost tokens on its left.
    """

    log_likelihoods: tuple[float, ...]
    acc: bool
    acc_norm: bool
    truncated: int


def task_names() -> list[str]:
    """Names of the tasks that come with a template."""
    return sorted(Path(entry.name).stem for entry in TEMPLATES.iterdir() if entry.name.endswith(".yaml"))


def load_task(name: str, data: Path | None) -> list[Task]:
    """The task of a template with a local file ``<name>.test.jsonl``; its parts, when it is scored by subject.

    Empty when there is no such template or no such file.

    Raises:
        MoesmithError: a record is malformed, no record has an answer, or a few-shot task has no training file.
    """
    if name not in task_names() or data is None or not records_file(data, f"{name}.test").is_file():
        return []
    template = yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8"))
    test = _answered(records_file(data, f"{name}.test"), template)
    train: tuple[Record, ...] = ()
    if wanted := template.get("num_fewshot", 0):
        train = _answered(records_file(data, f"{name}.train"), template)
    task = Task(name, template, test, train)
    parts = _parts(task)
    if short := sum(part.shots < wanted for part in parts):
        say(f"{name}: {short} of {len(parts)} parts have fewer than {wanted} examples; each shows all it has")
    return parts


def _parts(task: Task) -> list[Task]:
    """One task per value of the field named by ``metadata.split_by``, in order of appearance, or the task itself."""
    key = task.template["metadata"].get("split_by")
    if key is None:
        return [task]

    def having(records: tuple[Record, ...], value: Any) -> tuple[Record, ...]:
        return tuple(record for record in records if record.get(key) == value)

    values = dict.fromkeys(record.get(key) for record in task.test)
    return [
        replace(task, name=f"{task.name}_{value}", test=having(task.test, value), train=having(task.train, value))
        for value in values
    ]


def _answered(path: Path, template: dict[str, Any]) -> tuple[Record, ...]:
    """The records of a file that have an answer; each is checked."""
    records = read_records(path)
    cloze = template["output_type"] == "loglikelihood"
    for number, record in enumerate(records, 1):
        if problem := _cloze_problem(record) if cloze else _choice_problem(record):
            raise MoesmithError(f"{path}: record {number} has {problem}", "Mend or remove the record.")
    answered = tuple(record for record in records if cloze or record["answer"] is not None)
    if not answered:
        raise MoesmithError(f"{path} has no record with an answer", "Give the labelled file.")
    return answered


def _cloze_problem(record: Record) -> str:
    right = all(isinstance(record.get(key), str) and record[key] for key in ("context", "target"))
    return "" if right else "no 'context' and 'target' texts"


def _choice_problem(record: Record) -> str:
    choices, answer = record.get("choices"), record.get("answer", False)
    if not isinstance(record.get("question"), str):
        return "no 'question' text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return "no list of 'choices', two or more texts"
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        return f"no 'answer' from 0 to {len(choices) - 1}"
    return ""


def share(limit: int | None, parts: int) -> int | None:
    """How many items of each part make up ``limit`` items of the whole, rounded up."""
    return None if limit is None else -(-limit // parts)


@cache
def _template(source: str) -> Callable[..., str]:
    try:
        import jinja2
    except ImportError as error:
        raise MoesmithError("Task templates need jinja2", "Run: pip install 'moesmith[report]'") from error
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source).render


def _value(spec: str | list[str], record: Record) -> Any:
    """What a template's entry says of a record: a field's value, a fixed list, or rendered text."""
    if isinstance(spec, list):
        return spec
    return record[spec] if spec in record else _template(spec)(**record)


def _choices(template: dict[str, Any], record: Record) -> list[str]:
    choices = _value(template["doc_to_choice"], record)
    return ast.literal_eval(choices) if isinstance(choices, str) else choices


def items(task: Task, limit: int | None = None) -> list[Item]:
    """The prompts of a multiple-choice task, examples first, as lm-evaluation-harness puts them.

    Examples are the first ones of the training file, or a sample of it drawn anew for each question with the harness's
    generator and seed, as the template says. Where ``doc_to_text`` is a number (WinoGrande), the choices are contexts
    and one continuation follows them all: partial evaluation.
    """
    template, shots = task.template, task.shots
    first = template.get("fewshot_config", {}).get("sampler") == "first_n"
    generator = random.Random(FEWSHOT_SEED)
    result = []
    for record in task.test[:limit]:
        drawn = task.train[:shots] if first else generator.sample(task.train, shots)
        before = _value(template.get("description", ""), record) + "".join(
            f"{_value(template['doc_to_text'], r)} {_choices(template, r)[r['answer']]}\n\n" for r in drawn
        )
        text, choices = _value(template["doc_to_text"], record), _choices(template, record)
        if isinstance(text, int):
            rest = _value(template["doc_to_target"], record)
            pairs = tuple((before + choice, f" {rest}") for choice in choices)
        else:
            pairs = tuple((before + text, f" {choice}") for choice in choices)
        result.append(Item(pairs, tuple(map(len, choices)), record["answer"]))
    return result


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch: int = 8,
    *,
    label: str | None = None,
) -> list[Scores]:
    """Log-likelihood of every choice of every item, and whether the best one is right.

    ``batch`` counts sequences of 512 tokens per forward pass. Raises as ``evaluate.log_likelihoods``.
    """
    found = iter(log_likelihoods(model, tokenizer, [p for item in items for p in item.pairs], batch, label=label))
    result = []
    for item in items:
        choices = [next(found) for _ in item.pairs]
        totals = tuple(choice.total for choice in choices)
        per_character = [total / length for total, length in zip(totals, item.lengths, strict=True)]
        result.append(
            Scores(
                totals,
                totals.index(max(totals)) == item.answer,
                per_character.index(max(per_character)) == item.answer,
                sum(choice.truncated > 0 for choice in choices),
            )
        )
    return result


def quick_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    data: Path,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Score local multiple-choice tasks without lm-evaluation-harness; the same numbers in the same form.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names from ``task_names()``.
        data: folder of ``<task>.test.jsonl`` and, for few-shot tasks, ``<task>.train.jsonl``.
        limit: first so many items of each task only (of a task in parts: as many of each part as makes that number).
        batch: sequences of 512 tokens per forward pass.

    Returns:
        per task its metrics (``acc``, mostly ``acc_norm``) and ``items``.

    Raises:
        MoesmithError: an unknown task (the nearest is named), no local file, or a malformed one; jinja2 is missing.
    """
    loaded = {name: _known(name, data) for name in tasks}
    result = {}
    for name, parts in loaded.items():
        found = [item for part in parts for item in items(part, share(limit, len(parts)))]
        scores = score_choices(model, tokenizer, found, batch, label=name)
        if cut := sum(score.truncated for score in scores):
            say(f"{name}: {cut} prompts were longer than the model's context and lost tokens on their left")
        result[name] = {metric: statistics.fmean(getattr(s, metric) for s in scores) for metric in parts[0].metrics}
        result[name]["items"] = len(scores)
    return result


def _known(name: str, data: Path) -> list[Task]:
    choosable = [task for task in task_names() if task != "lambada"]  # a cloze task: evaluate.lambada
    if name not in choosable:
        near = difflib.get_close_matches(name, choosable, 1)
        raise MoesmithError(
            f"There is no task {name!r} here",
            f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(choosable)}.",
        )
    if parts := load_task(name, data):
        return parts
    raise MoesmithError(f"{data / f'{name}.test.jsonl'} is missing", "Put the task's records there.")
