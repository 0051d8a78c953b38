"""Measure one model for a comparison: every window's loss, every item's answer, so that models can be paired."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moesmith.comparison.spec import WIKITEXT, Measure
from moesmith.console import meter
from moesmith.data.text import evaluation_blocks, load_domains
from moesmith.errors import MoesmithError
from moesmith.evaluation.harness import Found, find_tasks, run_items
from moesmith.evaluation.health import health
from moesmith.evaluation.likelihoods import lambada_pairs, log_likelihoods
from moesmith.evaluation.perplexity import WINDOW, context_length, token_nlls, wikitext2_blocks
from moesmith.files.seal import digest
from moesmith.parent.digests import tokenizer_digest
from moesmith.parent.load import Parent

ACCURACY = "acc"  # the metric of choices
WRITTEN = ("pass@1", "exact_match")  # the metrics of answers that a model writes


def is_written(scores: Collection[str]) -> bool:
    """Whether a task, by the metrics it has, asks for answers to write."""
    return ACCURACY not in scores and any(name in scores for name in WRITTEN)


def right(scores: Mapping[str, list[float]]) -> list[float]:
    """Return how right the answer to each item of a task is, from 0 to 1."""
    return next(scores[name] for name in (ACCURACY, *WRITTEN) if name in scores)


class Ruler:
    """Text and tasks, read once.

    Attributes:
        digest: of all that a model is measured on.

    Args:
        parent: whose tokenizer reads them.
        data: data source; WikiText-2, LAMBADA and tasks need a folder.
        spec: what to measure.

    Raises:
        MoesmithError: a domain, a file or a task is missing or malformed, windows are longer than the model's context,
            or a task has no score by item.
    """

    def __init__(self, parent: Parent, data: str, spec: Measure) -> None:
        self.parent, self.spec = parent, spec
        folder = Path(data).expanduser()
        local = folder if folder.is_dir() else None
        if (spec.wikitext2 or spec.lambada) and local is None:
            raise MoesmithError(f"measure.wikitext2 and measure.lambada need a data folder, not {data}", "Give one.")
        if spec.window > (longest := context_length(parent.model, parent.tokenizer)):
            raise MoesmithError(f"measure.window is {spec.window}, but the model reads {longest} tokens", "Lower it.")
        self.blocks: dict[str, Tensor] = {
            domain.name: evaluation_blocks(domain, parent.tokenizer, spec.tokens, spec.window).blocks
            for domain in load_domains(data, spec.names)
        }
        if spec.wikitext2:
            self.blocks[WIKITEXT] = wikitext2_blocks(parent.tokenizer, folder, spec.window, spec.wikitext2)
        self.pairs = lambada_pairs(folder, spec.lambada) if spec.lambada else []
        self.tasks: Found = find_tasks(spec.tasks, local, spec.run_code) if spec.tasks else {}
        records: dict[str, Any] = {}
        for name, task in self.tasks.items():
            if isinstance(task, list):
                records[name], metrics = [(t.test, t.train) for t in task], [t.metrics for t in task]
            else:
                records[name], metrics = name, [list(t.aggregation()) for t in task["tasks"].values()]
            if not all(ACCURACY in known or is_written(known) for known in metrics):
                known = ", ".join((ACCURACY, *WRITTEN))
                raise MoesmithError(f"task {name!r} has none of the metrics {known}", "Leave it out of measure.tasks.")
        text = {name: ids.tolist() for name, ids in self.blocks.items()}
        self.digest = digest([text, self.pairs, records, spec.limit, tokenizer_digest(parent.tokenizer)])

    @property
    def parts(self) -> list[str]:
        """The parts of which a whole measurement consists."""
        tasks = [f"task {name}" for name in self.tasks]
        return ["windows", *["lambada"] * bool(self.pairs), *tasks, *["health"] * self.spec.health]

    def measure(self, model: PreTrainedModel, label: str, have: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
        """Measure a model, part by part.

        Args:
            model: the parent, or a mixture made of it.
            label: what the progress line says.
            have: names of parts that are known already.

        Yields:
            ``windows``: mean loss of each window, by domain (and ``wikitext2``), nats per token; ``lambada``: ``loss``
            of each last word, nats, and whether it was the most likely one (``right``); ``task NAME``: by metric, each
            item's score; ``health``: what :func:`health` returns.

        Raises:
            MoesmithError: a loss is not finite.
        """
        if "windows" not in have:
            yield "windows", self._windows(model, label)
        if self.pairs and "lambada" not in have:
            scores = log_likelihoods(model, self.parent.tokenizer, self.pairs, label="lambada")
            losses = [round(-score.total, 6) for score in scores]
            _check_finite({"lambada": losses}, label)
            yield "lambada", {"loss": losses, "right": [int(score.greedy) for score in scores]}
        for name, task in self.tasks.items():
            if f"task {name}" not in have:
                found = run_items(model, self.parent.tokenizer, {name: task}, self.spec.limit)
                yield f"task {name}", found[name]

        if self.spec.health and "health" not in have:
            yield "health", health(model, self.parent.tokenizer)

    def _windows(self, model: PreTrainedModel, label: str) -> dict[str, list[float]]:
        rows = max(1, 8 * WINDOW // self.spec.window)
        with meter(label, sum(ids.numel() for ids in self.blocks.values())) as bar:
            nlls = token_nlls(model, list(self.blocks.values()), rows, bar=bar)
        windows = {
            name: [round(float(x), 6) for x in nll_NS.double().mean(1)]
            for name, nll_NS in zip(self.blocks, nlls, strict=True)
        }
        _check_finite(windows, label)
        return windows


def _check_finite(losses: dict[str, list[float]], label: str) -> None:
    for name, values in losses.items():
        if not all(map(math.isfinite, values)):
            raise MoesmithError(f"losses of {label} on {name} are not finite", "Convert it with other settings.")
