"""Check where a command may write: never over what it reads, never over what moesmith did not write and list.

A folder of ours holds ``SHA256SUMS``, a file of ours has ``NAME.sha256`` next to it: lists (``artefact.write_list``)
that ``sha256sum -c`` understands. What such a list names is ours if it has not changed since, and is replaced on
request. With one more file in the folder, one other byte, or a list that somebody else made, it stays as it is.

What is replaced is moved aside until the new one is in place, and put back after an error. A process killed between
these two moves leaves both in hidden folders that end in ``.moesmith.tmp``, the old one as ``NAME.old``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from moesmith.errors import MoesmithError
from moesmith.files.artefact import (
    SUMS,
    aside,
    differing,
    hidden_beside,
    own_list,
    read_json,
    strangers,
    sums_of,
    write_list,
)
from moesmith.files.seal import file_digest
from moesmith.files.write import write_cure

OTHER = "Give another --out"
ASK = "Give --overwrite (in Python overwrite=True) to replace what moesmith wrote there, or another --out."
# names that a run's folder uses
OF_A_RUN = ("run.json", "stages", "model", "stock", "bench", "figures", "tensorboard", "wandb")


def inputs_of(run: Path, *more: str | Path | None) -> list[Path]:
    """List what a command about a run reads: the run, its parent and data if they are on this machine, and ``more``.

    Raises:
        MoesmithError: the folder is not a run.
    """
    header = read_json(run / "run.json")
    named = header.get("inputs", {}) if isinstance(header, dict) else {}
    return existing(run, named.get("model"), named.get("data"), *more)


def existing(*named: str | Path | None) -> list[Path]:
    """Return the named paths that exist on this machine, and the folder into which the hub is downloaded."""
    names = [os.path.expanduser(name) for name in (*named, HF_HUB_CACHE) if isinstance(name, str | Path)]
    return [Path(name) for name in names if name and os.path.exists(name)]


def real(path: Path) -> Path:
    """Return where a path leads when links are followed."""
    return Path(os.path.realpath(path))


def check_place(out: Path, inputs: Iterable[Path], home: Path | None = None, *, links: bool = True) -> None:
    """Refuse to write at, in or around what a command reads, and at or around the root, home and current folder.

    Args:
        out: a file or a folder; it need not exist.
        inputs: files and folders.
        home: a folder that ``out`` may be directly in although it is read.
        links: whether to look for files of ``out`` that are files of the inputs under another name.

    Raises:
        MoesmithError: ``out`` is one of these by its real path or as another name of the same file.
    """
    there = real(out)
    for name, place in _places():
        if _within(place, there):
            raise MoesmithError(f"{out} {'is' if _within(there, place) else 'holds'} {name}", f"{OTHER}.")
    for path in inputs:
        known = real(path)
        around, inside = _within(known, there), _within(there, known)
        if around or (inside and (home is None or there.parent != real(home))):
            relation = "is in" if not around else "is" if inside else "holds"
            raise MoesmithError(f"{out} {relation} {path}, which this command reads", f"{OTHER}.")
    if linked := {_node(path) for path in _ours(there) if path.stat().st_nlink > 1} if links else ():
        for path in (file for known in inputs for file in _files(real(known))):
            if _node(path) in linked:
                raise MoesmithError(f"{out} is another name of {path}, which this command reads", f"{OTHER}.")


def _within(path: Path, folder: Path) -> bool:
    """Whether a real path is ``folder`` or is below it, under whatever name (mounted twice, in capitals)."""
    if folder in (path, *path.parents):
        return True
    return folder.is_dir() and any(each.exists() and each.samefile(folder) for each in (path, *path.parents))


def _ours(path: Path) -> list[Path]:
    """Return a file, or the files that a list of ours names in a folder: no others are ever replaced."""
    paths = [path / name for name in own_list(path / SUMS) or ()] if path.is_dir() else [path]
    return [each for each in paths if each.is_file()]


def _places() -> Iterator[tuple[str, Path]]:
    yield "the root of the file system", Path(os.path.abspath(os.sep))
    with contextlib.suppress(RuntimeError):
        yield "your home folder", real(Path.home())
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        yield "the current folder", real(Path.cwd())


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or every file below a folder."""
    for found in path.rglob("*") if path.is_dir() else (path,):
        if found.is_file():
            yield found


def _node(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def foreign(folder: Path, apart: Collection[str] = (), *, thorough: bool = True) -> str | None:
    """Say why a folder is not as moesmith left it; ``None`` if it is.

    Args:
        folder: one that exists.
        apart: names of files that may be there in any state.
        thorough: compare the hashes too.
    """
    sums = own_list(folder / SUMS)
    if sums is None:
        return f"it has no {SUMS} of moesmith's"
    for name in strangers(folder, {*sums, SUMS, *apart}):
        return f"{name} is not in its {SUMS}"
    for name in differing(folder, sums) if thorough else ():
        return f"{name} has changed"
    return None


def check_folder(out: Path, *, overwrite: bool, apart: Collection[str] = ()) -> None:
    """Refuse a folder that may not be written; one that is absent or empty may.

    Raises:
        MoesmithError: ``out`` is there and of the other kind, not ours, or ours without ``overwrite``.
    """
    there = real(out)
    if not os.path.lexists(there) or (there.is_dir() and not any(there.iterdir())):
        return
    if not there.is_dir():
        raise MoesmithError(f"{out} exists and is not a folder", f"{OTHER}.")
    if (why := foreign(there, apart, thorough=overwrite)) is not None:
        raise MoesmithError(f"{out} exists and holds something else: {why}", f"{OTHER}, or move it away.")
    if not overwrite:
        raise MoesmithError(f"{out} exists", ASK)


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False, apart: Collection[str] = ()) -> Iterator[Path]:
    """Give a hidden path of the same name to write a folder to; it is renamed to ``out``, or deleted after an error.

    Args:
        out: a new or empty folder, or with ``overwrite`` one of ours.
        overwrite: replace what moesmith wrote.
        apart: names of files that are not checked, and are copied from the old folder where the new one has none.

    Raises:
        MoesmithError: as :func:`check_folder`, or ``out`` cannot be written.
    """
    check_folder(out, overwrite=overwrite, apart=apart)
    there = real(out)
    with _hidden(out, there) as work:
        yield work
        check_folder(out, overwrite=overwrite, apart=apart)  # somebody may have written there meanwhile
        for name in apart:
            if (there / name).is_file() and not (work / name).exists():
                shutil.copyfile(there / name, work / name)
        with aside(there):
            os.replace(work, there)


def list_of(out: Path) -> Path:
    """Return the path of the list that proves a file ours: it names the file and what was written with it."""
    return out.with_name(f"{out.name}.sha256")


def check_file(out: Path, *, overwrite: bool, beside: Iterable[str] = ()) -> None:
    """Refuse a file that may not be written; one that is absent may.

    Args:
        out: the file.
        overwrite: replace what moesmith wrote.
        beside: names of other files that are written with it, relative to its folder.

    Raises:
        MoesmithError: a folder, something that is not ours, or ours without ``overwrite``.
    """
    there = real(out)
    sums, lists = own_list(list_of(there)), list_of(there)
    if there.is_dir():
        raise MoesmithError(f"{out} is a folder, and a file is to be written", "Give a file's name.")
    if sums is None and os.path.lexists(lists):
        raise MoesmithError(f"{lists} exists and is not moesmith's", f"{OTHER}, or move it away.")
    for name in [there.name, *sorted({*beside, *(sums or {})} - {there.name})]:
        path = there.parent / name
        if not os.path.lexists(path):
            continue
        if sums is None or name not in sums:
            raise MoesmithError(f"{path} exists and is not in a list of moesmith's", f"{OTHER}, or move it away.")
        if path.is_symlink() or not path.is_file() or file_digest(path) != sums[name]:
            raise MoesmithError(f"{path} has changed since moesmith wrote it", f"{OTHER}, or move it away.")
        if not overwrite:
            raise MoesmithError(f"{path} exists", ASK)


def check_result(
    out: Path, run: Path, *more: str | Path | None, overwrite: bool = False, beside: Iterable[str] = ()
) -> None:
    """Refuse a file for something about a run; it may be directly in the run's folder.

    Args:
        out: the file.
        run: the run's folder.
        more: what else is read.
        overwrite: replace what moesmith wrote.
        beside: as in :func:`check_file`.

    Raises:
        MoesmithError: the folder is not a run; as :func:`check_place` and :func:`check_file`.
    """
    check_place(out, inputs_of(run, *more), run)
    there = real(out)
    if there.parent == real(run) and there.name in OF_A_RUN:
        raise MoesmithError(f"{out} is a part of the run", f"{OTHER}.")
    check_file(out, overwrite=overwrite, beside=beside)


@contextmanager
def new_file(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden path of the same name to write a file to, alone in a folder: at the end all that was written there,
    in folders too, is moved next to ``out``, with its list. After an error nothing has changed.

    Args:
        out: the file.
        overwrite: replace what moesmith wrote.

    Raises:
        MoesmithError: as :func:`check_file`, or ``out`` cannot be written.
    """
    check_file(out, overwrite=overwrite)
    there = real(out)
    with _hidden(out, there) as work:
        yield work
        made = sums_of(work.parent)
        check_file(out, overwrite=overwrite, beside=made)
        old = [*(own_list(list_of(there)) or {}), list_of(there).name]
        with ExitStack() as stack:
            for name in old:
                stack.enter_context(aside(there.parent / name))
            placed = stack.enter_context(_taken_back())
            for name in made:
                (there.parent / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(work.parent / name, there.parent / name)
                placed.append(there.parent / name)
            write_list(list_of(there), made)
            placed.append(list_of(there))


@contextmanager
def _taken_back() -> Iterator[list[Path]]:
    """Give a list for files that have just been put in their places; after an error they are deleted."""
    placed: list[Path] = []
    try:
        yield placed
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _hidden(out: Path, there: Path) -> Iterator[Path]:
    """Give ``NAME`` in a hidden folder next to ``there`` that is deleted at the end; errors name ``out`` instead."""
    try:
        hidden = hidden_beside(there)
    except OSError as error:
        raise MoesmithError(f"cannot write {out}: {error.strerror or error}", write_cure(error)) from error
    work = hidden / there.name
    try:
        yield work
    except MoesmithError as error:
        said = str(error).replace(str(work), str(out)).replace(str(hidden), str(out.parent))
        raise MoesmithError(said) from error
    except OSError as error:
        raise MoesmithError(f"cannot write {out}: {error.strerror or error}", write_cure(error)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
