"""A comparison's table: every row beside the parent and beside the baseline, with intervals; CSV, Markdown, terminal.

A group's number is the geometric mean over its domains of perplexity, divided by the parent's on the same windows.
Tests are paired: the same windows, the same items. Conversions that differ in their seed alone are averaged window by
window, and ``spread`` is the standard deviation of their numbers.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesmith.comparison.spec import Conversion, Spec
from moesmith.comparison.statistics import interval, mean, p_value
from moesmith.console import duration, show_table
from moesmith.files.artefact import write_text

WIKITEXT = "wikitext2"  # the name of its windows
Measured = Mapping[str, Any]
Strata = list[list[float]]


def table_of(
    spec: Spec, dense: Mapping[str, Any], found: Sequence[tuple[Conversion, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Make the table's rows.

    Args:
        spec: the comparison.
        dense: ``facts`` and ``measured`` of the parent.
        found: the same of every conversion, or why it was ``refused``.

    Returns:
        ``groups``, ``tasks`` and ``metric`` (of tasks), ``baseline``, and ``rows``: title, facts, and by quantity its
        number with ``low`` and ``high``, and ``p`` against the baseline.
    """
    families: dict[str, list[tuple[Conversion, Mapping[str, Any]]]] = {}
    for conversion, result in found:
        families.setdefault(conversion.row, []).append((conversion, result))
    measured = {
        name: [result["measured"] for _, result in family if "measured" in result] for name, family in families.items()
    }
    base = spec.baseline or spec.rows[0].name
    bases = {f[0][0].variant: measured[name] for name, f in families.items() if f[0][0].source.name == base}
    rows = [_row(spec, "dense parent", dense["facts"], [dense["measured"]], dense["measured"], None)]
    for name, family in families.items():
        title = family[0][0].title
        reasons = [result["refused"] for _, result in family if "refused" in result]
        if not measured[name]:
            rows.append({"title": title, "refused": reasons[0]})
            continue
        facts = next(result["facts"] for _, result in family if "facts" in result)
        beside = bases.get(family[0][0].variant) or next(iter(bases.values()), None)
        beside = beside if beside and beside is not measured[name] else None
        rows.append(_row(spec, title, facts, measured[name], dense["measured"], beside) | {"name": name})
    return {"groups": list(spec.measure.domains), "tasks": spec.measure.tasks, "baseline": base, "rows": rows}


def _row(
    spec: Spec,
    title: str,
    facts: Mapping[str, Any],
    measured: Sequence[Measured],
    dense: Measured,
    against: Sequence[Measured] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"title": title, "seeds": len(measured), **facts}
    row["groups"] = {
        group: _perplexity(measured, names, dense, against) for group, names in spec.measure.domains.items()
    }
    if spec.measure.wikitext2:
        row[WIKITEXT] = _perplexity(measured, [WIKITEXT], dense, against)
    if spec.measure.lambada:
        row["lambada"] = _compared([[one["lambada"]["right"]] for one in measured], None, None, float)
        losses = [one["lambada"]["loss"] for one in measured]
        row["lambada"]["perplexity"] = math.exp(mean(losses))
    if spec.measure.tasks:
        answers = [_answers(one) for one in measured]
        row["accuracy"] = _compared(answers, None, None if against is None else [_answers(o) for o in against], float)
        row["by task"] = dict(zip(measured[0]["tasks"], map(mean, zip(*answers, strict=True)), strict=True))
    return row


def _perplexity(
    measured: Sequence[Measured], names: Sequence[str], dense: Measured, against: Sequence[Measured] | None
) -> dict[str, float]:
    """Compare the geometric mean of some texts' perplexities with the parent's, and name it."""

    def windows(one: Measured) -> Strata:
        return [one["windows"][name] for name in names]

    mine = [windows(one) for one in measured]
    others = None if against is None else [windows(one) for one in against]
    found = _compared(mine, windows(dense), others, math.exp)
    return found | {"perplexity": math.exp(statistics.fmean(map(mean, mine)))}


def _answers(one: Measured) -> Strata:
    return [scores["acc"] for scores in one["tasks"].values()]


def _compared(
    mine: Sequence[Strata], dense: Strata | None, others: Sequence[Strata] | None, scale: Callable[[float], float]
) -> dict[str, float]:
    """Estimate a mean over strata on a scale, less the parent's where one is given; test it against the baseline.

    Args:
        mine: observations, for each seed.
        dense: the parent's.
        others: the baseline's, for each seed.
        scale: from the mean to the number in the table.
    """
    less = [_differences(strata, dense) for strata in mine]
    pooled = _pooled(less)
    estimate = interval(pooled)
    found = {"value": scale(estimate.mean), "low": scale(estimate.low), "high": scale(estimate.high)}
    if len(less) > 1:
        found["spread"] = statistics.stdev(scale(mean(strata)) for strata in less)
    if others is not None:
        found["p"] = p_value(_differences(_pooled(mine), _pooled(others)))
    return found


def _pooled(seeds: Sequence[Strata]) -> Strata:
    """Average several seeds, observation by observation."""
    return [list(np.mean(parts, axis=0)) for parts in zip(*seeds, strict=True)]


def _differences(strata: Strata, others: Strata | None) -> Strata:
    if others is None:
        return strata
    return [list(np.subtract(one, other)) for one, other in zip(strata, others, strict=True)]


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def quality(result: Mapping[str, Any]) -> list[Column]:
    """List the columns that say how good a row is: a title, and what to take from a row."""
    rows = [row for row in result["rows"] if "refused" not in row]
    found: list[Column] = [("", lambda row: row["title"])]
    for group in result["groups"]:
        found += [(f"{group}", _text(group)), ("× parent", _ratio(group))]
    if any("p" in row["groups"][result["groups"][0]] for row in rows):
        found.append((f"p against {result['baseline']}", lambda row: _p(row["groups"][result["groups"][0]])))
    if any(WIKITEXT in row for row in rows):
        found.append(("WikiText-2", lambda row: f"{row[WIKITEXT]['perplexity']:,.2f}"))
    if any("lambada" in row for row in rows):
        found.append(("LAMBADA", lambda row: f"{row['lambada']['perplexity']:,.2f}"))
        found.append(("LAMBADA acc", lambda row: f"{100 * row['lambada']['value']:.1f} %"))
    if any("accuracy" in row for row in rows):
        found.append((f"{len(result['tasks'])} tasks, acc", _accuracy))
    return found


COST: list[Column] = [
    ("", lambda row: row["title"]),
    ("FFN active", lambda row: f"{100 * row['ffn_active']:.1f} %"),
    ("active", lambda row: f"{row['parameters_active'] / 1e6:,.1f} M"),
    ("total", lambda row: f"{row['parameters_total'] / 1e6:,.1f} M"),
    ("on disk", lambda row: f"{row['bytes'] / 1e6:,.1f} MB"),
    ("calibration tokens", lambda row: f"{row['calibration_tokens']:,}"),
    ("training tokens", lambda row: f"{row['training_tokens']:,}"),
    ("time", lambda row: duration(row["seconds"]) if row["seconds"] else "–"),
    ("peak memory", lambda row: f"{row['memory'] / 2**30:.1f} GiB" if row["memory"] else "–"),
]


def _text(group: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row['groups'][group]['perplexity']:,.2f}"


def _ratio(group: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        found = row["groups"][group]
        if found["low"] == found["high"]:  # the parent beside itself
            return f"{found['value']:.3f}"
        spread = f" ± {found['spread']:.3f}" if "spread" in found else ""
        return f"{found['value']:.3f}{spread} ({found['low']:.3f}–{found['high']:.3f})"

    return cell


def _accuracy(row: Mapping[str, Any]) -> str:
    found = row["accuracy"]
    return f"{100 * found['value']:.1f} % ({100 * found['low']:.1f}–{100 * found['high']:.1f})"


def _p(found: Mapping[str, float]) -> str:
    return "–" if "p" not in found else "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"


def cells(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return two tables as text, quality and cost: head and body of each.

    A refused row has its reason in the second cell of the first, and no place in the second.
    """
    tables = []
    for shown in (quality(result), COST):
        body = []
        for row in result["rows"]:
            if "refused" not in row:
                body.append([take(row) for _, take in shown])
            elif shown is not COST:
                body.append([row["title"], f"refused: {row['refused']}", *[""] * (len(shown) - 2)])
        tables.append(([title for title, _ in shown], body))
    return tables


def write_tables(out: Path, result: Mapping[str, Any]) -> None:
    """Write ``comparison.csv`` and ``comparison.md``."""
    parts = []
    for head, body in cells(result):
        lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in body]
        parts.append("\n".join(lines) + "\n")
    write_text(out / "comparison.md", "\n".join(parts))
    flat = [_flat(row) for row in result["rows"]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(out / "comparison.csv", text.getvalue())


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with one number per column: ``groups.seen.value``, ``by task.boolq``."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{part}": x for part, x in _flat(value).items()}
        else:
            found[name] = value
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    for title, (head, body) in zip((result["title"], "sizes, text, time and memory"), cells(result), strict=True):
        show_table(title, head, body)
