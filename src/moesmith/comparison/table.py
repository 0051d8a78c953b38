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

from moesmith.comparison.measure import is_written, right
from moesmith.comparison.quantised import Quantised
from moesmith.comparison.spec import WIKITEXT, Conversion, Spec
from moesmith.comparison.speed import SPEED, speeds
from moesmith.comparison.statistics import interval, mean, p_value
from moesmith.console import duration, inline, markdown, show_table, show_text
from moesmith.files.write import write_text

PARENT_TITLE = "dense parent"
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
        ``groups``, ``tasks``, those of them that are ``written`` (if any), ``baseline`` (a row's title), and ``rows``:
        title, facts, and by quantity its number with ``low`` and ``high``, and ``p`` against the baseline; ``source``
        is the title that variants of a row share; ``speed`` what :func:`speeds` says of it.
    """
    families: dict[str, list[tuple[Conversion, Mapping[str, Any]]]] = {}
    for conversion, result in found:
        families.setdefault(conversion.row, []).append((conversion, result))
    measured = {
        name: [result["measured"] for _, result in family if "measured" in result] for name, family in families.items()
    }
    base = next(row for row in spec.rows if row.name == spec.base)
    bases = [(f[0][0].varied, measured[name]) for name, f in families.items() if f[0][0].source.name == base.name]
    alone = len({c.row for c in spec.conversions() if c.source.name == base.name}) == 1
    fast = _speeds(found)
    rows = [_row(spec, PARENT_TITLE, dense["facts"], [dense["measured"]], dense["measured"], None)]
    for name, family in families.items():
        first, title = family[0][0], family[0][0].title
        reasons = [result["refused"] for _, result in family if "refused" in result]
        if not measured[name]:
            rows.append({"title": title, "refused": reasons[0]})
            continue
        if reasons:
            title += f" ({len(measured[name])} of {len(family)} seeds)"
        facts = next(result["facts"] for _, result in family if "facts" in result)
        beside = None if first.source.name == base.name else _beside(first.varied, bases, alone=alone)
        source = first.source.title or first.source.name
        rows.append(
            {"name": name, "source": source} | _row(spec, title, facts, measured[name], dense["measured"], beside)
        )
        if timed := [fast[conversion.name] for conversion, _ in family if conversion.name in fast]:
            rows[-1][SPEED] = timed[0]
    if "" in fast:
        rows[0][SPEED] = fast[""]
    written = [task for task in spec.measure.tasks if is_written(dense["measured"].get(f"task {task}", ()))]
    return {
        "groups": list(spec.measure.domains),
        "tasks": spec.measure.tasks,
        **({"written": written} if written else {}),
        "baseline": base.title or base.name,
        "rows": rows,
    }


def _speeds(found: Sequence[tuple[Conversion, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the speed of every conversion that was timed, or is another one in fewer bits, and the parent's."""
    timed = {conversion.name: row["measured"][SPEED] for conversion, row in found if SPEED in row.get("measured", {})}
    fewer = {one.name: one.source.control for one, _ in found}
    return speeds(timed, {name: (q.of, q.quant) for name, q in fewer.items() if isinstance(q, Quantised)})


def _beside(
    varied: Mapping[str, Any], bases: Sequence[tuple[Mapping[str, Any], list[Measured]]], *, alone: bool
) -> list[Measured] | None:
    """Return the baseline's conversions of a row's variant; none where several variants fit, or none does."""
    fit = [seeds for other, seeds in bases if alone or all(varied.get(key) == value for key, value in other.items())]
    return fit[0] if len(fit) == 1 and fit[0] else None


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
        row["lambada"]["perplexity"] = _exp(mean([one["lambada"]["loss"] for one in measured]))
    if spec.measure.health:
        every = [one["health"] for one in measured]
        row["health"] = {name: statistics.fmean(one[name] for one in every) for name in every[0]}
    names = [f"task {name}" for name in spec.measure.tasks]  # in this order in every row
    if names:
        for title, written in (("accuracy", False), ("written", True)):
            if some := [name for name in names if is_written(measured[0][name]) == written]:
                mine, others = ([_answers(one, some) for one in many or ()] for many in (measured, against))
                row[title] = _compared(mine, None, others or None, float)
        answers = [_answers(one, names) for one in measured]
        means = [statistics.fmean(map(mean, ([part] for part in parts))) for parts in zip(*answers, strict=True)]
        row["by task"] = {name.removeprefix("task "): value for name, value in zip(names, means, strict=True)}
    return row


def _perplexity(
    measured: Sequence[Measured], names: Sequence[str], dense: Measured, against: Sequence[Measured] | None
) -> dict[str, float]:
    """Compare the geometric mean of some texts' perplexities with the parent's, and name it."""

    def windows(one: Measured) -> Strata:
        return [one["windows"][name] for name in names]

    mine = [windows(one) for one in measured]
    others = None if against is None else [windows(one) for one in against]
    found = _compared(mine, windows(dense), others, _exp)
    return found | {"perplexity": _exp(statistics.fmean(map(mean, mine)))}


def _answers(one: Measured, names: Sequence[str]) -> Strata:
    return [right(one[name]) for name in names]


def _exp(x: float) -> float:
    """Compute e^x; infinite where it overflows, as ``evaluation.perplexity`` does."""
    return math.exp(x) if x < 709 else math.inf


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
        found += [(group, _text(group)), ("× parent", _ratio(group))]
        if any("p" in row["groups"][group] for row in rows):
            found.append(("p", _p_of(group)))
    if any(WIKITEXT in row for row in rows):
        found.append(("WikiText-2", lambda row: number(row[WIKITEXT]["perplexity"], 2)))
    if any("lambada" in row for row in rows):
        found.append(("LAMBADA", lambda row: number(row["lambada"]["perplexity"], 2)))
        found.append(("LAMBADA acc", lambda row: f"{100 * row['lambada']['value']:.1f} %"))
    if any("accuracy" in row for row in rows):
        found.append((f"{len(result['tasks']) - len(result.get('written', ()))} tasks, acc", _share("accuracy")))
    if any("written" in row for row in rows):
        found.append((" and ".join(result["written"]), _share("written")))
    if any("health" in row for row in rows):
        found.append(("answers that end", lambda row: f"{100 * row['health']['ended']:.0f} %"))
        found.append(("that loop", lambda row: f"{100 * row['health']['loops']:.0f} %"))
    return found


COST: list[Column] = [
    ("", lambda row: row["title"]),
    ("FFN active", lambda row: f"{100 * row['ffn_active']:.1f} %"),
    ("active parameters", lambda row: f"{row['parameters_active'] / 1e6:,.1f} M"),
    ("in total", lambda row: f"{row['parameters_total'] / 1e6:,.1f} M"),
    ("on disk", lambda row: f"{row['bytes'] / 1e6:,.1f} MB"),
    ("calibration text", lambda row: f"{row['calibration_tokens']:,}"),
    ("training text", lambda row: f"{row['training_tokens']:,}"),
    ("time", lambda row: duration(row["seconds"]) if row["seconds"] else "–"),
    ("peak memory", lambda row: f"{row['memory'] / 2**30:.1f} GiB" if row["memory"] else "–"),
]

FAST: list[Column] = [
    ("llama.cpp", lambda row: row[SPEED]["weights"] if SPEED in row else "–"),
    ("file", lambda row: f"{row[SPEED]['bytes'] / 1e6:,.1f} MB" if SPEED in row else "–"),
    ("decode, tokens/s", lambda row: _fast(row, "decode")),
    ("prefill, tokens/s", lambda row: _fast(row, "prefill")),
]

DEVICE: Column = (
    "of the accelerator",
    lambda row: f"{row['device_memory'] / 2**30:.1f} GiB" if row["device_memory"] else "–",
)


def _fast(row: Mapping[str, Any], phase: str) -> str:
    found = row.get(SPEED)
    if found is None:
        return "–"
    ratio = found.get(f"{phase}_ratio")
    return f"{found[phase]:,.1f}" + ("" if ratio is None else f" ({ratio:.2f} ×)")


def number(value: float, decimals: int) -> str:
    """Write a positive number: without decimals from a thousand on, with a power of ten from a million on."""
    return f"{value:.1e}" if value >= 1e6 else f"{value:,.{0 if value >= 1000 else decimals}f}"


def _text(group: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: number(row["groups"][group]["perplexity"], 2)


def _ratio(group: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        found = row["groups"][group]
        if found["low"] == found["high"]:  # the parent beside itself, or one window of each domain
            return number(found["value"], 3)
        spread = f" ± {number(found['spread'], 3)}" if "spread" in found else ""
        return f"{number(found['value'], 3)}{spread} ({number(found['low'], 3)}–{number(found['high'], 3)})"

    return cell


def _share(name: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        found = row[name]
        return f"{100 * found['value']:.1f} % ({100 * found['low']:.1f}–{100 * found['high']:.1f})"

    return cell


def _p_of(group: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        p = row["groups"][group].get("p")
        return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"

    return cell


def cells(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return two tables as text, quality and cost: head and body of each, without refused rows."""
    rows = [row for row in result["rows"] if "refused" not in row]
    cost = [*COST, *([DEVICE] if any(row["device_memory"] for row in rows) else [])]
    cost += FAST if any(SPEED in row for row in rows) else []
    return [
        ([title for title, _ in shown], [[take(row) for _, take in shown] for row in rows])
        for shown in (quality(result), cost)
    ]


def refused(result: Mapping[str, Any]) -> list[str]:
    """Say in a line each which rows were refused, and why."""
    return [f"{row['title']}: {row['refused']}" for row in result["rows"] if "refused" in row]


def write_tables(out: Path, result: Mapping[str, Any]) -> None:
    """Write ``comparison.csv`` and ``comparison.md``."""
    parts = [markdown(head, body) + "\n" for head, body in cells(result)]
    parts += ["".join(f"- not made: {line}\n" for line in map(inline, refused(result)))]
    write_text(out / "comparison.md", "\n".join(part for part in parts if part))
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
    for line in refused(result):
        show_text(f"not made: {line}")
