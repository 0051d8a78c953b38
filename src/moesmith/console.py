"""Print what a person sees while moesmith works: lines, progress with time left, aligned tables. Write a run's log.

Everything is shown literally: brackets and colons in a name are not markup, its control characters cannot drive the
terminal, and what the output's encoding lacks is written as an escape. Every line goes to the logger ``moesmith`` too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moesmith.arguments import first_process
from moesmith.errors import MoesmithError

LOGGER = logging.getLogger("moesmith")
LOGGER.addHandler(logging.NullHandler())  # without it Python would print warnings a second time
_shown = logging.INFO  # lines of this level and above are printed
# what the environment tells libraries, before they are imported
_TALKATIVE = {"TRANSFORMERS_VERBOSITY": "info"}
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
_LITERAL: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
console = Console(stderr=True, **_LITERAL)
out = Console(soft_wrap=True, **_LITERAL)
# characters that move a cursor or reverse the reading direction, without line ends and tabs
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MARKS = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])")  # Markdown's


def plain(text: str, file: IO[str] | None = None) -> str:
    """Make text safe for a terminal or log: control characters and what the encoding lacks become escapes.

    Args:
        text: anything, from a user or a model.
        file: where it goes; standard output if left out.
    """
    return _escaped(text, getattr(sys.stdout if file is None else file, "encoding", None) or "utf-8")


def _escaped(text: str, encoding: str) -> str:
    text = _CONTROL.sub(lambda found: _escape(found[0]), text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def inline(text: str) -> str:
    """Escape a user's text for a line or table cell of Markdown: it is shown as it is, whatever marks it holds."""
    return _MARKS.sub(r"\\\g<0>", plain(" ".join(text.split())))


def code(text: str) -> str:
    """Write a user's text as code in a line of Markdown, fenced by more backticks than it holds."""
    text = plain(" ".join(text.split()))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def markdown(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """Write a table in Markdown; its first column is text, the others are numbers."""
    head_line, *lines = (f"| {' | '.join(inline(str(cell)) for cell in row)} |" for row in (head, *body))
    return "\n".join([head_line, "|---|" + "---:|" * (len(head) - 1), *lines])


def say(message: str, level: int = logging.INFO) -> None:
    """Print one line for the person who waits (standard error), and log it.

    Args:
        message: the line.
        level: a level of ``logging``: a quiet command prints only errors, a verbose one debug lines too.
    """
    if level >= _shown:
        console.print(plain(message, sys.stderr), soft_wrap=True)
    log(message, level)


def log(message: str, level: int = logging.INFO) -> None:
    """Give one line to the logger ``moesmith`` alone, as literally as on a terminal."""
    LOGGER.log(level, "%s", _escaped(message, "utf-8"))


@contextmanager
def volume(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Set how much is printed inside a ``with``; tables and other results always are.

    Args:
        quiet: only errors; no progress, no warnings from libraries.
        verbose: debug lines too, and what libraries log and warn about.

    Raises:
        MoesmithError: both are asked for.
    """
    global _shown
    if quiet and verbose:
        raise MoesmithError("--quiet and --verbose exclude each other", "Give one of them, or none.")
    before = _shown
    _shown = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    try:
        with ExitStack() as stack:
            if quiet:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(_environment(_QUIET))
            if verbose:
                stack.enter_context(_environment(_TALKATIVE))
                stack.enter_context(_libraries_speak())
            yield
    finally:
        _shown = before


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Libraries(logging.Handler):
    """Says what loggers other than ours are given, with their names."""

    def emit(self, record: logging.LogRecord) -> None:
        library, line = record.name.partition(".")[0], f"{record.name}: {record.getMessage().strip()}"
        if library == "transformers":  # it prints by itself
            log(line, record.levelno)
        elif library != LOGGER.name:
            say(line, record.levelno)


@contextmanager
def _libraries_speak() -> Iterator[None]:
    root, handler = logging.getLogger(), _Libraries()
    sources = (root, logging.getLogger("transformers"))  # transformers' records do not reach the root
    levels = {logger: logger.level for logger in (root, LOGGER)}
    for source in sources:
        source.addHandler(handler)
    root.setLevel(logging.INFO)
    LOGGER.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        logging.captureWarnings(False)
        for source in sources:
            source.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)


class _RunLog(logging.StreamHandler[IO[str]]):
    """Appends time, level and line to a file until writing fails once; once open, it never raises."""

    def __init__(self, path: Path) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OSError(0, "it is not an ordinary file")
        super().__init__(open(path, "a", encoding="utf-8"))  # noqa: SIM115
        self.path = path

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(record.created))
        # further lines of a message are indented, so that no name in it can look like a message of its own
        return f"{stamp} {record.levelname} " + _escaped(text, "utf-8").replace("\n", "\n    ")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        LOGGER.removeHandler(self)  # first: the next line goes to the log too
        _no_log(self.path, error)

    def close(self) -> None:
        with suppress(OSError):  # a full disk does not take the rest
            self.stream.close()
        super().close()


def _no_log(path: Path, error: BaseException | None) -> None:
    reason = error.strerror or error if isinstance(error, OSError) else error
    say(f"{path} cannot be written: {reason}; going on without it", logging.WARNING)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write every line that is said inside a ``with`` to a file as well, even where it is not printed.

    Each line gets the time and its level; an error that ends the body is the last line, a fault with its traceback. An
    existing file is continued. If the file cannot be written, from the start or later, there is one warning and no
    error. Of several processes only the first one writes.

    Args:
        path: ``run.log`` in a folder that exists.
    """
    if not first_process():
        yield
        return
    try:
        handler = _RunLog(path)
    except OSError as error:
        _no_log(path, error)
        yield
        return
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(min(LOGGER.getEffectiveLevel(), logging.INFO))
    try:
        yield
    except MoesmithError as error:
        log(str(error), logging.ERROR)
        raise
    except KeyboardInterrupt:
        log("interrupted", logging.ERROR)
        raise
    except Exception:
        LOGGER.critical("a fault", exc_info=True)
        raise
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()


def show_text(text: str) -> None:
    """Print lines on standard output."""
    out.print(plain(text), soft_wrap=True)


def show_piece(text: str) -> None:
    """Print a part of a text on standard output at once, without a line end."""
    out.print(plain(text), soft_wrap=True, end="")


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
    """Write a time as people say it: ``45 s``, ``14 min``, ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


class Meter:
    """A running count of units done, with a rate and the time left; ``detail`` is free text at the end."""

    def __init__(self, label: str, total: float, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started, self.printed = 0.0, time.monotonic(), time.monotonic()
        self.progress: Progress | None = None
        if console.is_terminal and _shown <= logging.INFO:
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
        if time.monotonic() - self.printed > 15:  # a log file gets a line every quarter of a minute
            self.printed = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-9)
            share = 100 * self.done / max(self.total, 1e-9)
            line = f"  {self.label}: {share:.0f} %, {rate:,.0f} {self.unit}/s, {left:.0f} s left {detail}"
            if self.progress is None:
                say(line)
            else:
                log(line)  # a terminal shows the bar


@contextmanager
def meter(label: str, total: float, unit: str = "tokens") -> Iterator[Meter]:
    """Show progress for the body of a ``with``: ``with meter("moments", n) as m: m.advance(512)``."""
    bar = Meter(label, total, unit)
    if bar.progress is None:
        yield bar
    else:
        with bar.progress:
            yield bar
