"""Runs and stages: every stage is a folder with a manifest, made once, resumed when killed, re-used when it fits.

A stage's key is a hash of what it depends on: its own settings, the seed, the parent, the data and the keys of the
stages it needs. A finished folder with the same key is used as it is; anything else is made again.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesmith.artefact import (
    MANIFEST,
    aside,
    check_left,
    commit,
    digest,
    finished,
    hidden_beside,
    read_json,
    sweep,
    verify_files,
    write_cure,
    write_json,
)
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.recipe import Recipe

LISTS = ("card.sha256", "report.html.sha256", "bench.json.sha256")
OURS = ("run.json", "stages", "bench", "figures", "report.html", "bench.json", *LISTS)  # but for finished models
WORKING = ("checkpoint.safetensors", ".key")  # a stage's working state: not part of the finished artefact


class Run:
    """A conversion's folder.

    Args:
        folder: where everything goes.
        recipe: what to do.
        inputs: fingerprints of parent and data (``model``, ``model_digest``, ``tokenizer_digest``, ``data``,
            ``data_digest``).
        reuse: other runs whose finished stages may be taken over when their keys agree.

    Raises:
        MoesmithError: the folder holds something else, or a run with another recipe or other inputs.
    """

    def __init__(self, folder: Path, recipe: Recipe, inputs: Mapping[str, str], reuse: Sequence[Path] = ()) -> None:
        self.folder, self.recipe, self.inputs, self.reuse = folder, recipe, dict(inputs), list(reuse)
        self.keys: dict[str, str] = {}
        check_folder(folder, recipe, inputs)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Open the folder and keep a second process out of it; sweep up what killed processes left half-written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise MoesmithError(f"cannot write in {self.folder}: {error.strerror}", "Give another --out.") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MoesmithError(f"another process works in {self.folder}", "Wait for it, or stop it.") from error
            sweep(self.folder)
            header = {"recipe": self.recipe.model_dump(mode="json"), "inputs": self.inputs}
            known = self.folder / "run.json"
            before = read_json(known) if known.is_file() else {}
            if before | header != before:
                write_json(known, {"versions": versions()} | before | header)
            yield

    def path(self, name: str) -> Path:
        """A finished stage's folder."""
        return self.folder / "stages" / name

    def manifest(self, name: str) -> dict[str, Any]:
        """A finished stage's manifest."""
        found: dict[str, Any] = read_json(self.path(name) / MANIFEST)
        return found

    def stage(
        self,
        name: str,
        needs: Sequence[str],
        settings: Mapping[str, Any],
        body: Callable[[Path], Mapping[str, Any]],
        *,
        shared: bool = True,
    ) -> Path:
        """Make a stage unless it is there.

        Args:
            name: the stage and its folder.
            needs: stages it reads.
            settings: the part of the recipe it depends on.
            body: fills the working folder it is given, finding there what an earlier, killed try left; returns
                metrics for the manifest.
            shared: whether another run's stage may be taken over: its folder holds all that it made.

        Returns:
            The finished folder.

        Raises:
            MoesmithError: the body's own, a finished stage is damaged, or something cannot be written; what was
            finished before stays.
        """
        key = digest(
            {
                "stage": name,
                "settings": dict(settings),
                "seed": self.recipe.seed,
                "needs": {need: self.keys[need] for need in needs},
                "inputs": {k: self.inputs[k] for k in ("model_digest", "data_digest")},
            }
        )
        self.keys[name] = key
        final = self.path(name)
        if finished(final, key):
            if _begun(final) == key:
                for left in WORKING:  # of a process killed between the rename and this
                    (final / left).unlink(missing_ok=True)
            verify_files(final)
            say(f"[{name}] done before")
            return final
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            check_left(final, WORKING)
            for other in self.reuse if shared else ():
                if finished(other / "stages" / name, key):
                    verify_files(other / "stages" / name)
                    _take_over(other / "stages" / name, final)
                    say(f"[{name}] taken over from {other}")
                    return final
            self._make(name, key, {"needs": list(needs), "settings": dict(settings)}, body)
        except OSError as error:
            raise MoesmithError(f"stage {name} stopped: {error}", write_cure(error)) from error
        return final

    def _make(self, name: str, key: str, facts: dict[str, Any], body: Callable[[Path], Mapping[str, Any]]) -> None:
        final = self.path(name)
        say(f"[{name}]")
        work = final.parent / f".{name}.partial"
        if _begun(work) != key:
            _drop_partial(work)
            work.mkdir()
            (work / ".key").write_text(key)
        started = time.monotonic()
        metrics = dict(body(work))
        seconds = round(time.monotonic() - started, 1)
        manifest = {"stage": name, "key": key, **facts}
        manifest |= {"seed": self.recipe.seed, "inputs": self.inputs, "versions": versions()}
        commit(work, final, manifest | {"seconds": seconds, "metrics": metrics}, drop=WORKING)
        say(f"[{name}] {seconds:,.1f} s")


def versions() -> dict[str, str]:
    """Versions of what computes."""
    packages = ("moesmith", "torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _begun(work: Path) -> str | None:
    """The key of the stage that a folder was filled for, while it is working state."""
    return (work / ".key").read_text() if (work / ".key").is_file() else None


def _drop_partial(work: Path) -> None:
    """Remove an unfinished stage: its key is in it, or nothing is."""
    if not os.path.lexists(work):
        return
    if work.is_symlink() or not work.is_dir() or (_begun(work) is None and any(work.iterdir())):
        raise MoesmithError(f"{work} is not a stage that moesmith began", "Delete it or move it away.")
    shutil.rmtree(work)


def _take_over(source: Path, final: Path) -> None:
    """Hard-link (or copy) a finished stage of another run."""
    _drop_partial(final.with_name(f".{final.name}.partial"))
    hidden = hidden_beside(final)
    work = hidden / final.name
    try:
        shutil.copytree(source, work, copy_function=os.link)
    except OSError:  # another file system
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
    with aside(final):
        os.replace(work, final)
    hidden.rmdir()


def check_folder(folder: Path, recipe: Recipe, inputs: Mapping[str, str]) -> None:
    """Refuse a folder that holds something other than this run; a run without a finished stage is no obstacle.

    Args:
        folder: the run's folder.
        recipe: what is to be done in it.
        inputs: as :class:`Run` takes them; a fingerprint that is not known yet may be missing.

    Raises:
        MoesmithError: it is a file, holds other files, or a run with another recipe, parent or data; what changed is
            named.
    """
    known = folder / "run.json"
    if not known.is_file():
        if folder.exists() and not (folder.is_dir() and all(map(_just_begun, folder.iterdir()))):
            raise MoesmithError(f"{folder} exists and holds no moesmith run", "Give another --out.")
        return
    before = read_json(known)
    if not isinstance(before, dict) or not {"recipe", "inputs"} <= before.keys():
        raise MoesmithError(f"{folder} exists and holds no moesmith run", "Give another --out.")
    changed = _changes(before.get("recipe"), recipe.model_dump(mode="json"))
    old = before.get("inputs", {})
    for name in ("model", "data"):
        # the same weights and text are the same wherever they lie
        was, now = (found.get(f"{name}_digest") for found in (old, inputs))
        if now is not None and was != now:
            changed.append(f"{name} was {old.get(name)} ({was}), is {inputs[name]} ({now})")
    was, now = (found.get("tokenizer_digest") for found in (old, inputs))
    if None not in (was, now) and was != now:  # runs of moesmith's first days do not say
        changed.append(f"the model's tokenizer was another one ({was}, is {now})")
    if changed and any((folder / "stages").glob(f"[!.]*/{MANIFEST}")):
        raise MoesmithError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}",
            "Give another --out, or the old settings to continue it.",
        )
    if changed and not all(path.name in OURS or _just_begun(path) for path in folder.iterdir()):
        raise MoesmithError(
            f"{folder} holds other files beside a run that was only begun, with other settings", "Give another --out."
        )


def _just_begun(path: Path) -> bool:
    """Whether a file of a run's folder can be all that is there: the lock, and a half-written ``run.json``."""
    return path.name == ".lock" or (path.name.startswith(".run.json.") and path.name.endswith(".tmp"))


def _changes(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Every leaf that differs, as ``section.key was x, is y``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            change
            for key in sorted({*before, *now})
            for change in _changes(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [f"{prefix} was {before}, is {now}"]
