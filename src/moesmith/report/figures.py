"""The report's figures of affinity, overlap, perplexity and training; each returns a matplotlib ``Figure``.

They take plain arrays, so a figure can be saved from anywhere: ``affinity_figure(...).savefig("affinity.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesmith.arguments import ceil_div
from moesmith.report import style
from moesmith.report.style import INK, LINE, MUTED, PAPER, SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAGE_MARKS = ("D", "o", "s", "^", "v", "P", "X")
_STAGE_COLOURS = (style.ORANGE, style.TEAL, style.BLUE, *style.EXPERT_COLOURS[3:7])


def affinity_order(
    matrix: ArrayLike, names: Sequence[str], linkage: ArrayLike | None, clusters: Sequence[Sequence[str]]
) -> tuple[list[int], dict[str, Any] | None]:
    """Order rows so that the clusters are diagonal blocks; return the order and the dendrogram that belongs to it.

    Leaves are turned so that neighbours are alike (optimal leaf ordering). There is no dendrogram without a
    linkage, or when the clusters do not come from it (published ones) and so are not its branches.
    """
    from scipy.cluster import hierarchy

    matrix = np.asarray(matrix, float)
    member = _membership(names, clusters)
    if linkage is not None:
        links = np.asarray(linkage, float)
        distance = 1 - matrix[np.triu_indices(len(names), 1)]
        if np.isfinite(distance).all():
            links = hierarchy.optimal_leaf_ordering(links, distance)
        tree: Any = hierarchy.dendrogram(links, no_plot=True, link_color_func=_branch_colour(links, member))
        order = [int(leaf) for leaf in tree["leaves"]]
        row = [member[leaf] for leaf in order]
        if sum(a != b for a, b in pairwise(row)) == len(set(row)) - 1:
            return order, tree
    return sorted(range(len(names)), key=lambda i: (member[i], i)), None


def affinity_figure(
    matrix: ArrayLike,
    names: Sequence[str],
    linkage: ArrayLike | None = None,
    clusters: Sequence[Sequence[str]] = (),
) -> Figure:
    """Draw the correlation of domains as a heatmap in diagonal blocks, the dendrogram above (DIVE, arXiv:2506.09351).

    Args:
        matrix: (n, n) correlations.
        names: the n domains.
        linkage: scipy's linkage (n - 1, 4) or ``None``.
        clusters: names per expert, in expert order.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    matrix, n = np.asarray(matrix, float), len(names)
    order, tree = affinity_order(matrix, names, linkage, clusters)
    side = max(3.4, 0.27 * n)
    figure = style.new_figure(side + 2.4, side + 1.4 + (1.1 if tree else 0))
    grid = figure.add_gridspec(2, 1, height_ratios=[1.1 if tree else 0.01, side], hspace=0.0)
    axes = figure.add_subplot(grid[1])
    others = matrix[~np.eye(n, dtype=bool)] if n > 1 else matrix.ravel()
    low, centre = float(np.nanmin(others)), float(np.nanmean(others))
    norm = TwoSlopeNorm(centre, min(low, centre - 1e-3), max(1.0, centre + 1e-3))
    style.dress(axes)
    image = style.heatmap(axes, matrix[np.ix_(order, order)], norm)
    labels = [style.plain(names[i]) for i in order]
    axes.set_xticks(range(n), labels, rotation=90)
    axes.set_yticks(range(n), labels)
    if n <= 12:
        style.annotate(axes, image, matrix[np.ix_(order, order)], lambda value: f"{value:.2f}".replace("0.", "."))
    member = _membership(names, clusters)
    for expert in range(len(clusters)):
        places = [place for place, i in enumerate(order) if member[i] == expert]
        if not places:
            continue
        start, size = places[0] - 0.5, len(places)
        axes.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=style.ON_LIGHT, linewidth=1.4))
        hue = style.colour(expert)
        # x in parts of the matrix's width
        beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        axes.add_patch(Rectangle((1.008, start + 0.06), 0.012, size - 0.12, facecolor=hue, linewidth=0, **beside))
        axes.text(
            1.03, start + size / 2, f"E{expert}", va="center", fontsize=SIZE, color=INK, fontweight="bold", **beside
        )
    style.colourbar(figure, image, axes, f"Pearson correlation r (white: mean of pairs, {centre:.2f})", pad=0.01)
    if tree is not None:
        top = figure.add_subplot(grid[0], sharex=axes)
        for xs, ys, hue in zip(tree["icoord"], tree["dcoord"], tree["color_list"], strict=True):
            top.plot([(x - 5) / 10 for x in xs], ys, color=hue, linewidth=1.4)
        style.dress(top, ylabel="distance 1 − r")
        top.tick_params(labelbottom=False, bottom=False)
        top.spines["bottom"].set_visible(False)
        top.set_ylim(bottom=0)
    return figure


def _membership(names: Sequence[str], clusters: Sequence[Sequence[str]]) -> list[int]:
    """Return each domain's cluster; domains without one come after all clusters."""
    of = {name: expert for expert, cluster in enumerate(clusters) for name in cluster}
    return [of.get(name, len(clusters)) for name in names]


def _branch_colour(links: NDArray[np.float64], member: Sequence[int]) -> Any:
    """Colour a dendrogram branch: its cluster's colour, or grey above the cut."""
    inside: dict[int, set[int]] = {leaf: {cluster} for leaf, cluster in enumerate(member)}
    for row, (left, right, *_) in enumerate(links):
        inside[len(member) + row] = inside[int(left)] | inside[int(right)]
    return lambda node: style.colour(min(inside[node])) if len(inside[node]) == 1 else MUTED


def overlap_figure(iou_LEE: ArrayLike, union_L: ArrayLike | None = None) -> Figure:
    """Draw channel overlap: the experts' mean IoU matrix, and its range and the union's share over layers.

    Args:
        iou_LEE: intersection over union of every two experts, (L, E, E); NaN where a layer has fewer.
        union_L: share of the parent's channels that any expert keeps, (L,).
    """
    from matplotlib.colors import Normalize

    iou_LEE = np.ma.masked_invalid(np.asarray(iou_LEE, float))
    layers, experts, _ = iou_LEE.shape
    figure = style.new_figure(style.WIDTH, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    pairs_LP = iou_LEE[:, *np.triu_indices(experts, 1)] if experts > 1 else np.ones((layers, 1))
    shown_EE = np.where(np.eye(experts, dtype=bool), np.nan, iou_LEE.mean(0).filled(np.nan))
    style.dress(left, title="Mean over layers")
    norm = Normalize(pairs_LP.mean(0).min() - 0.02, pairs_LP.mean(0).max() + 0.02)
    image = style.heatmap(left, shown_EE, norm, "Blues")
    left.set_box_aspect(1)
    step = ceil_div(experts, 8)
    for set_ticks in (left.set_xticks, left.set_yticks):
        set_ticks(range(0, experts, step), [f"E{expert}" for expert in range(0, experts, step)])
    if experts <= 12:
        style.annotate(left, image, shown_EE, lambda value: "" if np.isnan(value) else f"{value:.2f}".removeprefix("0"))
    style.dress(right, "layer", "share of channels", title="Per layer", grid="y")
    x = np.arange(layers)
    right.fill_between(
        x, pairs_LP.min(1), pairs_LP.max(1), color=style.BLUE, alpha=0.2, linewidth=0, label="IoU, all pairs"
    )
    right.plot(
        x, pairs_LP.mean(1), color=style.BLUE, linewidth=1.8, marker="o", markersize=3, label="IoU, mean of pairs"
    )
    if union_L is not None:
        right.plot(x, union_L, color=style.ORANGE, linewidth=1.8, marker="s", markersize=3, label="kept by any expert")
    right.set_ylim(0, 1.02)
    layer_ticks(right, layers, 30)
    style.legend(right, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, handlelength=1.4, columnspacing=1.2)
    return figure


def overlap_layers_figure(iou_LEE: ArrayLike) -> Figure:
    """Draw the IoU matrix of every layer (L, E, E) as small multiples on one scale."""
    from matplotlib.colors import Normalize

    iou_LEE = np.ma.masked_invalid(np.asarray(iou_LEE, float))
    layers, experts, _ = iou_LEE.shape
    columns = min(10, layers)
    rows = ceil_div(layers, columns)
    figure = style.new_figure(style.WIDTH, 1.25 * rows + 0.1)
    off = ~np.eye(experts, dtype=bool)
    pairs = iou_LEE[:, off] if experts > 1 else iou_LEE
    norm = Normalize(pairs.min() - 0.02, pairs.max() + 0.02)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= layers:
            axes.set_axis_off()
            continue
        image = style.heatmap(axes, np.where(off, iou_LEE[index].filled(np.nan), np.nan), norm, "Blues")
        axes.set_box_aspect(1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_facecolor("none")
        axes.set_title(f"layer {index}", fontsize=SIZE - 1.5, color=MUTED, pad=2)
    style.colourbar(figure, image, list(grid.flat), "IoU", fraction=0.015)
    return figure


def stages_figure(stages: Mapping[str, Mapping[str, float]], means: Mapping[str, float]) -> Figure:
    """Draw perplexity per domain after each stage, one row per domain, log axis; the parent is the upright mark.

    Args:
        stages: label of a stage to domain to perplexity; the first is the parent.
        means: label of a stage to the geometric mean over domains.
    """
    names = list(next(iter(stages.values())))
    rows = [*names, "", "geometric mean"]
    figure = style.new_figure(style.WIDTH, 0.24 * len(rows) + 1.0)
    axes = figure.add_subplot()
    style.dress(axes, "perplexity (log scale)", grid="x")
    axes.set_xscale("log")
    table = np.full((len(stages), len(rows)), np.nan)
    for s, (label, values) in enumerate(stages.items()):
        table[s, : len(names)] = [values.get(name) or np.nan for name in names]
        table[s, -1] = means.get(label) or np.nan
    table[~np.isfinite(table)] = np.nan
    y = np.arange(len(rows))
    known = np.isfinite(table).any(0)
    axes.hlines(
        y[known], np.nanmin(table[:, known], 0), np.nanmax(table[:, known], 0), color=LINE, linewidth=2.5, zorder=1
    )
    for s, label in enumerate(stages):
        if s == 0:
            look: dict[str, Any] = {"marker": "|", "color": INK, "markersize": 11, "markeredgewidth": 2.4}
        else:
            look = {"marker": _STAGE_MARKS[s % 7], "color": _STAGE_COLOURS[(s - 1) % 7], "markersize": 6.5}
            look |= {"markeredgecolor": PAPER, "markeredgewidth": 0.6}
        axes.plot(table[s], y, linestyle="none", label=style.plain(label), zorder=3 + s, **look)
    axes.set_yticks([row for row, name in enumerate(rows) if name], [style.plain(name) for name in rows if name])
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _plain_log(axes.xaxis, np.nanmin(table), np.nanmax(table))
    style.legend(
        axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(5, len(stages)), handletextpad=0.4, columnspacing=1.4
    )
    return figure


def _plain_log(axis: Any, low: float, high: float) -> None:
    """Write log ticks as plain numbers, denser when the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = high / low > 8
    axis.set_major_locator(
        LogLocator(10, subs=(1, 2, 5) if wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), numticks=40)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def training_figure(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Draw loss over tokens, one panel per stage: every step thin, the running mean thick.

    Args:
        curves: title of a stage to (tokens, loss), one value per step.
    """
    from matplotlib.ticker import EngFormatter

    figure = style.new_figure(style.WIDTH, 3.2)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, (tokens, loss)) in zip(panels, curves.items(), strict=True):
        x, y = np.asarray(tokens, float), np.asarray(loss, float)
        style.dress(axes, "training tokens", "loss (nats per token)", title, grid="y")
        plot_steps(axes, x, y)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    style.legend(panels[-1], loc="upper right")
    return figure


def plot_steps(axes: Any, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """A curve of a training log: every step thin, the running mean thick."""
    axes.plot(x, y, color=style.BLUE, linewidth=0.8, alpha=0.4, label="each step")
    axes.plot(x, running_mean(y, max(1, len(y) // 25)), color=style.BLUE, linewidth=2, label="running mean")
    axes.margins(x=0.01)


def running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Average over ``reach`` steps on both sides; the window shrinks at the ends."""
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    place = np.arange(len(values))
    start, stop = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def layers_figure(label: str, curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what a step measured of every layer, a line per name."""
    figure = style.new_figure(style.WIDTH, 2.5)
    axes = figure.add_subplot()
    style.dress(axes, "layer", label, grid="y")
    colours = (style.TEAL, style.BLUE, *style.EXPERT_COLOURS)
    for index, (name, values) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": colours[index % len(colours)], "marker": "os^D"[index % 4], "markersize": 3.5}
        axes.plot(range(len(values)), values, linewidth=1.8, label=name, **look)
    axes.set_ylim(bottom=0)
    layer_ticks(axes, max(map(len, curves.values())))
    style.legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def layer_ticks(axes: Any, layers: int, most: int = 36) -> None:
    """Label at most ``most`` layers of an x axis."""
    step = ceil_div(layers, most)
    axes.set_xticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)])
    axes.set_xlim(-0.5, layers - 0.5)
