"""What a person sees while moesmith works: lines, progress with time left, aligned tables.

Everything is shown literally: brackets and colons of a name are no markup, its control characters cannot drive the
terminal, and what the output's encoding lacks is written as an escape.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LITERAL: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
console = Console(stderr=True, **_LITERAL)
out = Console(soft_wrap=True, **_LITERAL)
# what moves a cursor, and what turns the reading direction around; line ends and tabs are left
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str, file: IO[str] | None = None) -> str:
    """Text as it may be written to a terminal or log: control characters and what the encoding lacks as escapes.

    Args:
        text: anything, of a user or a model.
        file: where it goes; standard output if left out.
    """
    text = _CONTROL.sub(lambda found: _escape(found[0]), text)
    encoding = getattr(sys.stdout if file is None else file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def say(message: str) -> None:
    """One line for the person who waits (standard error)."""
    console.print(plain(message, sys.stderr), soft_wrap=True)


def show_text(text: str) -> None:
    """Print lines on standard output."""
    out.print(plain(text), soft_wrap=True)


def show_json(value: Any) -> None:
    """Print a value as JSON on standard output; it stays JSON in every encoding."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    text = json.dumps(value, indent=2, ensure_ascii=encoding != "utf8")
    text = re.sub("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", lambda found: _escape(found[0]), text)
    out.print(text, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print an aligned table on standard output; numbers are right-aligned."""
    table = Table(title=plain(title), title_justify="left", show_edge=False, pad_edge=False, box=None)
    cells = [[plain(_cell(value)) for value in row] for row in rows]
    needed = 0
    for position, name in enumerate(map(plain, columns)):
        numeric = bool(rows) and all(isinstance(row[position], int | float | None) for row in rows)
        last = position + 1 == len(columns)  # the one that may wrap on a narrow terminal
        texts = [name, *(row[position] for row in cells)]
        needed += 2 + max(cell_len(part) for text in texts for part in (text.split() if last else [text]) or [""])
        table.add_column(name, justify="right" if numeric else "left", no_wrap=not last, overflow="fold")
    for row in cells:
        table.add_row(*row)
    wide = Console(width=None if sys.stdout.isatty() else 160, **_LITERAL)
    wide.width = max(wide.width, needed)  # nothing is ever cut: a narrower terminal breaks the lines itself
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
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=console,
                transient=True,
            )
            self.task = self.progress.add_task(plain(label, sys.stderr), total=total, rate="", detail="")

    def advance(self, units: float, detail: str = "") -> None:
        """Report ``units`` more done."""
        self.done += units
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        if self.progress is not None:
            self.progress.update(self.task, advance=units, rate=f"{rate:,.0f} {self.unit}/s", detail=plain(detail))
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
