"""Shapes of figures that studies share: lines, marks by row, a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from moesmith.comparison.figures import COLOURS, MARKS, ticks
from moesmith.report import style
from moesmith.report.figures import layer_ticks
from moesmith.report.style import PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = tuple[Sequence[float], Sequence[float]]  # xs, ys


def lines(
    xlabel: str, ylabel: str, series: Mapping[str, Line], *, log: str = "", layers: bool = False, title: str = ""
) -> Figure:
    """Draw a line per name.

    Args:
        xlabel: of the x axis.
        ylabel: of the y axis.
        series: xs and ys by name.
        log: ``x``, ``y``, ``xy`` for logarithmic axes.
        layers: whether xs are layers.
        title: above it.
    """
    figure = style.new_figure(style.WIDTH * 0.75, 3.4)
    axes = figure.add_subplot()
    style.dress(axes, xlabel, ylabel, title, grid="y")
    many = max((len(xs) for xs, _ in series.values()), default=0) > 40
    for index, (name, (xs, ys)) in enumerate(series.items()):
        mark: dict[str, Any] = {} if many else {"marker": MARKS[index % len(MARKS)], "markersize": 4}
        axes.plot(xs, ys, color=COLOURS[index % len(COLOURS)], linewidth=1.5, label=style.plain(name), **mark)
    if "x" in log:
        axes.set_xscale("log")
        ticks(axes.xaxis, [x for xs, _ in series.values() for x in xs])
    if "y" in log:
        axes.set_yscale("log")
        ticks(axes.yaxis, [y for _, ys in series.values() for y in ys])
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if layers:
        layer_ticks(axes, max(len(xs) for xs, _ in series.values()))
    if len(series) > 1:
        style.legend(figure, loc="outside upper left", ncols=min(5, len(series)))
    return figure


def by_layer(ylabel: str, series: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Draw a number of every layer, a line per name."""
    return lines("layer", ylabel, {n: (range(len(ys)), ys) for n, ys in series.items()}, layers=True, title=title)


def marks(
    xlabel: str, rows: Sequence[str], series: Mapping[str, Sequence[float | None]], *, log: bool = True
) -> Figure:
    """Draw a line per row and a mark per name on it; nothing for ``None``."""
    figure = style.new_figure(style.WIDTH * 0.8, 1.1 + 0.36 * len(rows))
    axes = figure.add_subplot()
    style.dress(axes, xlabel, grid="x")
    for place, (name, values) in enumerate(series.items()):
        points = [(value, -row) for row, value in enumerate(values) if value is not None]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], MARKS[place % len(MARKS)],
            color=COLOURS[place % len(COLOURS)], markersize=6.5, markeredgecolor=PAPER, label=style.plain(name),
        )  # fmt: skip
    if log:
        axes.set_xscale("log")
        ticks(axes.xaxis, [value for values in series.values() for value in values if value is not None])
    axes.set_yticks([-row for row in range(len(rows))], [style.plain(row) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.5 - len(rows), 0.5)
    if len(series) > 1:
        style.legend(figure, loc="outside upper left", ncols=len(series))
    return figure


def matrix(
    values: ArrayLike, rows: Sequence[str], columns: Sequence[str], label: str, words: Callable[[float], str],
    *, xlabel: str = "", ylabel: str = "",
) -> Figure:  # fmt: skip
    """Draw a matrix as coloured cells with their numbers."""
    from matplotlib.colors import Normalize

    numbers = np.asarray(values, float)
    figure = style.new_figure(2.6 + 0.46 * len(columns), 1.9 + 0.34 * len(rows))
    axes = figure.add_subplot()
    style.dress(axes, xlabel, ylabel)
    image = style.heatmap(axes, numbers, Normalize(float(np.nanmin(numbers)), float(np.nanmax(numbers))), "Blues")
    axes.set_xticks(range(len(columns)), [style.plain(name) for name in columns], rotation=90)
    axes.set_yticks(range(len(rows)), [style.plain(name) for name in rows])
    style.annotate(axes, image, numbers, words)
    style.colourbar(figure, image, axes, label)
    return figure
