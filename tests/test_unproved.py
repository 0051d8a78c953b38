"""Nothing unproved bears a model's name, and a run replaces only what it lists: the rest of it is its owner's."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Answer, moesmith
from conversions import arguments, convert, weights
from refusals import CURE, refused
from test_outputs import tree

from moesmith.errors import MoesmithError
from moesmith.export import targets, verify
from moesmith.export.target import Options
from moesmith.files.artefact import MANIFEST, read_json, sums_of, write_list
from moesmith.files.seal import file_digest
from moesmith.files.write import TEMPORARY, write_atomic, write_json
from moesmith.parent.load import Parent, load_parent

KERNELS = [
    (RuntimeError("grouped_mm: strides should be multiple of 16 bytes\nand more"), "RuntimeError: grouped_mm: strides"),
    (NotImplementedError("no kernel for this width"), "NotImplementedError: no kernel for this width"),
    (MemoryError(), "memory is full. Free memory"),
]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def loaded(home: Path) -> Parent:
    """The run's parent, loaded once."""
    return load_parent(str(home / "m"))


def failing(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """From here on no model can be run to be compared."""

    def fail(*_: object, **__: object) -> None:
        raise error

    patch.setattr(verify, "last_hidden", fail)


def again(home: Path, run: Path) -> Answer:
    """The run's own command."""
    return moesmith(*arguments("dive-plus", home / "m", home / "d", run))


def last_line(answer: Answer) -> Answer:
    """An answer without the lines of the stages before."""
    return replace(answer, err=answer.err.splitlines()[-1], began=0)


def to_make_again(run: Path) -> None:
    """A run whose export was made from something else."""
    path = run / "stages" / "export" / MANIFEST
    write_json(path, read_json(path) | {"key": "another"})


# Verification ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "says"), KERNELS, ids=[type(error).__name__ for error, _ in KERNELS])
@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_kernel_that_fails_leaves_no_export(
    finished: Path, to: str, error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    failing(monkeypatch, error)
    refused(moesmith("export", finished, "--to", to, "--out", out), rf"{out} cannot be verified: {says}")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert moesmith("export", finished, "--to", to, "--out", out).status == 0
    before = tree(tmp_path)
    failing(monkeypatch, error)
    refused(moesmith("export", finished, "--to", to, "--out", out, "--overwrite"), f"cannot be verified: {says}")
    assert tree(tmp_path) == before


def test_an_interrupted_export_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        targets.export_run(finished, "hf", tmp_path / "out", Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [*(error for error, _ in KERNELS), KeyboardInterrupt()], ids=repr)
def test_a_run_never_shows_an_unproved_model(
    home: Path, run: Path, loaded: Parent, finished: Path, error: BaseException, old: bool, monkeypatch: Any
) -> None:
    if old:
        to_make_again(run)
    else:
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "stages" / "export")
    before = tree(run / "model") if old else {}
    failing(monkeypatch, error)
    with pytest.raises((MoesmithError, KeyboardInterrupt)) as caught:
        convert("dive-plus", loaded, home / "d", run)
    assert isinstance(error, KeyboardInterrupt) or "model cannot be verified" in str(caught.value)
    assert (run / "model").exists() is old
    assert (tree(run / "model") if old else {}) == before
    assert not list(run.rglob(f"*{TEMPORARY}"))
    monkeypatch.undo()
    convert("dive-plus", loaded, home / "d", run)
    assert weights(run) == weights(finished)


# What a run replaces --------------------------------------------------------------------------------------------------


def test_a_model_that_no_manifest_lists(home: Path, run: Path) -> None:
    shutil.rmtree(run / "stages" / "export")
    before = tree(run)
    refused(again(home, run), r"run/model is not a model that this run lists\. Delete it")
    assert tree(run) == before


@pytest.mark.parametrize("name", ["notes.txt", ".hidden"])
def test_a_note_beside_the_model(home: Path, run: Path, name: str) -> None:
    (run / "model" / name).write_text("mine")
    assert again(home, run).status == 0  # nothing is to be replaced
    to_make_again(run)
    before = tree(run / "model")
    refused(last_line(again(home, run)), rf"model exists and holds something else: {name} is not in its SHA256SUMS")
    assert tree(run / "model") == before


def test_a_model_of_another_run_in_its_place(home: Path, run: Path) -> None:
    listing = run / "model" / "SHA256SUMS"
    (run / "model" / "tokenizer.json").unlink()
    sums = {name: value for name, value in sums_of(run / "model").items() if name != "README.md"}
    write_list(listing, sums)
    to_make_again(run)
    before = tree(run / "model")
    says = r"model/SHA256SUMS is missing or damaged\. Delete the folder"
    refused(last_line(again(home, run)), says)
    assert tree(run / "model") == before


def test_a_card_that_was_edited_stays(home: Path, run: Path) -> None:
    card, first = run / "model" / "README.md", (run / "model" / "README.md").read_bytes()
    card.write_text("how I made it")
    answer = again(home, run)
    assert (answer.status, card.read_text()) == (0, "how I made it")
    assert "README.md was edited and stays as it is" in answer.err
    to_make_again(run)  # the model is replaced, the card is carried over
    assert again(home, run).status == 0
    assert card.read_text() == "how I made it"
    write_list(run / "card.sha256", {"model/README.md": file_digest(card)})  # as if an older moesmith had written it
    assert again(home, run).status == 0
    assert card.read_bytes() == first
    card.unlink()
    assert again(home, run).status == 0
    assert card.read_bytes() == first


def test_hidden_names_of_others_are_not_swept_up(home: Path, run: Path, finished: Path) -> None:
    mine = [".notes.tmp", "stages/.draft.1.tmp", "stages/.carve.taken/thesis.txt", ".model.12.tmp/thesis.txt"]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    ours = [
        run / f".run.json.7{TEMPORARY}",
        run / "stages" / "carve" / f".x.7{TEMPORARY}",
        run / "stages" / f".x.7{TEMPORARY}",
    ]
    for path in ours[:2]:
        path.write_text("half of it")
    ours[2].mkdir()
    hidden = run / f".model.ab{TEMPORARY}"  # a process was killed while the model was aside
    hidden.mkdir()
    (run / "model").rename(hidden / "model.old")
    assert again(home, run).status == 0
    assert all((run / name).read_text() == "mine" for name in mine)
    assert not any(os.path.lexists(path) for path in (*ours, hidden))
    assert weights(run) == weights(finished)


def test_a_stage_that_holds_something_else(home: Path, run: Path) -> None:
    stage = run / "stages" / "evaluate"
    (stage / "notes.txt").write_text("mine")
    write_json(stage / MANIFEST, read_json(stage / MANIFEST) | {"key": "another"})
    before = tree(run)
    refused(last_line(again(home, run)), r"evaluate/notes\.txt is not as moesmith left it\. Delete \S+evaluate or move")
    assert tree(run) == before
    (stage / "notes.txt").unlink()
    (stage / MANIFEST).write_text('{"name": "my extension", "manifest_version": 3}')
    before = tree(run)
    refused(last_line(again(home, run)), "is not as moesmith left it")
    assert tree(run) == before


def test_a_partial_stage_that_nobody_began(home: Path, run: Path) -> None:
    shutil.rmtree(run / "stages" / "evaluate")
    partial = run / "stages" / ".evaluate.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("ten years of work")
    before = tree(run)
    refused(last_line(again(home, run)), r"\.evaluate\.partial is not a stage that moesmith began\. Delete it")
    assert tree(run) == before


# Cures ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free disk space and run"),
        (OSError(errno.EROFS, "Read-only file system"), "Give a folder on a disk that is not read-only"),
        (OSError(errno.EACCES, "Permission denied"), "Give a folder that you may write in"),
        (OSError(errno.EMFILE, "Too many open files"), r"Raise the number .*ulimit -n"),
        (OSError(0, "I/O error: Read-only file system (os error 30)"), "Give a folder on a disk that is not read-only"),
        (OSError(0, "something of a library's own"), "Fix that and run"),
    ],
)
def test_cures_fit_what_the_system_says(tmp_path: Path, error: OSError, says: str) -> None:
    def fail(_: Path) -> None:
        raise error

    with pytest.raises(MoesmithError, match=rf"cannot write .*x\.txt: .*\. {says}") as caught:
        write_atomic(tmp_path / "x.txt", fail)
    assert CURE.search(str(caught.value))
    assert list(tmp_path.iterdir()) == []
