"""Make several rows of a comparison, or conversions of a study, at the same time, in processes of their own.

A small model does not fill an accelerator: its kernels take less time than to start them, and one process starts them
one after the other. Each process has its own copy of the parent and makes one row after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

import torch

from moesmith.console import duration, meter, say, volume
from moesmith.errors import MoesmithError
from moesmith.parent.compute import AUTO, Device, accelerators

Make = Callable[[str], Any]  # what a process makes of a row's name
ENDED = "A process that made rows has ended, perhaps for lack of memory"

_make: Make | None = None  # of a process of the pool
_quiet = ExitStack()


def check_jobs(jobs: int) -> None:
    """Refuse a number of processes that makes nothing.

    Raises:
        MoesmithError: it is below 1.
    """
    if jobs < 1:
        raise MoesmithError(f"jobs is {jobs}", "Give 1 or more.")


def at_once(
    begin: Callable[[Device], Make], names: Sequence[str], jobs: int, device: Device
) -> Iterator[tuple[str, Any]]:
    """Make rows in several processes, and yield each as it is done.

    Args:
        begin: called once in every process with its device; returns what makes a row. It is pickled.
        names: of the rows.
        jobs: processes.
        device: where they compute; of several accelerators of a machine each takes the next, if none is named.

    Yields:
        A row's name, and what was made.

    Raises:
        MoesmithError: a process has ended.
    """
    context = multiprocessing.get_context("spawn")  # what was computed on an accelerator does not survive a fork
    jobs, started = min(jobs, len(names)), time.monotonic()
    options: dict[str, Any] = {"initializer": _begin, "initargs": (begin, context.Value("i", 0), jobs, device)}
    with meter("rows", len(names)) as bar, ProcessPoolExecutor(jobs, context, **options) as pool:
        waiting = {pool.submit(_row, name): name for name in names}
        try:
            for done in as_completed(waiting):
                found = done.result()
                say(f"== {waiting[done]}: after {duration(time.monotonic() - started)}")
                bar.advance(1)
                yield waiting[done], found
        except BrokenProcessPool as error:
            raise MoesmithError(ENDED, "Run the same command again, with fewer --jobs.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[[Device], Make], counter: Any, jobs: int, device: Device) -> None:
    """Get a process of the pool ready."""
    global _make
    threading.Thread(target=_follow, daemon=True).start()
    with counter.get_lock():
        place, counter.value = counter.value, counter.value + 1
    _quiet.enter_context(volume(quiet=True))
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    known = accelerators()
    if str(device) == AUTO and known:
        device = known[place % len(known)]
    _make = begin(device)


def _follow() -> None:
    """End this process with the one that began it, which may be killed: a pool waits for its next row forever."""
    first = multiprocessing.parent_process()
    assert first is not None, "a process of a pool was begun by another"
    first.join()
    os._exit(1)


def _row(name: str) -> Any:
    assert _make is not None
    return _make(name)
