"""Load domains: named texts with a calibration and an evaluation split, and all that makes token windows of them.

This is the module to import from: reading is here, records are in ``records``, files of them in ``formats``, their
tokens in ``encoding``, sampling and packing in ``sampling``, what splits share in ``overlap``, the built-in domains in
``builtin``, Hugging Face data sets in ``hf_datasets``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from moesmith.arguments import path_text, several
from moesmith.data.builtin import builtin_digest, builtin_domains
from moesmith.data.formats import FORMATS, read_jsonl, read_records, records_file
from moesmith.data.hf_datasets import hub_domains, read_sets
from moesmith.data.overlap import Overlap, check_splits, overlaps
from moesmith.data.records import Domain, Record, as_text, check_names, choose, fields, kind
from moesmith.data.sampling import evaluation_blocks, pack, sample_windows, training_blocks
from moesmith.errors import MoesmithError
from moesmith.files.parse import parse_json
from moesmith.files.seal import digest, file_digest

__all__ = [
    "Domain",
    "Overlap",
    "Record",
    "as_text",
    "check_splits",
    "evaluation_blocks",
    "fields",
    "kind",
    "load_domains",
    "overlaps",
    "pack",
    "read_jsonl",
    "read_records",
    "records_file",
    "sample_windows",
    "source_digest",
    "training_blocks",
]

BUILTIN = "builtin"
SHIPPED = {"paper24": Path(__file__).parent / "sets" / "paper24.yaml"}
SPLITS = {"train": "calibration", "test": "evaluation"}  # a split's name in files → what it is for


def load_domains(source: str | Path, names: str | Sequence[str] | None = None) -> list[Domain]:
    """Read domains.

    Args:
        source: ``builtin``; a folder of ``<name>.train.jsonl`` (calibration) with ``<name>.test.jsonl`` (evaluation),
            or of files in another of ``FORMATS``; a ``.yaml`` file that describes Hugging Face data sets
            (``hf_datasets``); or ``paper24``, DIVE's own 24 sets.
        names: which domains, in this order. By default all, sorted by name; in a folder, sets with only one of the two
            files are then skipped.

    Raises:
        MoesmithError: there is nothing of that name, no complete set, an unknown name (the nearest one is given), a
            named set with only one split, or an empty or malformed file (with its line).
    """
    source, names = path_text("data", source), None if names is None else several("names", names)
    if source == BUILTIN:
        return builtin_domains(names)
    path = locate(source)
    if path.is_file():
        return hub_domains(path, names)
    groups = _groups(path)
    return [
        Domain(name, read_records(train), read_records(test), groups.get(name, ""))
        for name, (train, test) in _files(path, names).items()
    ]


def source_digest(source: str | Path, names: Sequence[str] | None = None) -> str:
    """Return a short hash of the files ``load_domains`` would read, to notice changed inputs.

    For Hugging Face data sets it covers their description, not the data: give a ``revision`` to fix those.

    Raises:
        MoesmithError: as ``load_domains``, except for what is inside the files.
    """
    source = path_text("data", source)
    if source == BUILTIN:
        return builtin_digest(names)
    path = locate(source)
    if path.is_file():
        sets = read_sets(path)
        return digest({name: sets[name].model_dump() for name in choose(sorted(sets), names, str(path))})
    return digest({name: [file_digest(file) for file in pair] for name, pair in _files(path, names).items()})


def locate(source: str) -> Path:
    """Return the folder or the ``.yaml`` file that a data source is, the one of this package for a name it knows.

    Raises:
        MoesmithError: it is neither; nor is the built-in text.
    """
    if not source.strip():
        raise MoesmithError(
            "no data source is named", f"Give a folder, a .yaml file, {BUILTIN} or {', '.join(SHIPPED)}."
        )
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in (".yaml", ".yml")):
        return path
    if source in SHIPPED:
        return SHIPPED[source]
    near = difflib.get_close_matches(source, [BUILTIN, *SHIPPED], n=1)
    cure = f"Did you mean '{near[0]}'?" if near else f"Give a folder, a .yaml file, {BUILTIN} or {', '.join(SHIPPED)}."
    what = "is neither a folder nor a .yaml file" if path.exists() else "does not exist"
    raise MoesmithError(f"the data source {source} {what}", cure)


def _files(folder: Path, names: Sequence[str] | None) -> dict[str, tuple[Path, Path]]:
    """Map each set to its calibration and evaluation file."""
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for path in folder.iterdir():
        for split in SPLITS:
            for ending in FORMATS:
                if path.name.endswith(f".{split}{ending}"):
                    found[split].add(path.name.removesuffix(f".{split}{ending}"))
    every, complete = sorted(found["train"] | found["test"]), sorted(found["train"] & found["test"])
    chosen = complete if names is None else choose(every, names, str(folder))
    check_names(chosen, str(folder))
    if not chosen:
        raise MoesmithError(
            f"{folder} holds no domain",
            "A domain is a pair of files, <name>.train.jsonl and <name>.test.jsonl, with one record per line.",
        )
    return {name: (_split(folder, name, "train"), _split(folder, name, "test")) for name in chosen}


def _split(folder: Path, name: str, split: str) -> Path:
    """Return the file of a split."""
    file = records_file(folder, f"{name}.{split}")
    if not file.is_file():
        raise MoesmithError(
            f"domain '{name}' has no {SPLITS[split]} split: {file} is missing", "Add the file or leave the domain out."
        )
    return file


def _groups(folder: Path) -> dict[str, str]:
    """Map each set to its field by ``index.json``; nothing depends on it, so a file of another shape is ignored."""
    try:
        return {
            entry["set"]: str(entry["domain"])
            for entry in parse_json((folder / "index.json").read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, TypeError, KeyError):
        return {}
