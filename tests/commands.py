"""The command line as a user meets it: words in, exit status and both outputs back."""

from __future__ import annotations

import io
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
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
