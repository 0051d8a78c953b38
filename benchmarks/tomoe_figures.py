"""Figures of the studies in ``tomoe.py``: what the union term does, and how alike the experts of several seeds are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesmith.report import style
from moesmith.report.figures import running_mean

SMOOTH = 7  # steps on both sides


def save(figure: Any, path: Path) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=130)


def union_figure(logs: Mapping[str, Sequence[Mapping[str, float]]], by_layer: Mapping[str, Sequence[float]]) -> Any:
    """Union and KL over training, and the finished masks' union per layer, one colour per weight of R_U.

    Args:
        logs: weight to the lines of the masks' ``log.jsonl``.
        by_layer: weight to the share of channels that any expert keeps, per layer.
    """
    figure = style.new_figure(style.WIDTH, 3.4)
    panels = figure.subplots(1, 3)
    looks = [(style.ORANGE, "s"), (style.BLUE, "o"), (style.TEAL, "^")]
    for (weight, steps), (colour, marker) in zip(logs.items(), looks, strict=False):
        label = f"weight {weight}"
        for axes, name in zip(panels, ("union", "kl"), strict=False):
            values = running_mean(np.array([step[name] for step in steps]), SMOOTH)
            axes.plot([step["step"] for step in steps], values, color=colour, linewidth=1.4, label=label)
        panels[2].plot(range(len(by_layer[weight])), by_layer[weight], color=colour, marker=marker, ms=3, lw=1,
                       label=label)  # fmt: skip
    style.dress(panels[0], "training step", "share of channels", "Union of sampled masks", grid="y")
    style.dress(panels[1], "training step", "KL to the parent (nats per token)", "Distillation", grid="y")
    style.dress(panels[2], "layer", "share of channels", "Union of the finished masks", grid="y")
    for axes in panels:
        axes.set_ylim(bottom=0)
    style.legend(panels[0], loc="lower left")
    return figure


def stability_figure(iou_by_layer: Sequence[Sequence[float]], chance: Sequence[Sequence[float]], pairs: Any) -> Any:
    """Mean IoU of matched experts per layer, one line per pair of seeds; grey: random masks of the same widths."""
    figure = style.new_figure(style.WIDTH * 0.62, 3.4)
    axes = figure.subplots()
    looks = [(style.ORANGE, "s"), (style.BLUE, "o"), (style.TEAL, "^")]
    for pair, line, (colour, marker) in zip(pairs, iou_by_layer, looks, strict=True):
        axes.plot(range(len(line)), line, color=colour, marker=marker, ms=3, lw=1,
                  label=f"seeds {pair[0]} and {pair[1]}")  # fmt: skip
    for number, line in enumerate(chance):
        label = "random masks, as wide" if number == 0 else None
        axes.plot(range(len(line)), line, color=style.MUTED, lw=1, ls="--", label=label)
    style.dress(axes, "layer", "intersection over union", "Experts of two seeds, matched one to one", grid="y")
    axes.set_ylim(0, 1)
    style.legend(axes, loc="upper right")
    return figure
