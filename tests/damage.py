"""Damage files that moesmith wrote, one byte flipped or the end cut off, and ask the reader whose business it is.

Whatever is damaged, the reader says so in one line with a cure, or it answers as before, bit for bit.
"""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conversions import convert, fitting, weights
from golden import ASSETS
from killable import SETTINGS, server
from ordeals import Options
from refusals import CURE
from tally import Tally

from moesmith.conversion import pace
from moesmith.errors import MoesmithError
from moesmith.export import folder as folders
from moesmith.export.delta import pack, unpack
from moesmith.export.push import push
from moesmith.export.target import Options as Export
from moesmith.export.targets import export_run
from moesmith.files.artefact import read_tensors, sums_of
from moesmith.files.outputs import list_of
from moesmith.files.write import TEMPORARY
from moesmith.methods import steps
from moesmith.parent.load import Parent, load_parent
from moesmith.report.overview import describe
from moesmith.report.page import write_report
from moesmith.run.folder import open_run
from moesmith.training import loop

PARENT, DATA = ASSETS / "parents" / "llama", ASSETS / "text"
SHARD = 60_000  # bytes: several shards of a tiny model
BEGUN = {  # stages that keep unfinished work, and of which preset
    "moments": "dive-plus",
    "affinity": "dive-plus",
    "carve": "dive-plus",
    "router": "dive-plus",
    "experts": "dive-plus",
    "evaluate": "dive-plus",
    "masks": "tomoe-50",
}
Reader = Callable[[Path], Any]


@dataclass
class Kind:
    """A kind of file and who reads it.

    Attributes:
        name: of the kind.
        home: a folder that is copied for every trial.
        files: what is damaged, relative to it.
        read: by name, gives everything that a reader makes of a copy, as a plain value; the last may change the copy.
        share: of all trials.
    """

    name: str
    home: Path
    files: Sequence[str]
    read: dict[str, Reader]
    share: float


def damage(options: Options) -> Iterator[Tally]:
    """Damage one random file of a kind in each trial."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(folders, "SHARD_BYTES", SHARD))
        stack.enter_context(mock.patch.object(pace, "MEASURE", 0.0))
        torch.set_num_threads(1)
        made = list(kinds(options, stack))
        shares, before = sum(kind.share for kind in made), 0.0
        for kind in made:
            after = before + options.trials * kind.share / shares
            yield from tried(kind, round(after) - round(before), options)
            before = after


def tried(kind: Kind, trials: int, options: Options) -> Iterator[Tally]:
    """Damage files of one kind."""
    rng, tally = options.rng(f"damage {kind.name}"), Tally(f"damaged: {kind.name}")
    unread: Counter[str] = Counter()
    answers = asked(kind, Path(shutil.copytree(kind.home, options.fresh("copy"))))
    for answer in answers.values():
        if isinstance(answer, BaseException):
            raise answer
    for _ in range(trials):
        copy = Path(shutil.copytree(kind.home, options.fresh("copy")))
        name = rng.choice(kind.files)
        what = damaged(copy / name, rng)
        found = asked(kind, copy)
        problems = [f"{who}: {said}" for who in found if (said := problem(answers[who], found[who])) is not None]
        noticed = any(isinstance(answer, MoesmithError) for answer in found.values())
        wrong = f"{name} {what}: {'; '.join(problems)}; seed {options.seed}" if problems else None
        tally.count(wrong, effect=noticed)
        unread[Path(name).name] += not (problems or noticed)
    if +unread:
        tally.notes.append(
            "without effect in " + ", ".join(f"{name} {count}" for name, count in sorted((+unread).items()))
        )
    yield tally


def asked(kind: Kind, copy: Path) -> dict[str, Any]:
    """Ask all readers of a kind: what they answer or raise."""
    return {name: silently(read, copy) for name, read in kind.read.items()}


def problem(answer: Any, found: Any) -> str | None:
    """Say what is wrong with a reader's answer or error; ``None`` if nothing."""
    if isinstance(found, MoesmithError):
        return None if CURE.search(str(found)) else f"no cure: {found}"
    if isinstance(found, BaseException):
        return " | ".join(traceback.format_exception(found)[-2:]).replace("\n", " ")
    return None if found == answer else f"another answer: {first_difference(answer, found)}"


def damaged(path: Path, rng: random.Random) -> str:
    """Damage a file at a random place; say how."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content)) if content else 0
    if not content or rng.random() < 0.25:
        path.write_bytes(content[:place])
        return f"cut to {place:,} of {len(content):,} bytes"
    before = content[place]
    content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return f"byte {place:,} of {len(content):,} from {before:#04x} to {content[place]:#04x}"


def silently(read: Reader, copy: Path) -> Any:
    """Return a reader's answer, or what it raised."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        try:
            return read(copy)
        except Exception as error:
            return error


def first_difference(a: Any, b: Any, where: str = "") -> str:
    """Say where two plain values differ first."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *b]:
            if a.get(key) != b.get(key):
                return first_difference(a.get(key), b.get(key), f"{where}.{key}")
    return f"{where} was {str(a)[:80]}, is {str(b)[:80]}"


def plain(value: Any) -> Any:
    """Return tensors as hashes of their bytes, in mappings as well."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def kinds(options: Options, stack: ExitStack) -> Iterator[Kind]:
    """Make one of everything that moesmith writes, and say who reads it."""
    work, parent = options.fresh("made"), load_parent(PARENT, torch.float32, device="cpu")
    work.mkdir()
    settings = ["affinity.method=perplexity"]
    run, ids = work / "run", torch.arange(2, 34)[None]
    silently(lambda out: convert("dive-plus", parent, DATA, out, settings, device="cpu"), run)

    def again(copy: Path) -> Any:
        return weights(convert("dive-plus", parent, DATA, copy, settings, device="cpu").folder)

    def inspected(copy: Path) -> Any:
        return {key: value for key, value in describe(copy).items() if key != "run"}

    def opened(copy: Path) -> Any:
        run = open_run(copy)
        found = {"header": run.header, "manifests": run.manifests, "evaluation": run.evaluation}
        found |= {"held out": plain(run.held_out), "stage2": plain(run.training("stage2"))}
        for name in run.carved:
            carving = run.carving(name)
            found[name] = [layer.gate().model_dump() for layer in carving.layers], carving.provenance
            found[name] += (plain(read_tensors(run.path(name) / "carving.safetensors")),)
        return found

    def answered(copy: Path) -> Any:
        model: Any = open_run(copy).load(parent)
        with torch.no_grad():
            return plain(model(input_ids=ids).logits)

    def pushed(copy: Path, *files: Path) -> Any:
        out = options.fresh("pushed")
        push(copy, "user/name", out=out, licence="mit", dry_run=True, files=files)
        return {name: value for name, value in sums_of(out).items() if name != "README.md"}

    def reported(copy: Path) -> Any:
        page = write_report(copy, options.fresh("page") / "page.html").read_text(encoding="utf-8")
        if "could not be read" in page:
            raise MoesmithError("a part of the page says that it could not be read", "Delete what it names.")
        return hashlib.sha256(page.replace(str(copy), "RUN").encode()).hexdigest()

    stages = [path.relative_to(run).as_posix() for path in sorted(run.glob("stages/*/*"))]
    carvings = [name for name in stages if "/carving." in name]
    tensors = [name for name in stages if name.endswith(".safetensors") and name not in carvings]
    manifests = [name for name in stages if name.endswith("/manifest.json")]
    others = [name for name in stages if name not in (*carvings, *tensors, *manifests)]
    read_by_report = [name for name in others if name.endswith((".jsonl", ".csv", ".npz", "clusters.json"))]
    model = [path.relative_to(run).as_posix() for path in sorted((run / "model").iterdir())]
    shards = [name for name in model if name.endswith(".safetensors")]
    card = ["model/README.md", "card.sha256"]
    everyone: dict[str, Reader] = {"inspect": inspected, "open_run": opened, "convert": again}
    loads: dict[str, Reader] = {"the model": answered, "push": pushed, "convert": again}
    yield Kind("stage tensors", run, tensors, everyone, 10)
    yield Kind("carvings", run, carvings, everyone, 10)
    yield Kind("other files of stages", run, others, everyone, 10)
    yield Kind("manifests", run, manifests, everyone, 10)
    yield Kind("run.json", run, ["run.json"], everyone, 5)
    yield Kind("what a report shows", run, read_by_report, {"report": reported}, 3)
    yield Kind("model shards", run, shards, loads, 8)
    files = [name for name in model if name not in (*shards, *card)]
    yield Kind("config, tokenizer and list of a model", run, files, loads, 8)
    yield Kind("model card and its list", run, card, {"push": pushed, "convert": again}, 3)
    yield Kind("log and lock", run, ["run.log", ".lock"], everyone, 1)
    silently(lambda run: pack(run, work / "delta"), run)
    delta = [path.relative_to(work / "delta").as_posix() for path in (work / "delta").rglob("*") if path.is_file()]

    def unpacked(copy: Path) -> Any:
        return sums_of(Path(unpack(copy, PARENT, options.fresh("unpacked"))["out"]))

    yield Kind("packed delta", work / "delta", sorted(delta), {"unpack": unpacked}, 10)
    out = work / "gguf" / "moe.gguf"
    out.parent.mkdir()
    error = silently(lambda run: export_run(run, "gguf", out, Export(), "cpu"), run)
    if not isinstance(error, BaseException):
        read: dict[str, Reader] = {"push": lambda copy: pushed(run, copy / out.name)}
        yield Kind("GGUF file and its list", out.parent, [out.name, list_of(out).name], read, 4)
    elif not isinstance(error, MoesmithError):  # which says that llama.cpp's tools are not installed
        raise error
    yield from begun(options, work, parent, stack)


def begun(options: Options, work: Path, parent: Parent, stack: ExitStack) -> Iterator[Kind]:
    """Give runs that were killed while a stage was being made; who reads them is the conversion that goes on."""
    home = work / "home"
    home.mkdir()
    (home / "m").symlink_to(PARENT)
    (home / "d").symlink_to(DATA)
    for module in (loop, steps):
        stack.enter_context(mock.patch.object(module, "SAVE_SECONDS", -1.0))
    with server(home) as job:
        counts: dict[str, dict[str, int]] = {}
        for stage, preset in BEGUN.items():
            if preset not in counts:
                counts[preset] = job(work / f"whole-{preset}", preset=preset)["counts"]
            order = list(counts[preset])
            start = sum(counts[preset][name] for name in order[: order.index(stage)])
            out = work / f"begun-{stage}"
            for late in range(start + counts[preset][stage] * 2 // 3, start + counts[preset][stage]):
                shutil.rmtree(out, ignore_errors=True)
                job(out, preset=preset, kill=late)
                left = [path for path in sorted(out.glob(f"stages/.{stage}.partial/**/*")) if path.is_file()]
                files = [path.relative_to(out).as_posix() for path in left if not path.name.endswith(TEMPORARY)]
                if any(not Path(name).name.startswith(".") for name in files):  # something that the next try reads
                    break

            def goes_on(copy: Path, preset: str = preset) -> Any:
                own = fitting(SETTINGS, preset)
                return weights(convert(preset, parent, DATA, copy, own, device="cpu").folder)

            yield Kind(f"unfinished work of {stage}", out, files, {"convert": goes_on}, 2)
