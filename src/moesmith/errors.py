"""The one error a user sees: a single line that says what is wrong and how to fix it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class MoesmithError(Exception):
    """Something the user can fix. The command line prints its one line and exits with status 2."""

    def __init__(self, what: str, cure: str = "") -> None:
        line = f"{what.rstrip('.')}. {cure}" if cure else what
        super().__init__(" ".join(line.split()))


def first_fault(error: ValidationError, whole: str = "") -> tuple[str, str]:
    """Say where the first thing is that values were refused for (``whole`` if at no single key), and what it is."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])) or whole, first["msg"].removeprefix("Value error, ")
