"""A folder of many conversions of one parent, and of what was made of them: a comparison, a study.

OUT/<result>.json: what it began with, and what was found; OUT/runs/<name>: the conversions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesmith.arguments import path_of, path_text, refuse_many_processes
from moesmith.console import log_to
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json, sweep
from moesmith.files.lock import HIDDEN, LOCK, folder_lock
from moesmith.files.outputs import check_place, existing, real
from moesmith.files.write import write_record
from moesmith.parent.compute import Device, DType, keep_dtype, long_name, named
from moesmith.parent.load import load_parent
from moesmith.run.pipeline import check_reuse

FORMAT = 1
FOLDERS = ("rows", "parts", "figures")  # of files that a kill may leave half written


class Series:
    """The folder, its parent and its data source; nothing is written before :meth:`opened`.

    Attributes:
        out: the folder.
        parent: of every conversion, loaded whole.
        data: where all text comes from.
        head: what a result begins with.

    Args:
        kind: ``comparison`` or ``study``, for messages and the names of files.
        out: the folder.
        model: the parent's source.
        data: the data source.
        read: other files that are read, which must not be in the way.
        runs: finished runs that are read; those in the folder may be.
        reuse: runs whose finished stages conversions may take over, likewise.
        dtype: what all compute in; a folder that is continued keeps its own.
        device: where.

    Raises:
        MoesmithError: the folder holds something else, or another parent's results; or an argument is wrong.
    """

    def __init__(
        self,
        kind: str,
        out: str | Path,
        model: str | Path,
        data: str | Path,
        read: Sequence[str] = (),
        runs: Sequence[str] = (),
        reuse: Sequence[str] = (),
        dtype: DType = "auto",
        device: Device = "auto",
    ) -> None:
        refuse_many_processes()
        self.kind, self.result = kind, f"{kind}.json"
        source, self.data, self.out = path_text("model", model), path_text("data", data), path_of("out", out)
        apart = [run for run in (*reuse, *runs) if not real(Path(run)).is_relative_to(real(self.out))]
        check_place(self.out, existing(source, self.data, *read, *apart))
        self.before, self.reused = self._begun(), check_reuse(reuse)
        kept = named(self.before["compute"]) if self.before else None
        dtype = keep_dtype(f"{self.out} holds a {kind}", kept, dtype)
        self.parent = load_parent(source, dtype, device=device, half=False)
        if self.before and self.before["parent"] != self.parent.digest:
            raise MoesmithError(f"{self.out} holds a {kind} of another parent", "Give another --out.")
        self.head: dict[str, Any] = {"format": FORMAT, "model": source, "parent": self.parent.digest, "data": self.data}
        self.head |= {"compute": long_name(self.parent.dtype), "device": str(self.parent.device)}

    @contextmanager
    def opened(self, more: Mapping[str, Any]) -> Iterator[None]:
        """Write what it begins with, keep others out of the folder and its output in a log, inside the ``with``."""
        self.head |= more
        with folder_lock(self.out):
            for name in FOLDERS:
                sweep(self.out / name)
            self.write({k: v for k, v in self.before.items() if k not in self.head})
            with log_to(self.out / f"{self.kind}.log"):
                yield

    def write(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return the result: the head and what was found."""
        result = {**self.head, **found}
        write_record(self.out / self.result, result)
        return result

    def folder(self, name: str) -> Path:
        """Return a conversion's folder."""
        return self.out / "runs" / name

    def others(self, name: str) -> list[str]:
        """List the runs whose stages a conversion may take over."""
        done = [path.parent for path in sorted(self.out.glob("runs/*/run.json"))]
        return [str(path) for path in (*done, *self.reused) if path != self.folder(name)]

    def _begun(self) -> dict[str, Any]:
        """Read what a folder began with; empty for a new one."""
        out, path = self.out, self.out / self.result
        if path.is_file():
            found = read_json(path)
            if isinstance(found, dict) and {"format", "compute", "parent"} <= found.keys():
                if found["format"] > FORMAT:
                    raise MoesmithError(f"{out} was written by a newer moesmith", "Upgrade moesmith.")
                return found
        elif not out.exists() or (out.is_dir() and all(map(self._just_begun, out.iterdir()))):
            return {}
        raise MoesmithError(f"{out} exists and holds no {self.kind}", "Give another --out.")

    def _just_begun(self, path: Path) -> bool:
        """Whether a file is what a folder that was just begun can hold."""
        half = path.name.startswith((f".{self.result}.", f"{LOCK}.")) and path.name.endswith(".tmp")
        return path.name in HIDDEN or half
