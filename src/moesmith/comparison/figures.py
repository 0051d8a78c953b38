"""Figures of a comparison: each row's distance from the parent, and the frontier of quality and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesmith.report import style
from moesmith.report.style import INK, MUTED, SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = ("o", "s", "D", "^", "v")
COLOURS = (style.BLUE, style.ORANGE, style.TEAL, *style.EXPERT_COLOURS[3:])


def ratios_figure(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> Figure:
    """Draw perplexity over the parent's, a line per row and a mark with its interval per group of domains."""
    figure = style.new_figure(style.WIDTH * 0.8, 1.3 + 0.36 * len(rows))
    axes = figure.add_subplot()
    style.dress(axes, "perplexity ÷ parent's (log scale; bars: 95 % interval over windows)", grid="x")
    step = 0.5 / max(1, len(groups))
    for place, group in enumerate(groups):
        ys = [-index + 0.25 - step * (place + 0.5) for index in range(len(rows))]
        values = [row["groups"][group]["value"] for row in rows]
        below = [max(0.0, row["groups"][group]["value"] - row["groups"][group]["low"]) for row in rows]
        above = [max(0.0, row["groups"][group]["high"] - row["groups"][group]["value"]) for row in rows]
        axes.errorbar(
            values, ys, xerr=[below, above], fmt=MARKS[place % len(MARKS)], color=COLOURS[place % len(COLOURS)],
            markersize=5.5, elinewidth=1.2, label=style.plain(group),
        )  # fmt: skip
    axes.set_xscale("log")
    ticks(axes.xaxis, [row["groups"][group][end] for row in rows for group in groups for end in ("low", "high")])
    axes.set_yticks([-index for index in range(len(rows))], [style.plain(row["title"]) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.5 - len(rows), 0.5)
    axes.axvline(1, color=MUTED, linewidth=1)
    if len(groups) > 1:
        style.legend(figure, loc="outside upper left", ncols=len(groups))
    return figure


def frontier_figure(rows: Sequence[Mapping[str, Any]], group: str) -> Figure:
    """Draw a group's perplexity over the parent's against active parameters; a disc's area is the total."""
    figure = style.new_figure(style.WIDTH * 0.8, 4.6)
    axes = figure.add_subplot()
    style.dress(
        axes,
        "active parameters, millions",
        f"{style.plain(group)}: perplexity ÷ parent's (log scale)",
        "Quality, active and total parameters (area of a disc: total)",
        grid="both",
    )
    _discs(
        axes,
        [
            (row["parameters_active"] / 1e6, row["groups"][group]["value"], row["parameters_total"], row["title"])
            for row in rows
        ],
    )
    axes.set_yscale("log")
    ticks(axes.yaxis, [row["groups"][group]["value"] for row in rows])
    return figure


def speed_figure(rows: Sequence[Mapping[str, Any]], group: str) -> Figure:
    """Draw the quality of rows that were timed against decoding speed; a disc's area is the file's size.

    Quality is the share of written answers that are right, or a group's perplexity over the parent's where none are
    measured.
    """
    rows = [row for row in rows if "speed" in row]
    written = all("written" in row for row in rows)
    title = "written answers that are right, %" if written else f"{style.plain(group)}: perplexity ÷ parent's"
    figure = style.new_figure(style.WIDTH * 0.8, 4.6)
    axes = figure.add_subplot()
    style.dress(
        axes, "tokens per second, one sequence, llama.cpp", title,
        "Quality, decoding speed and size (area of a disc: bytes of the file)", grid="both",
    )  # fmt: skip
    points = []
    for row in rows:
        speed, quality = row["speed"], 100 * row["written"]["value"] if written else row["groups"][group]["value"]
        points.append((speed["decode"], quality, speed["bytes"], f"{row['title']} ({speed['weights']})"))
    _discs(axes, points)
    return figure


def _discs(axes: Any, points: Sequence[tuple[float, float, float, str]]) -> None:
    """Draw points (x, y, size, name) as discs whose area is their size, with their names beside them."""
    largest = max(size for _, _, size, _ in points)
    for index, (x, y, size, name) in enumerate(points):
        axes.scatter(x, y, s=620 * size / largest, color=COLOURS[index % len(COLOURS)], alpha=0.35, linewidth=0)
        axes.scatter(x, y, s=9, color=INK, linewidth=0)
        axes.annotate(
            style.plain(name), (x, y), xytext=(14, 0), textcoords="offset points", fontsize=SIZE - 1,
            color=INK, va="center",
        )  # fmt: skip
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.04 * (high - low), high + 0.4 * (high - low))  # room for the names


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows that differ from others of their source in how much text they read, by source and in that order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("source", row["title"]), []).append(row)
    several = {name: sorted(some, key=tokens_of) for name, some in found.items()}
    return {name: some for name, some in several.items() if len(set(map(tokens_of, some))) > 1}


def tokens_of(row: Mapping[str, Any]) -> int:
    """Count the text that a row read, for calibration and training."""
    return int(row["calibration_tokens"] + row["training_tokens"])


def tokens_figure(rows: Sequence[Mapping[str, Any]], group: str) -> Figure:
    """Draw a group's perplexity over the parent's against the text that was read, a line per source."""
    figure = style.new_figure(style.WIDTH * 0.8, 4.0)
    axes = figure.add_subplot()
    label = f"{style.plain(group)}: perplexity ÷ parent's (log scale)"
    style.dress(axes, "tokens read, calibration and training (log scale)", label, grid="both")
    for index, (name, some) in enumerate(curves(rows).items()):
        found = [row["groups"][group] for row in some]
        ys = [each["value"] for each in found]
        below = [max(0.0, each["value"] - each["low"]) for each in found]
        above = [max(0.0, each["high"] - each["value"]) for each in found]
        axes.errorbar(
            list(map(tokens_of, some)), ys, yerr=[below, above], fmt=f"{MARKS[index % len(MARKS)]}-",
            color=COLOURS[index % len(COLOURS)], markersize=5, elinewidth=1.2, linewidth=1.5, label=style.plain(name),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    every = [row for some in curves(rows).values() for row in some]
    ticks(axes.yaxis, [row["groups"][group][end] for row in every for end in ("low", "high")])
    style.legend(figure, loc="outside upper left", ncols=min(5, len(curves(rows))))
    return figure


def ticks(axis: Any, values: Sequence[float]) -> None:
    """Write plain numbers on a logarithmic axis, close together where its range is small."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    wide = max(values) / max(min(values), 1e-9) > 10
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
