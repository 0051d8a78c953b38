"""Files appear whole or not at all, and a finished artefact says what it holds."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from moesmith.errors import MoesmithError
from moesmith.files import artefact, write
from moesmith.files.artefact import MANIFEST, commit, finished, read_json, read_metadata, read_tensors, verify_files
from moesmith.files.seal import digest, file_digest
from moesmith.files.write import TEMPORARY, write_atomic, write_json, write_tensors, write_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, min_size=2, max_size=6))
def test_digest_does_not_depend_on_key_order(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert digest(value) == digest(turned)
    first = next(iter(value))
    assert digest(value) != digest(value | {first: [value[first]]})


@given(JSON)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).T  # not contiguous
    tensors = {"a": turned, "b": torch.tensor(3), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"state": "7"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == t.dtype for name, t in tensors.items())
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], turned)
    assert read_metadata(tmp_path / "x.safetensors") == {"state": "7"}


@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MoesmithError, match=r"cannot write .*file\.txt: No space left on device\. Free disk space"):
        write_atomic(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file.txt"])
    assert before is None or path.read_text() == before


def test_a_crash_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file.txt", half)
    assert not list(tmp_path.iterdir())


def test_the_full_disk_of_safetensors_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SafetensorError(Exception):
        pass

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(MoesmithError, match=r"cannot write .*x\.safetensors: I/O error: No space left.*Free disk"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoesmithError, match="cannot write"):
        write_text(tmp_path / "file" / "below.txt", "x")


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(MoesmithError, match=r"x\.json (is missing|cannot be read)"):
        read_json(path)


def test_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-10])
    for read in (read_tensors, read_metadata):
        with pytest.raises(MoesmithError, match=r"x\.safetensors cannot be read"):
            read(path)


def test_commit_makes_an_artefact_that_verifies(tmp_path: Path) -> None:
    work, final = tmp_path / ".stage.partial", tmp_path / "stage"
    write_text(work / "a.txt", "a")
    write_json(work / "deep" / "b.json", [1])
    write_text(work / "checkpoint", "state")
    (work / f".a.txt.1{TEMPORARY}").write_text("left by a killed process")
    commit(work, final, {"key": "k1", "metrics": {"x": 1}}, drop=["checkpoint"])
    assert not work.exists()
    manifest = json.loads((final / MANIFEST).read_text())
    assert manifest["files"] == {
        name: hashlib.sha256((final / name).read_bytes()).hexdigest() for name in ("a.txt", "deep/b.json")
    }
    assert not (final / "checkpoint").exists()
    assert manifest.pop("seal")
    assert finished(final, "k1") == manifest
    assert finished(final, "k2") is None
    verify_files(final)


def test_commit_replaces_an_older_artefact(tmp_path: Path) -> None:
    for key in ("old", "new"):
        write_text(tmp_path / "work" / f"{key}.txt", key)
        commit(tmp_path / "work", tmp_path / "stage", {"key": key})
    assert sorted(p.name for p in (tmp_path / "stage").iterdir()) == [MANIFEST, "new.txt"]
    assert finished(tmp_path / "stage", "new")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damage_is_noticed_and_named(tmp_path: Path, damage: str) -> None:
    write_text(tmp_path / "work" / "a.txt", "a")
    write_text(tmp_path / "work" / "b.txt", "b")
    commit(tmp_path / "work", tmp_path / "stage", {"key": "k"})
    victim = tmp_path / "stage" / "b.txt"
    victim.write_text("c") if damage == "changed" else victim.unlink()
    with pytest.raises(MoesmithError, match=r"b\.txt is missing or damaged\. Delete .*stage and run"):
        verify_files(tmp_path / "stage")


def test_a_folder_without_manifest_is_not_finished(tmp_path: Path) -> None:
    assert finished(tmp_path, "k") is None
    (tmp_path / "x.txt").write_text("x")
    assert file_digest(tmp_path / "x.txt") == hashlib.sha256(b"x").hexdigest()


def test_an_error_is_one_line() -> None:
    error = MoesmithError("wrong\n  in two lines.", "Mend\nit.")
    assert str(error) == "wrong in two lines. Mend it."
    assert str(MoesmithError("no cure")) == "no cure"


def test_mapped_tensors_are_a_safetensors_file(tmp_path: Path) -> None:
    path, shapes = tmp_path / "x.safetensors", {"first": (3, 5), "third": (7,)}
    wanted = {name: torch.randint(0, 99, shape, dtype=torch.int32) for name, shape in shapes.items()}
    for name, tensor in write.mapped_tensors(path, shapes).items():
        tensor.copy_(wanted[name])
    write.settle(path)
    found = artefact.read_tensors(path)
    assert found.keys() == {"first", "third"}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert write.mapped_tensors(tmp_path / "empty.safetensors", {}) == {}
    assert artefact.read_tensors(tmp_path / "empty.safetensors") == {}
