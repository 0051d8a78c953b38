"""Load tasks that have a template of ours, choices, clozes and answers to write: ``tasks/*.yaml`` and local records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, meta

from moesmith.arguments import ceil_div
from moesmith.console import say
from moesmith.data.text import Record, read_records, records_file
from moesmith.errors import MoesmithError

COMPLETION = "completion"  # what a model wrote, in a template's program
TEMPLATES = resources.files("moesmith.evaluation") / "tasks"


@dataclass(frozen=True)
class Task:
    """A task with its records.

    Attributes:
        name: as the user gives it; a part of a task has its subject appended (``mmlu_anatomy``).
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
        """Examples before each question: as many as the task asks for, or all there are."""
        return min(self.template.get("num_fewshot", 0), len(self.train))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics the task is reported in."""
        return [entry["metric"] for entry in self.template["metric_list"]]

    @property
    def runs_code(self) -> bool:
        """Whether what a model writes is run to score it."""
        return bool(self.template.get("unsafe_code"))


def task_names() -> list[str]:
    """List the names of the tasks that come with a template."""
    return sorted(Path(entry.name).stem for entry in TEMPLATES.iterdir() if entry.name.endswith(".yaml"))


def load_task(name: str, data: Path | None) -> list[Task]:
    """Load the task of a template with a local file ``<name>.test.jsonl``; its parts, when it is scored by subject.

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
    """Split a task by the values of the field ``metadata.split_by``, in order of appearance, or return it whole."""
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
    """Check each record of a file, and return those that have an answer."""
    records = read_records(path)
    choice = template["output_type"] == "multiple_choice"
    fields = [] if choice else fields_of(template)
    for number, record in enumerate(records, 1):
        if problem := _choice_problem(record) if choice else _missing(record, fields):
            raise MoesmithError(f"{path}: record {number} has {problem}", "Fix or remove the record.")
    answered = tuple(record for record in records if not choice or record["answer"] is not None)
    if not answered:
        raise MoesmithError(f"{path} has no record with an answer", "Give the labelled file.")
    return answered


def fields_of(template: dict[str, Any]) -> list[str]:
    """List the fields of a record that a template's texts name, sorted."""
    texts = [template["doc_to_text"], template["doc_to_target"], template["metadata"].get("program", "")]
    return sorted(meta.find_undeclared_variables(Environment().parse(" ".join(texts))) - {COMPLETION})


def _missing(record: Record, fields: Sequence[str]) -> str:
    """Say which of the fields is no text, nor a list of texts; empty if none."""
    for name in fields:
        value = record.get(name)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            return f"no {name!r} text"
    return ""


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
    """Return how many items of each part make up ``limit`` items of the whole, rounded up."""
    return None if limit is None else ceil_div(limit, parts)
