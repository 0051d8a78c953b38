"""Run a program that a model wrote, apart from this process and within limits.

The program gets its own process in an empty folder, an empty environment, limits on time, memory and files, and an
audit hook that refuses what a solution of a coding task never needs: other processes, the network, changes to files
outside that folder. This stops accidents, not an attacker: whoever does not trust a model runs it in a container.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from moesmith.errors import MoesmithError

SECONDS = 10.0  # of a program, start included
MEMORY = 2 * 1024**3  # bytes of address space
GUARD = r"""
import json, os, sys

job = json.loads(sys.stdin.readline())
try:
    import resource
except ImportError:  # no such limits on Windows; the time limit is the caller's
    pass
else:
    for name, most in job["limits"].items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (OSError, ValueError):  # macOS has no limit of address space
            pass
place = os.path.realpath(os.getcwd()) + os.sep
refused = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
           "os.kill", "os.killpg", "pty.", "signal.pthread_kill", "ftplib.", "smtplib.", "urllib.")
changes = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
           "os.truncate", "os.utime", "shutil.", "tempfile.")

def inside(path):
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return isinstance(path, int) or (os.path.realpath(path) + os.sep).startswith(place)

def watch(event, args):
    if event.startswith(refused):
        raise PermissionError(event)
    if event == "open" and args[0] is not None:
        path, mode, flags = args
        writes = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
        if flags & writes and not inside(path):
            raise PermissionError(event)
    if event.startswith(changes) and not all(inside(a) for a in args if isinstance(a, (str, bytes))):
        raise PermissionError(event)

answer = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
word = job["word"].encode()
sys.addaudithook(watch)
exec(compile(job["program"], "program", "exec"), {"__name__": "program"})
os.write(answer, word)
"""


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a program runs to its end without an exception.

    Args:
        program: Python source; what it prints is thrown away, and it can read nothing from standard input.
        seconds: of wall clock and of CPU.
        memory: bytes of address space.
    """
    word = secrets.token_hex(16)  # written after the last line: leaving early is not passing
    limits = {"RLIMIT_AS": memory, "RLIMIT_CPU": int(seconds) + 1, "RLIMIT_FSIZE": 2**20, "RLIMIT_CORE": 0}
    job = json.dumps({"program": program, "word": word, "limits": limits})
    with tempfile.TemporaryDirectory() as place:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=place, env=_environment(), start_new_session=True, text=True,
            encoding="utf-8",
        )  # fmt: skip
        try:
            return process.communicate(job + "\n", timeout=seconds)[0] == word
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def check_sandbox() -> None:
    """Refuse to measure where no program runs: all of them would seem wrong.

    Raises:
        MoesmithError: a program that does nothing does not run to its end.
    """
    if not passes("pass"):
        cure = f"Try: {sys.executable} -I -c pass; or leave tasks that run code out."
        raise MoesmithError(f"no program runs to its end here within {SECONDS:g} s and {MEMORY >> 30} GiB", cure)


def _environment() -> dict[str, str]:
    """Keep what an interpreter needs to start; tokens and paths of the user stay here."""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads take address space


def _end(process: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.communicate()
