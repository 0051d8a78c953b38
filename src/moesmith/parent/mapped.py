"""Give back the memory of weights in mapped safetensors files once a layer has done its work."""

from __future__ import annotations

import ctypes
import os
import re
from io import FileIO
from pathlib import Path

import numpy as np

MAPS, PAGES, SMAPS = Path("/proc/self/maps"), Path("/proc/self/pagemap"), Path("/proc/self/smaps")
DONTNEED = 4  # MADV_DONTNEED: a page that is a file's own is dropped, and read again when it is touched
# address range of a mapping; in smaps also the count of pages that were written to and so are the process's own
MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) [^\n]*\.safetensors$", re.MULTILINE)
COUNTED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) [^\n]*\.safetensors\n(?:[A-Z].*\n)*?Anonymous: +(\d+) kB", re.MULTILINE)
# of a page's entry: it is the file's own, it is swapped out, it is in memory
OF_FILE, SWAPPED, PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))
CHUNK = 2**20  # entries that are read at once, of 8 bytes each


def give_back() -> None:
    """Drop every resident page of mapped safetensors files, except of mappings that this process has written to.

    What the allocator holds in reserve goes back as well: glibc keeps freed blocks of up to 32 MiB, such as a layer's
    matrices. Without ``/proc`` nothing happens: the system drops such pages itself when it needs them.
    """
    if not MAPS.is_file():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's own
        libc.malloc_trim(0)
    for start, end in _unwritten():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)


def _unwritten() -> list[tuple[int, int]]:
    """Address ranges of mapped safetensors files that hold no page of the process's own.

    The mappings are private: what was written would be lost. ``smaps`` tells it of every mapping, and a process with
    torch has a thousand; the page table tells it of these alone, where a process may read it.
    """
    try:
        with FileIO(PAGES) as pages:
            mapped = [(int(start, 16), int(end, 16)) for start, end in MAPPED.findall(MAPS.read_text())]
            return [(start, end) for start, end in mapped if not _written(pages, start, end)]
    except OSError:
        found = COUNTED.findall(SMAPS.read_text())
        return [(int(start, 16), int(end, 16)) for start, end, written in found if written == "0"]


def _written(pages: FileIO, start: int, end: int) -> bool:
    """Whether one of these pages is the process's own."""
    size = os.sysconf("SC_PAGE_SIZE")
    pages.seek(start // size * 8)
    left = (end - start) // size * 8
    while left:
        entries = pages.read(min(left, 8 * CHUNK))
        if not entries:
            raise OSError("the page table ends early")
        entries_N = np.frombuffer(entries, np.uint64)
        if (((entries_N & (SWAPPED | PRESENT)) != 0) & ((entries_N & OF_FILE) == 0)).any():
            return True
        left -= len(entries)
    return False
