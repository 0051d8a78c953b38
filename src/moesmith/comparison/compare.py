"""Convert and measure every row of a comparison, one after the other or several at once; write its table and page.

OUT/runs/<row>: the conversions; OUT/rows/<row>.json: what was measured of each; OUT/speed/<row>.json: the benchmark of
a row that is timed; OUT/comparison.json, .csv, .md, .html.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from moesmith.arguments import path_text, several, words
from moesmith.comparison.facts import facts, parent_facts
from moesmith.comparison.jobs import at_once, check_jobs
from moesmith.comparison.measure import Ruler
from moesmith.comparison.page import write_page
from moesmith.comparison.quantised import Quantised
from moesmith.comparison.spec import PARENT, Conversion, Spec, load_spec
from moesmith.comparison.speed import SPEED, measure_speed, timed
from moesmith.comparison.table import PARENT_TITLE, table_of, write_tables
from moesmith.console import say
from moesmith.conversion.convert import convert
from moesmith.conversion.order import steps_of
from moesmith.conversion.series import Series
from moesmith.data.text import source_digest
from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, hidden_beside, read_json
from moesmith.files.seal import digest
from moesmith.files.write import write_record
from moesmith.methods.base import Carver
from moesmith.parent.compute import AUTO, Device, DType, long_name
from moesmith.parent.load import Parent
from moesmith.report.page import template_of
from moesmith.run.folder import Run, open_run
from moesmith.run.pipeline import check_folder
from moesmith.run.recipe import Recipe, check_known, load_recipe
from moesmith.run.settings import Section

Row = dict[str, Any]  # key, facts, measured, done
Parts = Iterator[tuple[str, Any]]


@dataclass
class Comparison:
    """A comparison in a folder.

    Attributes:
        spec: what is compared.
        series: its folder, with the parent of every row and the source of all text.
        ruler: what is measured.
    """

    spec: Spec
    series: Series
    ruler: Ruler

    def __post_init__(self) -> None:
        self.conversions = {conversion.name: conversion for conversion in self.spec.conversions()}
        self.read_later = {of for conversion in self.conversions.values() if (of := needed_by(conversion))}
        self.recipes = _recipes(self.spec)

    @property
    def parent(self) -> Parent:
        """Return the parent of every row."""
        return self.series.parent

    def key(self, work: Any) -> str:
        """Return a digest of what a row's numbers depend on."""
        found = {"work": work, "text": self.ruler.digest, "parent": self.parent.digest}
        return digest(found | {"compute": long_name(self.parent.dtype)})

    def made(self, name: str) -> Row:
        """Return what was measured of a row, after converting if need be, or why it was ``refused``."""
        try:
            return self.row(self.conversions[name], make=True) or {}
        except MoesmithError as error:
            return {"refused": str(error)}

    def known(self, conversion: Conversion) -> Row | None:
        """Return what was measured of a row if it is finished."""
        try:
            return self.row(conversion, make=False)
        except MoesmithError:  # it says so when it is to be made
            return None

    def row(self, conversion: Conversion, *, make: bool) -> Row | None:
        """Return what was measured of a row, after converting if need be; ``None`` if it is not to be made.

        Args:
            conversion: the row's.
            make: whether to convert and measure what is not known.

        Raises:
            MoesmithError: the row cannot be made.
        """
        name, title, control = conversion.name, conversion.title, conversion.source.control
        recipe = self.recipes.get(name)
        if control is not None:

            def controlled(have: Mapping[str, Any]) -> Parts:
                with control.row(self.parent, self.finished) as (model, found):
                    yield "facts", found
                    yield from self.ruler.measure(model, title, have)

            work: Any = control.model_dump(exclude_defaults=True)
            if of := needed_by(conversion):
                work |= {"of": self._work(self.recipes[of])}
            return self._kept(name, work, controlled if make else None)
        if recipe is None:
            run = open_run(conversion.source.run)
            run.check_finished()
            if run.inputs["model_digest"] != self.parent.digest:
                raise MoesmithError(f"{run.folder} was made from another parent", "Give a run of the comparison's own.")
            key = run.manifest("export")["key"]
            made = (lambda have: self._measured(run, conversion, have)) if make else None
            return self._kept(name, key, made, conversion.source.speed)
        folder, data = self.series.folder(name), self.series.data

        def converted(have: Mapping[str, Any]) -> Parts:
            try:
                check_folder(folder, recipe, {})
            except MoesmithError as error:
                raise MoesmithError(f"{error} Or delete {folder}, or give the row another name.") from error
            made = convert(recipe, self.parent, data, folder, reuse=self.series.others(name))
            yield from self._measured(made, conversion, have)

        found = self._kept(name, self._work(recipe), converted if make else None, conversion.source.speed)
        if make and not self.spec.keep and name not in self.read_later:
            drop_models(folder)
        return found

    def finished(self, name: str) -> Run:
        """Return the finished run of a conversion.

        Raises:
            MoesmithError: it has not been made.
        """
        try:
            run = open_run(self.series.folder(name))
            run.check_finished()
        except MoesmithError as error:
            raise MoesmithError(f"the run of row {name!r} is not there", f"Make it first: --only {name}.") from error
        return run

    def _work(self, recipe: Recipe) -> list[Any]:
        """Return what a conversion's numbers depend on. A setting that was added later changes it where it acts."""
        found = recipe.same_work()
        for name, known in found.items():
            section = getattr(recipe, name)
            if isinstance(section, Section) and known != {"tokens": 0}:
                found[name] = section.used()
        if isinstance(recipe.method, Carver):
            found["carve"] = recipe.method.key(self.parent)
        versions = {step.name: step.version for step in steps_of(recipe) if step.version > 1}
        return [found, versions, source_digest(self.series.data, recipe.domains.names)]

    def dense(self) -> Row:
        """Return what was measured of the parent."""

        def made(have: Mapping[str, Any]) -> Parts:
            yield "facts", parent_facts(self.parent)
            yield from self.ruler.measure(self.parent.model, PARENT_TITLE, have)

        return self._kept(PARENT, PARENT, made) or {}

    def _measured(self, run: Run, conversion: Conversion, have: Mapping[str, Any]) -> Parts:
        yield "facts", facts(run, self.parent)
        if conversion.source.speed and SPEED not in have:  # before the model is in this process's memory too
            out = self.series.out / "speed" / f"{conversion.name}.json"
            yield SPEED, measure_speed(run, self.spec.measure.speed, conversion.source.speed, out)
        if not set(self.ruler.parts) <= have.keys():  # else it was timed alone, and need not be loaded
            model = cast(PreTrainedModel, run.load(self.parent))  # whole
            yield from self.ruler.measure(model, conversion.title, have)

    def _kept(
        self,
        name: str,
        work: Any,
        make: Callable[[Mapping[str, Any]], Parts] | None,
        quants: Collection[str] = (),
    ) -> Row | None:
        """Return a row's numbers from its file, or make those that it lacks and write each as it comes.

        Args:
            name: the row's.
            work: what it depends on besides text and parent.
            make: what makes the numbers, given those that are known.
            quants: types of the weights in which it is timed.
        """
        path, key = self.series.out / "rows" / f"{name}.json", self.key(work)
        found: Row = read_json(path) if path.is_file() else {}
        measured = found.get("measured", {})
        was_timed = timed(measured, self.spec.measure.speed, quants)
        whole = set(self.ruler.parts) <= measured.keys()
        if found.get("key") == key and found.get("done") and was_timed and whole:
            return found
        if make is None:
            return None
        say(f"== {name}")
        if found.get("key") != key:
            found = {"key": key, "measured": {}}
        if not was_timed:
            found["measured"].pop(SPEED, None)
        for part, value in make(found["measured"]):
            if part == "facts":
                found["facts"] = value
            else:
                found["measured"][part] = value
            write_record(path, found)
        write_record(path, found | {"done": True})
        return found


def compare(
    spec: str | Path | Spec,
    out: str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    only: str | Sequence[str] | None = (),
    reuse: str | Path | Sequence[str | Path] | None = (),
    jobs: int = 1,
    dtype: DType = AUTO,
    device: Device = AUTO,
) -> dict[str, Any]:
    """Convert a parent in many ways on one footing, and put the results into one table.

    Rows that are finished stay; the same call continues a comparison that was stopped. A row that cannot be converted
    says why in the table, and the others go on. The parent is loaded whole.

    Args:
        spec: a YAML file, or a :class:`Spec`.
        out: the comparison's folder.
        model: the parent, in place of the specification's.
        data: the data source, in place of the specification's.
        only: rows to convert now, as the specification names them, also several in one text with commas between
            them; the table shows all that are finished.
        reuse: other runs whose finished stages rows may take over.
        jobs: how many rows are made at the same time, each in a process with its own copy of the parent.
        dtype: what all rows compute in; a comparison that is continued keeps its own.
        device: where.

    Returns:
        ``comparison.json``.

    Raises:
        MoesmithError: the specification, a recipe or a file is wrong, before any work; or the folder holds something
            else.
    """
    read = [] if isinstance(spec, Spec) else [path_text("spec", spec)]
    spec = spec if isinstance(spec, Spec) else load_spec(spec)
    chosen = [name for each in several("only", only) for name in words(each)]
    if unknown := sorted(set(chosen) - {row.name for row in spec.rows}):
        known = ", ".join(row.name for row in spec.rows)
        raise MoesmithError(f"there is no row {unknown[0]!r}", f"Choose from {known}.")
    check_jobs(jobs)
    for name, given in {"model": model or spec.model, "data": data or spec.data}.items():
        if not given:
            raise MoesmithError(f"the comparison names no {name}", f"Give --{name}, or name it in the file.")
    template_of("moesmith.comparison", "page.html")  # what the page needs is missed now
    check_known(spec.settings)
    _recipes(spec)  # a setting that is wrong is refused before the parent is loaded
    begin = partial(_begun, spec, out, model or spec.model, data or spec.data, read, several("reuse", reuse), dtype)
    comparison = begin(device)
    series = comparison.series
    more: dict[str, Any] = {"title": spec.title, "data_digest": source_digest(series.data, spec.measure.names)}
    more |= {"spec": spec.model_dump(mode="json", exclude_defaults=True)}
    with series.opened(more):
        dense = comparison.dense()
        shown = list(comparison.conversions.values())
        found = {one.name: row for one in shown if (row := comparison.known(one)) is not None}

        def table() -> dict[str, Any]:
            return table_of(spec, dense, [(one, found[one.name]) for one in shown if one.name in found])

        now = [one for one in turns(shown) if not chosen or one.source.name in chosen]
        now = [one for one in now if one.name not in found]
        # rows that read what another row makes come after all others
        for some in ([one.name for one in now if bool(needed_by(one)) == last] for last in (False, True)):
            if min(jobs, len(some)) < 2:
                rows: Iterable[tuple[str, Row]] = ((name, comparison.made(name)) for name in some)
            else:
                rows = at_once(partial(_made, begin), some, jobs, device)
            for name, row in rows:
                if "refused" in row:
                    say(f"{name}: {row['refused']}")
                found[name] = row
                write_tables(series.out, series.write(table()))
        to_read = {needed_by(one) for one in shown if "refused" in found.get(one.name, {"refused": "not made"})}
        for name in () if spec.keep else comparison.read_later - to_read:
            drop_models(series.folder(name))
        result = series.write(table())
        write_tables(series.out, result)
        write_page(series.out, result)
    return result


def _recipes(spec: Spec) -> dict[str, Recipe]:
    """Load the recipe of every conversion that has one, by its name."""
    return {
        c.name: load_recipe(c.source.recipe, spec.budget, spec.settings_of(c))
        for c in spec.conversions()
        if c.source.recipe
    }


def _begun(
    spec: Spec,
    out: str | Path,
    model: str | Path,
    data: str | Path,
    read: Sequence[str],
    reuse: Sequence[str],
    dtype: DType,
    device: Device,
) -> Comparison:
    """Load the parent and read the text of a comparison."""
    runs = [row.run for row in spec.rows if row.run]
    series = Series("comparison", out, model, data, read=read, runs=runs, reuse=reuse, dtype=dtype, device=device)
    return Comparison(spec, series, Ruler(series.parent, series.data, spec.measure))


def _made(begin: Callable[[Device], Comparison], device: Device) -> Callable[[str], Row]:
    """Return what makes rows in a process of its own."""
    return begin(device).made


def needed_by(conversion: Conversion) -> str:
    """Return the name of the conversion whose finished run this one reads; empty if it reads none."""
    control = conversion.source.control
    return control.of if isinstance(control, Quantised) else ""


def turns(conversions: Sequence[Conversion]) -> list[Conversion]:
    """Order conversions to be made: of every row the first, then the second; what is stopped has a whole table."""
    seen: Counter[str] = Counter()
    order = []
    for conversion in conversions:
        order.append(seen[conversion.source.name])
        seen[conversion.source.name] += 1
    return [conversion for _, conversion in sorted(zip(order, conversions, strict=True), key=lambda pair: pair[0])]


def drop_models(folder: Path) -> None:
    """Delete a run's models, its benchmarks' files and carvings; what other runs can use (text, statistics) stays."""
    gone = [folder / "model", folder / "stock", folder / "bench"]
    for path in folder.glob(f"stages/*/{MANIFEST}"):
        if path.parent.name == "export" or (path.parent / "carving.json").is_file():
            gone.append(path.parent)
    for path in gone:
        if path.is_dir():
            hidden = hidden_beside(path)
            os.replace(path, hidden / path.name)  # a kill from here on leaves what the run's own sweep removes
            shutil.rmtree(hidden)
