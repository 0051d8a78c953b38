"""The reference has a page for every public name, and none for a name that is not there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import moesmith

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("python.md", "tutorial.md")
DIRECTIVES = re.findall(
    r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.MULTILINE
)


def found(name: str) -> Any:
    """What a dotted name means: a module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)


def home(name: str) -> str:
    """Where a thing is defined, whatever it is called here."""
    thing = found(name)
    return thing.__name__ if inspect.ismodule(thing) else f"{thing.__module__}.{thing.__qualname__}"


def imported(page: str) -> set[str]:
    """Names below ``moesmith`` that the Python blocks of a page import, and that its text calls in full."""
    names = set(re.findall(r"`(moesmith(?:\.[a-z_]+)+)\(", page))
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moesmith":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.startswith("moesmith.")}
    return names


def test_what_counts_as_imported() -> None:
    page = (
        "`moesmith.a.f(x)`\n```python\nimport moesmith\nimport moesmith.b\nfrom moesmith.c import d, e\nimport os\n```"
    )
    assert imported(page) == {"moesmith.a.f", "moesmith.b", "moesmith.c.d", "moesmith.c.e"}


def test_every_public_name_has_a_page() -> None:
    from_modules = set().union(*(imported((DOCS / page).read_text(encoding="utf-8")) for page in PAGES))
    assert len(from_modules) > 10
    public = {f"moesmith.{name}" for name in moesmith.__all__} | from_modules
    described = {home(name) for name in DIRECTIVES}
    assert sorted(name for name in public if home(name) not in described) == []


def test_no_name_has_two_places() -> None:
    assert [name for name, times in Counter(map(home, DIRECTIVES)).items() if times > 1] == []


@pytest.mark.parametrize("name", DIRECTIVES)
def test_a_described_name_is_there_and_says_what_it_is(name: str) -> None:
    assert (inspect.getdoc(found(name)) or "").strip()
