"""Commands that must be refused: exit status 2, one line that names the cure, and nothing changed on disk."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import golden_lines
import pytest
from commands import Answer, moesmith
from conversions import arguments, snapshot

from moesmith.console import plain
from moesmith.conversion import convert as conversion
from moesmith.files.write import TEMPORARY
from moesmith.run import folder


@dataclass
class World:
    """Where a bad command runs, and what it may change before."""

    model: Path
    data: Path
    out: Path
    patch: pytest.MonkeyPatch

    def own_model(self) -> Path:
        """A copy of the parent to damage."""
        self.model = Path(shutil.copytree(self.model, self.out.parent / "own-m"))
        return self.model

    def own_data(self) -> Path:
        """A copy of the data to damage."""
        self.data = Path(shutil.copytree(self.data, self.out.parent / "own-d"))
        return self.data


# how a line goes on that tells what to do, or what would be right
CURE = re.compile(
    r"[.?;] (Add|Check|Choose|Delete|Fetch|Fix|Free|Give|Leave|Lower|Mend|Name|Put|Raise|Run|Save|Set|Wait|Write)\b"
    r"|Did you mean '|Is this a folder made by|Known by name: |[.] (It|A) \w+ \w+|[.] moesmith (converts|starts)"
    r"|[.] See '|[.] Upgrade moesmith|[.?;] (give|raise)\b"
)


# what is said before a parent is read: not the error, but the work ahead
AHEAD = re.compile(
    r"(computes in \w+ on |about [\d.,]+ (s|min|h) on this machine|text: \w+\.tokens="
    r"|not all evaluation text is held out)"
)


def refused(answer: Answer, says: str, *, golden: bool = True) -> None:
    """One line on standard error that matches and is in the golden file, exit status 2, nothing written since.

    Args:
        answer: what the command left.
        says: what the line holds, a pattern.
        golden: false where one of dozens of like cases is tried, which nobody would read through.
    """
    assert answer.status == 2, answer.err
    assert answer.out == ""
    lines = [line for line in answer.err.splitlines() if not AHEAD.match(line)]
    assert len(lines) == 1, answer.err
    assert re.match(f"moesmith: .*{says}", lines[0]), lines[0]
    assert lines[0] == plain(lines[0])
    assert CURE.search(lines[0]), f"no cure: {lines[0]}"
    if answer.words:
        assert not (left := written(answer)), left
    if answer.words and golden:
        golden_lines.check(answer.words, lines[0])


def midway(answer: Answer, line: str, says: str) -> None:
    """As ``refused`` for a command that did and said something before: ``line`` is what it says last."""
    refused(replace(answer, out="", err=line, began=0), says)


def written(answer: Answer) -> list[str]:
    """Files written since a command began into what it names, or half-written beside that; logs and locks apart."""
    named = [Path(word) for word in answer.words if word.startswith(str(golden_lines.base))]
    found = [path for folder in named if folder.is_dir() for path in folder.rglob("*")]
    fresh = [path for path in found if path.is_file() and path.name not in (".lock", "run.log")]
    fresh = [path for path in fresh if answer.began and path.stat().st_mtime_ns >= answer.began]
    beside = [path for path in named if path.parent.is_dir() for path in path.parent.glob(f".*{TEMPORARY}")]
    return sorted({str(path) for path in (*fresh, *beside)})


def convert_is_refused(world: World, says: str, settings: list[str], preset: str, *more: object) -> None:
    """``moesmith convert`` is refused and leaves ``--out`` as it was."""
    before = snapshot(world.out) if world.out.is_dir() else world.out.exists()
    words = arguments(preset, world.model, world.data, world.out, settings)
    refused(moesmith(*words, *more), says)
    assert (snapshot(world.out) if world.out.is_dir() else world.out.exists()) == before


def not_loaded(world: World) -> None:
    """From here on it is a fault to load the parent."""

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    for module in (conversion, folder):
        world.patch.setattr(module, "load_parent", load)
