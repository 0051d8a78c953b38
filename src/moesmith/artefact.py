"""Files that appear whole or not at all: atomic writes, hashes, and the list of what a finished folder holds.

Everything moesmith leaves on disk goes through this module. A file is written beside its final name,
flushed to the disk and renamed; a folder is filled under a hidden name and renamed when the list of its files is
in it. A process killed at any moment therefore leaves either the old state or the new one.

A stage's list is in its manifest; a folder that others read as well (a model, a packed delta) has ``SHA256SUMS``, which
``sha256sum -c`` understands. Whatever reads a listed file compares it with its hash first.
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

from moesmith.console import meter
from moesmith.errors import MoesmithError

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
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
    # a path that is no UTF-8 is written as an escape, which JSON reads back
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a broken file is named.

    Raises:
        MoesmithError: the file is missing, not JSON, or not the one that its folder lists.
    """
    check_file(path)
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
        MoesmithError: the file is missing, truncated, not safetensors, or not the one that its folder lists.
    """
    check_file(path)
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


def sums_of(folder: Path) -> dict[str, str]:
    """sha256 by name of every file below ``folder``, its ``SHA256SUMS`` apart."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: file_digest(folder / name) for name in names if name != SUMS}


def write_sums(folder: Path, sums: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS``: a line with hash and name for every file below ``folder``, or as ``sums`` says."""
    sums = sums_of(folder) if sums is None else sums
    write_text(folder / SUMS, "".join(f"{value}  {name}\n" for name, value in sums.items()))


def listed(folder: Path) -> dict[str, str]:
    """sha256 by name of the files that a finished folder was left with; empty where nothing lists them.

    Raises:
        MoesmithError: the list itself is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return dict(read_json(folder / MANIFEST).get("files", {})) if (folder / MANIFEST).is_file() else {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split("  ", 1) for line in lines if line.count("  ")]
    found = {name: value for value, name in pairs}
    if len(found) != len(lines) or any(len(value) != 64 for value in found.values()):
        raise MoesmithError(f"{path} is damaged", f"Delete {folder} and make it again.")
    return found


def differing(folder: Path) -> list[str]:
    """Names that a folder lists whose files are missing or have other bytes."""
    expected = listed(folder)
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in expected}
    found = []
    with meter(f"checking {folder.name}", sum(sizes.values()) / 1e6, "MB") as bar:
        for name, known in expected.items():
            if not (folder / name).is_file() or file_digest(folder / name) != known:
                found.append(name)
            bar.advance(sizes[name] / 1e6)
    return found


def verify_files(folder: Path, cure: str = "") -> None:
    """Compare every file that a finished folder lists with its hash.

    Args:
        folder: a stage, a model, a packed delta.
        cure: what to do about it; to convert again if left out.

    Raises:
        MoesmithError: a file is missing or changed; it is named.
    """
    for name in differing(folder)[:1]:
        raise _damaged(folder, name, cure)


def check_file(path: Path) -> None:
    """Compare a file with its hash where its folder lists it; a folder that is still being filled lists nothing.

    Raises:
        MoesmithError: it is missing or changed.
    """
    if path.name in (MANIFEST, SUMS):
        return
    known = listed(path.parent).get(path.name)
    if known is not None and (not path.is_file() or file_digest(path) != known):
        raise _damaged(path.parent, path.name)


def _damaged(folder: Path, name: str, cure: str = "") -> MoesmithError:
    cure = cure or f"Delete {folder} and run the same 'moesmith convert' again."
    return MoesmithError(f"{folder / name} is missing or damaged", cure)
