"""The known methods: every class with a ``name`` in this package, those of installed packages, and of files."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from moesmith.errors import MoesmithError

if TYPE_CHECKING:
    from moesmith.methods.base import Method

GROUP = "moesmith.methods"  # entry points of other packages: name = "package.module:Class"
_known: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name; a decorator.

    Raises:
        MoesmithError: it lacks a name or settings, or another class has the name.
    """
    name = getattr(method, "name", "")
    if not isinstance(name, str) or not name or not hasattr(method, "Settings"):
        raise MoesmithError(f"{method.__name__} is not a method", "Give it a name and a class Settings.")
    other = _known.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (method.__module__, method.__qualname__):
        raise MoesmithError(f"there is a method {name} already ({other.__module__})", "Give it another name.")
    _known[name] = method
    return method


@cache
def _load() -> None:
    import moesmith.methods as package

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group=GROUP):
        register(entry.load())


def methods() -> dict[str, type[Method]]:
    """Return every method by name."""
    _load()
    return dict(sorted(_known.items()))


def find(name: str) -> type[Method]:
    """Return the method of a name.

    Raises:
        MoesmithError: there is none; the message names the nearest.
    """
    known = methods()
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, 1, 0.3)
        cure = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(known)}."
        raise MoesmithError(f"there is no method '{name}'", f"{cure} One of your own needs --method-file.")
    return known[name]


def load_file(path: str | Path) -> None:
    """Run a Python file that registers methods of its own.

    Raises:
        MoesmithError: it is not a Python file, cannot be run, or registers nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise MoesmithError(f"there is no method file {path}", "Give an existing Python file.")
    _load()
    before = dict(_known)
    name = f"moesmith_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise MoesmithError(f"{path} is not a Python file", "Its name must end in .py.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except MoesmithError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise MoesmithError(f"{path} cannot be run: {type(error).__name__}: {error}", "Fix the file.") from error
    mine = [known for known in _known.values() if known.__module__ == name]
    if not mine and _known == before:
        raise MoesmithError(f"{path} registers no method", "Put @register over its class.")
