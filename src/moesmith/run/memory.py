"""The most memory that a piece of work took: of this process, and of the accelerator."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class Peak:
    """What :func:`peak_memory` found, in bytes; 0 until its ``with`` ends."""

    host = 0
    device = 0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the most resident memory inside the ``with``, pages of mapped files included, and an accelerator's.

    Linux forgets earlier peaks on request. Other systems know the whole process's only, so that there a piece of work
    after a larger one shows the larger one's.
    """
    found = Peak()
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")
    for index in _cudas():
        torch.cuda.reset_peak_memory_stats(index)
    try:
        yield found
    finally:
        found.host = _resident()
        found.device = max((torch.cuda.max_memory_allocated(index) for index in _cudas()), default=0)


def _cudas() -> range:
    """The GPUs that this process already uses: to ask would begin to use one."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _resident() -> int:
    with contextlib.suppress(OSError):
        if high := re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text()):
            return int(high[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return 0
