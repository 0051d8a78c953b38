"""What a person sees while moesmith works: lines, progress with time left, aligned tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)
out = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line for the person who waits (standard error)."""
    console.print(message, markup=False, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print an aligned table on standard output; numbers are right-aligned."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, box=None)
    for position, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float | None) for row in rows)
        last = position + 1 == len(columns)  # the one that may wrap on a narrow terminal; nothing is ever cut
        table.add_column(name, justify="right" if numeric else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    wide = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    wide.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def duration(seconds: float) -> str:
    """A time as people say it: ``45 s``, ``14 min``, ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


class Meter:
    """A running count of units done, with a rate and the time left; ``detail`` is free text at the end."""

    def __init__(self, label: str, total: float, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started, self.printed = 0.0, time.monotonic(), time.monotonic()
        self.progress: Progress | None = None
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=console,
                transient=True,
            )
            self.task = self.progress.add_task(label, total=total, rate="", detail="")

    def advance(self, units: float, detail: str = "") -> None:
        """Report ``units`` more done."""
        self.done += units
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        if self.progress is not None:
            self.progress.update(self.task, advance=units, rate=f"{rate:,.0f} {self.unit}/s", detail=detail)
        elif time.monotonic() - self.printed > 15:  # a log file gets a line every quarter of a minute
            self.printed = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-9)
            share = 100 * self.done / max(self.total, 1e-9)
            say(f"  {self.label}: {share:.0f} %, {rate:,.0f} {self.unit}/s, {left:.0f} s left {detail}")


@contextmanager
def meter(label: str, total: float, unit: str = "tokens") -> Iterator[Meter]:
    """Show progress for the body of a ``with``: ``with meter("moments", n) as m: m.advance(512)``."""
    bar = Meter(label, total, unit)
    if bar.progress is None:
        yield bar
    else:
        with bar.progress:
            yield bar
