"""The one error a user sees: a single line that says what is wrong and how to fix it."""

from __future__ import annotations


class MoesmithError(Exception):
    """Something the user can fix. The command line prints its one line and exits with status 2."""

    def __init__(self, what: str, cure: str = "") -> None:
        line = f"{what.rstrip('.')}. {cure}" if cure else what
        super().__init__(" ".join(line.split()))
