"""Read a GGUF file's keys and tensors once: the gguf package's reader is slow, and three places need its result."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesmith.errors import MoesmithError
from moesmith.parent.checkpoint import first_line

# lists as long as the vocabulary, which only the tokenizer needs
LONG = frozenset(f"tokenizer.ggml.{what}" for what in ("tokens", "token_type", "scores", "merges"))


def open_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a ``gguf.GGUFReader`` of a file, and the file's keys without its vocabulary.

    Raises:
        MoesmithError: there is no such file or it cannot be read; the package gguf is missing.
    """
    if not path.is_file():
        raise MoesmithError(f"There is no file {path}", "Give the path of a GGUF file that exists.")
    if importlib.util.find_spec("gguf") is None:
        raise MoesmithError(f"{path.name} is a GGUF file, read with the gguf package", "pip install 'moesmith[gguf]'")
    facts = path.stat()
    try:
        reader = _reader(path.resolve(), facts.st_mtime_ns, facts.st_size)
        return reader, {name: field.contents() for name, field in reader.fields.items() if name not in LONG}
    except Exception as error:  # numpy's or struct's own error types, depending on where the file ends
        raise MoesmithError(f"{path} cannot be loaded: {first_line(error)}", "Fetch the file again.") from error


@functools.lru_cache(maxsize=1)
def _reader(path: Path, _changed: int, _size: int) -> Any:
    import gguf

    class Reader(gguf.GGUFReader):
        """The same reader over a plain array: a slice of a mapped one costs several times as much."""

        def _get(self, *args: Any, **options: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data: Any = self.data.view(np.ndarray)
            return super()._get(*args, **options)

    return Reader(str(path))


@contextmanager
def handed_over(reader: Any) -> Iterator[None]:
    """Inside the ``with``, give transformers this reader of the file instead of letting it read the file again."""
    import gguf

    before = gguf.GGUFReader
    gguf.GGUFReader = lambda *_args, **_options: reader  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = before  # type: ignore[misc]


def dtype_of(reader: Any) -> torch.dtype:
    """Return the dtype that a file's matrices are stored in; bf16 where they are quantised or differ."""
    plain = {"F32": torch.float32, "F16": torch.float16}
    kinds = {plain.get(tensor.tensor_type.name) for tensor in reader.tensors if len(tensor.shape) > 1}
    return kinds.pop() or torch.bfloat16 if len(kinds) == 1 else torch.bfloat16
