"""The command line as a user meets it: words in, exit status and both outputs back; or in processes of its own."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from moesmith import cli


@dataclass
class Answer:
    """What a command left: its exit status and what it wrote; what it was, and when it began (ns)."""

    status: int
    out: str
    err: str
    words: tuple[str, ...] = ()
    began: int = 0


def moesmith(*words: object) -> Answer:
    """Run ``moesmith`` with these words through its entry point, in this process."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    given, began = tuple(map(str, words)), time.time_ns()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", ["moesmith", *given]),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
    assert status is None or isinstance(status, int)
    return Answer(status or 0, out.getvalue(), err.getvalue(), given, began)


def environment() -> dict[str, str]:
    """Return what a command in a process of its own is started with."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return found | ({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {})


def torchrun(processes: int, words: Sequence[str]) -> list[str]:
    """Return the command that starts so many processes of ``moesmith`` with these words."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, "-m", "moesmith", *words]
