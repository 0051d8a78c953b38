"""A run in the making: a step is a folder with a manifest, made once, resumed when killed, re-used when it fits.

A step's key is a hash of what it depends on: its own settings, the version of its mathematics, the seed, the parent,
the data and the keys of the steps it needs. A finished folder with the same key is used as it is; anything else is made
again. Steps that version 0.1 made have other keys, which ``legacy.py`` computes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.files.artefact import (
    FORMAT,
    MANIFEST,
    aside,
    check_file,
    check_left,
    commit,
    finished,
    hidden_beside,
    read_json,
    remove,
    sweep,
    verify_files,
)
from moesmith.files.lock import HIDDEN, LOCK, folder_lock
from moesmith.files.seal import PARTIAL, beside, digest
from moesmith.files.write import write_cure, write_record, write_text
from moesmith.run.folder import Run
from moesmith.run.legacy import Legacy, upgraded
from moesmith.run.memory import peak_memory
from moesmith.run.recipe import Recipe, parse
from moesmith.run.step import Job, Step
from moesmith.run.versions import version_changes, versions
from moesmith.world import together, world

LISTS = ("card.sha256", "report.html.sha256", "bench.json.sha256")
# names in a run's folder that are ours, those of finished models apart
OURS = (
    "run.json",
    "run.log",
    "stages",
    "bench",
    "figures",
    "report.html",
    "bench.json",
    "tensorboard",
    "wandb",
    *LISTS,
)
WORKING = ("checkpoint.safetensors", "checkpoint", ".key")  # a stage's working state: not part of the finished artefact


class Pipeline(Run):
    """A conversion's folder.

    Args:
        folder: where everything goes.
        recipe: what to do.
        inputs: fingerprints of parent and data: ``model``, ``model_digest``, ``tokenizer_digest``, ``data``,
            ``data_digest``, ``dtype`` (of the weights), and if known those of ``fingerprints`` and ``compute`` (the
            dtype that models compute in; the same as ``dtype`` if it is missing).
        reuse: other runs whose finished steps may be taken over when their keys agree.

    Raises:
        MoesmithError: the folder holds something else, or a run with another recipe or other inputs.
    """

    def __init__(self, folder: Path, recipe: Recipe, inputs: Mapping[str, str], reuse: Sequence[Path] = ()) -> None:
        super().__init__(folder)
        self.recipe, self.reuse = recipe, list(reuse)
        self._inputs = dict(inputs)
        self.keys: dict[str, str] = {}
        self.old = {path: Legacy.of(path) for path in (folder, *self.reuse)}
        check_folder(folder, recipe, inputs)

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of parent and data."""
        return self._inputs

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Open the folder and keep a second process out of it; delete what killed processes left half-written."""
        with folder_lock(self.folder):
            sweep(self.folder)
            header = {"format": FORMAT, "recipe": self.recipe.model_dump(mode="json"), "inputs": self.inputs}
            known = self.folder / "run.json"
            before = read_json(known) if known.is_file() else {}
            if before | header != before:
                kept = {} if (old := self.old[self.folder]) is None else {"before": old.header}
                write_record(known, {"versions": versions()} | before | header | kept)
            self.__dict__.pop("header", None)
            self._say_versions()
            yield

    def _say_versions(self) -> None:
        """Say which finished steps other versions made; they are used as they are."""
        now, others = versions(), defaultdict(list)
        for path in sorted(self.folder.glob(f"stages/[!.]*/{MANIFEST}")):
            if changed := version_changes(read_json(path).get("versions", {}), now):
                others[changed].append(path.parent.name)
        for changed, names in others.items():
            say(f"made by other versions and used as they are: {', '.join(names)} ({changed})")

    def step(self, step: Step, job: Job) -> Path:
        """Make a step unless it is finished.

        Returns:
            The finished folder.

        Raises:
            MoesmithError: the step's own, a finished step is damaged, or something cannot be written; steps that were
            finished before stay.
        """
        if not world().first:
            return self._follow(step, job)
        name, settings = step.name, step.settings(job)
        inputs = {k: self.inputs[k] for k in ("model_digest", "data_digest")} | self._reads(step)
        facts = {"stage": name, "settings": settings, "seed": self.recipe.seed, "inputs": inputs}
        facts |= {"version": step.version} if step.version > 1 else {}
        self.keys[name] = digest(facts | {"needs": {need: self.keys[need] for need in step.needs}})
        for old in self.old.values():
            if old is not None:
                old.learn(step, job, settings, self)
        final = self.path(name)
        if self._fits(step, self.folder):
            if (begun := _begun(final)) is not None and begun[0] in self._known_keys(name):
                for left in WORKING:  # from a process killed between the rename and this
                    remove(final / left)
            verify_files(final)
            say(f"[{name}] done before")
            world().share(False)
            return final
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            check_left(final, WORKING)
            for other in self.reuse if step.shared else ():
                if self._fits(step, other) and _taken_over(other / "stages" / name, final):
                    say(f"[{name}] taken over from {other}")
                    world().share(False)
                    return final
            self._make(step, job, settings)
        except OSError as error:
            raise MoesmithError(f"stage {name} stopped: {error}", write_cure(error)) from error
        return final

    def _reads(self, step: Step) -> dict[str, str]:
        """Return a step's inputs besides weights and data; later steps depend on them through the keys they need."""
        found = {k: self.inputs[k] for k in step.reads if k in self.inputs}
        computed = self.inputs.get("compute", self.inputs.get("dtype"))
        if not step.tokenises and computed is not None and computed != self.inputs.get("dtype"):
            found["compute"] = computed
        return found

    def _fits(self, step: Step, run: Path) -> bool:
        """Whether a run holds this step finished, with the key of this moesmith or of an older one."""
        folder, old = run / "stages" / step.name, self.old[run]
        if finished(folder, self.keys[step.name]):
            return True
        return old is not None and old.holds(step, self, own=run == self.folder)

    def _known_keys(self, name: str) -> list[str]:
        """List the keys under which a step's folder may have been begun."""
        old = self.old[self.folder]
        return [self.keys[name], *(() if old is None else old.keys_of(name))]

    def _follow(self, step: Step, job: Job) -> Path:
        """Do what the first process does: help with a step that all make together, or wait for it."""
        for name in ("header", "manifests"):
            self.__dict__.pop(name, None)
        if world().share(False):
            with together():
                step.make(job, self._work(step.name))
        return self.path(step.name)

    def _work(self, name: str) -> Path:
        """Return the folder in which a step is made."""
        return self.path(name).with_name(f".{name}{PARTIAL}")

    def _make(self, step: Step, job: Job, settings: dict[str, Any]) -> None:
        name = step.name
        final, key = self.path(name), self.keys[name]
        say(f"[{name}]")
        work = self._work(name)
        begun, now = _begun(work), versions()
        if begun is None or begun[0] not in self._known_keys(name):
            _drop_partial(work)
            work.mkdir()
            write_text(work / ".key", f"{key}\n{json.dumps(now)}")
            begun = key, now
        if changed := version_changes(begun[1], now):
            say(f"[{name}] was begun by other versions and goes on ({changed})")
        started = time.monotonic()
        world().share(step.parallel)
        with peak_memory() as peak, together() if step.parallel else nullcontext():
            metrics = dict(step.make(job, work))
        seconds = round(time.monotonic() - started, 1)
        manifest = {"format": FORMAT, "stage": name, "key": key, "needs": list(step.needs), "settings": settings}
        manifest |= {"version": step.version, "title": step.title, "headline": step.headline(metrics)}
        manifest |= {"seed": self.recipe.seed, "inputs": self.inputs, "versions": now}
        manifest |= {"begun_by": begun[1]} if changed else {}
        manifest |= {"seconds": seconds, "memory": peak.host, "device_memory": peak.device, "metrics": metrics}
        commit(work, final, manifest, drop=WORKING)
        self.__dict__.pop("manifests", None)
        say(f"[{name}] {seconds:,.1f} s")


def _begun(work: Path) -> tuple[str, dict[str, str]] | None:
    """Read the key and versions that a working folder was begun with; 0.1 did not write the versions.

    Raises:
        MoesmithError: they have changed.
    """
    check_file(work / ".key")
    try:
        key, _, text = (work / ".key").read_text(encoding="utf-8").partition("\n")
        return key, json.loads(text) if text else {}
    except (OSError, ValueError):
        return None


def _drop_partial(work: Path) -> None:
    """Remove an unfinished stage: a folder that holds its key, or nothing."""
    if not os.path.lexists(work):
        return
    if (
        work.is_symlink()
        or not work.is_dir()
        or (_begun(work) is None and any(p.name not in (".key", beside(work / ".key").name) for p in work.iterdir()))
    ):
        raise MoesmithError(f"{work} is not a stage that moesmith began", "Delete it or move it away.")
    shutil.rmtree(work)


def _taken_over(source: Path, final: Path) -> bool:
    """Hard-link (or copy) a finished stage of another run; return whether it was still there."""
    hidden = hidden_beside(final)
    work = hidden / final.name
    try:
        verify_files(source)
        _drop_partial(final.with_name(f".{final.name}{PARTIAL}"))
        try:
            shutil.copytree(source, work, copy_function=os.link)
        except OSError:  # another file system
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(source, work)
    except (OSError, MoesmithError):
        shutil.rmtree(hidden, ignore_errors=True)
        if source.is_dir():
            raise
        return False  # its owner has deleted it meanwhile, as a comparison that keeps no models does
    with aside(final):
        os.replace(work, final)
    hidden.rmdir()
    return True


def check_reuse(names: Sequence[str]) -> list[Path]:
    """Check and return the runs that stages may be taken over from.

    Raises:
        MoesmithError: a folder does not exist, or holds something else.
    """
    folders = [Path(name) for name in names]
    for folder in folders:
        if not (folder / "run.json").is_file():
            what = "holds no moesmith run" if folder.exists() else "does not exist"
            raise MoesmithError(
                f"--reuse {folder} {what}", "Give a folder made by 'moesmith convert', or leave it out."
            )
    return folders


def check_folder(folder: Path, recipe: Recipe, inputs: Mapping[str, str]) -> None:
    """Refuse a folder that holds something other than this run; a run without a finished stage is accepted.

    Args:
        folder: the run's folder.
        recipe: what is to be done in it.
        inputs: as :class:`Pipeline` takes them; a fingerprint that is not known yet may be missing.

    Raises:
        MoesmithError: it is a file, or it holds other files or a run with another recipe, parent or data; the message
            names what changed.
    """
    known = folder / "run.json"
    if not known.is_file():
        if folder.exists() and not (folder.is_dir() and all(map(_just_begun, folder.iterdir()))):
            raise MoesmithError(f"{folder} exists and holds no moesmith run", "Give another --out.")
        return
    before = read_json(known)
    if not isinstance(before, dict) or not {"recipe", "inputs"} <= before.keys():
        raise MoesmithError(f"{folder} exists and holds no moesmith run", "Give another --out.")
    changed = _changes(_work(before), recipe.same_work())
    old = before.get("inputs", {})
    for name in ("model", "data"):
        # the same weights and text are the same wherever they are stored
        was, now = (found.get(f"{name}_digest") for found in (old, inputs))
        if now is not None and was != now:
            changed.append(f"{name} was {old.get(name)} ({was}), is {inputs[name]} ({now})")
    for name, what in (("tokenizer", "tokenizer"), ("text", "tokenizer"), ("chat", "chat template")):
        was, now = (found.get(f"{name}_digest") for found in (old, inputs))
        if None not in (was, now) and was != now and not any(what in change for change in changed):
            changed.append(f"the model's {what} has changed (was {was}, is {now})")  # older runs do not say
    was, now = (found.get("compute", found.get("dtype")) for found in (old, inputs))
    if None not in (was, now) and was != now:
        changed.append(f"computed in {was}, is {now}")
    if changed and any((folder / "stages").glob(f"[!.]*/{MANIFEST}")):
        raise MoesmithError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}",
            "Give another --out, or the old settings to continue it.",
        )
    if changed and not all(path.name in OURS or _just_begun(path) for path in folder.iterdir()):
        raise MoesmithError(
            f"{folder} holds a run with other settings that was only begun, and other files", "Give another --out."
        )


def _work(header: Mapping[str, Any]) -> Any:
    """Describe what the run of a header does, in the terms of this version."""
    values = upgraded(header)
    try:
        return parse(values, stored=True).same_work()
    except MoesmithError:  # an unknown method, or a setting that is gone: compare it as it is
        return values


def _just_begun(path: Path) -> bool:
    """Whether a file is what a run that was just begun can leave: the lock, or a half-written ``run.json``."""
    return path.name in HIDDEN or (path.name.startswith((".run.json.", f"{LOCK}.")) and path.name.endswith(".tmp"))


def _changes(before: Any, now: Any, prefix: str = "") -> list[str]:
    """List every leaf that differs, as ``section.key was x, is y``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            change
            for key in sorted({*before, *now})
            for change in _changes(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [f"{prefix} was {before}, is {now}"]
