"""The registry of targets, and ``moesmith export``: explain them, or write one and prove it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesmith.artefact import MANIFEST, read_tensors
from moesmith.carving import Carving
from moesmith.compare import parent_of
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.export.delta import Delta
from moesmith.export.gguf import Gguf
from moesmith.export.hf import HuggingFace
from moesmith.export.native import Native
from moesmith.export.sglang import SGLang
from moesmith.export.target import Options, Source, Target
from moesmith.overview import CARVINGS
from moesmith.positions import text_to_compare

KNOWN: list[Target] = [
    HuggingFace(),
    SGLang(),
    Gguf(),
    Native(),
    Delta(),
]
TARGETS: dict[str, Target] = {target.name: target for target in KNOWN}


def source_of(folder: Path) -> Source:
    """The parent, the last carving and some held-out text of a finished run.

    Raises:
        MoesmithError: the run is not finished, or its parent is not the one it was made from.
    """
    parent = parent_of(folder)
    stages = folder / "stages"
    last = [name for name in CARVINGS if (stages / name / MANIFEST).is_file()][-1]
    text = read_tensors(stages / "held-out" / "evaluation.safetensors")
    ids = text_to_compare(parent.config, next(iter(text.values())).long())
    return Source(parent, Carving.load(stages / last), folder, ids)


def explain_run(folder: Path) -> list[dict[str, Any]]:
    """For each target whether it holds a run's model: ``target``, ``fits``, ``reason`` (``None`` if it fits), ``lost``.

    Raises:
        MoesmithError: as :func:`source_of`.
    """
    source = source_of(folder)
    found = []
    for name, target in TARGETS.items():
        reason = target.explain(source)
        found.append(
            {
                "target": name,
                "fits": reason is None,
                "reason": reason,
                "lost": target.lost(source, None) if reason is None else [],
            }
        )
    return found


def rows_of(explained: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """:func:`explain_run`'s value as rows of a table."""
    return [
        (x["target"], "yes" if x["fits"] else "no", x["reason"] or "; ".join(x["lost"]) or "nothing is lost")
        for x in explained
    ]


def export_run(folder: Path, to: str | None, out: Path | None, options: Options) -> dict[str, Any]:
    """Write a run's model for a target and compare it in its runtime; ``out`` appears whole and proved, or not at all.

    Args:
        folder: a finished run.
        to: a name of :data:`TARGETS`.
        out: the folder or file to write; a model that is there is replaced.
        options: what is asked of the target.

    Returns:
        ``target``, ``out``, ``lost``, and what the target's ``write`` and ``verify`` return.

    Raises:
        MoesmithError: an unknown target, an option it does not take, an ``out`` that holds something else, a model that
            does not fit, or one that answers differently after writing.
    """
    if to not in TARGETS:
        what = "no target is given" if to is None else f"there is no target {to}"
        raise MoesmithError(what, f"Give --to one of {', '.join(TARGETS)}.")
    if out is None:
        raise MoesmithError("it is not said where to write", "Give --out.")
    target = TARGETS[to]
    if odd := [flag for name, flag in options.given().items() if name not in target.takes]:
        raise MoesmithError(f"the target {to} has no {odd[0]}", "Leave it out.")
    check_out(out, target)
    source = source_of(folder)
    if (reason := target.explain(source)) is not None:
        raise MoesmithError(f"{to} cannot hold this model: {reason}", f"See 'moesmith export {folder} --explain'.")
    lost = target.lost(source, options)
    for line in lost:
        say(f"  lost in {to}: {line}")
    with staged(out) as work:
        facts = target.write(source, work, options)
        facts |= target.verify(source, work, source.ids)
    return {"target": to, "out": str(out), "lost": lost} | facts


def check_out(out: Path, target: Target) -> None:
    """Refuse to write over what is no model of this kind.

    Raises:
        MoesmithError: ``out`` has another suffix, is a folder where a file is to be, or holds other files.
    """
    suffix, known = target.suffix, (out / target.mark).is_file()
    if suffix and (out.suffix != suffix or out.is_dir()):
        raise MoesmithError(f"{out} is no name of a {suffix} file", f"Give an --out that ends in {suffix}.")
    if not suffix and out.exists() and (out.is_file() or (any(out.iterdir()) and not known)):
        raise MoesmithError(f"{out} exists and holds no model", "Give another --out, or delete it.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden path of the same name to write to and to verify; renamed to ``out`` at the end, gone after an error."""
    hidden = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    work = hidden / out.name
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield work
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(work, out)
    except MoesmithError as error:
        raise MoesmithError(str(error).replace(str(work), str(out))) from error
    except OSError as error:
        raise MoesmithError(f"cannot write {out}: {error.strerror or error}", "Give another --out.") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
