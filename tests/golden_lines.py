"""What refused commands print, kept in ``assets/refusals.txt`` for people to read through.

Every refusal that tests make (``refusals.refused``) must be there, below the title of its test. Write the file anew,
whole or for the tests of some files:

    REFUSALS=write python -m pytest -n 0 tests/test_bad_input.py

``REFUSALS=skip`` compares nothing: libraries of other versions, which some lines quote, say it in other words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from conversions import MASKED, TINY
from golden import ASSETS

FILE = ASSETS / "refusals.txt"
HEAD = """\
What moesmith prints when it refuses a command, one line each, as the tests of the files named below make it.
Paths are shortened to what is in the test's folder, and numbers that depend on the machine are <n>.
Settings that only make a conversion tiny are left out. How to write this file anew: tests/golden_lines.py.
"""
MACHINE = {  # what differs between two machines, or two runs
    r"\b[0-9a-f]{16}([0-9a-f]{48})?\b": "<hash>",
    r"\b[\d,.]+(?= ([KMGT]i?B|ms|s|min|h)\b)": "<n>",
    r"(?<=process )\d+|(?<=127\.0\.0\.1:)\d+": "<n>",
    r"\b\d+\.\d+\.\d+(\.?\w+)?\b(?!:)": "<version>",
    r"[.]\w[\w.-]*[.]moesmith[.]tmp": "<hidden>",
    r"(?<=Give one of auto, cpu)[^.]*": "",  # and its accelerators
}
base = Path("/nowhere")  # the folder of all temporary folders of this session; conftest sets it

Cases = dict[str, dict[str, set[tuple[str, str]]]]  # file → title → commands and their lines
_begun: set[str] = set()  # files whose cases this session has begun to write anew


def check(words: Sequence[str], line: str) -> None:
    """Compare the line that a command printed with the golden file, or write it there."""
    mode = os.environ.get("REFUSALS", "")
    if mode == "skip":
        return
    file, title = _test()
    case = (shown(" ".join(["moesmith", *_words(words)])), shown(line.removeprefix("moesmith: ")))
    cases = read()
    if mode == "write":
        if file not in _begun:
            _begun.add(file)
            cases.pop(file, None)
        cases.setdefault(file, {}).setdefault(title, set()).add(case)
        FILE.write_text(written(cases), encoding="utf-8")
        return
    known = cases.get(file, {}).get(title, set())
    assert case in known, f"{FILE.name} has not, below {file}, {title}:\n{case[0]}\n{case[1]}\nbut {known}"


def read() -> Cases:
    """Read the golden file."""
    cases: Cases = {}
    file, title, command = "", "", ""
    for row in FILE.read_text(encoding="utf-8").splitlines()[HEAD.count("\n") :] if FILE.is_file() else ():
        if row.startswith("## "):
            file = row[3:]
        elif row.startswith("    $ "):
            command = row[6:]
        elif row.startswith("    "):
            cases.setdefault(file, {}).setdefault(title, set()).add((command, row[4:]))
        elif row:
            title = row
    return cases


def written(cases: Cases) -> str:
    """The text of a golden file."""
    rows = [HEAD]
    for file in sorted(cases):
        rows.append(f"## {file}\n")
        for title in sorted(cases[file]):
            rows += [title, *(f"    $ {command}\n    {line}" for command, line in sorted(cases[file][title])), ""]
    return "\n".join(rows)


def shown(text: str) -> str:
    """A command or a line as it is on every machine."""
    text = re.sub(rf"{re.escape(str(base))}/[\w-]+(/|(?=\W|$))", lambda found: "" if found[1] else ".", text)
    text = text.replace(str(ASSETS.parent.parent), "<repository>")
    for pattern, name in MACHINE.items():
        text = re.sub(pattern, name, text)
    return text


def _words(words: Sequence[str]) -> list[str]:
    """The words of a command without the settings that make it tiny; what holds a blank is quoted."""
    found: list[str] = []
    tiny = iter([*TINY, *MASKED])  # they come first and in this order; a case's own settings come after them
    for word in words:
        if found and found[-1] == "--set" and word in tiny:
            found.pop()
        else:
            found.append(f"'{word}'" if not word or " " in word else word)
    return found


def _test() -> tuple[str, str]:
    """The file and the title of the test that runs."""
    node = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    path, _, name = node.partition("::")
    name, _, case = name.partition("[")
    title = name.removeprefix("test_").replace("_", " ")
    return Path(path).name, title + (f": {case.removesuffix(']')}" if case else "")
