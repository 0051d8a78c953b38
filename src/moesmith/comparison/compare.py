"""Convert and measure every row of a comparison, one after the other, and write its table and page.

OUT/runs/<row>: the conversions; OUT/rows/<row>.json: what was measured of each; OUT/comparison.json, .csv, .md, .html.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from moesmith.arguments import path_of, path_text, refuse_many_processes, several
from moesmith.comparison.facts import facts, parent_facts
from moesmith.comparison.measure import Ruler
from moesmith.comparison.page import write_page
from moesmith.comparison.spec import PARENT, Conversion, Spec, load_spec
from moesmith.comparison.table import PARENT_TITLE, table_of, write_tables
from moesmith.console import log_to, say
from moesmith.conversion.convert import convert
from moesmith.data.text import source_digest
from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, digest, hidden_beside, read_json, sweep, write_json
from moesmith.files.lock import HIDDEN, LOCK, folder_lock
from moesmith.files.outputs import check_place, existing, real
from moesmith.parent.compute import AUTO, Device, DType, keep_dtype, long_name, named
from moesmith.parent.load import Parent, load_parent
from moesmith.report.page import template_of
from moesmith.run.folder import Run, open_run
from moesmith.run.pipeline import check_folder, check_reuse
from moesmith.run.recipe import Recipe, check_known, load_recipe

FORMAT = 1
RESULT = "comparison.json"
LOG = "compare.log"
Row = dict[str, Any]  # key, facts, measured, done
Parts = Iterator[tuple[str, Any]]


@dataclass
class Comparison:
    """A comparison in a folder.

    Attributes:
        spec: what is compared.
        out: its folder.
        parent: of every row.
        data: where all text comes from.
        ruler: what is measured.
    """

    spec: Spec
    out: Path
    parent: Parent
    data: str
    ruler: Ruler

    def key(self, work: Any) -> str:
        """Return a digest of what a row's numbers depend on."""
        found = {"work": work, "text": self.ruler.digest, "parent": self.parent.digest}
        return digest(found | {"compute": long_name(self.parent.dtype)})

    def row(self, conversion: Conversion, recipe: Recipe | None, done: Sequence[Path], *, make: bool) -> Row | None:
        """Return what was measured of a row, after converting if need be; ``None`` if it is not to be made.

        Args:
            conversion: the row's.
            recipe: its recipe; ``None`` for a finished run or a control.
            done: runs whose stages may be used.
            make: whether to convert and measure what is not known.

        Raises:
            MoesmithError: the row cannot be made.
        """
        name, title, control = conversion.name, conversion.title, conversion.source.control
        if control is not None:

            def controlled(have: Mapping[str, Any]) -> Parts:
                with control.model(self.parent) as model:
                    yield "facts", control.facts(self.parent)
                    yield from self.ruler.measure(model, title, have)

            return self._kept(name, control.model_dump(), controlled if make else None)
        if recipe is None:
            run = open_run(conversion.source.run)
            run.check_finished()
            if run.inputs["model_digest"] != self.parent.digest:
                raise MoesmithError(f"{run.folder} was made from another parent", "Give a run of the comparison's own.")
            key = run.manifest("export")["key"]
            return self._kept(name, key, (lambda have: self._measured(run, title, have)) if make else None)
        folder = self.out / "runs" / name

        def converted(have: Mapping[str, Any]) -> Parts:
            try:
                check_folder(folder, recipe, {})
            except MoesmithError as error:
                raise MoesmithError(f"{error} Or delete {folder}, or give the row another name.") from error
            made = convert(recipe, self.parent, self.data, folder, reuse=[str(path) for path in done])
            yield from self._measured(made, title, have)

        work = [recipe.same_work(), source_digest(self.data, recipe.domains.names)]
        found = self._kept(name, work, converted if make else None)
        if make and not self.spec.keep:
            drop_models(folder)
        return found

    def dense(self) -> Row:
        """Return what was measured of the parent."""

        def made(have: Mapping[str, Any]) -> Parts:
            yield "facts", parent_facts(self.parent)
            yield from self.ruler.measure(self.parent.model, PARENT_TITLE, have)

        return self._kept(PARENT, PARENT, made) or {}

    def _measured(self, run: Run, title: str, have: Mapping[str, Any]) -> Parts:
        yield "facts", facts(run, self.parent)
        yield from self.ruler.measure(cast(PreTrainedModel, run.load(self.parent)), title, have)  # loaded whole

    def _kept(self, name: str, work: Any, make: Callable[[Mapping[str, Any]], Parts] | None) -> Row | None:
        """Return a row's numbers from its file, or make those that it lacks and write each as it comes."""
        path, key = self.out / "rows" / f"{name}.json", self.key(work)
        found: Row = read_json(path) if path.is_file() else {}
        if found.get("key") == key and found.get("done"):
            return found
        if make is None:
            return None
        say(f"== {name}")
        if found.get("key") != key:
            found = {"key": key, "measured": {}}
        for part, value in make(found["measured"]):
            if part == "facts":
                found["facts"] = value
            else:
                found["measured"][part] = value
            write_json(path, found)
        write_json(path, found | {"done": True})
        return found


def compare(
    spec: str | Path | Spec,
    out: str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    only: str | Sequence[str] | None = (),
    reuse: str | Path | Sequence[str | Path] | None = (),
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
        only: rows to convert now, as the specification names them; the table shows all that are finished.
        reuse: other runs whose finished stages rows may take over.
        dtype: what all rows compute in; a comparison that is continued keeps its own.
        device: where.

    Returns:
        ``comparison.json``.

    Raises:
        MoesmithError: the specification, a recipe or a file is wrong, before any work; or the folder holds something
            else.
    """
    refuse_many_processes()
    read = [] if isinstance(spec, Spec) else [path_text("spec", spec)]
    spec = spec if isinstance(spec, Spec) else load_spec(spec)
    chosen, others = several("only", only), several("reuse", reuse)
    if unknown := sorted(set(chosen) - {row.name for row in spec.rows}):
        known = ", ".join(row.name for row in spec.rows)
        raise MoesmithError(f"there is no row {unknown[0]!r}", f"Choose of {known}.")
    template_of("moesmith.comparison", "page.html")  # what the page needs is missed now
    source, text = path_text("model", model or spec.model), path_text("data", data or spec.data)
    out = path_of("out", out)
    runs = [run for run in (*others, *(row.run for row in spec.rows)) if run]
    runs = [run for run in runs if not real(Path(run)).is_relative_to(real(out))]  # its own may be rows again
    check_place(out, existing(source, text, *read, *runs))
    before, reused = _begun(out), check_reuse(others)
    check_known(spec.settings)
    recipes = {
        c.name: load_recipe(c.source.recipe, spec.budget, spec.settings_of(c)) if c.source.recipe else None
        for c in spec.conversions()
    }
    kept = named(before["compute"]) if before else None
    parent = load_parent(source, keep_dtype(f"{out} holds a comparison", kept, dtype), device=device, half=False)
    if before and before["parent"] != parent.digest:
        raise MoesmithError(f"{out} holds a comparison of another parent", "Give another --out.")
    comparison = Comparison(spec, out, parent, text, Ruler(parent, text, spec.measure))
    head = {"format": FORMAT, "title": spec.title, "model": source, "parent": parent.digest, "data": text}
    head |= {"compute": long_name(parent.dtype), "device": str(parent.device)}
    head |= {"data_digest": source_digest(text, spec.measure.names)}
    head |= {"spec": spec.model_dump(mode="json", exclude_defaults=True)}
    with folder_lock(out):
        for name in ("rows", "figures"):
            sweep(out / name)
        write_json(out / RESULT, before | head)
        with log_to(out / LOG):
            dense = comparison.dense()
            found: list[tuple[Conversion, Row]] = []
            for conversion in spec.conversions():
                now = not chosen or conversion.source.name in chosen
                done = [path.parent for path in sorted(out.glob("runs/*/run.json"))]
                done = [path for path in done if path.name != conversion.name]
                try:
                    row = comparison.row(conversion, recipes[conversion.name], [*done, *reused], make=now)
                except MoesmithError as error:
                    if not now:
                        continue
                    say(f"{conversion.title}: {error}")
                    row = {"refused": str(error)}
                if row is not None:
                    found.append((conversion, row))
                if now:
                    _write(out, head | table_of(spec, dense, found))
            result = head | table_of(spec, dense, found)
            _write(out, result)
            write_page(out, result)
    return result


def _write(out: Path, result: dict[str, Any]) -> None:
    write_json(out / RESULT, result)
    write_tables(out, result)


def _begun(out: Path) -> dict[str, Any]:
    """Read what a folder's comparison began with; empty for a new one.

    Raises:
        MoesmithError: the folder holds something else.
    """
    if (out / RESULT).is_file():
        found = read_json(out / RESULT)
        if isinstance(found, dict) and {"format", "compute", "parent"} <= found.keys():
            if found["format"] > FORMAT:
                raise MoesmithError(f"{out} was written by a newer moesmith", "Upgrade moesmith.")
            return found
    elif not out.exists() or (out.is_dir() and all(map(_just_begun, out.iterdir()))):
        return {}
    raise MoesmithError(f"{out} exists and holds no comparison", "Give another --out.")


def _just_begun(path: Path) -> bool:
    """Whether a file is what a comparison that was just begun can leave."""
    half = path.name.startswith((f".{RESULT}.", f"{LOCK}.")) and path.name.endswith(".tmp")
    return path.name in HIDDEN or half


def drop_models(folder: Path) -> None:
    """Delete a run's models and carvings; what other runs can use of it (text, statistics) stays."""
    gone = [folder / "model", folder / "stock"]
    for path in folder.glob(f"stages/*/{MANIFEST}"):
        if path.parent.name == "export" or (path.parent / "carving.json").is_file():
            gone.append(path.parent)
    for path in gone:
        if path.is_dir():
            hidden = hidden_beside(path)
            os.replace(path, hidden / path.name)  # a kill from here on leaves what the run's own sweep removes
            shutil.rmtree(hidden)
