"""The registry of targets, and ``moesmith export``: explain them, or write one and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesmith.arguments import path_of, takes_paths
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.export.delta import Delta
from moesmith.export.gguf.target import Gguf
from moesmith.export.hf import HuggingFace
from moesmith.export.native import Native
from moesmith.export.sglang import SGLang
from moesmith.export.target import Options, Source, Target
from moesmith.files.outputs import check_file, check_folder, check_place, inputs_of, new_file, new_folder
from moesmith.parent.compute import AUTO, Device
from moesmith.parent.load import Parent
from moesmith.parent.proof.positions import text_to_compare
from moesmith.run.folder import Run, open_run

KNOWN: list[Target] = [HuggingFace(), SGLang(), Gguf(), Native(), Delta()]
TARGETS = {target.name: target for target in KNOWN}


@takes_paths("folder")
def source_of(folder: Path, device: Device = AUTO) -> Source:
    """Load the parent as it is stored, the last carving and some held-out text of a finished run.

    Raises:
        MoesmithError: the run is not finished, or its parent is not the one it was made from.
    """
    run = open_run(folder)
    return source_for(run, run.parent(None, device))


def source_for(run: Run, parent: Parent) -> Source:
    """Return the same of a run whose parent, as it is stored, is loaded."""
    ids = text_to_compare(parent.config, next(iter(run.held_out.values())))
    return Source(parent, run.carving(), run.folder, ids)


@takes_paths("folder")
def explain_run(folder: Path, device: Device = AUTO) -> list[dict[str, Any]]:
    """Say of each target if it fits a run's model: ``target``, ``fits``, ``reason`` (``None`` if it fits), ``lost``.

    Raises:
        MoesmithError: as :func:`source_of`.
    """
    source = source_of(folder, device)
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


@takes_paths("folder")
def export_run(
    folder: Path,
    to: str | None,
    out: Path | None,
    options: Options,
    device: Device = AUTO,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a run's model for a target and compare it in its runtime; ``out`` appears whole and proved, or not at all.

    Args:
        folder: a finished run.
        to: a name of :data:`TARGETS`.
        out: the folder or file to write, outside of the run.
        options: what is asked of the target.
        device: the device on which a folder is compared with the carving, in fp32.
        overwrite: replace what moesmith wrote at ``out``, when the new one is proved.

    Returns:
        ``target``, ``out``, ``lost``, and what the target's ``write`` and ``verify`` return; of a GGUF file also the
        lines that serve it, ``ollama`` and ``llama_server``.

    Raises:
        MoesmithError: an unknown target, an option it does not take, an ``out`` that may not be written
            (``files/outputs.py``), a model that does not fit, or one that answers differently after writing.
    """
    if to not in TARGETS:
        what = "no target is given" if to is None else f"there is no target {to}"
        raise MoesmithError(what, f"Give --to one of {', '.join(TARGETS)}.")
    if out is None:
        raise MoesmithError("there is no output to write to", "Give --out.")
    out = path_of("out", out)
    target = TARGETS[to]
    if odd := [flag for name, flag in options.given().items() if name not in target.takes]:
        raise MoesmithError(f"the target {to} has no {odd[0]}", "Leave it out.")
    check_out(out, target, folder, overwrite=overwrite)
    source = source_of(folder, device)
    if (reason := target.explain(source)) is not None:
        raise MoesmithError(f"{to} cannot hold this model: {reason}", f"See 'moesmith export {folder} --explain'.")
    lost = target.lost(source, options)
    for line in lost:
        say(f"  lost in {to}: {line}")
    place = new_file if target.suffix else new_folder
    with place(out, overwrite=overwrite) as work:
        facts = target.write(source, work, options)
        facts |= target.verify(source, work, source.ids)
        facts |= target.accompany(source, work, out)
    return {"target": to, "out": str(out), "lost": lost} | facts


def check_out(out: Path, target: Target, run: Path, *, overwrite: bool = False) -> None:
    """Refuse an ``out`` before any work.

    Raises:
        MoesmithError: it has another suffix, is an input of this command, or holds what may not be replaced.
    """
    if target.suffix and (out.suffix != target.suffix or out.is_dir()):
        raise MoesmithError(
            f"{out} is not the name of a {target.suffix} file", f"Give an --out that ends in {target.suffix}."
        )
    check_place(out, inputs_of(run))
    if target.suffix:
        check_file(out, overwrite=overwrite, beside=target.beside(out))
    else:
        check_folder(out, overwrite=overwrite)
