"""Let one process work in a run's folder: the lock, who holds it, and file systems that have no locks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from moesmith.console import say
from moesmith.errors import MoesmithError

LOCK = ".lock"  # locked by the system, which unlocks it when the process ends, however it ends
MARK = ".lock.mark"  # where the system has no locks: the file's existence is the lock
HOLDER = ".lock.holder"  # who holds it: for the error of a process that does not get it
HIDDEN = (LOCK, MARK, HOLDER)
# what flock answers on Lustre mounted without it, on NFS without a lock daemon, and on some FUSE file systems
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, getattr(errno, "ENOTSUP", errno.EOPNOTSUPP)}


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make a folder and keep every other process out of it inside the ``with``.

    On a file system without locks a file stands in for the lock, and a killed process leaves it behind. It is removed
    when its process is seen to be gone, which cannot be seen for a process on another machine.

    Raises:
        MoesmithError: another process is working in the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder)
    except OSError as error:
        raise MoesmithError(f"cannot write in {folder}: {error.strerror or error}", "Give another --out.") from error
    try:
        with contextlib.suppress(OSError):  # only for the errors of other processes
            (folder / HOLDER).write_text(json.dumps(_me()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _acquired(folder: Path) -> BaseFileLock:
    if _can_lock(folder):
        return _taken(FileLock(folder / LOCK), folder, "Wait for it, or stop it.")
    mark = folder / MARK
    if mark.exists() and (holder := _holder(folder)) and holder["host"] == socket.gethostname() and not _lives(holder):
        mark.unlink(missing_ok=True)
    lock = _taken(SoftFileLock(mark), folder, f"Wait for it, or stop it; delete {mark} if it is gone.")
    say(f"the file system of {folder} has no locks: {MARK} is used instead; start nothing else in that folder")
    return lock


def _taken(lock: BaseFileLock, folder: Path, cure: str) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = _holder(folder)  # what a killed process left says nothing about the one that works now
        known = holder is not None and (holder["host"] != socket.gethostname() or _lives(holder))
        who = f"process {holder['pid']} on {holder['host']}" if holder and known else "another process"
        raise MoesmithError(f"{who} is working in {folder}", cure) from error
    return lock


def _can_lock(folder: Path) -> bool:
    """Whether the system locks a new file that no other process uses: if not, it locks none on this file system."""
    path = folder / f"{LOCK}.{os.getpid()}.tmp"
    lock = FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning that it fell back
            lock.acquire(timeout=0)
        return not isinstance(lock, SoftFileLock)  # what the library turns it into where flock does not exist
    except (Timeout, NotImplementedError):
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    finally:
        lock.release(force=True)
        path.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def _holder(folder: Path) -> dict[str, Any] | None:
    """Read which process holds the lock, if one has written that down."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "started": float(found["started"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _lives(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs; another one may have got its number since."""
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
