"""Folders that appear whole or not at all, the list of what each holds, and readers that compare with it.

A file is written next to its final name, flushed to the disk and renamed (``files/write.py``); a folder is filled under
a hidden name and renamed when it holds the list of its files. A process killed at any moment therefore leaves either
the old state or the new one.

A stage's list is in its manifest; a folder that others read as well (a model, a packed delta) has ``SHA256SUMS``, which
``sha256sum -c`` understands. Whatever reads a listed file compares it with its hash first. The first line of the list
says that moesmith wrote it: moesmith may replace what it names, if unchanged (``files/outputs.py``), and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moesmith.console import meter
from moesmith.errors import MoesmithError
from moesmith.files.parse import as_written, parse_json
from moesmith.files.seal import BESIDE, as_sealed, file_digest, making, unsealed
from moesmith.files.write import TEMPORARY, write_record, write_text

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
RUN = "run.json"
FORMAT = 3  # of a run's files (1: keys without the tokenizer, no format number; 2: every section in every recipe)
SIGNED = "# written by moesmith; sha256 of the lines below: "  # sha256sum skips lines that begin with #
OLD = ".old"  # ends the name of what is moved aside


def read_text(path: Path) -> str:
    """Read a text file that its folder lists.

    Raises:
        MoesmithError: it is missing, or not the one that its folder lists.
    """
    check_file(path)
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; the error names a broken file.

    Raises:
        MoesmithError: the file is missing, not JSON, a record that has changed since, or not the one that its folder
            lists; or it is a run's, in a format that a newer moesmith writes.
    """
    check_file(path)
    try:
        found = unsealed(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise MoesmithError(f"{path} is missing", "Is this a folder made by 'moesmith convert'?") from error
    except (OSError, ValueError) as error:
        raise MoesmithError(f"{path} cannot be read: {error}", _cure(path)) from error
    if path.name in (RUN, MANIFEST):
        with as_written(path):
            check_format(path, found.get("format", 1))
    return found


def check_format(path: Path, written: int, known: int = FORMAT) -> None:
    """Refuse what a newer moesmith wrote.

    Raises:
        MoesmithError: its format is above the one that this version knows.
    """
    if written > known:
        raise MoesmithError(
            f"{path} was written by a newer moesmith (format {written}, this one knows {known})",
            "Upgrade moesmith to work with it.",
        )


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
        raise MoesmithError(f"{path} cannot be read: {error}", "Delete the folder it is in and run again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the string metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:
        raise MoesmithError(f"{path} cannot be read: {error}", "Delete the folder it is in and run again.") from error


def commit(work: Path, final: Path, manifest: Mapping[str, Any], drop: Sequence[str] = ()) -> None:
    """Turn a filled working folder into a finished artefact: hash its files, add the manifest, rename it.

    Files and folders named in ``drop`` are working state: they are deleted once the rename has made the artefact final.

    Raises:
        MoesmithError: ``final`` holds what moesmith did not leave there (:func:`check_left`), or a file of ``work`` has
            changed since it was written.
    """
    sweep(work)
    names = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
    names = [n for n in names if n.partition("/")[0] not in (*drop, MANIFEST) and not n.endswith(BESIDE)]
    hashes = {name: file_digest(work / name) for name in names}
    for name, value in hashes.items():  # what an earlier try left may have been damaged since
        if not as_sealed(work / name, value):
            raise _damaged(work, name)
    write_record(work / MANIFEST, {**manifest, "files": hashes})
    for path in work.rglob(f".*{BESIDE}"):
        path.unlink()
    check_left(final, drop)
    with aside(final):
        os.replace(work, final)
    for name in drop:
        remove(final / name)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; neither need be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_left(final: Path, drop: Sequence[str] = ()) -> None:
    """Refuse to replace a stage's folder that differs from its manifest; one that is absent or empty may be filled.

    Raises:
        MoesmithError: a file in it is not listed or has changed.
    """
    if not os.path.lexists(final):
        return
    manifest = read_json(final / MANIFEST) if (final / MANIFEST).is_file() else None
    ours = isinstance(manifest, dict) and {"key", "files"} <= manifest.keys()
    known = manifest["files"] if manifest is not None and ours else {}
    odd = strangers(final, {*known, *drop, MANIFEST} if ours else ())
    odd = [name for name in odd if not (ours and name.partition("/")[0] in drop)]  # and what is in such a folder
    if odd := odd or differing(final, known):
        raise MoesmithError(f"{final / odd[0]} is not as moesmith left it", f"Delete {final} or move it away.")


@contextlib.contextmanager
def aside(path: Path) -> Iterator[None]:
    """Move what is at ``path`` aside while something else takes its place; put it back after an error, else delete."""
    if not os.path.lexists(path):
        yield
        return
    hidden = hidden_beside(path)
    old = hidden / f"{path.name}{OLD}"
    try:
        os.replace(path, old)
        yield
    except BaseException:
        if os.path.lexists(old):  # if this fails, the old one stays under its hidden name
            os.replace(old, path)
        hidden.rmdir()
        raise
    shutil.rmtree(hidden, ignore_errors=True)


def hidden_beside(path: Path) -> Path:
    """Make a new hidden folder next to ``path`` for unfinished work: it is ours, since it did not exist before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=TEMPORARY, dir=path.parent))


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written below ``folder``, recognised by its hidden name.

    What was moved aside for something that never came gets its name back.
    """
    for left in sorted(folder.rglob(f".*{TEMPORARY}")):
        if left.is_dir() and not left.is_symlink():
            for old in left.glob(f"*{OLD}"):
                if not os.path.lexists(name := left.parent / old.name.removesuffix(OLD)):
                    os.replace(old, name)
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """Read the manifest of a finished artefact made from the inputs behind ``key``; ``None`` if it is not there."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest if manifest.get("key") == key else None


def sums_of(folder: Path) -> dict[str, str]:
    """Compute the sha256 of every file below ``folder`` except its ``SHA256SUMS``, by name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: file_digest(folder / name) for name in names if name != SUMS}


def write_sums(folder: Path, sums: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS``: every file below ``folder``, or those in ``sums`` (:func:`write_list`)."""
    write_list(folder / SUMS, sums_of(folder) if sums is None else sums)


def write_list(path: Path, sums: Mapping[str, str]) -> None:
    """Write each file's hash and name, relative to the list's folder, below a line that says whose list it is."""
    lines = "".join(f"{value}  {name}\n" for name, value in sums.items())
    write_text(path, f"{SIGNED}{hashlib.sha256(lines.encode()).hexdigest()}\n{lines}")


def own_list(path: Path) -> dict[str, str] | None:
    """Read the sha256 by name in a list of moesmith's; ``None`` if there is no list, or not as moesmith left it."""
    if path.is_symlink() or not path.is_file():
        return None
    first, _, lines = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    if first != SIGNED + hashlib.sha256(lines.encode()).hexdigest():
        return None
    found = {name: value for value, _, name in (line.partition("  ") for line in lines.splitlines())}
    return found if _inside(found) else None


def _inside(names: Collection[str]) -> bool:
    """Whether names lead to files below the folder that lists them, and can be names of files."""
    paths = [PurePosixPath(name) for name in names if isinstance(name, str) and "\0" not in name]
    plain = [path for path in paths if not path.is_absolute() and not {"..", ""} & {*path.parts, path.name}]
    return len(plain) == len(names) and all(len(os.fsencode(part)) < 256 for path in plain for part in path.parts)


def listed(folder: Path) -> dict[str, str]:
    """Read the sha256 by name of the files that a finished folder was left with; empty where nothing lists them.

    Raises:
        MoesmithError: the list itself is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        if not (path := folder / MANIFEST).is_file():
            return {}
        with as_written(path):
            found = dict(read_json(path).get("files", {}))
        if not _inside(found):
            raise MoesmithError(f"{path} is damaged: it names files that are not its folder's", f"Delete {folder}.")
        return found
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pairs = [line.split("  ", 1) for line in lines if line.count("  ")]
    found = {name: value for value, name in pairs}
    whole = len(found) == len(lines) and all(len(value) == 64 for value in found.values())
    if not whole or not _inside(found) or (text.startswith(SIGNED) and own_list(path) is None):
        raise MoesmithError(f"{path} is damaged", f"Delete {folder} and make it again.")
    return found


def strangers(folder: Path, names: Collection[str]) -> list[str]:
    """List what is below ``folder`` apart from the files of these names: other files, links, folders that hold none."""
    above = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    found = []
    for path in sorted(folder.rglob("*")):
        name, plain = path.relative_to(folder).as_posix(), not path.is_symlink()
        if not (plain and ((path.is_dir() and name in above) or (path.is_file() and name in names))):
            found.append(name)
    return found if folder.is_dir() and not folder.is_symlink() else [*found, ""]


def differing(folder: Path, expected: Mapping[str, str] | None = None) -> list[str]:
    """Return those of the ``expected`` names (default: all a folder lists) whose files are missing or have changed."""
    expected = listed(folder) if expected is None else expected
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
        cure: how to fix it; to convert again if left out.

    Raises:
        MoesmithError: a file is missing or changed; it is named.
    """
    for name in differing(folder)[:1]:
        raise _damaged(folder, name, cure)


def check_file(path: Path) -> None:
    """Compare a file with its hash: in its folder's list, or beside it where a stage is still being made.

    Raises:
        MoesmithError: it is missing or changed.
    """
    if path.name in (MANIFEST, SUMS):
        return
    known = listed(path.parent).get(path.name)
    if not as_sealed(path) if known is None else not path.is_file() or file_digest(path) != known:
        raise _damaged(path.parent, path.name)


def _damaged(folder: Path, name: str, cure: str = "") -> MoesmithError:
    return MoesmithError(f"{folder / name} is missing or damaged", cure or _cure(folder / name))


def _cure(path: Path) -> str:
    """Say how to get a damaged file of a run again."""
    if path.name == RUN:
        return "Put a copy of it back, or convert again in another folder."
    return f"Delete {making(path) or path.parent} and run the same 'moesmith convert' again."
