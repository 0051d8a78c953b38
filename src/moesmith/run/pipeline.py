"""Runs and stages: every stage is a folder with a manifest, made once, resumed when killed, re-used when it fits.

A stage's key is a hash of what it depends on: its own settings, the seed, the parent, the data and the keys of the
stages it needs. A finished folder with the same key is used as it is; anything else is made again. Stages that
moesmith 0.1 made have keys that know less; they count where their manifests say that the rest agrees.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.files.artefact import (
    FORMAT,
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
    write_text,
)
from moesmith.files.lock import HIDDEN, LOCK, folder_lock
from moesmith.report.overview import MATTER
from moesmith.run.fingerprints import folder_companions
from moesmith.run.recipe import Recipe

LISTS = ("card.sha256", "report.html.sha256", "bench.json.sha256")
OURS = ("run.json", "stages", "bench", "figures", "report.html", "bench.json", *LISTS)  # but for finished models
WORKING = ("checkpoint.safetensors", ".key")  # a stage's working state: not part of the finished artefact
TEXT = ("domains", "held-out", "corpus")  # stages that turn text into tokens and compute nothing


class Run:
    """A conversion's folder.

    Args:
        folder: where everything goes.
        recipe: what to do.
        inputs: fingerprints of parent and data: ``model``, ``model_digest``, ``tokenizer_digest``, ``data``,
            ``data_digest``, ``dtype`` (of the weights), and where they are known those of ``fingerprints`` and
            ``compute`` (the dtype that models compute in; as ``dtype`` if it is missing).
        reuse: other runs whose finished stages may be taken over when their keys agree.

    Raises:
        MoesmithError: the folder holds something else, or a run with another recipe or other inputs.
    """

    def __init__(self, folder: Path, recipe: Recipe, inputs: Mapping[str, str], reuse: Sequence[Path] = ()) -> None:
        self.folder, self.recipe, self.inputs, self.reuse = folder, recipe, dict(inputs), list(reuse)
        self.keys: dict[str, str] = {}
        self.old_keys: dict[str, str] = {}  # as moesmith 0.1 made them
        check_folder(folder, recipe, inputs)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Open the folder and keep a second process out of it; sweep up what killed processes left half-written."""
        with folder_lock(self.folder):
            sweep(self.folder)
            header = {"format": FORMAT, "recipe": self.recipe.model_dump(mode="json"), "inputs": self.inputs}
            known = self.folder / "run.json"
            before = read_json(known) if known.is_file() else {}
            if before | header != before:
                write_json(known, {"versions": versions()} | before | header)
            self._say_versions()
            yield

    def _say_versions(self) -> None:
        """Say which finished stages other versions made: a stage is used as it is, whoever made it."""
        now, others = versions(), defaultdict(list)
        for path in sorted(self.folder.glob(f"stages/[!.]*/{MANIFEST}")):
            if changed := _version_changes(read_json(path).get("versions", {}), now):
                others[changed].append(path.parent.name)
        for changed, names in others.items():
            say(f"made by other versions and used as they are: {', '.join(names)} ({changed})")

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
        was: Mapping[str, Any] | None = None,
    ) -> Path:
        """Make a stage unless it is there.

        Args:
            name: the stage and its folder.
            needs: stages it reads.
            settings: the part of the recipe it depends on.
            body: fills the working folder it is given, finding there what an earlier, killed try left; returns
                metrics for the manifest.
            shared: whether another run's stage may be taken over: its folder holds all that it made.
            was: the settings under which moesmith 0.1 made a stage that will do as well, if they were others.

        Returns:
            The finished folder.

        Raises:
            MoesmithError: the body's own, a finished stage is damaged, or something cannot be written; what was
            finished before stays.
        """
        inputs = {k: self.inputs[k] for k in ("model_digest", "data_digest")}
        facts = {"stage": name, "settings": dict(settings), "seed": self.recipe.seed}
        key = self.keys[name] = digest(
            {**facts, "needs": {need: self.keys[need] for need in needs}, "inputs": inputs | self._reads(name)}
        )
        facts |= {} if was is None else {"settings": dict(was)}
        self.old_keys[name] = digest({**facts, "needs": {n: self.old_keys[n] for n in needs}, "inputs": inputs})
        final = self.path(name)
        if self._fits(name, final, own=True):
            if (begun := _begun(final)) is not None and begun[0] in self._known_keys(name):
                for left in WORKING:  # of a process killed between the rename and this
                    (final / left).unlink(missing_ok=True)
            verify_files(final)
            say(f"[{name}] done before")
            return final
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            check_left(final, WORKING)
            for other in self.reuse if shared else ():
                if self._fits(name, other / "stages" / name):
                    verify_files(other / "stages" / name)
                    _take_over(other / "stages" / name, final)
                    say(f"[{name}] taken over from {other}")
                    return final
            self._make(name, key, {"needs": list(needs), "settings": dict(settings)}, body)
        except OSError as error:
            raise MoesmithError(f"stage {name} stopped: {error}", write_cure(error)) from error
        return final

    def _reads(self, name: str) -> dict[str, str]:
        """Inputs of a stage besides weights and data; what follows from it has them in the keys of what it needs."""
        wanted = {"export": ["companions_digest"]} | {stage: ["text_digest", "chat_digest"] for stage in TEXT}
        found = {k: self.inputs[k] for k in wanted.get(name, ()) if k in self.inputs}
        computed = self.inputs.get("compute", self.inputs.get("dtype"))
        if name not in TEXT and computed is not None and computed != self.inputs.get("dtype"):
            found["compute"] = computed
        return found

    def _fits(self, name: str, folder: Path, *, own: bool = False) -> bool:
        """Whether a folder holds this stage finished, with the key of this moesmith or of 0.1.

        0.1's key knows neither tokenizer nor the dtype of the computation: its manifest has to say that they agree.
        What it does not say counts as the same in the run's own folder only.
        """
        if finished(folder, self.keys[name]):
            return True
        manifest = finished(folder, self.old_keys[name])
        if manifest is None or "format" in manifest or not self._known_to_old(name):
            return False
        then, now = manifest.get("inputs", {}), self.inputs
        if any(then.get(k, now.get(k) if own else None) != now.get(k) for k in ("tokenizer_digest", "dtype")):
            return False
        known = now.get("companions_digest")
        return name != "export" or known is None or folder_companions(self.folder / "model") == known

    def _known_to_old(self, name: str) -> bool:
        """Whether 0.1 could have made this stage: it had no conversations, and computed in the dtype of the weights."""
        return "chat_digest" not in self.inputs and "compute" not in self._reads(name)

    def _known_keys(self, name: str) -> list[str]:
        """Keys by which a stage's folder may have been begun; of 0.1's, ``check_folder`` has compared the rest."""
        return [self.keys[name], *([self.old_keys[name]] if self._known_to_old(name) else [])]

    def _make(self, name: str, key: str, facts: dict[str, Any], body: Callable[[Path], Mapping[str, Any]]) -> None:
        final = self.path(name)
        say(f"[{name}]")
        work = final.parent / f".{name}.partial"
        begun, now = _begun(work), versions()
        if begun is None or begun[0] not in self._known_keys(name):
            _drop_partial(work)
            work.mkdir()
            write_text(work / ".key", f"{key}\n{json.dumps(now)}")
            begun = key, now
        if changed := _version_changes(begun[1], now):
            say(f"[{name}] was begun by other versions and goes on ({changed})")
        started = time.monotonic()
        metrics = dict(body(work))
        seconds = round(time.monotonic() - started, 1)
        manifest = {"format": FORMAT, "stage": name, "key": key, **facts}
        manifest |= {"seed": self.recipe.seed, "inputs": self.inputs, "versions": now}
        manifest |= {"begun_by": begun[1]} if changed else {}
        commit(work, final, manifest | {"seconds": seconds, "metrics": metrics}, drop=WORKING)
        say(f"[{name}] {seconds:,.1f} s")


def versions() -> dict[str, str]:
    """Versions of what computes."""
    packages = ("moesmith", "torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _begun(work: Path) -> tuple[str, dict[str, str]] | None:
    """Key and versions by which a working folder was begun; 0.1 did not write the versions."""
    try:
        key, _, text = (work / ".key").read_text(encoding="utf-8").partition("\n")
        return key, json.loads(text) if text else {}
    except (OSError, ValueError):
        return None


def _drop_partial(work: Path) -> None:
    """Remove an unfinished stage: its key is in it, or nothing is."""
    if not os.path.lexists(work):
        return
    if (
        work.is_symlink()
        or not work.is_dir()
        or (_begun(work) is None and any(p.name != ".key" for p in work.iterdir()))
    ):
        raise MoesmithError(f"{work} is not a stage that moesmith began", "Delete it or move it away.")
    shutil.rmtree(work)


def _version_changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What matters and differs, as ``torch 2.12.0, now 2.13.0``; empty if nothing does."""
    changed = [name for name in MATTER if name in then and then[name] != now[name]]
    return "; ".join(f"{name} {then[name]}, now {now[name]}" for name in changed)


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


def check_reuse(names: Sequence[str]) -> list[Path]:
    """The runs that stages may be taken over from.

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
    for name, what in (("tokenizer", "tokenizer"), ("text", "tokenizer"), ("chat", "chat template")):
        was, now = (found.get(f"{name}_digest") for found in (old, inputs))
        if None not in (was, now) and was != now and not any(what in change for change in changed):
            changed.append(f"the model's {what} was another one ({was}, is {now})")  # older runs do not say
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
            f"{folder} holds other files beside a run that was only begun, with other settings", "Give another --out."
        )


def _just_begun(path: Path) -> bool:
    """Whether a file of a run's folder can be all that is there: the lock, and a half-written ``run.json``."""
    return path.name in HIDDEN or (path.name.startswith((".run.json.", f"{LOCK}.")) and path.name.endswith(".tmp"))


def _changes(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Every leaf that differs, as ``section.key was x, is y``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            change
            for key in sorted({*before, *now})
            for change in _changes(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [f"{prefix} was {before}, is {now}"]
