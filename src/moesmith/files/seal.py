"""Notice damage to what no list of a folder names: records that stand alone, and a stage's files while it is made.

A record (``run.json``, a manifest) holds the hash of its own content. Next to a file of a stage that is being made lies
a hidden one with its hash. That is written first and holds the hash of the file before as well, since a process can be
killed between the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "seal"  # the key of a record's own hash
BESIDE = ".seal"  # ends the hidden name of a file that holds the hash of another
PARTIAL = ".partial"  # ends the hidden name of a stage that is being made


def digest(value: Any) -> str:
    """Return a short sha256 of any JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes (hex)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the hash of its content as JSON holds it."""
    return {**record, RECORD: digest(json.loads(json.dumps(record)))}


def unsealed(found: Any) -> Any:
    """Return a record without its hash; other JSON, and records of version 0.1, as they are.

    Raises:
        ValueError: it is not as it was sealed.
    """
    if isinstance(found, dict) and RECORD in found and found.pop(RECORD) != digest(found):
        raise ValueError("it has changed since moesmith wrote it")
    return found


def making(path: Path) -> Path | None:
    """Return the folder of the stage that is being made to which a file belongs."""
    return next((p for p in path.parents if p.name.endswith(PARTIAL) and p.parent.name == "stages"), None)


def beside(path: Path) -> Path:
    """Return the path of the hidden file that holds a file's hash."""
    return path.with_name(f".{path.name}{BESIDE}")


def as_sealed(path: Path, found: str | None = None) -> bool:
    """Whether a file is one whose hash lies beside it; where none does, nothing is known of it.

    Args:
        path: of the file.
        found: its hash, if it has been computed.
    """
    hashes = beside(path)
    if not (hashes.is_file() and path.is_file()):
        return True
    return (found or file_digest(path)) in hashes.read_text(encoding="utf-8", errors="replace").split()
