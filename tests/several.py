"""Call a function in several processes that talk over gloo, as ``torchrun`` would start them.

Run as a program, which has no threads that a fork would lose: ``python tests/several.py PROCESSES MODULE FUNCTION …``
calls a function of a module of the tests in each, with the rank and the other words. :func:`several` does so from a
test.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def several(processes: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, *args)`` in several processes; it is a function of a module, its arguments become text."""
    named = [str(processes), work.__module__, work.__name__, *map(str, args)]
    done = subprocess.run(
        [sys.executable, __file__, *named],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fork(processes: int, work: Callable[[int], None]) -> int:
    """Fork processes that call ``work(rank)``, and wait for them: all, or until one fails; returns its exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if Path("/sys/class/net/lo").exists():  # a host name that does not resolve is no obstacle then
                    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            status = 1
            try:
                work(rank)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others might wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return status
    return 0


if __name__ == "__main__":
    work = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])
    sys.exit(fork(int(sys.argv[1]), lambda rank: work(rank, *sys.argv[4:])) and 1)
