"""What a comparison is: a parent, text, rows that are conversions, and what is measured of each; a YAML file.

A row may vary settings: ``vary: {carve.ratio: [0.75, 0.5], seed: [1, 2, 3]}`` stands for six conversions. Those that
differ in their seed alone are one row of the table. A list of such sets stands for the conversions of all of them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from moesmith.arguments import path_text
from moesmith.comparison.controls import Control
from moesmith.comparison.quantised import Quantised
from moesmith.comparison.speed import Speed
from moesmith.errors import MoesmithError, first_fault
from moesmith.export.target import Quant
from moesmith.files.parse import parse_yaml
from moesmith.run.recipe import applicable
from moesmith.run.settings import Section, hold_a_window

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
LONGEST = 200  # characters of a folder's name
SEED = "seed"
WIKITEXT = "wikitext2"  # the name of its windows
PARENT = "parent"  # of the parent's own numbers


Vary = dict[str, list[Any]] | list[dict[str, list[Any]]]


def _sets(vary: Vary) -> list[dict[str, list[Any]]]:
    return vary if isinstance(vary, list) else [vary]


class Measure(Section):
    """What is measured of every row, and of the parent."""

    domains: dict[str, list[str]] = Field({}, description="groups of domains by title; their evaluation splits")
    tokens: int = Field(6144, ge=1, description="tokens per domain, at most")
    window: int = Field(512, ge=2, description="tokens per window, of domains and of WikiText-2")
    wikitext2: int = Field(0, ge=0, description="tokens of WikiText-2; 0 leaves it out")
    lambada: int = Field(0, ge=0, description="passages of LAMBADA; 0 leaves it out")
    tasks: list[str] = Field([], description="tasks with one score per item, in [0, 1]: choices, written answers")
    limit: int | None = Field(None, ge=1, description="items per task; all if left out")
    run_code: bool = Field(False, description="allow tasks that run what models write")
    health: bool = Field(False, description="let every row answer the prompts of the task health")
    speed: Speed = Speed()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for group, names in self.domains.items():
            if not names or len(set(names)) < len(names):
                raise ValueError(f"group {group!r} names no domain, or one twice")
        if self.wikitext2 and WIKITEXT in self.names:
            raise ValueError(f"{WIKITEXT} is a domain here; leave out {WIKITEXT}, or the domain")
        for tokens in (self.tokens, self.wikitext2 or self.tokens):
            hold_a_window(tokens, self.window)
        return self

    @property
    def names(self) -> list[str]:
        """The domains of all groups."""
        return list(dict.fromkeys(name for group in self.domains.values() for name in group))


class RowSection(Section):
    """A row: a recipe to convert by, a finished run, or a control."""

    name: str = Field(description="of its folder")
    title: str = Field("", description="in tables; the name if left out")
    recipe: str = Field("", description="a preset, a method's name or a YAML file")
    run: str = Field("", description="a finished run of the same parent, in place of a recipe")
    control: Control | Quantised | None = Field(
        None, description="the parent with fewer channels for each token, or in fewer bits, likewise"
    )
    settings: list[str] = Field([], description="section.key=value on top of the recipe and the comparison's settings")
    speed: list[Quant] = Field([], description="types of the weights in which llama.cpp is timed with it")
    vary: Vary = Field({}, description="values of settings, one conversion for each combination; or several such sets")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(map(bool, (self.recipe, self.run, self.control))) != 1:
            raise ValueError("give a row a recipe, a run or a control")
        if not self.recipe and (self.settings or self.vary):
            raise ValueError("settings and vary belong to a recipe; leave them out")
        if self.control and self.speed:
            raise ValueError("a control is not timed itself; leave out speed")
        return self


class Spec(Section):
    """A comparison."""

    title: str = "comparison"
    model: str = Field("", description="the parent; may be given on the command line")
    data: str = Field("", description="the data source; may be given on the command line")
    budget: str | None = Field(None, description="demo, small, evening or paper")
    settings: list[str] = Field([], description="section.key=value of every row whose recipe has it")
    vary: Vary = Field({}, description="of every row that has a recipe, as a row's own")
    measure: Measure = Measure()
    rows: list[RowSection] = Field(min_length=1)
    keep: bool = Field(True, description="keep the models of rows that are measured")
    baseline: str = Field("", description="the row that others are tested against; the first if left out")

    @model_validator(mode="after")
    def _names(self) -> Self:
        varied = [each for vary in (self.vary, *(row.vary for row in self.rows)) for each in _sets(vary)]
        if empty := [key for each in varied for key, values in each.items() if not values]:
            raise ValueError(f"vary.{empty[0]} has no values")
        names = [conversion.name for conversion in self.conversions()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows are called {twice[0]}")
        if odd := [n for n in names if not NAME.fullmatch(n) or len(n) > LONGEST or n == PARENT]:
            raise ValueError(f"{odd[0]!r} is no name for a folder: letters, digits, and . _ + - after the first")
        if self.baseline and self.baseline not in {row.name for row in self.rows}:
            raise ValueError(f"there is no row {self.baseline!r} for a baseline")
        made = {conversion.name for conversion in self.conversions() if conversion.source.recipe}
        for row in self.rows:
            if isinstance(row.control, Quantised) and row.control.of and row.control.of not in made:
                raise ValueError(f"row {row.name} is of {row.control.of!r}, and no conversion has that name")
        if not self.measure.domains:
            raise ValueError("measure.domains names no group of domains")
        return self

    @property
    def base(self) -> str:
        """The name of the row that others are tested against."""
        return self.baseline or self.rows[0].name

    def conversions(self) -> Iterator[Conversion]:
        """Yield every conversion of every row."""
        for row in self.rows:
            common = _sets(self.vary) if row.recipe else [{}]
            for vary in [one | own for one in common for own in _sets(row.vary)]:
                for values in itertools.product(*vary.values()):
                    chosen = dict(zip(vary, values, strict=True))
                    varied = {key: value for key, value in chosen.items() if key != SEED}
                    given = [*row.settings, *(f"{key}={json.dumps(value)}" for key, value in chosen.items())]
                    yield Conversion(row, varied, chosen.get(SEED), tuple(given))

    def settings_of(self, conversion: Conversion) -> list[str]:
        """Return all settings of a conversion: those of the comparison that its recipe has, and its own."""
        common = applicable(conversion.source.recipe, [*self.settings, *conversion.settings], self.settings)
        return [*common, *conversion.settings]


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    Attributes:
        source: the specification's row: what it converts by, a finished run, or a control.
        varied: the values of what is varied, its seed apart.
        seed: the seed, where it is varied.
        settings: its own.
    """

    source: RowSection
    varied: Mapping[str, Any]
    seed: Any
    settings: tuple[str, ...]

    @property
    def row(self) -> str:
        """The row of the table that it belongs to; several seeds share one."""
        return self.source.name + "".join(f"-{key.rpartition('.')[2]}-{value}" for key, value in self.varied.items())

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.row if self.seed is None else f"{self.row}-{SEED}-{self.seed}"

    @property
    def title(self) -> str:
        """The title of its row of the table."""
        return ", ".join([self.source.title or self.source.name, *(f"{k} {v}" for k, v in self.varied.items())])


def load_spec(path: str | Path) -> Spec:
    """Read a specification from a YAML file.

    Raises:
        MoesmithError: there is no such file, an unknown key, or a value that does not fit.
    """
    path = Path(path_text("spec", path))
    try:
        values = parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise MoesmithError(f"{path} cannot be read: {error.strerror or error}", "Give a YAML file.") from error
    if not isinstance(values, dict):
        raise MoesmithError(f"{path} holds no comparison", "See docs/commands/compare.md.")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        where, what = first_fault(error, "comparison")
        raise MoesmithError(f"{path}: {where}: {what}", "See docs/commands/compare.md.") from error
