"""A comparison as one self-contained page: the table, the figures, the tasks, and what was compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moesmith.comparison.figures import curves, frontier_figure, ratios_figure, speed_figure, tokens_figure
from moesmith.comparison.table import cells, refused
from moesmith.files.write import write_text
from moesmith.report import style
from moesmith.report.page import template_of


def write_page(out: Path, result: Mapping[str, Any]) -> None:
    """Write ``comparison.html``, and its figures into ``figures``.

    Raises:
        MoesmithError: matplotlib or jinja2 is not installed.
    """
    from markupsafe import Markup

    template = template_of("moesmith.comparison", "page.html")
    rows = [row for row in result["rows"] if "refused" not in row]
    others = rows[1:]  # without the parent
    pictures = {}
    if others:
        pictures["ratios"] = ratios_figure(others, result["groups"]), "Perplexity over the parent's, by row"
        if curves(others):
            pictures["tokens"] = tokens_figure(others, result["groups"][0]), "Quality by how much text was read"
        if sum("speed" in row for row in rows) > 1:
            pictures["speed"] = speed_figure(rows, result["groups"][0]), "Quality, decoding speed and size"
        pictures["frontier"] = frontier_figure(rows, result["groups"][0]), "Quality, active and total parameters"
    drawn = {}
    for name, (figure, description) in pictures.items():
        (out / "figures").mkdir(exist_ok=True)
        style.save_png(figure, out / "figures" / f"{name}.png")
        drawn[name] = Markup(style.to_svg(figure, name, description))
    recipe = yaml.safe_dump(result["spec"], sort_keys=False, allow_unicode=True, width=100)
    page = template.render(
        result=result, tables=cells(result), refused=refused(result), rows=rows, figures=drawn, spec=recipe
    )
    write_text(out / "comparison.html", page)
