"""Files that appear whole or not at all: atomic writes, hashes, and the manifest of a finished stage.

Everything moesmith leaves on disk goes through this module. A file is written beside its final name,
flushed to the disk and renamed; a stage's folder is filled under a hidden name and renamed when its
manifest is in it. A process killed at any moment therefore leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesmith.errors import MoesmithError

MANIFEST = "manifest.json"
WRITE_CURE = "Free disk space and run the same command again."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def digest(value: Any) -> str:
    """A short sha256 of any JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes (hex)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors makes files for their owner alone
        os.replace(temporary, path)
    except OSError as error:
        raise MoesmithError(f"cannot write {path}: {error.strerror or error}", WRITE_CURE) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda temporary: _fill(temporary, text))


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a broken file is named.

    Raises:
        MoesmithError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MoesmithError(f"{path} is missing", "Is this a folder made by 'moesmith convert'?") from error
    except (OSError, ValueError) as error:
        raise MoesmithError(f"{path} cannot be read as JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(whole, temporary, metadata=dict(metadata or {}))
        except Exception as error:  # safetensors reports a full disk as its own error type
            raise OSError(0, str(error)) from error

    write_atomic(path, save)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        MoesmithError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise MoesmithError(f"{path} cannot be read: {error}", "Delete the folder it lies in and run again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:
        raise MoesmithError(f"{path} cannot be read: {error}", "Delete the folder it lies in and run again.") from error


def commit(work: Path, final: Path, manifest: Mapping[str, Any], drop: Sequence[str] = ()) -> None:
    """Turn a filled working folder into a finished artefact: hash its files, add the manifest, rename it.

    Files named in ``drop`` are working state: they stay until the rename has made the artefact final, then go.
    """
    names = sorted(str(p.relative_to(work)) for p in work.rglob("*") if p.is_file())
    names = [name for name in names if name not in drop and name != MANIFEST and not name.endswith(".tmp")]
    write_json(work / MANIFEST, {**manifest, "files": {name: file_digest(work / name) for name in names}})
    if final.exists():
        shutil.rmtree(final)
    os.replace(work, final)
    for name in drop:
        (final / name).unlink(missing_ok=True)


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a finished artefact made from the inputs behind ``key``; ``None`` if it is not there."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest if manifest.get("key") == key else None


def verify_files(folder: Path) -> None:
    """Compare every file of a finished artefact with the hash in its manifest.

    Raises:
        MoesmithError: a file is missing or changed; it is named.
    """
    for name, expected in read_json(folder / MANIFEST)["files"].items():
        path = folder / name
        if not path.is_file() or file_digest(path) != expected:
            raise MoesmithError(f"{path} is missing or damaged", f"Delete {folder} and run the same command again.")
