"""How the page writes numbers."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> str:
    """Format three or four digits, enough for a perplexity or a loss; a dash for what is unknown."""
    if isinstance(value, str | bool):
        return str(value)
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,.0f}"
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2
    return f"{value:,.{digits}f}" if size >= 0.1 or size == 0 else f"{value:.3g}"


def percent(value: float) -> str:
    """Format a share in per cent, three digits."""
    return f"{100 * value:.3g}\N{NO-BREAK SPACE}%"


def big(value: float) -> str:
    """Format a count with its unit: 134.5 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{2 if unit == 'B' else 1}f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Format seconds as s, min or h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
