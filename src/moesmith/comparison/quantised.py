"""The parent in fewer bits, measured beside mixtures: what a person could take instead, in any runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from moesmith.comparison.facts import parent_facts
from moesmith.export.folder import write_companions
from moesmith.export.gguf.converter import convert
from moesmith.export.gguf.quantise import quantise
from moesmith.parent.checkpoint import quiet
from moesmith.parent.gguf.load import load_gguf
from moesmith.parent.load import Parent
from moesmith.run.settings import Section


class Quantised(Section):
    """The parent as a GGUF file, read back into the dtype that the comparison computes in.

    The file is llama.cpp's, and reading it compares its answers with llama.cpp's own; the numbers are those of its
    weights, without llama.cpp's rounding of activations.
    """

    quant: Literal["q8_0", "q4_k_m"] = Field(description="type of the weights")

    @contextmanager
    def row(self, parent: Parent) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
        """Give the model and its facts inside the ``with``.

        Raises:
            MoesmithError: the packages of the extra ``gguf`` are missing, or no GGUF file holds the parent.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder, plain, file = (Path(scratch) / name for name in ("parent", "f32.gguf", f"{self.quant}.gguf"))
            folder.mkdir()
            with quiet():
                parent.as_stored().model.save_pretrained(folder)
            write_companions(parent, folder)
            if self.quant == "q4_k_m":
                convert(folder, plain, "f32")
                quantise(plain, file)
            else:
                convert(folder, file, self.quant)
            model, _ = load_gguf(file, parent.dtype)
            size = file.stat().st_size
        yield model.to(parent.device), parent_facts(parent) | {"bytes": size}  # type: ignore[arg-type]
