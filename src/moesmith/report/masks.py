"""The report's figures of learned masks (ToMoE): what they keep per layer, and how they got there.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesmith.report import style
from moesmith.report.figures import layer_ticks, plot_steps
from moesmith.report.style import INK, MUTED, SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def chance(share_LE: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the overlap and union that random channels would give experts of these widths, per layer (L,).

    Args:
        share_LE: each expert's share of the channels, (L, E); 0 where a layer has fewer.

    Returns:
        The mean IoU of pairs, |A∩B| / |A∪B| = ab / (a + b − ab), NaN where there are none, and the union's share,
        1 − Π (1 − a).
    """
    share_LE = np.ma.masked_equal(np.asarray(share_LE, float), 0)
    first, second = np.triu_indices(share_LE.shape[1], 1)
    both_LP = share_LE[:, first] * share_LE[:, second]
    iou_LP = both_LP / (share_LE[:, first] + share_LE[:, second] - both_LP)
    return np.ma.filled(iou_LP.mean(1), np.nan), 1 - (1 - share_LE.filled(0)).prod(1)


def layers_figure(
    share_LE: ArrayLike, union_L: ArrayLike, iou_LEE: ArrayLike, attention: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Draw per layer what the masks keep: channels, dimensions of attention, and what two experts have in common.

    Args:
        share_LE: each expert's share of the channels, (L, E).
        union_L: share of the channels that any expert keeps, (L,).
        iou_LEE: intersection over union of every two experts, (L, E, E).
        attention: per layer the kept shares of a Q/K and of a V/O head; empty if attention is whole.
    """
    share_LE, iou_LEE = np.asarray(share_LE, float), np.asarray(iou_LEE, float)
    layers, experts = share_LE.shape
    x = np.arange(layers)
    iou_LP = iou_LEE[:, *np.triu_indices(experts, 1)]
    panels: list[tuple[str, str, list[tuple[str, ArrayLike, dict[str, Any]]]]] = [
        (
            "Feed-forward network",
            "share of channels",
            [
                ("any expert", union_L, _look(style.ORANGE, "s")),
                ("the widest", share_LE.max(1), _look(style.BLUE, "o")),
                ("the mean", share_LE.mean(1), _look(style.TEAL, "^")),
            ],
        )
    ]
    if attention:
        qk, vo = np.array(attention, float).T
        lines = [("Q and K", qk, _look(style.BLUE, "o")), ("V and O, at most", vo, _look(style.ORANGE, "s"))]
        panels.append(("Attention", "share of a head's dimensions", lines))
    if experts > 1:
        overlap = [
            ("mean of pairs", iou_LP.mean(1), _look(style.BLUE, "o")),
            ("random channels", chance(share_LE)[0], {"color": INK, "linewidth": 1, "linestyle": (0, (3, 2))}),
        ]
        panels.append(("Overlap of two experts", "intersection over union", overlap))
    figure = style.new_figure(style.WIDTH, 3.3)
    for axes, (title, label, lines) in zip(
        figure.subplots(1, len(panels), sharex=True, squeeze=False)[0], panels, strict=True
    ):
        style.dress(axes, "layer", label, title, grid="y")
        for name, values, look in lines:
            axes.plot(x, values, label=name, **look)
        axes.set_ylim(0, 1.03)
        layer_ticks(axes, layers, 12)
        style.legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, handlelength=1.6, columnspacing=1.2)
    return figure


def _look(colour: str, marker: str) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 3.5}


def training_figure(steps: Sequence[Mapping[str, Any]], budget: float, experts: int) -> Figure:
    """Draw four panels over training tokens: every step thin, the running mean thick, a target dashed.

    Args:
        steps: records of the stage's log, with ``tokens``, ``kl``, ``active``, ``union`` and ``entropy``.
        budget: share of the block parameters that may be active.
        experts: E; the entropy of the load is shown over log E.
    """
    from matplotlib.ticker import EngFormatter

    x = np.array([step["tokens"] for step in steps], float)
    scale = np.log(experts) if experts > 1 else 1.0
    panels: list[tuple[str, str, str, float, float | None]] = [
        ("kl", "Distance from the parent", "KL (nats per token)", 1.0, None),
        ("active", "Active parameters", "share of the blocks", 1.0, budget),
        ("union", "Kept by any expert", "share of channels", 1.0, None),
        ("entropy", "Load of the experts", "entropy / log E", scale, 1.0),
    ]
    figure = style.new_figure(style.WIDTH, 4.6)
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (key, title, label, unit, target) in zip(grid.flat, panels, strict=True):
        y = np.array([step.get(key, np.nan) for step in steps], float) / unit
        style.dress(axes, "", label, title, grid="y")
        plot_steps(axes, x, y)
        if target is not None:
            axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (3, 2)), label="budget, balance")
        if key != "kl":
            axes.set_ylim(0, 1.05)
    for axes in grid[1]:
        axes.set_xlabel("training tokens", fontsize=SIZE, color=MUTED)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    style.legend(grid[0, 1], loc="lower right")
    return figure
