"""Stages *baseline*, *export* (a Hugging Face folder, verified) and *evaluate* (held-out perplexity)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from moesmith.console import say
from moesmith.conversion.stages.data import evaluation_of
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import geometric_mean, perplexities
from moesmith.evaluation.routing import Recorder
from moesmith.export.folder import REMAKE, layered_folder, load_folder
from moesmith.export.native import write_native
from moesmith.export.stock.write import stock_reference, write_stock
from moesmith.export.verify import verify_folder
from moesmith.files.artefact import (
    MANIFEST,
    SUMS,
    file_digest,
    own_list,
    read_json,
    verify_files,
    write_json,
    write_list,
    write_text,
)
from moesmith.files.outputs import new_folder
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.moe import decoder
from moesmith.parent.layerwise import Decoder
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.proof.positions import text_to_compare
from moesmith.report.card import model_card
from moesmith.run.pipeline import Run

CARD = "README.md"


def export_stage(run: Run, computing: Parent, before: str) -> Path:
    """Write ``RUN/model`` and compare its logits with the carving's own.

    In the parent's stock MoE architecture, or in moesmith's own where no stock architecture holds the carving: a parent
    without a gate, attention masked by token. Where the experts alone would fit a stock architecture ``RUN/stock`` is
    written as well. Both are written and compared under hidden names, and get their own when the stage's manifest lists
    them: nothing unproved ever bears the name, and only what a manifest lists is replaced.
    """
    target = run.folder / "model"
    folders = [target]
    if has_stock(computing, Carving.load(run.path(before))):
        folders.append(run.folder / "stock")
    manifest = run.path("export") / MANIFEST
    if manifest.is_file() and not all((folder / "config.json").is_file() for folder in folders):
        write_json(manifest, read_json(manifest) | {"key": None})  # made again; what it knows of the other folder holds
    elif manifest.is_file():
        for folder in folders:
            check_finished(folder)
    places = ExitStack()

    def body(_work: Path) -> dict[str, Any]:
        parent = computing.as_stored()
        hidden = {folder: places.enter_context(_place(folder)) for folder in folders}
        carving = Carving.load(run.path(before))
        ids = text_to_compare(parent.config, next(iter(evaluation_of(run).values())))
        sliced = decoder(parent, carving)

        def stock(folder: Path) -> dict[str, Any]:
            written = write_stock(parent, carving, folder, parent.model.dtype)
            return written | verify_folder(parent, folder, stock_reference(parent, carving), ids)

        if parent.family != NATIVE and not carving.attention:
            metrics = stock(hidden[target])
            if carving.biased:  # the constant channel stands in for it: say how well
                measured = verify_folder(parent, hidden[target], sliced, ids)
                metrics |= {f"constant_channel_{name}": measured[name] for name in ("logits_kl", "argmax_agreement")}
                say(f"  constant channel for the bias: mean KL {measured['logits_kl']:.2e} nats to the exact bias")
            return metrics | listed_in(hidden) | parameters(parent, carving)
        metrics = write_native(parent, carving, hidden[target])
        metrics |= verify_folder(parent, hidden[target], sliced, ids)
        if has_stock(parent, carving):
            metrics["stock"] = stock(hidden[run.folder / "stock"])
            say("  RUN/stock drops the masks that attention has by token: all of V and O that any token keeps is used")
        return metrics | listed_in(hidden) | parameters(parent, carving)

    def listed_in(hidden: dict[Path, Path]) -> dict[str, Any]:
        return {"sums": {folder.name: file_digest(work / SUMS) for folder, work in hidden.items()}}

    with places:
        return run.stage("export", [before, "held-out"], {}, body, shared=False)  # the model itself lies elsewhere


@contextmanager
def _place(folder: Path) -> Iterator[Path]:
    """A hidden name for ``RUN/model`` or ``RUN/stock``; what bears the real one is replaced if the run lists it.

    The card beside the model is its owner's to edit, and stays.
    """
    check_known(folder)
    if os.path.lexists(folder / SUMS) and file_digest(folder / SUMS) != _known(folder):
        raise MoesmithError(f"{folder} is not a model that this run lists", "Delete it or move it away.")
    with new_folder(folder, overwrite=True, apart=(CARD,)) as work:
        yield work


def check_known(folder: Path) -> None:
    """Refuse to make a model where something lies that no manifest of the run lists.

    Args:
        folder: ``RUN/model`` or ``RUN/stock``.

    Raises:
        MoesmithError: it does.
    """
    filled = folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if filled and not (folder.parent / "stages" / "export" / MANIFEST).is_file():
        raise MoesmithError(f"{folder} is not a model that this run lists", "Delete it or move it away.")


def _known(folder: Path) -> str | None:
    """The hash of the list that ``RUN/model`` or ``RUN/stock`` was finished with."""
    manifest = read_json(folder.parent / "stages" / "export" / MANIFEST)
    found: str | None = manifest["metrics"].get("sums", {}).get(folder.name)
    return found


def has_stock(parent: Parent, carving: Carving) -> bool:
    """Whether a run leaves ``RUN/stock`` beside ``RUN/model``: its attention is native, its experts are not."""
    return bool(carving.attention) and parent.family != NATIVE


def baseline_stage(run: Run, parent: Parent) -> Path:
    """Perplexity per domain of the dense parent."""

    def body(work: Path) -> dict[str, Any]:
        result = _perplexities(parent.decoder, evaluation_of(run), "parent")
        write_json(work / "parent.json", result)
        return {"perplexity": result["geomean"]}

    return run.stage("baseline", ["held-out"], {}, body)


def evaluate_stage(run: Run, parent: Parent, made: list[str]) -> Path:
    """Perplexity per domain of every stage's carving beside the parent's, and the finished model's routing.

    The last stage is measured on ``RUN/model`` itself, loaded as anybody would load it; so is ``RUN/stock``.
    """
    folder = run.folder / "model"

    def body(work: Path) -> dict[str, Any]:
        blocks = evaluation_of(run)
        results = {"parent": read_json(run.path("baseline") / "parent.json")}
        for name in made[:-1]:
            path = work / f"{name}.json"
            if not path.is_file():
                write_json(path, _perplexities(decoder(parent, Carving.load(run.path(name))), blocks, name))
            results[name] = read_json(path)
        name, routing = made[-1], work / "routing.npz"
        path, routed = work / f"{name}.json", run.recipe.carve.experts > 1
        if not path.is_file() or (routed and not routing.is_file()):
            recorder = Recorder() if routed else None
            found = _perplexities(load_finished(folder, parent), blocks, name, recorder)
            if recorder is not None:
                recorder.result(parent.tokenizer, list(blocks)).save(routing)
            write_json(path, found)
        results[name] = read_json(path)
        if has_stock(parent, Carving.load(run.path(made[-1]))):
            path = work / "stock.json"
            if not path.is_file():
                write_json(path, _perplexities(load_finished(run.folder / "stock", parent), blocks, "stock"))
            results["stock"] = read_json(path)
        spec = run.recipe.evaluate
        summary = {"stages": results, "window": spec.window, "tokens": sum(b.numel() for b in blocks.values())}
        write_json(work / "evaluation.json", summary)
        return {name: result["geomean"] for name, result in results.items()}

    final = run.stage("evaluate", ["held-out", "baseline", *made, "export"], {"made": made}, body)
    _write_card(run, folder / CARD)
    return final


def _write_card(run: Run, card: Path) -> None:
    """The model card, and in ``RUN/card.sha256`` what it was: one that somebody edited since stays as it is."""
    text, list_path, name = model_card(run), run.folder / "card.sha256", card.relative_to(run.folder).as_posix()
    known = own_list(list_path) or {}
    if os.path.lexists(card) and card.read_text(encoding="utf-8") != text:
        if card.is_symlink() or file_digest(card) != known.get(name):
            say(f"  {card} was edited and stays as it is")
            return
    elif os.path.lexists(card) and known.get(name) == file_digest(card):
        return
    write_text(card, text)
    if known or not os.path.lexists(list_path):
        write_list(list_path, {name: file_digest(card)})


def _perplexities(
    model: Decoder, blocks: dict[str, Tensor], label: str, listener: Recorder | None = None
) -> dict[str, Any]:
    domains = perplexities(model, blocks, label=f"perplexity of {label}", listener=listener)
    worst = max(domains, key=lambda name: domains[name])
    return {"domains": domains, "geomean": geometric_mean(domains.values()), "worst": worst}


def load_finished(folder: Path, parent: Parent) -> Decoder:
    """``RUN/model`` or ``RUN/stock``, computing as its parent does; layer by layer where the parent is run so.

    Raises:
        MoesmithError: it is damaged.
    """
    check_finished(folder)
    dtype = parent.dtype
    if parent.layerwise:
        return layered_folder(folder, dtype, parent.device)
    return load_folder(folder, dtype).to(parent.device)  # type: ignore[arg-type]


def check_finished(folder: Path) -> None:
    """Compare every file of ``RUN/model`` or ``RUN/stock`` with its hash, and the list of hashes with the run's.

    Runs of moesmith's first days have no such list.

    Raises:
        MoesmithError: a file, or the list itself, is missing or changed.
    """
    known, path = _known(folder), folder / SUMS
    if known is not None and (not path.is_file() or file_digest(path) != known):
        raise MoesmithError(f"{path} is missing or damaged", REMAKE)
    verify_files(folder, REMAKE)
