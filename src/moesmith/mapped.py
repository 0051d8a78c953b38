"""Weights that lie in mapped safetensors files: their pages go back to the system when a layer has done its work."""

from __future__ import annotations

import ctypes
from pathlib import Path

MAPS = Path("/proc/self/maps")
DONTNEED = 4  # MADV_DONTNEED: a clean page of a file is dropped, and read again when it is touched


def give_back() -> None:
    """Drop every resident page of mapped safetensors files.

    For processes that never write to such weights, as a conversion layer by layer: what was written would be lost, since
    the mappings are private. Where the system keeps no ``/proc`` nothing happens, and it drops pages when it needs them.
    """
    if not MAPS.is_file():
        return
    libc = ctypes.CDLL(None)
    for line in MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(bound, 16) for bound in line.split(maxsplit=1)[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)
