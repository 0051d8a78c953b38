"""A run's folder, as everything reads it: header, steps, carvings, parent, model, evaluation.

RUN/run.json, RUN/stages/<step>/manifest.json, RUN/model, RUN/stock
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from moesmith.arguments import path_of
from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, RUN, SUMS, read_json, read_tensors, verify_files
from moesmith.files.parse import as_written
from moesmith.files.seal import file_digest
from moesmith.mixture.carving import Carving, Header
from moesmith.mixture.folder import REMAKE, layered_folder, load_folder
from moesmith.parent.compute import AUTO, Device, DType, named
from moesmith.parent.digests import tokenizer_digest
from moesmith.parent.layerwise import Decoder
from moesmith.parent.load import Parent, load_parent
from moesmith.run.legacy import described

STOCK = "stock"  # the name of RUN/stock in an evaluation
FIRST = ("held-out", "corpus", "baseline")  # steps whose order no other step's needs decide


def finished_of(stages: Iterable[str]) -> str:
    """Name the measured stage that is ``RUN/model``: the last one except the stock twin."""
    return [name for name in stages if name != STOCK][-1]


class Run:
    """A run's folder.

    Args:
        folder: made by ``moesmith convert``, finished or not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def header(self) -> dict[str, Any]:
        """``run.json``: ``format``, ``recipe``, ``inputs``, ``versions``."""
        return read_json(self.folder / "run.json")

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of parent and data."""
        return self.header["inputs"]

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as values, as the version that began the run wrote it."""
        return self.header["recipe"]

    @property
    def model(self) -> Path:
        """``RUN/model``."""
        return self.folder / "model"

    def path(self, step: str) -> Path:
        """Return a step's folder.

        Raises:
            MoesmithError: a manifest names a step that is no name, and could lead elsewhere.
        """
        if not isinstance(step, str) or Path(step).name != step or "\0" in step:
            raise MoesmithError(f"{self.folder}: {step!r:.80} is no name of a step", "Fetch or make the run again.")
        return self.folder / "stages" / step

    def has(self, step: str) -> bool:
        """Whether a step is finished."""
        return (self.path(step) / MANIFEST).is_file()

    def manifest(self, step: str) -> dict[str, Any]:
        """Read a finished step's manifest.

        Raises:
            MoesmithError: there is none, or it is damaged.
        """
        return read_json(self.path(step) / MANIFEST)

    def metrics(self, step: str) -> dict[str, Any]:
        """Return what a step measured; empty if it is not finished."""
        return dict(self.manifest(step)["metrics"]) if self.has(step) else {}

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """The manifests of all finished steps, each after those of the steps that it needs."""
        paths = sorted(self.folder.glob(f"stages/[!.]*/{MANIFEST}"))
        left = {path.parent.name: described(read_json(path)) for path in paths}
        order: dict[str, dict[str, Any]] = {}
        while left:
            ready = [name for name, found in left.items() if not set(found.get("needs", ())) & left.keys()]
            ready = [name for name in FIRST if name in ready] or ready or list(left)
            order |= {name: left.pop(name) for name in ready[:1]}
        return order

    @property
    def carved(self) -> list[str]:
        """Finished steps that end in a carving, in order."""
        return [name for name in self.manifests if (self.path(name) / "carving.json").is_file()]

    def carving(self, step: str | None = None) -> Carving:
        """Load a step's carving, or the last one.

        Raises:
            MoesmithError: there is none.
        """
        return Carving.load(self._carved(step))

    def carving_header(self, step: str | None = None) -> Header:
        """What the header of :meth:`carving` says; its tensors are not read.

        Raises:
            MoesmithError: there is none.
        """
        return Header.read(self._carved(step))

    def _carved(self, step: str | None) -> Path:
        """The folder of a step's carving, or of the last one."""
        if step is None and not self.carved:
            cure = "Run the same 'moesmith convert' again to continue it."
            raise MoesmithError(f"{self.folder} is not carved yet", cure)
        return self.path(step or self.carved[-1])

    @property
    def clusters(self) -> list[list[str]]:
        """Domains per expert that the first carving was made from; empty if experts were made in another way."""
        found: list[list[str]] = []
        if self.carved:
            found = self.carving_header(self.carved[0]).provenance.get("clusters", [])
        return found

    @property
    def evaluation(self) -> dict[str, Any]:
        """``evaluation.json``: ``stages``, ``window``, ``tokens``."""
        return read_json(self.path("evaluate") / "evaluation.json")

    @property
    def held_out(self) -> dict[str, Tensor]:
        """Evaluation blocks by domain, (N, window) int64."""
        blocks = read_tensors(self.path("held-out") / "evaluation.safetensors")
        return {name: ids.long() for name, ids in blocks.items()}

    def training(self, section: str) -> Tensor:
        """Read the sequences of a training stage, named by its section of the recipe, (N, window) int32."""
        return read_tensors(self.path("corpus") / "training.safetensors")[section]

    def check_finished(self) -> None:
        """Refuse a run that has no finished model.

        Raises:
            MoesmithError: the folder is no run, or the run is not finished.
        """
        assert self.header
        if not (self.model / "config.json").is_file():
            cure = "Run the same 'moesmith convert' again to finish it."
            raise MoesmithError(f"{self.folder} has no finished model", cure)

    def parent(self, dtype: DType | None = AUTO, device: Device = AUTO) -> Parent:
        """Load the finished run's dense parent, stored as in the run.

        Args:
            dtype: what it computes in, which need not be what the run computed in; ``None`` for the stored dtype.
            device: where it computes.

        Raises:
            MoesmithError: the run is not finished, or its parent is not the one it was made from.
        """
        self.check_finished()
        inputs, stored = self.inputs, named(self.inputs["dtype"])
        parent = load_parent(inputs["model"], stored if dtype is None else dtype, device=device, stored=stored)
        if parent.digest != inputs["model_digest"]:
            raise MoesmithError(
                f"{inputs['model']} is not the parent {self.folder} was made from (weights {parent.digest},"
                f" not {inputs['model_digest']})",
                "Put the original weights back, or convert again.",
            )
        known = inputs.get("tokenizer_digest")  # runs of the first moesmith versions do not say
        if known is not None and tokenizer_digest(parent.tokenizer) != known:
            raise MoesmithError(
                f"the tokenizer of {inputs['model']} is not the one {self.folder} was made with",
                "Put the original tokenizer back, or convert again.",
            )
        return parent

    def load(self, parent: Parent, name: str = "model") -> Decoder:
        """Load ``RUN/model`` or ``RUN/stock`` to compute as its parent does, layer by layer if the parent does.

        Raises:
            MoesmithError: it is damaged.
        """
        folder, dtype = self.folder / name, parent.dtype
        self.check_files(name)
        if parent.layerwise:
            return layered_folder(folder, dtype, parent.device)
        return load_folder(folder, dtype).to(parent.device)  # type: ignore[arg-type]

    def sums(self, name: str) -> str | None:
        """Return the hash of the list of hashes that ``RUN/model`` or ``RUN/stock`` was finished with."""
        return self.manifest("export")["metrics"].get("sums", {}).get(name)

    def check_files(self, name: str = "model") -> None:
        """Compare every file of ``RUN/model`` or ``RUN/stock`` with its hash, and the list of hashes with the run's.

        Runs of the first moesmith versions have no such list.

        Raises:
            MoesmithError: a file, or the list itself, is missing or changed.
        """
        known, path = self.sums(name), self.folder / name / SUMS
        if known is not None and (not path.is_file() or file_digest(path) != known):
            raise MoesmithError(f"{path} is missing or damaged", REMAKE)
        verify_files(self.folder / name, REMAKE)


def open_run(folder: str | Path) -> Run:
    """Open a run's folder for reading.

    Raises:
        MoesmithError: it is not a run, or a newer moesmith made it.

    Example:
        >>> run = moesmith.open_run("runs/demo")              # doctest: +SKIP
        >>> run.carving().union().mean()                      # doctest: +SKIP
        tensor(0.91)
    """
    run = Run(path_of("folder", folder))
    header = run.header
    if not isinstance(header, dict) or not {"recipe", "inputs"} <= header.keys():
        raise MoesmithError(f"{folder} is not a moesmith run", "Give a folder made by 'moesmith convert'.")
    with as_written(run.folder / RUN):
        if not isinstance(header["recipe"], dict):
            raise TypeError("recipe is no mapping")
        for name in ("model", "model_digest", "data", "dtype"):
            if not isinstance(header["inputs"][name], str) or "\0" in header["inputs"][name]:
                raise TypeError(f"inputs.{name} is no text")
    return run
