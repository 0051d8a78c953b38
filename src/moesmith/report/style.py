"""The look of the figures: colours, axes, and SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesmith.errors import MoesmithError
from moesmith.files.write import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Eight colours found by maximising the smallest OKLab distance under normal, protan, deutan and tritan vision,
# at least 2:1 against white and against a dark page. Further experts repeat them with another hatch or line.
EXPERT_COLOURS = ("#1a64a3", "#c77b00", "#249288", "#e8a4ab", "#71baff", "#b23a1e", "#9273eb", "#aec02f")
HATCHES = ("", "////", "....", "xxxx")

# Colours a page may exchange for its own (to_svg): text, secondary text, lines, background, and BLUE.
INK, MUTED, LINE, PAPER = "#1f2328", "#59636e", "#d0d7de", "#ffffff"
BLUE = "#1b66a6"  # lines and marks; a dark page lightens it
ORANGE, TEAL = EXPERT_COLOURS[1], EXPERT_COLOURS[2]
_THEME = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper", BLUE: "--blue"}

DIVERGING = "RdBu_r"
ON_DARK, ON_LIGHT = "#fdfdfd", "#151515"  # text inside a coloured cell keeps its colour in both themes
SIZE = 9.0  # points; a figure shown at 1.33 pixels per point has 12-pixel text
WIDTH = 11.6  # inches: the page's 1,120 pixels


def colour(expert: int) -> str:
    """Return an expert's colour."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def hatch(expert: int) -> str:
    """Return an expert's hatch, which tells experts of the same colour apart."""
    return HATCHES[expert // len(EXPERT_COLOURS) % len(HATCHES)]


def plain(text: str) -> str:
    """Escape text so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure (inches) that belongs to no global state.

    Raises:
        MoesmithError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoesmithError("figures need matplotlib", "pip install 'moesmith[report]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def dress(axes: Axes, xlabel: str = "", ylabel: str = "", title: str = "", grid: str = "") -> None:
    """Add labels, thin outer lines and an optional grid ("x", "y" or "both")."""
    axes.set_facecolor("none")
    axes.set_xlabel(xlabel, fontsize=SIZE, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=SIZE, color=MUTED)
    axes.set_title(title, fontsize=SIZE + 1, color=INK, loc="left", fontweight="bold")
    axes.tick_params(labelsize=SIZE - 0.5, labelcolor=INK, color=LINE, which="both", length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    if grid:
        axes.grid(axis=grid, color=LINE, linewidth=0.6, which="major")  # type: ignore[arg-type]
        axes.set_axisbelow(True)


def heatmap(axes: Axes, matrix: NDArray[Any], norm: Any, cmap: str = DIVERGING) -> Any:
    """Draw a matrix as coloured cells without outer lines; the picture inside the SVG is one pixel per cell."""
    image = axes.imshow(matrix, cmap=cmap, norm=norm, aspect="auto", interpolation="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def annotate(axes: Axes, image: Any, matrix: NDArray[Any], text: Callable[[float], str]) -> None:
    """Write every cell's number in black or white, whichever reads better on its colour; nothing for an empty text."""
    for (row, column), value in np.ndenumerate(matrix):
        if not (words := text(value)):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
        ink = ON_LIGHT if bright else ON_DARK
        axes.text(column, row, words, ha="center", va="center", fontsize=SIZE - 2, color=ink)


def colourbar(figure: Figure, image: Any, axes: Any, label: str, **options: Any) -> None:
    """Add a slim colour bar with its label."""
    bar = figure.colorbar(image, ax=axes, **{"fraction": 0.03, "pad": 0.015, "aspect": 30, **options})
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(label, fontsize=SIZE, color=MUTED)
    bar.ax.tick_params(labelsize=SIZE - 1, labelcolor=INK, color=LINE, length=2)


def legend(axes: Any, **options: Any) -> None:
    """Add a legend without a box."""
    axes.legend(**{"fontsize": SIZE - 0.5, "frameon": False, "labelcolor": INK, **options})


def save(figure: Figure, target: Any, **options: Any) -> None:
    """Write a figure; characters that its font lacks are boxes in a PNG and text in an SVG, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure.savefig(target, **options)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    options: dict[str, Any] = {"format": "png", "dpi": 130, "facecolor": "white", "bbox_inches": "tight"}
    write_atomic(path, lambda temporary: save(figure, temporary, **options))


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element for a page: text stays text, theme colours become CSS variables.

    Args:
        figure: the figure.
        name: prefix of all ids in it, unique in the page.
        description: for screen readers.
    """
    from html import escape

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        save(figure, buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = svg[: svg.index(">") + 1]
    _, _, width, height = (float(number) for number in re.findall(r'viewBox="([^"]+)"', head)[0].split())
    svg = (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width * 4 / 3:.0f}" role="img" '
        f'style="--natural: {width * 4 / 3:.0f}px" '
        f'aria-label="{escape(description)}">' + svg[len(head) :]
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = (
        re.sub(r'xlink:href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-").replace("xlink:href", "href")
    )
    svg = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]+", r"font: \1 var(--sans, sans-serif)", svg)
    for value, variable in _THEME.items():
        svg = svg.replace(value, f"var({variable}, {value})")
    return svg
