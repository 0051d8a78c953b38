"""Hand a finished model to others: a folder with a card that the Hugging Face hub reads, uploaded if asked.

The card is the run's own, with what the hub reads from its header: licence, parent, data sets, measured perplexities.

A repository has one relation to one base model. A mixture is a ``finetune`` of its parent, also where GGUF files of it
lie beside it: they are quantisations of the mixture, not of the parent. In a repository of their own they are
``quantized``, and the mixture's repository is their base model. Perplexities go into the card (``model-index``) and not
into ``.eval_results/``, whose entries must name a benchmark that the hub knows; no text of a run is one.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from moesmith.arguments import path_of, several
from moesmith.console import code, say
from moesmith.data.hf_datasets import read_sets
from moesmith.data.text import locate
from moesmith.errors import MoesmithError
from moesmith.export.folder import whole_folder
from moesmith.files.artefact import SUMS, differing, own_list
from moesmith.files.outputs import check_place, inputs_of, list_of
from moesmith.files.parse import parse_yaml
from moesmith.files.write import copy_file, write_text
from moesmith.run.folder import Run, finished_of, open_run

CARD = "README.md"
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def push(
    folder: str | Path,
    to: str,
    *,
    out: str | Path | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    files: str | Path | Sequence[str | Path] | None = (),
    quantized_of: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload a finished run's model, with a card that the hub reads.

    Args:
        folder: the run.
        to: the repository, ``user/name``; made if it is not there.
        out: where the folder to upload is written, with files of its own; a temporary one if left out.
        base_model: the parent's hub id; taken from the run where it names one.
        licence: of the model, a hub identifier such as ``apache-2.0``; the parent folder's own card says it if it is
            left out and that card does.
        files: further files, such as a GGUF file made by ``moesmith export``.
        quantized_of: the repository that holds the model itself: ``files`` alone are uploaded, as quantised from it.
        private: of a repository that is made.
        dry_run: write ``out`` and upload nothing.

    Returns:
        ``repository``, ``url`` (``None`` for a dry run), ``files`` with their sizes, ``metadata`` of the card.

    Raises:
        MoesmithError: the run is not finished or its model is damaged, the repository's name is none, a file is
            missing, ``out`` may not be written, or the hub refuses.
    """
    for flag, name in (("--to", to), ("--quantized-of", quantized_of)):
        if name is not None and not REPOSITORY.fullmatch(name):
            raise MoesmithError(f"{name!r} is no repository", f"Write {flag} user/name.")
    if quantized_of == to:
        raise MoesmithError(f"{to} cannot be quantised from itself", "Give --to another repository.")
    if dry_run and out is None:
        raise MoesmithError("a dry run writes a folder", "Give --out.")
    run, more = open_run(folder), [path_of("file", file) for file in several("files", files)]
    run.check_finished()
    if out is not None:
        check_place(path_of("out", out), [*inputs_of(run.folder), *more])
    run.check_files()
    if absent := [file for file in more if not file.is_file()]:
        raise MoesmithError(f"there is no file {absent[0]}", "Give files that exist.")
    for file in more:
        known = (own_list(list_of(file)) or {}).get(file.name)  # what was written beside it may have been edited
        if known is not None and differing(file.parent, {file.name: known}):
            raise MoesmithError(
                f"{file} has changed since moesmith wrote it", "Give it as it was written, or export it again."
            )
    if quantized_of is not None and not more:
        raise MoesmithError("no quantised files are named", "Give --file, such as a GGUF file of 'moesmith export'.")
    names, found = [file.name for file in more], run.model.rglob("*") if quantized_of is None else ()
    own = {file.relative_to(run.model).as_posix(): file for file in found if file.is_file()}
    if taken := [n for n in names if names.count(n) > 1 or n in {CARD, SUMS, *own}]:
        raise MoesmithError(f"two files would be called {taken[0]}", "Rename one of them.")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model" if out is None else path_of("out", out)
        card = _card(run, to, base_model, licence, names, quantized_of)
        with whole_folder(place) as work:
            for name, file in (own | dict(zip(names, more, strict=True))).items():
                if name not in (CARD, SUMS):
                    (copy_file if out is not None else _linked)(file, work / name)
            write_text(work / CARD, card)
        made = sorted(file for file in place.rglob("*") if file.is_file())
        sizes = {file.relative_to(place).as_posix(): file.stat().st_size for file in made}
        url = None if dry_run else _upload(place, to, private=private, card=card)
    return {"repository": to, "url": url, "files": sizes, "metadata": ModelCard(card).data.to_dict()}


def _linked(source: Path, target: Path) -> None:
    """Give a file another name in a folder that nobody edits, or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def _card(
    run: Run, to: str, base_model: str | None, licence: str | None, files: Sequence[str], quantized_of: str | None
) -> str:
    """Write the run's card anew with a header that the hub reads."""
    header, body = _front(run.model / CARD)
    base_model = base_model or header.get("base_model")
    licence = licence or header.get("license") or _licence(run)
    if licence is None:
        say("the card says no licence: give --license, such as that of the parent")
    gguf = [name for name in files if name.endswith(".gguf")]
    common: dict[str, Any] = {"license": licence, "pipeline_tag": "text-generation", "datasets": _datasets(run) or None}
    common["tags"] = [*(header.get("tags") or []), *(["gguf"] if gguf else [])]
    if quantized_of is not None:  # what was measured was measured on the model itself
        data = ModelCardData(base_model=quantized_of, base_model_relation="quantized", **common)
    else:
        relation = "finetune" if base_model else None
        common |= {"model_name": to.split("/")[1], "library_name": "transformers", "eval_results": _results(run)}
        data = ModelCardData(base_model=base_model, base_model_relation=relation, **common)
    if files:
        body += "\nFiles for other runtimes: " + ", ".join(code(name) for name in files) + ".\n"
    for name in gguf:
        served = f"llama-server --hf-repo {to} --hf-file {shlex.quote(name)}"
        body += f"\nTo serve {code(name)}: {code(served)}, or {code(f'ollama run hf.co/{to}:{name}')}.\n"
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _licence(run: Run) -> str | None:
    """Read the licence that the parent folder's own card names."""
    card = Path(run.inputs["model"]) / CARD
    try:
        name = _front(card)[0].get("license") if card.is_file() else None
    except MoesmithError:  # the parent's card is not ours to correct
        return None
    return name if isinstance(name, str) else None


def _front(card: Path) -> tuple[dict[str, Any], str]:
    """Return the fields of a card's header, and the text below it.

    Raises:
        MoesmithError: the header is not YAML, or no mapping.
    """
    text = card.read_text(encoding="utf-8", errors="replace")
    found = HEADER.match(text)
    fields = (parse_yaml(found[1], str(card)) if found else None) or {}
    if not isinstance(fields, dict) or not isinstance(fields.get("tags") or [], list):
        raise MoesmithError(f"the header of {card} has no fields, or tags that are no list", "Fix the file.")
    return fields, text[found.end() :] if found else text


def _datasets(run: Run) -> list[str]:
    """Return the hub ids of the data sets that a run read; empty for folders, files and the built-in text."""
    try:
        source = locate(run.inputs["data"])
    except MoesmithError:  # the built-in text, or of another machine
        return []
    sets = read_sets(source) if source.is_file() else {}
    names = run.header["recipe"]["domains"]["names"] or sets
    read = [sets[name] for name in names if name in sets]
    return sorted({one.hub for one in read if not one.data_files and not Path(one.hub).exists()})


def _results(run: Run) -> list[EvalResult]:
    """Return the perplexity of every domain, and the geometric mean, as the hub's evaluation results."""
    found = run.evaluation
    stage = found["stages"][finished_of(found["stages"])]
    values = {**stage["domains"], "geometric mean": stage["geomean"]}
    what: dict[str, Any] = {"task_type": "text-generation", "dataset_type": "held-out", "metric_type": "perplexity"}
    what |= {"metric_name": f"perplexity ({found['window']} tokens)"}
    return [
        EvalResult(dataset_name=f"held-out text: {name}", dataset_config=name, metric_value=round(value, 3), **what)
        for name, value in values.items()
    ]


def _upload(folder: Path, to: str, *, private: bool, card: str) -> str:
    """Make the repository, let the hub check the card, upload the folder; return its address."""
    api = HfApi()
    try:
        ModelCard(card).validate()
        api.create_repo(to, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=to, folder_path=folder, commit_message="Upload by moesmith")
    except Exception as error:  # the hub's, the network's, and those of what lies between
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        what = f"the hub did not take {to}: {said}"
        raise MoesmithError(what, "Run 'hf auth login', or fix what it says.") from error
    return str(done.commit_url)
