"""What a comparison is: a parent, text, rows that are conversions, and what is measured of each; a YAML file.

A row may vary settings: ``vary: {carve.ratio: [0.75, 0.5], seed: [1, 2, 3]}`` stands for six conversions. Those that
differ in their seed alone are one row of the table.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from moesmith.comparison.controls import Control
from moesmith.errors import MoesmithError
from moesmith.run.recipe import applicable
from moesmith.run.settings import Section

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
SEED = "seed"


class Measure(Section):
    """What is measured of every row, and of the parent."""

    domains: dict[str, list[str]] = Field({}, description="groups of domains by title; their evaluation splits")
    tokens: int = Field(6144, ge=1, description="tokens per domain, at most")
    window: int = Field(512, ge=2, description="tokens per window, of domains and of WikiText-2")
    wikitext2: int = Field(0, ge=0, description="tokens of WikiText-2; 0 leaves it out")
    lambada: int = Field(0, ge=0, description="passages of LAMBADA; 0 leaves it out")
    tasks: list[str] = Field([], description="multiple-choice tasks")
    limit: int | None = Field(None, ge=1, description="items per task; all if left out")

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
    control: Control | None = Field(None, description="the parent with fewer channels for each token, likewise")
    settings: list[str] = Field([], description="section.key=value on top of the recipe and the comparison's settings")
    vary: dict[str, list[Any]] = Field({}, description="values of settings, one conversion for each combination")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(map(bool, (self.recipe, self.run, self.control))) != 1:
            raise ValueError("give a row a recipe, a run or a control")
        if not self.recipe and (self.settings or self.vary):
            raise ValueError("settings and vary belong to a recipe; leave them out")
        if not NAME.fullmatch(self.name) or self.name == "parent":
            raise ValueError(f"{self.name!r} is no name: letters, digits, and . _ + - after the first; nor parent")
        return self


class Spec(Section):
    """A comparison."""

    title: str = "comparison"
    model: str = Field("", description="the parent; may be given on the command line")
    data: str = Field("", description="the data source; may be given on the command line")
    budget: str | None = Field(None, description="demo, small or paper")
    settings: list[str] = Field([], description="section.key=value of every row whose recipe has it")
    vary: dict[str, list[Any]] = Field({}, description="of every row that has a recipe, as a row's own")
    measure: Measure = Measure()
    rows: list[RowSection] = Field(min_length=1)
    keep: bool = Field(True, description="keep the models of rows that are measured")
    baseline: str = Field("", description="the row that others are tested against; the first if left out")

    @model_validator(mode="after")
    def _names(self) -> Self:
        varied = [self.vary, *(row.vary for row in self.rows)]
        if empty := [key for each in varied for key, values in each.items() if not values]:
            raise ValueError(f"vary.{empty[0]} has no values")
        names = [conversion.name for conversion in self.conversions()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows are called {twice[0]}")
        if self.baseline and self.baseline not in {row.name for row in self.rows}:
            raise ValueError(f"there is no row {self.baseline!r} for a baseline")
        if not self.measure.domains:
            raise ValueError("measure.domains names no group of domains")
        return self

    def conversions(self) -> Iterator[Conversion]:
        """Yield every conversion of every row."""
        for row in self.rows:
            vary = (self.vary if row.recipe else {}) | row.vary
            for values in itertools.product(*vary.values()):
                chosen = dict(zip(vary, values, strict=True))
                others = {key: value for key, value in chosen.items() if key != SEED}
                suffix = "".join(f"-{key.rpartition('.')[2]}-{value}" for key, value in others.items())
                title = ", ".join([row.title or row.name, *(f"{key} {value}" for key, value in others.items())])
                seed = f"-seed-{chosen[SEED]}" if SEED in chosen else ""
                own = [*row.settings, *(f"{key}={value}" for key, value in chosen.items())]
                yield Conversion(row, suffix, row.name + suffix + seed, title, tuple(own))

    def settings_of(self, conversion: Conversion) -> list[str]:
        """Return all settings of a conversion: those of the comparison that its recipe has, and its own."""
        common = applicable(conversion.source.recipe, [*self.settings, *conversion.settings], self.settings)
        return [*common, *conversion.settings]


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    Attributes:
        source: the specification's row: what it converts by, a finished run, or a control.
        variant: what is varied, its seed apart; in names.
        name: of its folder.
        title: of its row of the table.
        settings: its own.
    """

    source: RowSection
    variant: str
    name: str
    title: str
    settings: tuple[str, ...]

    @property
    def row(self) -> str:
        """The row of the table that it belongs to; several seeds share one."""
        return self.source.name + self.variant


def load_spec(path: str | Path, only: Sequence[str] = ()) -> Spec:
    """Read a specification.

    Args:
        path: a YAML file.
        only: rows to keep, as its ``rows`` name them; all if left out.

    Raises:
        MoesmithError: there is no such file, an unknown key, or a value that does not fit.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MoesmithError(f"{path} cannot be read: {error.strerror or error}", "Give a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MoesmithError(f"{path} is not YAML: {str(error).splitlines()[0]}", "Fix it.") from error
    if not isinstance(values, dict):
        raise MoesmithError(f"{path} holds no comparison", "See docs/commands/compare.md.")
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "comparison"
        said = first["msg"].removeprefix("Value error, ")
        raise MoesmithError(f"{path}: {where}: {said}", "See docs/commands/compare.md.") from error
    if unknown := sorted(set(only) - {row.name for row in spec.rows}):
        known = ", ".join(row.name for row in spec.rows)
        raise MoesmithError(f"{path} has no row {unknown[0]!r}", f"Choose of {known}.")
    return spec
