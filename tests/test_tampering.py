"""Damage to files that moesmith left: one line that names the file and the cure, and nothing half-written.

A finished model, a packed delta and the stages of a run; a file cut short, with one bit flipped, or gone; another
tokenizer; another parent; a disk without room.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import cycle
from pathlib import Path

import pytest
import torch
from commands import Answer, moesmith
from conversions import arguments, convert, snapshot, weights
from refusals import midway, refused
from test_delta import flip

from moesmith.errors import MoesmithError
from moesmith.export import folder as folders
from moesmith.export.delta import pack
from moesmith.export.stock.write import write_stock
from moesmith.files.artefact import MANIFEST, read_json, verify_files
from moesmith.mixture.folder import REMAKE
from moesmith.parent.load import Parent, load_parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import save_tiny, tiny_parent


def cut(path: Path) -> None:
    """A copy that broke off."""
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "flipped": flip, "gone": Path.unlink}


@pytest.fixture(scope="module")
def delta(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, packed."""
    folder = tmp_path_factory.mktemp("delta") / "delta"
    pack(finished, folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def other_tokenizer(folder: Path) -> None:
    """Another tokenizer's file over the one in ``folder``: two words of the vocabulary have changed places."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the kernel refuses the write, as on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal that comes with it
    try:
        with redirect_stderr(io.StringIO()):  # what pytest captures goes to a file as well
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(sizes: list[int]) -> list[int]:
    """Limits that one more of a folder's files is too large for each."""
    return [size - 1 for size in sorted(set(sizes)) if size > 1]


# A finished model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_finished_model(run: Path, damage: str, tmp_path: Path) -> None:
    files = [path for path in (run / "model").iterdir() if path.name != "README.md"]  # the card is the owner's to edit
    assert len(files) >= 7
    for path in files:
        kept = path.read_bytes()
        DAMAGES[damage](path)
        before = snapshot(tmp_path)
        answer = moesmith("pack", run, "--out", tmp_path / "delta")
        if (damage, path.name) == ("gone", "config.json"):  # by which a model is known
            refused(answer, "has no finished model. Run the same")
        else:
            refused(
                answer, rf"model/{path.name} is missing or damaged\. Delete the folder and run the command that made"
            )
        assert snapshot(tmp_path) == before
        path.write_bytes(kept)
    assert moesmith("pack", run, "--out", tmp_path / "delta").status == 0


@pytest.mark.parametrize("command", ["eval", "generate", "convert"])
def test_every_command_that_reads_a_finished_model(home: Path, run: Path, command: str) -> None:
    words: dict[str, list[object]] = {"eval": ["eval", run], "generate": ["generate", run, "a"]}
    words["convert"] = [*arguments("dive-plus", home / "m", home / "d", run)]
    flip(run / "model" / "model.safetensors")
    before = snapshot(run)
    one_line(moesmith(*words[command]), r"model/model\.safetensors is missing or damaged\. Delete the folder and run")
    assert snapshot(run) == before


def test_the_cure_cures(home: Path, run: Path, finished: Path) -> None:
    flip(run / "model" / "model.safetensors")
    shutil.rmtree(run / "model")
    assert moesmith(*arguments("dive-plus", home / "m", home / "d", run)).status == 0
    assert weights(run) == weights(finished)
    assert moesmith("generate", run, "a").status == 0


def test_one_shard_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 60_000)
    parent = tiny_parent("llama")
    for damage in DAMAGES.values():
        write_stock(parent, random_carving(parent), tmp_path / "moe", torch.float32)
        shards = sorted((tmp_path / "moe").glob("*.safetensors"))
        assert len(shards) > 2
        damage(shards[1])
        with pytest.raises(MoesmithError, match=rf"{shards[1].name} is missing or damaged\. Delete"):
            verify_files(tmp_path / "moe", REMAKE)
        shutil.rmtree(tmp_path / "moe")


@pytest.mark.parametrize("where", ["model", "parent"])
def test_another_tokenizer(home: Path, run: Path, where: str, tmp_path: Path) -> None:
    words = [["generate", run, "a"], arguments("dive-plus", home / "m", home / "d", run)]
    if where == "model":
        other_tokenizer(run / "model")
        says = [r"model/tokenizer\.json is missing or damaged\. Delete the folder"] * 2
    else:
        own = shutil.copytree(home / "m", tmp_path / "m")
        other_tokenizer(own)
        header = read_json(run / "run.json")
        header["inputs"]["model"] = str(own)
        (run / "run.json").write_text(json.dumps(header))
        words[1] = arguments("dive-plus", own, home / "d", run)
        says = [
            r"the tokenizer of \S+m is not the one \S+run was made with\. Put the original tokenizer back",
            r"run with other settings: the model's tokenizer has changed \(was \w{16}, is \w{16}\)\. Give another",
        ]
    before = snapshot(tmp_path)
    for command, line in zip(words, says, strict=True):
        one_line(moesmith(*command), line)
    assert snapshot(tmp_path) == before


def test_the_model_of_another_run(run: Path, tmp_path: Path) -> None:
    parent = load_parent(read_json(run / "run.json")["inputs"]["model"])
    write_stock(parent, random_carving(parent), tmp_path / "moe")  # whole, and listed in itself
    shutil.rmtree(run / "model")
    shutil.copytree(tmp_path / "moe", run / "model")
    refused(moesmith("generate", run, "a"), r"model/SHA256SUMS is missing or damaged\. Delete the folder and run")


# A packed delta ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_delta(home: Path, delta: Path, damage: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(delta, tmp_path / "delta"))
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        kept = path.read_bytes()
        DAMAGES[damage](path)
        before = snapshot(tmp_path)
        answer = moesmith("unpack", copy, "--model", home / "m", "--out", tmp_path / "made")
        refused(answer, "(missing|damaged)[^.]*[.] (Fetch the delta again|Give a whole folder|Delete)")
        assert snapshot(tmp_path) == before
        path.write_bytes(kept)
    assert moesmith("unpack", copy, "--model", home / "m", "--out", tmp_path / "made").status == 0


def test_another_tokenizer_in_a_delta(home: Path, delta: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(delta, tmp_path / "delta"))
    other_tokenizer(copy / "model")
    answer = moesmith("unpack", copy, "--model", home / "m", "--out", tmp_path / "made")
    refused(answer, r"model/tokenizer\.json is missing or damaged\. Fetch the delta again")


def test_another_parent_for_a_delta(delta: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", seed=3)
    before = snapshot(tmp_path)
    answer = moesmith("unpack", delta, "--model", tmp_path / "m", "--out", tmp_path / "made")
    refused(answer, r"m is not the parent of \S+delta \(.*\)\. Give the dense model that it was packed from")
    assert snapshot(tmp_path) == before


# Stages --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(home: Path) -> Parent:
    """The run's parent, loaded once."""
    return load_parent(str(home / "m"))


def test_every_file_of_every_stage(home: Path, run: Path, loaded: Parent) -> None:
    files = [path for path in sorted(run.glob("stages/*/*")) if path.name != MANIFEST]
    assert len(files) >= 15
    for path, damage in zip(files, cycle(DAMAGES.values()), strict=False):
        kept = path.read_bytes()
        damage(path)
        before = snapshot(run)
        says = rf"{path} is missing or damaged\. Delete {path.parent} and run the same 'moesmith convert' again"
        with pytest.raises(MoesmithError, match=says):
            convert("dive-plus", loaded, home / "d", run)
        assert snapshot(run) == before
        path.write_bytes(kept)
    convert("dive-plus", loaded, home / "d", run)


def test_a_stage_that_is_read(home: Path, run: Path) -> None:
    flip(run / "stages" / "experts" / "carving.safetensors")
    says = r"experts/carving\.safetensors is missing or damaged\. Delete \S+experts and run the same"
    for words in (["inspect", run], ["pack", run, "--out", run.parent / "delta"]):
        refused(moesmith(*words), says)
    one_line(moesmith(*arguments("dive-plus", home / "m", home / "d", run)), says)
    shutil.rmtree(run / "stages" / "experts")
    assert moesmith(*arguments("dive-plus", home / "m", home / "d", run)).status == 0
    assert moesmith("inspect", run).status == 0


# No room -------------------------------------------------------------------------------------------------------------


def test_no_room_for_a_delta(finished: Path, delta: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in delta.rglob("*") if path.is_file()]
    sizes.append((finished / "model" / "model.safetensors").stat().st_size)  # of the proof
    for limit in steps(sizes):
        with no_file_beyond(limit):
            answer = moesmith("pack", finished, "--out", tmp_path / "delta")
        refused(answer, r"cannot write .*(File too large|os error 27).*\. Free disk space and run")
        assert not list(tmp_path.iterdir())


def test_no_room_for_what_a_delta_holds(home: Path, delta: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()  # an empty folder may lie there, and stays
    for limit in steps([path.stat().st_size for path in (finished / "model").iterdir()]):
        with no_file_beyond(limit):
            answer = moesmith("unpack", delta, "--model", home / "m", "--out", tmp_path / "made")
        refused(answer, r"cannot write .*(File too large|os error 27).*\. Free disk space and run")
        assert [path.name for path in tmp_path.iterdir()] == ["made"]
        assert not list((tmp_path / "made").iterdir())


def test_no_room_for_a_finished_model(home: Path, run: Path, loaded: Parent, finished: Path) -> None:
    sizes = [path.stat().st_size for path in (run / "model").iterdir() if path.name != "README.md"]
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "stages" / "export")
    before = weights(run)
    for limit in steps(sizes):
        with (
            no_file_beyond(limit),
            pytest.raises(MoesmithError, match=r"(File too large|os error 27).*\. Free disk space and run"),
        ):
            convert("dive-plus", loaded, home / "d", run)
        assert not (run / "model").exists()
        assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
        assert weights(run) == before
    convert("dive-plus", loaded, home / "d", run)
    assert weights(run) == weights(finished)


def one_line(answer: Answer, says: str) -> None:
    """As ``refused``, after the lines of stages that were done before."""
    lines = [line for line in answer.err.splitlines() if not line.endswith("] done before")]
    midway(answer, "\n".join(lines), says)
