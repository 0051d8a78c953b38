"""Check what a Python caller passes: paths as text or ``Path``, one value or several, a model in memory.

The command line checks its own arguments; from Python anything can come, and one line says what is wrong with it.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from moesmith.errors import MoesmithError

if TYPE_CHECKING:
    from moesmith.parent.load import Parent

P = ParamSpec("P")
R = TypeVar("R")
# how torchrun and accelerate, then three MPIs, tell a process how many processes there are and which one it is
LAUNCHERS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}


def first_process() -> bool:
    """Whether this process is the one that prints: the only one, or the first that a launcher started."""
    return all(os.environ.get(rank, "0") == "0" for rank in LAUNCHERS.values())


def refuse_many_processes() -> None:
    """Refuse to be one of several processes that a launcher such as ``torchrun`` started.

    Raises:
        MoesmithError: it is one of them.
    """
    for name in LAUNCHERS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise MoesmithError(
                f"started as one of {count} processes ({name}={count}), and moesmith works in one",
                "Run it without torchrun or accelerate launch.",
            )


def path_text(what: str, value: Any) -> str:
    """Return a path, or a name given instead of one, as text.

    Raises:
        MoesmithError: it is neither text nor a path, or it is empty.
    """
    if not isinstance(value, str | os.PathLike):
        raise MoesmithError(f"{what} is {_kind(value)}", "Give text or a pathlib.Path.")
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise MoesmithError(f"{what} is empty" if not text else f"{what} is bytes", "Give text or a pathlib.Path.")
    return text


def path_of(what: str, value: Any) -> Path:
    """Check a path as :func:`path_text` does, and return it as a ``Path``."""
    return Path(path_text(what, value))


def several(what: str, value: Any) -> list[str]:
    """Return a list of texts from a list of texts or paths, a single one, or ``None`` (an empty list).

    Raises:
        MoesmithError: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, str | os.PathLike):
        return [path_text(what, value)]
    if not isinstance(value, Iterable) or isinstance(value, dict | bytes):
        raise MoesmithError(f"{what} is {_kind(value)}", "Give a list of texts.")
    return [path_text(f"{what}[{index}]", each) for index, each in enumerate(value)]


def words(text: str) -> list[str]:
    """Split a comma-separated list into its words."""
    return [word.strip() for word in text.split(",") if word.strip()]


def takes_paths(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take text as well as paths for the arguments of these names; ``None`` stays ``None``.

    Raises (when called):
        MoesmithError: such an argument is neither text nor a path.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name in names:
                optional = signature.parameters[name].default is None
                if name in given.arguments and not (optional and given.arguments[name] is None):
                    given.arguments[name] = path_of(name, given.arguments[name])
            return function(*given.args, **given.kwargs)

        return called

    return decorated


def parent_or_source(model: Any, tokenizer: Any = None) -> Parent | str:
    """Return what ``convert`` converts: a parent, made from a model in memory if need be, or where to load one from.

    Raises:
        MoesmithError: it is neither, a tokenizer is missing or superfluous, or the model does not fit
            (:meth:`moesmith.Parent.from_model`).
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moesmith.parent.load import Parent
    from moesmith.training.loop import refuse_inference

    if isinstance(model, PreTrainedModel | Parent):
        refuse_inference(model.model if isinstance(model, Parent) else model)
    if isinstance(model, PreTrainedModel):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise MoesmithError("a model in memory comes without its tokenizer", "Give it as tokenizer=.")
        return Parent.from_model(model, tokenizer, model.config._name_or_path or "memory")
    if tokenizer is not None:
        raise MoesmithError("a tokenizer is given with a parent that has its own", "Leave tokenizer out.")
    if isinstance(model, Parent):
        return model
    if not isinstance(model, str | os.PathLike):
        raise MoesmithError(f"model is {_kind(model)}", "Give a folder, a hub id, a .gguf file, a Parent or a model.")
    return path_text("model", model)


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def ceil_div(a: int, b: int) -> int:
    """Divide a by b and round up."""
    return -(-a // b)


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | float | None, what: str = "no size of memory") -> int | None:
    """Return the bytes that ``4GB``, ``3.5 GiB`` or a number of bytes means; ``None`` stays ``None``.

    Raises:
        MoesmithError: it is not a size.
    """
    if text is None:
        return None
    if isinstance(text, int | float) and not isinstance(text, bool) and 0 < text < math.inf:
        return int(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper() if isinstance(text, str) else "")
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise MoesmithError(f"{text!r} is {what}", "Write it like 4GB or 3.5GiB.")
    return int(float(found[1]) * UNITS[found[2]])
