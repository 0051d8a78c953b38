"""A step of a conversion describes itself: name, needs, what its result depends on, what it does, costs and reports.

Pipeline, plan, keys, ``inspect``, card and report walk a recipe's steps; their names are listed nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moesmith.data.text import Domain, Overlap
from moesmith.parent.load import Parent

if TYPE_CHECKING:
    from moesmith.run.folder import Run
    from moesmith.run.recipe import Recipe
    from moesmith.run.shapes import Pace, Shapes


@dataclass
class Job:
    """What every step is given.

    Attributes:
        run: the folder of the run, where finished steps are read.
        parent: the dense model.
        domains: the text.
        overlap: the part of each domain's evaluation text that is not held out.
    """

    run: Run
    parent: Parent
    domains: Sequence[Domain]
    overlap: Mapping[str, Overlap] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The domains, in order."""
        return [domain.name for domain in self.domains]


@dataclass(frozen=True)
class Cost:
    """What a step will cost, computed before any work.

    Attributes:
        kind: the sum it belongs to: ``calibration``, ``affinity``, ``training``, ``export`` or ``evaluation``.
        tokens: how many it reads.
        seconds: on this machine; 0 if no pace is given.
        memory: bytes on top of the parent, and of the mixture if there already is one.
        layerwise: the same with one layer in memory at a time; ``None`` if the whole model must be in memory.
        disk: bytes that it leaves on disk.
        passing: bytes on disk besides, only while it works.
        spread: where several processes can hold a part of the models each: the bytes that they share out, and those
            that each needs besides; ``None`` where they cannot.
    """

    kind: str = "calibration"
    tokens: int = 0
    seconds: float = 0.0
    memory: int = 0
    layerwise: int | None = 0
    disk: int = 0
    passing: int = 0
    spread: tuple[int, int] | None = None

    def one_layer(self, ranks: int) -> int | None:
        """Return the bytes that one of ``ranks`` processes needs if none holds a model whole; ``None`` if one must."""
        if self.layerwise is not None or self.spread is None or ranks == 1:
            return self.layerwise
        shared, own = self.spread
        return shared // ranks + own


def trained(metrics: Mapping[str, Any]) -> str:
    """Say how much a step trained, and its loss, from the metrics of its manifest."""
    return (
        f"{metrics['trainable']:,} parameters trained on {metrics['tokens']:,} tokens,"
        f" loss {metrics['first_loss']:.3f} -> {metrics['last_loss']:.3f}"
    )


class Step:
    """One stage of a conversion, a folder in ``RUN/stages``.

    Attributes:
        name: the name of its folder.
        title: what it did, for a report, such as ``routers trained``; empty for a step that changes no model.
        needs: steps whose folders it reads.
        version: of its mathematics. A new one makes the step again; a new setting with its neutral value does not.
        shared: whether its folder holds all that it made, so that another run may take it over.
        reads: fingerprints of inputs that it depends on besides weights and data.
        tokenises: whether it turns text into tokens and computes nothing.
        parallel: whether all processes of a run make it together (``world.together``); only the first one writes what
            it returns. Any other step is made by the first one alone.
        trains: the recipe's section with its training, whose text it reads; empty for none.
        recipe: the recipe that it is part of.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    version: ClassVar[int] = 1
    shared: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    tokenises: ClassVar[bool] = False
    parallel: ClassVar[bool] = False
    trains: ClassVar[str] = ""

    def __init__(self, recipe: Recipe, *needs: str) -> None:
        self.recipe, self.needs = recipe, needs

    def settings(self, job: Job) -> dict[str, Any]:
        """Return what its result depends on besides seed, inputs and the steps it needs; JSON-able."""
        return {}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Fill ``work``, where an earlier try that was killed may have left something.

        Returns:
            metrics for the manifest, JSON-able.

        Raises:
            MoesmithError: anything the user can fix.
        """
        raise NotImplementedError

    @contextmanager
    def prepared(self, job: Job) -> Iterator[None]:
        """Wrap the step, whether it is to be made or not."""
        yield

    def windows(self) -> dict[str, int]:
        """Return the tokens per sequence that the parent must be able to read, by setting."""
        return {f"{self.trains}.window": self.loop.window} if self.trains else {}

    @property
    def loop(self) -> Any:
        """The section with its training."""
        return getattr(self.recipe, self.trains)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say in one line what came out, for tables."""
        return ""

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Estimate what it will cost."""
        return Cost()
