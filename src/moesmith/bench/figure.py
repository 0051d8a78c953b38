"""Draw the measurements as bars: tokens per second, dense and MoE, with the ratio written above and a bound marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesmith.report import style
from moesmith.report.style import INK, MUTED, SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR = 0.38
PHASES = {"prefill": "prefill, tokens per second (log scale)", "decode": "decode, tokens per second (log scale)"}
LOSS = style.EXPERT_COLOURS[5]  # the colour of a ratio below 1


def bench_figure(found: dict[str, Any]) -> Figure:
    """Draw two panels, prefill and decode: a group of bars per runtime and type of the weights, by batch in a group.

    Args:
        found: what ``measure.bench`` returns.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    results = found["results"]
    figure = style.new_figure(min(style.WIDTH, 4.6 + 0.7 * len(results)), 6.8)
    places, groups = _places(results)
    for row, (phase, title) in enumerate(PHASES.items()):
        axes = figure.add_subplot(2, 1, row + 1)
        style.dress(axes, title=title, grid="y")
        parts = [result[phase] for result in results]
        dense, moe = [part["dense"] for part in parts], [part["moe"] for part in parts]
        axes.bar([x - BAR / 2 for x in places], dense, BAR, color=style.BLUE, label="dense parent")
        axes.bar([x + BAR / 2 for x in places], moe, BAR, color=style.ORANGE, label="MoE")
        limit = [part["dense"] * part["bound"] for part in parts]
        label = "bound by FLOPs (prefill) and bytes (decode)"
        axes.hlines(limit, places, [x + BAR for x in places], color=INK, linewidth=1.6, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        low, high = min(dense + moe), max(dense + moe + limit)
        axes.set_ylim(low / 2.5, high * 2.2)
        for x, part, top in zip(places, parts, limit, strict=True):
            axes.annotate(
                f"{part['ratio']:.2f}×",
                (x, max(part["dense"], part["moe"], top)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=SIZE,
                fontweight="bold",
                color=INK if part["ratio"] >= 1 else LOSS,
            )
        axes.set_xticks(places, [f"batch {result['batch']}" for result in results])
        for name, middle in groups:
            axes.annotate(
                style.plain(name),
                (middle, 0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, -20),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=SIZE,
                color=MUTED,
                fontweight="bold",
            )
    bound, *bars = figure.axes[0].get_legend_handles_labels()[0]
    style.legend(figure, handles=[*bars, bound], ncols=3, loc="outside upper left")
    return figure


def _places(results: list[dict[str, Any]]) -> tuple[list[float], list[tuple[str, float]]]:
    """Place each result's bars, and return the groups' names with their middles too."""
    places: list[float] = []
    members: dict[str, list[float]] = {}
    for result in results:
        name = f"{result['runtime']} {result['weights']}"
        x = (places[-1] + 1 if places else 0.0) + (0.6 if places and name not in members else 0.0)
        places.append(x)
        members.setdefault(name, []).append(x)
    return places, [(name, sum(xs) / len(xs)) for name, xs in members.items()]
