"""What an ordeal counted, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COLUMNS = ("kind", "tried", "survived or noticed", "without effect", "wrong")


@dataclass
class Tally:
    """One kind of disturbance.

    Attributes:
        kind: its name.
        tried: how often.
        survived: how often moesmith went on to the same result, or noticed what was wrong and said so in one line.
        without: how often nothing that anybody reads had changed.
        wrong: each other case, described so that it can be repeated.
        notes: what else is worth a line below the table.
    """

    kind: str
    tried: int = 0
    survived: int = 0
    without: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, wrong: str | None, *, effect: bool = True) -> None:
        """Add a case: ``wrong`` says what was wrong with it, ``effect`` whether there was anything to notice."""
        self.tried += 1
        if wrong is not None:
            self.wrong.append(wrong)
        elif effect:
            self.survived += 1
        else:
            self.without += 1

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return asdict(self)


def table(tallies: Sequence[Tally]) -> str:
    """Return an aligned table of all tallies with their sum, then notes and what was wrong."""
    rows: list[Sequence[Any]] = [[t.kind, t.tried, t.survived, t.without, len(t.wrong)] for t in tallies]
    rows.append(["all", *(sum(int(row[column]) for row in rows) for column in range(1, len(COLUMNS)))])
    cells = [COLUMNS, *([f"{value:,}" if isinstance(value, int) else value for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    lines += [f"{tally.kind}: {note}" for tally in tallies for note in tally.notes]
    lines += [f"WRONG, {tally.kind}: {case}" for tally in tallies for case in tally.wrong]
    return "\n".join(lines)
