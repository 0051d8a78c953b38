"""A small scorer of our own for multiple-choice tasks, beside which lm-evaluation-harness is tested.

Prompts come from the package's templates, the very ones the harness is given, rendered as it renders them.
"""

from __future__ import annotations

import ast
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.data.text import Record
from moesmith.evaluation.harness import FEWSHOT_SEED
from moesmith.evaluation.likelihoods import log_likelihoods
from moesmith.evaluation.templates import Task, load_task, share


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


@cache
def _template(source: str) -> Callable[..., str]:
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

    ``batch`` counts sequences of 512 tokens per forward pass.
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
    """Per task its metrics (``acc``, mostly ``acc_norm``) and ``items``: what the harness reports, in the same form."""
    loaded = {name: load_task(name, data) for name in tasks}
    result = {}
    for name, parts in loaded.items():
        found = [item for part in parts for item in items(part, share(limit, len(parts)))]
        scores = score_choices(model, tokenizer, found, batch, label=name)
        result[name] = {metric: statistics.fmean(getattr(s, metric) for s in scores) for metric in parts[0].metrics}
        result[name]["items"] = len(scores)
    return result
