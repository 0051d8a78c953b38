"""Convert and measure every row of a comparison, one after the other, and write its table and page.

OUT/runs/<row>: the conversions; OUT/rows/<row>.json: what was measured of each; OUT/comparison.json, .csv, .md, .html.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesmith.arguments import path_of, path_text, refuse_many_processes, several
from moesmith.comparison.controls import Control
from moesmith.comparison.facts import facts, parent_facts
from moesmith.comparison.measure import Ruler
from moesmith.comparison.page import write_page
from moesmith.comparison.spec import Conversion, Spec, load_spec
from moesmith.comparison.table import table_of, write_tables
from moesmith.console import log_to, say
from moesmith.conversion.convert import convert
from moesmith.data.text import load_domains, source_digest
from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, digest, read_json, write_json
from moesmith.files.lock import HIDDEN, folder_lock
from moesmith.files.outputs import check_place, existing
from moesmith.parent.compute import AUTO, Device, DType, long_name, named
from moesmith.parent.load import Parent, load_parent
from moesmith.run.folder import Run, open_run
from moesmith.run.pipeline import check_reuse
from moesmith.run.recipe import Recipe, load_recipe

FORMAT = 1
RESULT = "comparison.json"
PARENT = "dense parent"


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
        facts = {"work": work, "measure": self.spec.measure.model_dump(mode="json"), "text": self.ruler.digest}
        return digest(facts | {"parent": self.parent.digest, "compute": long_name(self.parent.dtype)})

    def row(self, conversion: Conversion, recipe: Recipe | None, done: Sequence[Path]) -> dict[str, Any]:
        """Return what was measured of a row, after converting if need be.

        Args:
            conversion: the row's.
            recipe: its recipe; ``None`` for a finished run or a control.
            done: runs whose stages may be used.
        """
        control, folder = conversion.source.control, Path(conversion.source.run)
        if control is not None:
            return self._kept(conversion.name, control.model_dump(), lambda: self._control(conversion.title, control))
        if recipe is None:
            key = open_run(folder).manifest("export")["key"]
            return self._kept(conversion.name, key, lambda: self._measured(conversion.title, self._finished(folder)))
        folder = self.out / "runs" / conversion.name

        def made() -> dict[str, Any]:
            run = convert(recipe, self.parent, self.data, folder, reuse=[str(path) for path in done])
            return self._measured(conversion.title, run)

        names = recipe.domains.names or [domain.name for domain in load_domains(self.data, None)]
        found = self._kept(conversion.name, [recipe.same_work(), source_digest(self.data, names)], made)
        if not self.spec.keep:
            drop_models(folder)
        return found

    def dense(self) -> dict[str, Any]:
        """Return what was measured of the parent."""

        def made() -> dict[str, Any]:
            return {"facts": parent_facts(self.parent), "measured": self.ruler.measure(self.parent.decoder, PARENT)}

        return self._kept("parent", PARENT, made)

    def _kept(self, name: str, work: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row's numbers from its file, or make them and write it."""
        path, key = self.out / "rows" / f"{name}.json", self.key(work)
        found = read_json(path) if path.is_file() else {}
        if found.get("key") != key:
            say(f"== {name}")
            found = {"key": key} | make()
            path.parent.mkdir(exist_ok=True)
            write_json(path, found)
        return found

    def _measured(self, title: str, run: Run) -> dict[str, Any]:
        return {"facts": facts(run, self.parent), "measured": self.ruler.measure(run.load(self.parent), title)}

    def _control(self, title: str, control: Control) -> dict[str, Any]:
        with control.model(self.parent) as model:
            return {"facts": control.facts(self.parent), "measured": self.ruler.measure(model, title)}

    def _finished(self, folder: Path) -> Run:
        run = open_run(folder)
        run.check_finished()
        if run.inputs["model_digest"] != self.parent.digest:
            raise MoesmithError(f"{folder} was made from another parent", "Give a run of the comparison's own.")
        return run


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
    says why in the table, and the others go on.

    Args:
        spec: a YAML file, or a :class:`Spec`.
        out: the comparison's folder.
        model: the parent, in place of the specification's.
        data: the data source, in place of the specification's.
        only: rows to convert now; the table shows all that are finished.
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
    chosen, names = several("only", only), spec
    spec = spec if isinstance(spec, Spec) else load_spec(spec, chosen)
    source, text = path_text("model", model or spec.model), path_text("data", data or spec.data)
    out = path_of("out", out)
    check_place(out, existing(source, text, *([] if isinstance(names, Spec) else [str(names)])))
    before, others = _begun(out), check_reuse(several("reuse", reuse))
    recipes = {
        c.name: load_recipe(c.source.recipe, spec.budget, spec.settings_of(c)) if c.source.recipe else None
        for c in spec.conversions()
    }
    parent = load_parent(source, named(before["compute"]) if before else dtype, device=device)
    if before and before["parent"] != parent.digest:
        raise MoesmithError(f"{out} holds a comparison of another parent", "Give another --out.")
    comparison = Comparison(spec, out, parent, text, Ruler(parent, text, spec.measure))
    with folder_lock(out), log_to(out / "compare.log"):
        head = {"format": FORMAT, "title": spec.title, "model": source, "parent": parent.digest, "data": text}
        head |= {"compute": long_name(parent.dtype), "device": str(parent.device)}
        head |= {
            "data_digest": source_digest(text, spec.measure.names),
            "spec": spec.model_dump(mode="json", exclude_defaults=True),
        }
        write_json(out / RESULT, before | head)
        dense = comparison.dense()
        found: list[tuple[Conversion, dict[str, Any]]] = []
        for conversion in spec.conversions():
            recipe, kept = recipes[conversion.name], out / "rows" / f"{conversion.name}.json"
            if chosen and conversion.source.name not in chosen:
                if kept.is_file():
                    found.append((conversion, read_json(kept)))
                continue
            done = [path.parent for path in sorted(out.glob("runs/*/run.json")) if path.parent.name != conversion.name]
            try:
                found.append((conversion, comparison.row(conversion, recipe, [*done, *others])))
            except MoesmithError as error:
                say(f"{conversion.title}: {error}")
                found.append((conversion, {"refused": str(error)}))
            result = head | table_of(spec, dense, found)
            write_json(out / RESULT, result)
            write_tables(out, result)
        result = head | table_of(spec, dense, found)
        write_json(out / RESULT, result)
        write_tables(out, result)
        write_page(out, result)
    return result


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
    elif not out.exists() or (out.is_dir() and all(path.name in HIDDEN for path in out.iterdir())):
        return {}
    raise MoesmithError(f"{out} exists and holds no comparison", "Give another --out.")


def drop_models(folder: Path) -> None:
    """Delete a run's models and carvings; what other runs can use of it (text, statistics) stays."""
    for path in (folder / "model", folder / "stock"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"stages/*/{MANIFEST}"):
        if path.parent.name == "export" or (path.parent / "carving.json").is_file():
            shutil.rmtree(path.parent, ignore_errors=True)
