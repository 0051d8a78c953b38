"""Give back the memory of weights in mapped safetensors files once a layer has done its work."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

MAPS = Path("/proc/self/smaps")
DONTNEED = 4  # MADV_DONTNEED: an unchanged page of a file is dropped, and read again when it is touched
# address range, then the size of the pages that were written to and so are the process's own
MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) [^\n]*\.safetensors\n(?:[A-Z].*\n)*?Anonymous: +(\d+) kB", re.MULTILINE)


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
    for start, end, written in MAPPING.findall(MAPS.read_text()):
        if written == "0":  # the mappings are private: what was written would be lost
            first = int(start, 16)
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(int(end, 16) - first), DONTNEED)
