"""The parent, or a mixture of it, in fewer bits: what a person could take instead, in any runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from moesmith.bench.files import Files
from moesmith.comparison.facts import facts, parent_facts
from moesmith.comparison.rounded import write_rounded
from moesmith.export.folder import write_companions
from moesmith.export.gguf.converter import convert
from moesmith.export.targets import source_for
from moesmith.mixture.folder import load_folder
from moesmith.parent.checkpoint import quiet
from moesmith.parent.gguf.load import load_gguf
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.settings import Section


class Quantised(Section):
    """A GGUF file, read back into the dtype that the comparison computes in.

    The file is llama.cpp's, and llama.cpp's answers with it were compared with ours; the numbers are those of its
    weights, without llama.cpp's rounding of activations.
    """

    quant: Literal["q8_0", "q4_k_m"] = Field(description="type of the weights")
    of: str = Field("", description="the row whose mixture it is; the parent if left out")

    @contextmanager
    def row(self, parent: Parent, run: Callable[[str], Run]) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
        """Give the model and its facts inside the ``with``.

        Args:
            parent: of all rows.
            run: what gives the finished run of a row.

        Raises:
            MoesmithError: the packages of the extra ``gguf`` are missing, no GGUF file holds the model, or the row has
                not been made.
        """
        with tempfile.TemporaryDirectory() as scratch:
            if self.of:
                made = run(self.of)
                model, size = self._mixture(parent, made, Path(scratch))
                found = facts(made, parent)
            else:
                model, size = self._parent(parent, Path(scratch))
                found = parent_facts(parent)
        yield model.to(parent.device), found | {"bytes": size}  # type: ignore[arg-type]

    def _parent(self, parent: Parent, scratch: Path) -> tuple[PreTrainedModel, int]:
        folder, file = scratch / "parent", scratch / f"{self.quant}.gguf"
        folder.mkdir()
        with quiet():
            parent.as_stored().model.save_pretrained(folder)
        write_companions(parent, folder)
        convert(folder, file, self.quant)
        return load_gguf(file, parent.dtype)[0], file.stat().st_size

    def _mixture(self, parent: Parent, run: Run, scratch: Path) -> tuple[PreTrainedModel, int]:
        _, file = Files(source_for(run, parent.as_stored())).ggufs(self.quant)
        run.check_files()
        write_rounded(run.folder / "model", file, scratch / "model")
        return load_folder(scratch / "model", parent.dtype), file.stat().st_size
