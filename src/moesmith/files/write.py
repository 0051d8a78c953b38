"""Write a file whole or not at all: next to its final name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.files.seal import BESIDE, beside, file_digest, making, sealed

TEMPORARY = ".moesmith.tmp"  # ends every hidden name of unfinished work, and no other name
ROOM = "Free disk space and run the same command again."
CURES = {  # by what the system says
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ROOM,
    errno.EROFS: "Give a folder on a disk that is not read-only.",
    errno.EACCES: "Give a folder that you may write in.",
    errno.EPERM: "Give a folder that you may write in.",
    errno.EEXIST: "Give another folder.",
    errno.ENOTDIR: "Give another folder.",
    errno.EISDIR: "Give another name.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EMFILE: "Raise the number of files that may be open (ulimit -n) and run the same command again.",
    errno.ENFILE: "Raise the number of files that may be open and run the same command again.",
    errno.EIO: "Give a folder on another disk: this one does not answer.",
}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def write_cure(error: OSError) -> str:
    """Say how to fix an error of the file system: what helps with a full disk does not help with a read-only one."""
    told = re.search(r"os error (\d+)", str(error))  # as libraries written in Rust say it
    code = int(told[1]) if told else error.errno
    return CURES.get(code or 0, "Fix that and run the same command again.")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, flush it to disk, then rename it into place.

    What is at ``path`` is replaced: the name is one that only moesmith writes, or ``files/outputs.py`` has allowed it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        if making(path) is not None and not path.name.endswith(BESIDE):
            hashes = [file_digest(each) for each in (temporary, path) if each.is_file()]
            write_text(beside(path), "\n".join(hashes))
        os.replace(temporary, path)
    except OSError as error:
        raise MoesmithError(f"cannot write {path}: {error.strerror or error}", write_cure(error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a new name, into a folder that is made if it is not there (some templates lie in one)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    # a path that is not UTF-8 is written as an escape, which JSON reads back
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write indented JSON that no list names, with its own hash, which :func:`read_json` compares and leaves out."""
    write_json(path, sealed(record))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(whole, temporary, metadata=dict(metadata or {}))
        except OSError:
            raise
        except Exception as error:  # safetensors reports a full disk as its own error type
            raise OSError(0, str(error)) from error

    write_atomic(path, save)


def mapped_tensors(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Make a safetensors file of int32 tensors that are on disk from the start, and may be larger than memory.

    Args:
        path: a new file; it is whole once all tensors are filled.
        shapes: of each tensor.

    Returns:
        The tensors, to be filled; :func:`settle` the file then.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "I32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if end and hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a signal later
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.truncate(8 + len(text) + end)
    found = {}
    for name, shape in shapes.items():
        place = 8 + len(text) + header[name]["data_offsets"][0]
        found[name] = torch.from_numpy(np.memmap(path, np.int32, "r+", place, tuple(shape)))
    return found


def settle(path: Path) -> None:
    """Wait until the disk holds what was written into a file's mapped tensors."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
