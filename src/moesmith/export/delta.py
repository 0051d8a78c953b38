"""Pack a delta: the carving alone. Together with the untouched parent it gives the model back bit for bit.

``DELTA/`` holds the run's last carving as its stage wrote it (``carving.json``, ``carving.safetensors``), for each
folder that the run finished (``model``, ``stock``) every file that is not weights, ``delta.json``, and ``SHA256SUMS``
of all that. The finished folder's own ``SHA256SUMS`` is packed too and says what its weights must be.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moesmith.arguments import takes_paths
from moesmith.console import Meter, meter
from moesmith.errors import MoesmithError
from moesmith.export.folder import whole_folder, write_shards
from moesmith.export.native import named_tensors
from moesmith.export.stock.write import ARCHITECTURES, stock_tensors
from moesmith.export.target import Options, Source, Target
from moesmith.files.artefact import (
    SUMS,
    check_format,
    differing,
    listed,
    read_json,
    read_tensors,
    sums_of,
    verify_files,
    write_sums,
)
from moesmith.files.outputs import check_folder, check_place, existing, inputs_of
from moesmith.files.parse import as_written
from moesmith.files.write import TEMPORARY, copy_file, write_json
from moesmith.mixture.carving import Carving
from moesmith.parent.compute import named
from moesmith.parent.load import Parent, load_parent
from moesmith.parent.proof.family import NATIVE
from moesmith.run.folder import open_run
from moesmith.run.versions import versions

FORMAT = 1
MARK = "delta.json"
FOLDERS = ("model", "stock")
WEIGHTS, CARD = ".safetensors", "README.md"
CARVING = ("carving.json", f"carving{WEIGHTS}")
STOCK = "stock"  # a folder's format; the other is NATIVE
PARTS = {  # bytes of a carving by purpose: the names of its tensors without the layer
    "channels": ("widths", "channels"),
    "router": ("router_ED", "router_hidden", "router_gate", "noise_ED", "constant_D"),
    "bias": ("bias_ED",),
    "gate_up": ("gate", "up"),
    "down_proj": ("down",),
    "shared": ("shared",),
    "lora": ("lora",),
    "norms": ("norm",),
    "attention": ("attention",),
}
MATTER = ("moesmith", "torch", "safetensors")  # packages that a file's bytes could depend on
AGAIN = "Fetch the delta again, or pack it again."


class Delta(Target):
    """``--to delta``: the same as ``moesmith pack``."""

    name, takes, suffix = "delta", frozenset[str](), ""

    def explain(self, source: Source) -> str | None:
        """Return ``None``: a carving always fits on its parent."""
        return None

    def lost(self, source: Source, options: Options | None) -> list[str]:
        """Name the parent's weights."""
        return ["the parent's weights: 'moesmith unpack' needs them"]

    def write(self, source: Source, out: Path, options: Options) -> dict[str, Any]:
        """Call :func:`pack`, which proves what it wrote."""
        facts = pack(source.run, out, source.parent)
        del facts["delta"]
        return facts

    def verify(self, source: Source, out: Path, ids: Tensor) -> dict[str, Any]:
        """Report what :meth:`write` proved: every file came out of the delta with the same bytes as the run's."""
        return {"verified": "every file, by sha256"}


@takes_paths("run", "out")
def pack(run: Path, out: Path, parent: Parent | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Write what ``run`` changed of its parent into the folder ``out``, whole or not at all, and prove it.

    The proof is the reverse: the finished folders are made again from parent and delta, in a hidden folder next
    to ``out`` that needs as much space as they do, and every file must have the same bytes as the run's.

    Args:
        run: a finished run.
        out: a new or empty folder, or with ``overwrite`` a folder that moesmith wrote.
        parent: the run's parent; loaded from its source if left out.
        overwrite: replace what moesmith wrote.

    Returns:
        ``delta``, ``bytes``, ``parent_bytes``, ``model_bytes`` (of the finished folders), ``share`` of the parent's
        bytes, ``compensation``, ``folders`` with the format of each (``stock`` or ``native``), and ``parts``: bytes by
        kind of content; all but the carving's tensors counts as ``files``.

    Raises:
        MoesmithError: the run is unfinished or damaged, its parent has changed, ``out`` may not be written
            (``files/outputs.py``) or cannot be, or the carving does not give the finished folders.
    """
    opened = open_run(run)
    opened.check_finished()
    header = opened.header
    check_place(out, inputs_of(run))
    check_folder(out, overwrite=overwrite)  # before the files of the run are compared with their hashes
    export = opened.manifest("export")
    stage = opened.path(export["needs"][0])
    verify_files(stage)
    parts = _parts(stage / CARVING[1])
    folders = {name: run / name for name in FOLDERS if name == "model" or name in export["metrics"]}
    for name in folders:
        opened.check_files(name)
    with whole_folder(out, overwrite=overwrite) as work:
        parent = parent or opened.parent(None, "cpu")
        facts: dict[str, Any] = {
            "format": FORMAT,
            "recipe": header["recipe"]["name"],
            "parent": {
                "name": header["inputs"]["model"].rstrip("/").split("/")[-1],
                "model_digest": parent.digest,
                "dtype": header["inputs"]["dtype"],
            },
            "folders": {name: _kind(folder) for name, folder in folders.items()},
            "bytes": {name: _size(folder, f"*{WEIGHTS}") for name, folder in folders.items()},
            "versions": versions(),
        }
        for name in CARVING:
            shutil.copyfile(stage / name, work / name)
        for name, folder in folders.items():
            _carry(folder, work / name, work / FOLDERS[0])
        write_json(work / MARK, facts)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=TEMPORARY) as scratch:
            for name in _rebuild(parent, work, facts, Path(scratch))[:1]:
                raise MoesmithError(
                    f"{run / name} is not what this moesmith makes of {stage}",
                    f"Delete {(run / name).parent} and run the same 'moesmith convert' again.",
                )
    size, whole = _size(out), sum(p.nbytes for p in parent.model.parameters())
    return {
        "delta": str(out),
        "parent": facts["parent"],
        "folders": facts["folders"],
        "compensation": read_json(out / CARVING[0])["compensation"],
        "bytes": size,
        "parent_bytes": whole,
        "share": size / whole,
        "model_bytes": sum(map(_size, folders.values())),
        "parts": parts | {"files": size - sum(parts.values())},
    }


@takes_paths("delta", "out")
def unpack(delta: Path, model: str | Path, out: Path) -> dict[str, Any]:
    """Make the finished folders of a packed run again: ``out/model`` and, if the run had one, ``out/stock``.

    Args:
        delta: a folder that :func:`pack` wrote.
        model: the parent, as :func:`moesmith.load_parent` takes it.
        out: a new or empty folder; it appears whole or not at all.

    Returns:
        ``folders`` with their format, ``out`` and ``bytes``.

    Raises:
        MoesmithError: ``delta`` is not a delta, damaged, or of a newer moesmith; ``model`` is not its parent; ``out``
            holds something, is an input or cannot be written; a file came out different from what was packed.
    """
    check_place(out, existing(delta, model))
    check_folder(out, overwrite=False)
    facts = _facts(delta)
    with whole_folder(out, sums=False) as work:
        stored = named(facts["parent"]["dtype"])
        parent = load_parent(model, stored, stored=stored, device="cpu")
        expected = facts["parent"]["model_digest"]
        if parent.digest != expected:
            raise MoesmithError(
                f"{model} is not the parent of {delta} (weights {parent.digest}, not {expected})",
                f"Give the dense model that it was packed from, {facts['parent']['name']}.",
            )
        with as_written(delta):
            wrong = _rebuild(parent, delta, facts, work)
        for name in wrong[:1]:
            made = ", ".join(f"{package} {facts['versions'][package]}" for package in MATTER)
            raise MoesmithError(
                f"{name} came out with other bytes than were packed",
                f"Run it with the versions it was packed by: {made}.",
            )
    return {"out": str(out), "folders": facts["folders"], "bytes": sum(_size(out / name) for name in facts["folders"])}


def _rebuild(parent: Parent, delta: Path, facts: Mapping[str, Any], out: Path) -> list[str]:
    """Write the finished folders of ``delta`` into ``out``; return the names of files that are not as they must be."""
    carving, wrong = Carving.load(delta), []
    carving.check(parent)
    for name, kind in facts["folders"].items():
        target = out / name
        with meter(f"making {name}", facts["bytes"][name] / 1e6, "MB") as bar:
            stock = kind == STOCK
            made = stock_tensors(parent, carving, parent.model.dtype) if stock else named_tensors(parent, carving)
            write_shards(target, _counted(made, bar))
        lists = listed(delta / name)
        for folder in dict.fromkeys((delta / FOLDERS[0], delta / name)):  # files of both are stored only in the first
            for path in (path for path in folder.rglob("*") if path.is_file()):
                file = path.relative_to(folder).as_posix()
                if file in lists or folder == delta / name:
                    copy_file(path, target / file)
        wrong += [f"{name}/{file}" for file in differing(target)]
    return wrong


def _counted(tensors: Iterable[tuple[str, Tensor]], bar: Meter) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        bar.advance(tensor.nbytes / 1e6)


def _kind(folder: Path) -> str:
    return STOCK if read_json(folder / "config.json")["architectures"][0] in ARCHITECTURES.values() else NATIVE


def _carry(folder: Path, target: Path, first: Path) -> None:
    """Copy what is not weights: listed files, their list, the model card; not what the first folder already has."""
    lists, before = listed(folder) or sums_of(folder), listed(first) if first != target else {}
    target.mkdir()
    for name in lists:
        if not name.endswith(WEIGHTS) and before.get(name) != lists[name]:
            copy_file(folder / name, target / name)
    write_sums(target, {name: lists[name] for name in lists if name != CARD})
    if (folder / CARD).is_file():
        shutil.copyfile(folder / CARD, target / CARD)


def _facts(delta: Path) -> dict[str, Any]:
    """Read ``delta.json`` of a delta, after checking that all its files are unchanged."""
    for name in (MARK, SUMS):
        if not (delta / name).is_file():
            raise MoesmithError(f"{delta / name} is missing", "Give a whole folder made by 'moesmith pack'.")
    verify_files(delta, AGAIN)
    facts: dict[str, Any] = read_json(delta / MARK)
    with as_written(delta / MARK):
        check_format(delta / MARK, facts["format"], FORMAT)
        if not facts["folders"] or not facts["folders"].keys() <= set(FOLDERS):
            raise MoesmithError(f"{delta / MARK} names folders that no run has", AGAIN)
        named(facts["parent"]["dtype"])
        texts = [facts["parent"][key] for key in ("name", "model_digest")]
        texts += [facts["versions"][package] for package in MATTER]
        sizes = [facts["bytes"][name] for name in facts["folders"]]
        if not all(isinstance(text, str) for text in texts) or not all(size >= 0 for size in sizes):
            raise TypeError("a text or a size is none")
        for name in facts["folders"]:
            if not (delta / name).is_dir():
                raise MoesmithError(f"{delta / name} is missing", AGAIN)
    return facts


def _size(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def _parts(carving: Path) -> dict[str, int]:
    """Count the bytes of a carving's tensors by kind of content."""
    found = dict.fromkeys(PARTS, 0)
    for name, tensor in read_tensors(carving).items():
        head, _, rest = name.partition(".")
        kind = (rest if head.isdigit() else head).partition(".")[0]
        part = next((part for part, kinds in PARTS.items() if kind in kinds), None)
        if part is None:
            raise MoesmithError(f"{carving} holds {name!r}, which no carving has", "Upgrade moesmith to pack it.")
        found[part] += tensor.nbytes
    return {part: size for part, size in found.items() if size}
