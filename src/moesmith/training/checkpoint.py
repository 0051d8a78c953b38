"""What training has reached, so that a run which was killed goes on: weights, moments, and where it stands.

One file, ``checkpoint.safetensors``, or for weights that are spread over processes one file of each of them, written
through ``torch.distributed.checkpoint`` into ``checkpoint/STEP``. Any number of processes goes on from either.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.files.artefact import check_file, read_json, read_metadata, read_tensors
from moesmith.files.seal import file_digest
from moesmith.files.write import write_json, write_tensors
from moesmith.training.sharding import cut, is_spread, part, part_of
from moesmith.world import crew

FILE, FOLDER, STATE = "checkpoint.safetensors", "checkpoint", "state.json"


class Checkpoint:
    """The newest checkpoint in a stage's working folder.

    Args:
        folder: the working folder.
        like: tensors by name, which say how what is kept with them is spread.
    """

    def __init__(self, folder: Path, like: Mapping[str, Tensor]) -> None:
        self.file, self.folder, self.like = folder / FILE, folder / FOLDER, like
        self.spread = any(is_spread(weight) for weight in like.values())

    def state(self) -> dict[str, Any] | None:
        """Return where training stands; ``None`` for a new one.

        Raises:
            MoesmithError: the checkpoint is damaged.
        """
        if (step := self._step()) is not None:
            found: dict[str, Any] = read_json(step / STATE)
            hashes: dict[str, str] = found.pop("files")
            for name, value in self._hashes(step, sorted(hashes)).items():
                if value != hashes[name]:
                    raise MoesmithError(f"{step / name} is missing or damaged", f"Delete {step} and run again.")
            return found
        if not self.file.is_file():
            return None
        check_file(self.file)
        said: dict[str, Any] = json.loads(read_metadata(self.file)["state"])
        return said

    def load(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's parts of what was saved.

        Args:
            wanted: tensors of the shapes and dtypes to read, as this process holds them; their names are
                ``kind.NAME`` with a name of ``like``.

        Raises:
            MoesmithError: the checkpoint is damaged.
        """
        if (step := self._step()) is not None:
            found = {name: self._described(name, torch.zeros_like(tensor)) for name, tensor in wanted.items()}
            try:
                with _quiet():
                    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(step)), no_dist=crew().size == 1)
            except Exception as error:
                what = f"{step} cannot be read: {str(error).partition(chr(10))[0]}"
                raise MoesmithError(what, f"Delete {step.parent} and run again.") from error
            return {name: part(tensor) for name, tensor in found.items()}
        whole = {name: tensor for name, tensor in read_tensors(self.file).items() if name in wanted}
        return {name: cut(self._model(name), tensor) if tensor.dim() else tensor for name, tensor in whole.items()}

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write what this process holds; of spread weights all must call it, else the first one.

        Raises:
            MoesmithError: it cannot be written.
        """
        if not self.spread:
            write_tensors(self.file, dict(tensors), {"state": json.dumps(state)})
            shutil.rmtree(self.folder, ignore_errors=True)  # an older one, of spread weights
            return
        step, team = self.folder / f"{state['step']:09}", crew()
        if team.first and step.exists():  # of a process that was killed
            shutil.rmtree(step)
        team.share(None)
        described = {name: self._described(name, tensor) for name, tensor in tensors.items()}
        with team.agreed():
            try:
                with _quiet():
                    writer = dcp.HuggingFaceStorageWriter(str(step), save_distributed=True)
                    dcp.save(described, storage_writer=writer)
            except OSError as error:
                raise MoesmithError(f"cannot write {step}: {error}", "Free space and run the same again.") from error
        files = self._hashes(step, team.share(sorted(path.name for path in step.iterdir())))
        if team.first:
            write_json(step / STATE, {**state, "files": files})  # from now on it counts
            for other in self.folder.iterdir():
                if other != step:
                    shutil.rmtree(other)
            self.file.unlink(missing_ok=True)

    def _step(self) -> Path | None:
        """Return the folder of the newest checkpoint that was written whole."""
        return max((path.parent for path in self.folder.glob(f"*/{STATE}")), default=None)

    def _hashes(self, step: Path, names: Sequence[str]) -> dict[str, str]:
        """Return the hashes of files, "" for a missing one; the processes share the reading, all must call it."""
        team = crew()
        own = {name: file_digest(step / name) if (step / name).is_file() else "" for name in team.mine(names)}
        return team.merged(own)

    def _model(self, name: str) -> Tensor:
        return self.like[name.partition(".")[2]]

    def _described(self, name: str, own: Tensor) -> Tensor:
        return part_of(self._model(name), own) if own.dim() else own


def _quiet() -> warnings.catch_warnings[Any]:
    """Hide what torch says about itself: that one process reads, that a writer is new."""
    hidden = warnings.catch_warnings()
    warnings.simplefilter("ignore")
    return hidden
