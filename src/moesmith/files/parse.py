"""Parse text that somebody else wrote, JSON and YAML: a value of bounded size, or an error of one kind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moesmith.errors import MoesmithError

# what Python raises where a value is missing, or another one than expected
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, StopIteration)
MOST = 100_000  # values in a YAML file, those that an alias repeats counted as often


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested beyond what Python's parser follows.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str | bytes, name: str, cure: str = "Fix the file.") -> Any:
    """Parse YAML into plain values; tags that make other objects are not known.

    Args:
        text: the file's content.
        name: what to call it in an error.
        cure: how to fix it.

    Raises:
        MoesmithError: it is not YAML (the line is named), or its aliases unfold into more than :data:`MOST` values.
    """
    try:
        value = yaml.safe_load(text.decode() if isinstance(text, bytes) else text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        said = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise MoesmithError(f"{name}{f':{mark.line + 1}' if mark else ''}: not YAML: {said}", cure) from error
    except Exception as error:  # a date that does not exist, brackets a thousand deep, a tag whose value does not fit
        raise MoesmithError(f"{name}: not YAML: {type(error).__name__}: {error}", cure) from error
    left, count = [value], 0
    while left:
        count += 1
        if count > MOST:
            raise MoesmithError(f"{name} unfolds into more than {MOST:,} values", "Write it without aliases (&, *).")
        one = left.pop()
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
    return value


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Inside the ``with``, take what moesmith wrote at ``path`` as it should be, and say in one line if it is not.

    Damage is found by hashes before; what is found here was made by somebody else, or by a moesmith that differs.

    Raises:
        MoesmithError: something is missing, or is not what it should be.
    """
    try:
        yield
    except ODD as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        what = f"{path} does not hold what moesmith writes ({said:.200})"
        raise MoesmithError(what, "Fetch or make it again.") from error
