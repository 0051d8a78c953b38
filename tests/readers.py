"""Every reader of files that somebody else may have made, for the tests and the fuzzer that feed it anything.

A reader reads what it is given or raises a ``MoesmithError`` of one line, in little time and memory; nothing else.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import yaml
from conversions import UNTRAINED, convert
from golden import ASSETS

from moesmith.comparison.spec import load_spec
from moesmith.data.formats import read_records
from moesmith.data.hf_datasets import read_sets
from moesmith.data.text import load_domains
from moesmith.errors import MoesmithError
from moesmith.export.delta import pack, unpack
from moesmith.export.gguf import converter
from moesmith.files.artefact import MANIFEST, read_json, read_metadata, read_tensors, verify_files, write_sums
from moesmith.files.seal import file_digest
from moesmith.files.write import write_record
from moesmith.mixture.carving import Carving
from moesmith.parent.checkpoint import stored_dtype
from moesmith.parent.gguf.load import load_gguf
from moesmith.parent.load import load_parent, load_skeleton
from moesmith.parent.stored import refuse_files
from moesmith.report.overview import describe
from moesmith.report.page import write_report
from moesmith.run.recipe import load_recipe

PARENT, TEXT = ASSETS / "parents" / "llama", ASSETS / "text"
SECONDS, BYTES = 20, 2**30  # a reader's time and memory, at most
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 3, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/passwd", "a\x00b", "\ud800", [], [None], [[]], {}, {"x": 1}, [3, "x"]),
]
ODD = (b"", b"\x00", b"\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00" * 7 + b"\x40", b"{", b"[" * 5000, b"\n", b"'")


@dataclass(frozen=True)
class Reader:
    """A reader of one file.

    Attributes:
        file: its path in a folder.
        read: reads the folder that holds it.
        home: a folder to copy that holds all else.
        seeds: contents to begin with; if there are none, that of the file in ``home``.
    """

    file: str
    read: Callable[[Path], object]
    home: Callable[[], Path] | None = None
    seeds: Callable[[], list[bytes]] | None = None

    def starts(self) -> list[bytes]:
        """The contents to begin with."""
        if self.seeds is not None:
            return self.seeds()
        assert self.home is not None
        return [(self.home() / self.file).read_bytes()]

    def place(self, folder: Path) -> Path:
        """Make a folder that holds all that the reader needs; return it."""
        if self.home is not None:
            shutil.copytree(self.home(), folder, dirs_exist_ok=True)
        (folder / self.file).parent.mkdir(parents=True, exist_ok=True)
        return folder

    def give(self, content: bytes, folder: Path) -> str:
        """Let it read a content; return the line of its refusal, empty if it was read.

        Raises:
            AssertionError: it took too long, or too much memory, or refused in several lines.
        """
        (folder / self.file).write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = ""
        with limited(SECONDS), redirect_stderr(StringIO()):
            try:
                self.read(folder)
            except MoesmithError as error:
                line = str(error)
                assert line, "an empty refusal"
                assert "\n" not in line, line
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < BYTES, f"{self.file} took {grown:,} bytes"
        return line


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """An error after so many seconds."""

    def late(*_: object) -> None:
        raise AssertionError(f"not read after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# Changes -------------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in ((*path, key), *places(one, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with something else at a path; without it if that is ``...``."""
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return found


def every_change(content: bytes) -> list[bytes]:
    """A JSON object with every field set to every hostile value, and without it."""
    value = json.loads(content)
    return [json.dumps(changed(value, path, new)).encode() for path in places(value) for new in (*HOSTILE, ...)]


def altered(content: bytes, file: str, draw: random.Random) -> bytes:
    """A content with a few changes, of its values or its bytes."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        content = _altered(content, file, draw)
    return content


def _altered(content: bytes, file: str, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return _bytes_altered(content, draw)
    try:
        if file.endswith(".gz"):
            return gzip.compress(_altered(gzip.decompress(content), file.removesuffix(".gz"), draw), 1)
        if file.endswith(".json"):
            return json.dumps(_value_altered(json.loads(content), draw)).encode()
        if file.endswith(".jsonl"):
            lines = content.split(b"\n")
            number = draw.randrange(len(lines))
            lines[number] = json.dumps(_value_altered(json.loads(lines[number]), draw)).encode()
            return b"\n".join(lines)
        if file.endswith((".yaml", "setting")):
            return yaml.safe_dump(_value_altered(yaml.safe_load(content), draw)).encode()
        if file.endswith(".safetensors"):
            size = int.from_bytes(content[:8], "little")
            header = json.dumps(_value_altered(json.loads(content[8 : 8 + size]), draw)).encode()
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
    except Exception:  # a change before made it something else
        pass
    return _bytes_altered(content, draw)


def _value_altered(value: Any, draw: random.Random) -> Any:
    paths = places(value)
    new = draw.choice([*HOSTILE, ...])
    return changed(value, draw.choice(paths), new) if paths else None if new is ... else new


def _bytes_altered(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(min(len(content), draw.choice((64, 4096, 2**30))) + 1)
    match draw.randrange(4):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + draw.choice(ODD) + content[place:]
        case 2:
            new = draw.choice(ODD)
            return content[:place] + new + content[place + len(new) :]
        case _:
            return content[:place] + draw.randbytes(draw.choice((1, 1, 4, 64))) + content[place + 1 :]


# Readers -------------------------------------------------------------------------------------------------------------

SEED_RECORDS: list[Any] = [
    {"text": "one two"},
    {"question": "Q?", "choices": ["a", "b"], "answer": 1, "context": "c", "facts": ["f"]},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ]
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    {"premise": "a", "hypothesis": "b"},
    {"context_options": ["a", "b"], "continuation": "c", "answer": 0},
]
SEED_SETS = (
    b"race: {hub: ehovy/race, config: all, split: train, eval_split: test, fields: [article], template: '{q}'}\n"
)
SEED_SPEC = b"""title: t
measure: {domains: {all: [sum, count]}, tokens: 512, window: 64, tasks: []}
settings: [domains.tokens=512]
vary: {seed: [1, 2]}
rows:
- {name: a, recipe: dive-1of8, vary: {carve.ratio: [0.5, 0.25]}}
- {name: b, control: {by: magnitude, active: 0.5}}
"""
SEED_RECIPE = b"""base: dive-plus
description: mine
seed: 3
carve: {method: dive, experts: 4, top_k: 1, ratio: 0.5}
stage1: {tokens: 512, window: 32}
stage2: {tokens: 512, window: 32}
budgets: {demo: {stage1: {tokens: 64, window: 32}, stage2: {tokens: 64, window: 32}}}
"""
SEED_SETTINGS = [b"carve.experts=4", b"domains.names=[sum, count]", b"stage1.lr=1e-3"]


@cache
def scratch() -> Path:
    """A folder for what is made once."""
    folder = tempfile.TemporaryDirectory(prefix="moesmith-readers-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []


@cache
def run() -> Path:
    """A finished run, whose files are to be changed."""
    return convert("dive-1of8", PARENT, TEXT, scratch() / "run", UNTRAINED, device="cpu").folder


@cache
def delta() -> Path:
    """The same, packed."""
    pack(run(), scratch() / "delta")
    return scratch() / "delta"


@cache
def gguf() -> Path:
    """A folder with a tiny parent in a GGUF file."""
    (scratch() / "gguf").mkdir()
    converter.convert(PARENT, scratch() / "gguf" / "x.gguf", "f32")
    return scratch() / "gguf"


@cache
def sharded() -> Path:
    """A parent whose weights an index names."""
    folder = Path(shutil.copytree(PARENT, scratch() / "sharded"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    tensors = read_tensors(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _parquet() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    found = []
    for rows in ([{"text": "a"}, {"text": "b"}], SEED_RECORDS[1:2], SEED_RECORDS[3:4]):
        file = BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        found.append(file.getvalue())
    return found


def _lines() -> list[bytes]:
    return ["\n".join(map(json.dumps, SEED_RECORDS)).encode()]


def resealed(folder: Path, file: str) -> Path:
    """Let the lists of hashes name a changed file, as whoever changed it would."""
    parent = (folder / file).parent
    manifest = parent / MANIFEST
    if manifest.is_file() and manifest.name != Path(file).name:
        found = read_json(manifest)
        found["files"][Path(file).name] = file_digest(folder / file)
        write_record(manifest, found)
    for sums in (parent, folder):
        if (sums / "SHA256SUMS").is_file() and Path(file).name != "SHA256SUMS":
            write_sums(sums)
    return folder


def _of_run(file: str, use: Callable[[Path], object] = describe) -> Callable[[Path], object]:
    return lambda folder: use(resealed(folder, file))


def _of_delta(file: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        out = folder.with_name("made")
        shutil.rmtree(out, ignore_errors=True)
        unpack(resealed(folder, file), PARENT, out)

    return read


def _headers(folder: Path) -> None:
    try:
        refuse_files(folder, "x")
        stored_dtype(str(folder))
    except MoesmithError:
        read_metadata(folder / "model.safetensors")
    read_tensors(folder / "model.safetensors")


def _parent(folder: Path) -> None:
    load_parent(folder, device="cpu")


READERS: dict[str, Reader] = {
    "records.jsonl": Reader("x.jsonl", lambda f: list(read_records(f / "x.jsonl")), None, _lines),
    "records.jsonl.gz": Reader(
        "x.jsonl.gz",
        lambda f: list(read_records(f / "x.jsonl.gz")),
        None,
        lambda: [gzip.compress(text) for text in _lines()],
    ),
    "records.json": Reader(
        "x.json", lambda f: list(read_records(f / "x.json")), None, lambda: [json.dumps(SEED_RECORDS).encode()]
    ),
    "records.parquet": Reader("x.parquet", lambda f: list(read_records(f / "x.parquet")), None, _parquet),
    "index of domains": Reader(
        "index.json", load_domains, lambda: TEXT, lambda: [b'[{"set": "sum", "domain": "mathematics"}]']
    ),
    "recipe": Reader("x.yaml", lambda f: load_recipe(f / "x.yaml", "demo").method, None, lambda: [SEED_RECIPE]),
    "setting": Reader(
        "setting",
        lambda f: load_recipe("dive-plus", None, [(f / "setting").read_text(errors="replace")]).method,
        None,
        lambda: SEED_SETTINGS,
    ),
    "data sets": Reader("sets.yaml", lambda f: read_sets(f / "sets.yaml"), None, lambda: [SEED_SETS]),
    "comparison": Reader("spec.yaml", lambda f: load_spec(f / "spec.yaml"), None, lambda: [SEED_SPEC]),
    "safetensors header": Reader("model.safetensors", _headers, lambda: PARENT),
    "parent's safetensors": Reader("model.safetensors", _parent, lambda: PARENT),
    "index of shards": Reader("model.safetensors.index.json", _parent, sharded),
    "config": Reader("config.json", _parent, lambda: PARENT),
    "config for plan": Reader("config.json", lambda f: load_skeleton(str(f)), lambda: PARENT),
    "generation config": Reader("generation_config.json", _parent, lambda: PARENT),
    "tokenizer": Reader("tokenizer.json", _parent, lambda: PARENT),
    "tokenizer config": Reader("tokenizer_config.json", _parent, lambda: PARENT),
    "adapter config": Reader(
        "adapter_config.json", _parent, lambda: PARENT, lambda: [b'{"base_model_name_or_path": "x"}']
    ),
    "GGUF": Reader("x.gguf", lambda f: load_gguf(f / "x.gguf", None), gguf),
    "run": Reader("run.json", _of_run("run.json"), run),
    "manifest": Reader("stages/carve/manifest.json", _of_run("stages/carve/manifest.json"), run),
    "evaluation": Reader(
        "stages/evaluate/evaluation.json", _of_run("stages/evaluate/evaluation.json", write_report), run
    ),
    "carving.json": Reader("stages/carve/carving.json", _of_run("stages/carve/carving.json"), run),
    "carving.safetensors": Reader("stages/carve/carving.safetensors", _of_run("stages/carve/carving.safetensors"), run),
    "list of hashes": Reader("model/SHA256SUMS", lambda f: verify_files(f / "model"), run),
    "delta.json": Reader("delta.json", _of_delta("delta.json"), delta),
    "delta's carving.json": Reader("carving.json", _of_delta("carving.json"), delta),
    "delta's tensors": Reader("carving.safetensors", _of_delta("carving.safetensors"), delta),
    "delta's config": Reader("model/config.json", _of_delta("model/config.json"), delta),
    "carving": Reader(
        "carving.safetensors",
        lambda f: Carving.load(resealed(f, "carving.safetensors")),
        lambda: run() / "stages" / "carve",
    ),
}
