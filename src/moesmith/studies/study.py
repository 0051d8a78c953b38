"""What a study is, and the known ones: a question of a paper, the conversions that answer it, tables and figures.

A new study is a new file in this package: a subclass of :class:`Study` with ``@register``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from moesmith.errors import MoesmithError
from moesmith.run.settings import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moesmith.studies.bench import Bench

SIXTEEN = (
    "wikipedia,c4,gsm8k,mathqa,mbpp,code_alpaca,pubmedqa,medmcqa,race,hellaswag,squad,boolq,alpaca,consumer_contracts,"
    "arxiv,multilingual_wiki"
)  # the sets of docs/lab.md

Found = Mapping[str, Any]  # what a study measured: plain values, as JSON holds them


class Planned(NamedTuple):
    """A conversion of a study: the name of its folder, a preset or method, settings of its own, its title."""

    name: str
    recipe: str
    settings: Sequence[str] = ()
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a study's page: cells are text, the first column names the row."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


class Study(ABC):
    """A question, and how it is answered.

    Attributes:
        name: as the command takes it.
        title: of its page.
        paper: whose question it is.
        question: what is asked.
        expected: what the paper says or what we expected before measuring.
        settings: of all its conversions, where a recipe has them; ``--set`` comes after them.
        budget: of all its conversions, unless the command gives one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    question: ClassVar[str]
    expected: ClassVar[str]
    settings: ClassVar[Sequence[str]] = ()
    budget: ClassVar[str] = "small"

    class Options(Section):
        """What only this study can be told: ``--set study.KEY=VALUE``."""

    def __init__(self, options: Section) -> None:
        self.options: Any = options

    def conversions(self) -> list[Planned]:
        """List the conversions of its parent that need no result of another; ``--jobs`` makes several at once."""
        return []

    @abstractmethod
    def measure(self, bench: Bench) -> dict[str, Any]:
        """Convert and measure; what is finished is not done again.

        Args:
            bench: parent, text and folder.

        Returns:
            Numbers and names, as JSON holds them.
        """

    @abstractmethod
    def tables(self, found: Found) -> list[Table]:
        """Put what was measured into tables."""

    @abstractmethod
    def figures(self, found: Found) -> dict[str, Figure]:
        """Draw what was measured: figures by the name of their file."""


_known: dict[str, type[Study]] = {}


def register(study: type[Study]) -> type[Study]:
    """Make a study known by its name; a decorator."""
    _known[study.name] = study
    return study


@cache
def _load() -> None:
    import moesmith.studies as package

    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def studies() -> dict[str, type[Study]]:
    """Return every study by name."""
    _load()
    return dict(sorted(_known.items()))


def find(name: str) -> type[Study]:
    """Return the study of a name.

    Raises:
        MoesmithError: there is none; the message names the nearest.
    """
    known = studies()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.3)
        cure = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(known)}."
        raise MoesmithError(f"there is no study '{name}'", cure)
    return known[name]
