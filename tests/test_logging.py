"""What is said goes to the logger and to run.log as well; --quiet and --verbose choose what is printed."""

from __future__ import annotations

import io
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import moesmith

from moesmith import console
from moesmith.arguments import LAUNCHERS
from moesmith.console import LOGGER, log_to, meter, say, volume
from moesmith.errors import MoesmithError

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ([A-Z]+) (.*)")


def lines(path: Path) -> list[tuple[str, str]]:
    """Level and text of every line of a log."""
    found = [LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(found)
    return [(match[1], match[2]) for match in found if match]


@contextmanager
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each look of a meter at the clock is ten seconds later than the one before."""
    ticks = count(0.0, 10.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks), strftime=time.strftime, localtime=time.localtime)
    with monkeypatch.context() as patch:
        patch.setattr(console, "time", clock)
        yield


def state() -> tuple[object, ...]:
    """What logging changes and must put back."""
    loggers = (LOGGER, logging.getLogger(), logging.getLogger("transformers"))
    levels = [(logger.level, list(logger.handlers)) for logger in loggers]
    return levels, console._shown, list(warnings.filters), warnings.showwarning, dict(os.environ)


def test_a_line_goes_to_both(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "moesmith"):
        say("kept 50 % of [bold]x[/bold]")
        say("odd", logging.WARNING)
    assert capsys.readouterr().err == "kept 50 % of [bold]x[/bold]\nodd\n"
    records = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert records == [("moesmith", "INFO", "kept 50 % of [bold]x[/bold]"), ("moesmith", "WARNING", "odd")]


def test_the_log_has_time_and_level_and_is_continued(tmp_path: Path) -> None:
    before, path = state(), tmp_path / "run.log"
    say("before")
    with log_to(path):
        say("first 100 %s")
    with log_to(path):
        say("second", logging.WARNING)
        say("not of interest", logging.DEBUG)
    say("after")
    assert lines(path) == [("INFO", "first 100 %s"), ("WARNING", "second")]
    assert state() == before


def test_control_characters_and_line_ends_forge_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with log_to(path):
        say("a\x1b[2Jb\u202ec\rd\ud800 ä\n2026-01-01 00:00:00+0000 INFO forged")
    head, tail = path.read_text(encoding="utf-8").splitlines()
    assert head.endswith(r"INFO a\u001b[2Jb\u202ec\u000dd\ud800 ä")
    assert tail == "    2026-01-01 00:00:00+0000 INFO forged"


def test_what_ends_a_run_is_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with pytest.raises(MoesmithError), log_to(path):
        raise MoesmithError("no such thing", "Take another.")
    with pytest.raises(KeyboardInterrupt), log_to(path):
        raise KeyboardInterrupt
    assert lines(path) == [("ERROR", "no such thing. Take another."), ("ERROR", "interrupted")]
    with pytest.raises(ZeroDivisionError), log_to(path):
        print(1 / 0)
    fault = path.read_text(encoding="utf-8").splitlines()[2:]
    assert LINE.fullmatch(fault[0])
    assert fault[-1] == "    ZeroDivisionError: division by zero"
    assert any("print(1 / 0)" in line for line in fault)


def test_the_file_is_closed(tmp_path: Path) -> None:
    with log_to(tmp_path / "run.log"):
        stream = LOGGER.handlers[-1].stream  # type: ignore[attr-defined]
        assert not stream.closed
    assert stream.closed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = tmp_path / "run.log", state()
    with log_to(path):
        say("one")
        full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
        LOGGER.handlers[-1].setStream(full)  # type: ignore[attr-defined]
        say("two")
        say("three")
    said = capsys.readouterr().err.splitlines()
    assert said == ["one", "two", f"{path} cannot be written: No space left on device; going on without it", "three"]
    assert lines(path) == [("INFO", "one")]
    assert full.closed
    assert state() == before


@pytest.mark.parametrize("what", ["a folder", "a link", "no folder"])
def test_what_is_no_file_of_ours_is_left_alone(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "run" / "run.log", tmp_path / "other"
    other.write_text("mine")
    if what != "no folder":
        path.parent.mkdir()
    if what == "a folder":
        path.mkdir()
    if what == "a link":
        path.symlink_to(other)
    with log_to(path):
        say("goes on")
    warning, line = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"{path} cannot be written: ")
    assert line == "goes on"
    assert other.read_text() == "mine"


@pytest.mark.parametrize("variable", LAUNCHERS.values())
def test_only_the_first_process_writes(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with log_to(tmp_path / "second.log"):
        say("hello")
    monkeypatch.setenv(variable, "0")
    with log_to(tmp_path / "first.log"):
        say("hello")
    assert [path.name for path in tmp_path.iterdir()] == ["first.log"]


@pytest.mark.parametrize("quiet", [False, True])
def test_meters_obey(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with slow_clock(monkeypatch), log_to(tmp_path / "run.log"), volume(quiet=quiet), meter("moments", 100) as bar:
        bar.advance(50)
    printed = capsys.readouterr().err
    assert printed.startswith("  moments: 50 %, ") is not quiet
    assert (printed == "") is quiet
    assert [text[:16] for _, text in lines(tmp_path / "run.log")] == ["  moments: 50 %,"]


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_obey_and_the_log_gets_their_lines(quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = console.Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(console, "console", terminal)
    with slow_clock(monkeypatch), log_to(tmp_path / "run.log"), volume(quiet=quiet), meter("moments", 100) as bar:
        bar.advance(50)
        assert (bar.progress is None) is quiet
    assert ("moments" in screen.getvalue()) is not quiet
    assert [text[:16] for _, text in lines(tmp_path / "run.log")] == ["  moments: 50 %,"]


def test_quiet_prints_errors_alone_and_logs_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state()
    with log_to(tmp_path / "run.log"), volume(quiet=True):
        say("progress")
        say("odd", logging.WARNING)
        say("wrong", logging.ERROR)
        warnings.warn("of a library", stacklevel=1)
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert capsys.readouterr().err == "wrong\n"
    assert lines(tmp_path / "run.log") == [("INFO", "progress"), ("WARNING", "odd"), ("ERROR", "wrong")]
    assert state() == before


def test_verbose_prints_and_logs_what_libraries_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state()
    with volume(verbose=True), log_to(tmp_path / "run.log"):
        say("detail", logging.DEBUG)
        logging.getLogger("some.library").info("so it is")
        warnings.warn("will go away", DeprecationWarning, stacklevel=1)
        logging.getLogger("transformers.trainer").warning("of transformers")
    printed = capsys.readouterr().err
    assert "detail\n" in printed
    assert "some.library: so it is\n" in printed
    assert "DeprecationWarning: will go away" in printed
    logged = (tmp_path / "run.log").read_text(encoding="utf-8")
    for part in (
        "DEBUG detail",
        "INFO some.library: so it is",
        "WARNING py.warnings",
        "WARNING transformers.trainer: of",
    ):
        assert part in logged
    assert state() == before


def test_both_are_refused_in_one_line() -> None:
    answer = moesmith("--quiet", "--verbose", "presets")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "moesmith: --quiet and --verbose exclude each other. Give one of them, or none.\n"


def test_a_quiet_command_prints_its_table_or_its_error(finished: Path, tmp_path: Path) -> None:
    run = [str(finished), "--tokens", "256"]
    loud, quiet = moesmith("eval", *run), moesmith("--quiet", "eval", *run)
    assert (loud.status, quiet.status, quiet.err) == (0, 0, "")
    assert quiet.out == loud.out
    assert loud.err != ""
    wrong = moesmith("--quiet", "inspect", tmp_path / "nowhere")
    assert (wrong.status, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert wrong.err.startswith("moesmith: ")
    assert console._shown == logging.INFO  # the next command is as it always was
