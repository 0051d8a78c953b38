"""What a study works with: conversions in its folder, models and text, and numbers that are kept once measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from moesmith.console import say
from moesmith.conversion.convert import convert
from moesmith.conversion.series import Series
from moesmith.data.text import evaluation_blocks, load_domains
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import geometric_mean, perplexities
from moesmith.files.artefact import read_json
from moesmith.files.seal import digest
from moesmith.files.write import write_record
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent, load_parent
from moesmith.run.folder import Run
from moesmith.run.recipe import applicable
from moesmith.studies.study import Planned

Value = TypeVar("Value")
Around = Callable[[Any], AbstractContextManager[Any]]
WINDOW = 512  # tokens of a window that a study measures itself


class Bench:
    """A study's folder.

    Args:
        series: the folder, its parent and data source.
        settings: of all conversions, where a recipe has them.
        budget: of all conversions.
    """

    def __init__(self, series: Series, settings: Sequence[str], budget: str | None) -> None:
        self.series, self.settings, self.budget = series, list(settings), budget
        self.runs: list[dict[str, Any]] = []

    @property
    def parent(self) -> Parent:
        """The dense parent."""
        return self.series.parent

    def beside(self, source: str) -> Bench:
        """Return a bench in the same folder for another parent, which computes in the same dtype and place.

        Raises:
            MoesmithError: it cannot be loaded.
        """
        other = copy.copy(self)
        other.series = copy.copy(self.series)
        parent = load_parent(source, self.parent.dtype, device=self.parent.device, half=False)
        other.series.parent, other.series.head = parent, self.series.head | {"parent": parent.digest}
        return other

    def convert(self, name: str, recipe: str, settings: Sequence[str] = (), title: str = "") -> Run:
        """Make a conversion, or continue it; stages that others have made are taken over.

        Args:
            name: of its folder.
            recipe: a preset or a method.
            settings: its own, which come last.
            title: what the page calls it; the name if left out.
        """
        common = applicable(recipe, [*self.settings, *settings], self.settings)
        found = [*common, *settings]
        say(f"== {name}")
        run = convert(
            recipe, self.parent, self.series.data, self.series.folder(name), settings=found, budget=self.budget,
            reuse=self.series.others(name),
        )  # fmt: skip
        self.runs.append({"name": name, "title": title or name, "recipe": recipe, "settings": list(settings)})
        return run

    def make(self, planned: Planned) -> Run:
        """Make a planned conversion, or continue it."""
        return self.convert(*planned)

    def once(self, name: str, depends: Any, make: Callable[[], Value]) -> Value:
        """Return a value that was kept under a name, or make and keep it.

        Args:
            name: of its file.
            depends: plain values that it depends on besides the parent.
            make: gives the value, as JSON holds it.
        """
        path, key = self.series.out / "parts" / f"{name}.json", digest([depends, self.series.head])
        if path.is_file() and (kept := read_json(path))["key"] == key:
            return kept["value"]
        value = make()
        write_record(path, {"key": key, "value": value})
        return read_json(path)["value"]  # what the next call will return

    def blocks(self, names: Sequence[str], tokens: int, window: int = WINDOW) -> dict[str, Tensor]:
        """Return held-out windows of domains, (N, window) each."""
        domains = load_domains(self.series.data, list(names))
        return {d.name: evaluation_blocks(d, self.parent.tokenizer, tokens, window).blocks for d in domains}

    def perplexity(
        self,
        name: str,
        blocks: Mapping[str, Tensor],
        carving: Carving | None = None,
        key: Any = None,
        around: Around = nullcontext,
    ) -> dict[str, float]:
        """Measure perplexity by domain; kept under a name.

        Args:
            name: what it is kept under, and what the progress line says.
            blocks: windows by domain, (N, window).
            carving: of the parent; the parent itself if left out.
            key: plain values that tell the carving from others.
            around: makes a context of the model, in which it reads.
        """

        def make() -> dict[str, float]:
            model = self.parent.model if carving is None else build(self.parent, carving)
            with around(model):
                return perplexities(model, blocks, label=name)

        return self.once(f"perplexity {name}", [key, digest_of(blocks)], make)


def digest_of(blocks: Mapping[str, Tensor]) -> str:
    """Return a digest of windows of text."""
    return digest({name: ids.tolist() for name, ids in blocks.items()})


def key_of(run: Run, step: str | None = None) -> str:
    """Return what tells a step's result from others; of the last carving if no step is named."""
    return str(run.manifest(step or run.carved[-1])["key"])


def mean(perplexity: Mapping[str, float]) -> float:
    """Average the perplexities of domains: their geometric mean."""
    return geometric_mean(perplexity.values())


def stages_of(run: Run) -> dict[str, float]:
    """Return a run's perplexity after every stage, the geometric mean over its domains; ``parent`` is the first."""
    return dict(run.metrics("evaluate"))


def randomised(carving: Carving, seed: int = 0) -> Carving:
    """Return experts of the same widths with random channels; routers and attention stay.

    Raises:
        MoesmithError: experts have matrices of their own, which belong to their channels.
    """
    if any(expert.down_DF is not None for layer in carving.layers for expert in layer.routed):
        raise MoesmithError("experts with matrices of their own have no random twin", "Take a carving without a refit.")
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(carving)
    for layer in other.layers:
        for expert in layer.routed:
            expert.channels = torch.randperm(carving.d_ff, generator=generator)[: expert.width].sort().values
    return other
