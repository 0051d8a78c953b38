"""The report's figures of routing: load per expert, where domains go and how they differ, entropy.

Shapes: D domains, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from moesmith.arguments import ceil_div
from moesmith.report import style
from moesmith.report.figures import layer_ticks
from moesmith.report.style import INK, MUTED, PAPER, SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_figure(load_LE: ArrayLike, threshold: float = 0.05) -> Figure:
    """Draw choices per expert (rows) and layer (columns); white is the uniform share, a cross a dead expert.

    Args:
        load_LE: (L, E), rows sum to 1; NaN for an expert that a layer does not have.
        threshold: an expert below this fraction of the uniform share counts as dead.
    """
    from matplotlib.colors import TwoSlopeNorm

    percent_EL = 100 * np.asarray(load_LE, float).T
    experts, layers = percent_EL.shape
    figure = style.new_figure(style.WIDTH, min(0.3, 5 / experts) * experts + 0.9)
    axes = figure.add_subplot()
    uniform = 100 / experts
    style.dress(axes, "layer")
    image = style.heatmap(axes, percent_EL, TwoSlopeNorm(uniform, 0, max(np.nanmax(percent_EL), 1.01 * uniform)))
    layer_ticks(axes, layers)
    step = max(1, experts // 16)
    axes.set_yticks(range(0, experts, step), [f"E{expert}" for expert in range(0, experts, step)])
    if experts <= 16 and layers <= 36:

        def words(value: float) -> str:
            return "" if np.isnan(value) else "×" if value < threshold * uniform else f"{value:.0f}"

        style.annotate(axes, image, percent_EL, words)
    style.colourbar(figure, image, axes, "share of choices (%)")
    return figure


def domain_figure(share_DE: ArrayLike, names: Sequence[str], home: Sequence[int | None] | None = None) -> Figure:
    """Draw which experts each domain goes to: bars per domain, uniform share dashed (as in Drop-Upcycling's figure).

    Args:
        share_DE: (D, E), rows sum to 1.
        names: the D domains.
        home: the expert made for each domain, marked by a triangle.
    """
    share_DE = 100 * np.asarray(share_DE, float)
    domains, experts = share_DE.shape
    columns = min(8, domains)
    rows = ceil_div(domains, columns)
    figure = style.new_figure(style.WIDTH, 1.25 * rows + 0.35)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    x, high = np.arange(experts), float(share_DE.max()) * 1.2
    step = max(1, ceil_div(experts, 8))
    for index, axes in enumerate(grid.flat):
        if index >= domains:
            axes.set_axis_off()
            continue
        style.dress(axes, grid="y")
        name = names[index] if len(names[index]) <= 16 else f"{names[index][:15]}…"
        axes.set_title(style.plain(name), fontsize=SIZE, color=INK, loc="left", pad=3)
        bars = axes.bar(x, share_DE[index], 0.78, color=[style.colour(e) for e in range(experts)])
        for expert, bar in enumerate(bars):
            bar.set_hatch(style.hatch(expert))
            bar.set_edgecolor(PAPER)
            bar.set_linewidth(0)
        axes.axhline(100 / experts, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        if home is not None and (own := home[index]) is not None:
            axes.plot(own, share_DE[index, own] + high * 0.08, "v", color=INK, markersize=5, clip_on=False)
        axes.set_ylim(0, high)
        axes.set_xticks(x[::step], [str(e) for e in x[::step]])
        axes.tick_params(labelsize=SIZE - 2, axis="both")
        axes.tick_params(axis="x", length=0)
    figure.supylabel("share of choices (%)", fontsize=SIZE, color=MUTED)
    figure.supxlabel("expert", fontsize=SIZE, color=MUTED)
    return figure


def parting_figure(parting_DL: ArrayLike, names: Sequence[str]) -> Figure:
    """Draw how far each domain's choices (rows) are from those of all text, by layer (columns).

    Args:
        parting_DL: (D, L) in [0, 1] (``Routing.parting_DL``); NaN for a layer that chooses nothing.
        names: the D domains.
    """
    from matplotlib.colors import Normalize

    percent_DL = 100 * np.asarray(parting_DL, float)
    domains, layers = percent_DL.shape
    figure = style.new_figure(style.WIDTH, min(0.22, 9 / domains) * domains + 0.9)
    axes = figure.add_subplot()
    style.dress(axes, "layer")
    image = style.heatmap(axes, percent_DL, Normalize(0, max(float(np.nanmax(percent_DL)), 1.0)), "Blues")
    layer_ticks(axes, layers)
    step = ceil_div(domains, 56)
    axes.set_yticks(range(0, domains, step), [style.plain(name) for name in names[::step]])
    style.colourbar(figure, image, axes, "choices unlike those of all text (%)")
    return figure


def entropy_figure(entropy_L: ArrayLike, balance_L: ArrayLike) -> Figure:
    """Draw two entropies per layer over log E: of a token's router probabilities, and of the experts' load."""
    layers = len(np.asarray(entropy_L))
    figure = style.new_figure(style.WIDTH, 2.5)
    axes = figure.add_subplot()
    style.dress(axes, "layer", "entropy / log E", grid="y")
    x = np.arange(layers)
    axes.plot(x, balance_L, color=style.TEAL, linewidth=1.8, marker="s", markersize=3.5, label="load (1 = balanced)")
    axes.plot(
        x, entropy_L, color=style.BLUE, linewidth=1.8, marker="o", markersize=3.5, label="one token (0 = certain)"
    )
    axes.set_ylim(-0.02, 1.05)
    layer_ticks(axes, layers)
    style.legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure
