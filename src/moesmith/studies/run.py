"""Run a study and write its page: STUDY.json, STUDY.md, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moesmith.arguments import several
from moesmith.comparison.jobs import at_once, check_jobs
from moesmith.console import markdown, plain, show_table, show_text
from moesmith.conversion.series import Series
from moesmith.data.text import source_digest
from moesmith.errors import MoesmithError, first_fault
from moesmith.files.parse import parse_yaml
from moesmith.files.write import write_text
from moesmith.parent.compute import AUTO, Device, DType
from moesmith.report import style
from moesmith.run.recipe import check_known
from moesmith.run.settings import Section
from moesmith.studies.bench import Bench
from moesmith.studies.study import Found, Study, find

OWN = "study."  # settings of a study itself


def study(
    name: str,
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: str | Sequence[str] | None = (),
    budget: str | None = None,
    reuse: str | Path | Sequence[str | Path] | None = (),
    jobs: int = 1,
    dtype: DType = AUTO,
    device: Device = AUTO,
) -> dict[str, Any]:
    """Answer one of the papers' questions on a parent: convert, measure, write tables, figures and a page.

    The same call continues a study that was stopped. The parent is loaded whole.

    Args:
        name: of the study; :func:`moesmith.studies.study.studies` lists them.
        model: the parent.
        data: where all text comes from.
        out: the study's folder.
        settings: ``section.key=value`` of every conversion whose recipe has it, and ``study.key=value``.
        budget: of every conversion; the study's own if left out.
        reuse: runs whose finished stages conversions may take over.
        jobs: how many conversions are made at the same time, each in a process with its own copy of the parent; what
            follows from their results comes after them.
        dtype: what all compute in; a study that is continued keeps its own.
        device: where.

    Returns:
        ``study.json``.

    Raises:
        MoesmithError: the study, a setting or a file is wrong, or the folder holds something else.
    """
    check_jobs(jobs)
    kind, given = find(name), several("settings", settings)
    asked = kind(_options(kind, [s for s in given if s.startswith(OWN)]))
    mine = [s for s in given if not s.startswith(OWN)]
    check_known(mine)
    style.new_figure(1, 1)  # without matplotlib there is no page; said before any work
    budget = budget or kind.budget
    begin = partial(_begun, [*kind.settings, *mine], budget, out, model, data, several("reuse", reuse), dtype)
    bench = begin(device)
    series = bench.series
    if series.before and series.before.get("study") != name:
        raise MoesmithError(f"{series.out} holds the study {series.before.get('study')}", "Give another --out.")
    more = {"study": name, "settings": given, "budget": budget}
    with series.opened(more | {"data_digest": source_digest(series.data)}):
        planned = [one.name for one in asked.conversions()]
        if min(jobs, len(planned)) > 1:
            for _, refused in at_once(partial(_made, begin, asked), planned, jobs, device):
                if refused:
                    raise MoesmithError(refused)
        found = asked.measure(bench)
        result = series.write({"found": found, "conversions": bench.runs})
        _write(series.out, asked, result)
    return result


def _begun(
    settings: Sequence[str],
    budget: str,
    out: str | Path,
    model: str | Path,
    data: str | Path,
    reuse: Sequence[str],
    dtype: DType,
    device: Device,
) -> Bench:
    """Load the parent of a study."""
    return Bench(Series("study", out, model, data, reuse=reuse, dtype=dtype, device=device), settings, budget)


def _made(begin: Callable[[Device], Bench], asked: Study, device: Device) -> Callable[[str], str]:
    """Return what makes planned conversions in a process of its own, and says why one cannot be made."""
    bench, planned = begin(device), {one.name: one for one in asked.conversions()}

    def made(name: str) -> str:
        try:
            bench.make(planned[name])
        except MoesmithError as error:
            return str(error)
        return ""

    return made


def _options(kind: type[Study], given: Sequence[str]) -> Section:
    """Read ``study.key=value``, values as YAML has them.

    Raises:
        MoesmithError: a setting that the study does not have, or a value that does not fit.
    """

    values: dict[str, Any] = {}
    for setting in given:
        key, _, value = setting.removeprefix(OWN).partition("=")
        if key not in kind.Options.model_fields:
            known = ", ".join(OWN + field for field in kind.Options.model_fields) or "none"
            raise MoesmithError(f"study {kind.name} has no setting '{OWN}{key}'", f"It has {known}.")
        values[key] = parse_yaml(value, setting, "Write a number, a word or [a, b].")
    try:
        return kind.Options.model_validate(values)
    except ValidationError as error:
        raise MoesmithError(OWN + ": ".join(first_fault(error)), "See docs/commands/study.md.") from error


def _write(out: Path, asked: Study, result: Mapping[str, Any]) -> None:
    """Write figures and ``study.md``."""
    (out / "figures").mkdir(exist_ok=True)
    names = []
    for name, figure in asked.figures(result["found"]).items():
        style.save_png(figure, out / "figures" / f"{name}.png")
        names.append(name)
    write_text(out / "study.md", page(asked, result, names))


def page(asked: Study, result: Mapping[str, Any], figures: Sequence[str]) -> str:
    """Write a study's page in Markdown."""
    given = "".join(f" --set '{plain(setting)}'" for setting in result["settings"])
    budget = "" if result["budget"] == asked.budget else f" --budget {result['budget']}"
    source = plain(" ".join(f"--model {result['model']} --data {result['data']}".split()))
    parts = [
        f"# {asked.title}",
        f"**Question** ({asked.paper}). {asked.question}",
        f"**Expected.** {asked.expected}",
        f"    moesmith study {asked.name} {source}{budget}{given} --out RUN",
        f"Computed in {result['compute']} on {result['device']}.",
    ]
    parts += [f"### {table.title}\n\n{markdown(table.head, table.body)}" for table in asked.tables(result["found"])]
    parts += [f"![{name.replace('-', ' ')}](figures/{name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def show(result: Mapping[str, Any]) -> None:
    """Print a study's tables."""
    asked = find(result["study"])
    found: Found = result["found"]
    for table in asked(asked.Options()).tables(found):
        show_table(table.title, list(table.head), [list(row) for row in table.body])
    show_text(f"question: {asked.question}")
    show_text(f"expected: {asked.expected}")
