"""A stage's ``log.jsonl``: a line of JSON for each step, compared with the checkpoint's hash when the stage goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_text
from moesmith.files.seal import beside
from moesmith.files.write import write_atomic


class Log:
    """Writes JSON lines, one for each step.

    Args:
        path: of the file.
        done: steps that the checkpoint has; lines past them are dropped, so that each step is logged once.
        known: the hash of their lines that the checkpoint holds; ``None`` if it holds none.

    Raises:
        MoesmithError: the lines have changed.
    """

    def __init__(self, path: Path, done: int, known: str | None) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        kept = b"".join(line for line in lines[:done] if line.endswith(b"\n"))
        self.hash = hashlib.sha256(kept)
        if known not in (None, self.hash.hexdigest()):
            cure = f"Delete {path.parent} and run the same 'moesmith convert' again."
            raise MoesmithError(f"{path} is missing or damaged", cure)
        write_atomic(path, lambda temporary: temporary.write_bytes(kept))
        beside(path).unlink(missing_ok=True)  # it grows
        # without a buffer: what finds no room is an error now, and not once more when the file is closed
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.hash.update(line)

    def settled(self) -> str:
        """Wait until the disk holds all lines; return their hash."""
        os.fsync(self.file.fileno())
        return self.hash.hexdigest()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the steps of a finished stage's log; a last line cut off by a kill is left out.

    Raises:
        MoesmithError: it is missing, or not the one that its stage lists.
    """
    steps = []
    for line in read_text(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record and "tokens" in record:
            steps.append(record)
    return steps
