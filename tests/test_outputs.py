"""No command writes over what it reads, or what moesmith did not write and list: nothing changes, one line says so."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import moesmith
from conversions import arguments
from refusals import refused

from moesmith.conversion import convert as conversion
from moesmith.errors import MoesmithError
from moesmith.export import delta as delta_module
from moesmith.export.delta import pack
from moesmith.files.artefact import MANIFEST, SUMS, read_json, sums_of, write_list, write_sums
from moesmith.files.outputs import check_file, check_folder, check_place, foreign, list_of, new_file, new_folder
from moesmith.files.write import write_json
from moesmith.run import folder

Tree = dict[str, tuple[object, ...]]


def tree(folder: Path) -> Tree:
    """Everything below a folder, byte for byte: files with their inode and time, links with their aim, folders."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name, told = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder", told.st_ino)
        elif path.name != "run.log":  # says what happened, a refusal as well
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = ("file", told.st_ino, told.st_mtime_ns, told.st_nlink, content)
    return found


@dataclass
class Scene:
    """A folder in which every place lies that a command could be pointed at by mistake."""

    top: Path

    def __getattr__(self, name: str) -> Path:
        return self.top / name


MARKS: dict[str, Callable[[Scene, Path], None]] = {
    "config.json": lambda scene, folder: copy(scene.m / "config.json", folder),
    "delta.json": lambda scene, folder: copy(scene.delta / "delta.json", folder),
    "manifest.json": lambda scene, folder: copy(scene.run / "stages" / "carve" / MANIFEST, folder),
    "run.json": lambda scene, folder: other_settings(scene, folder),
    "some-run.json": lambda _, folder: write_json(folder / "run.json", {"name": "experiment 7", "lr": 0.1}),
    "made.json": lambda _, folder: write_json(folder / "made.json", {}),
    "card.sha256": lambda scene, folder: copy(scene.run / "card.sha256", folder),
    "all-of-a-model": lambda scene, folder: shutil.copytree(scene.run / "model", folder, dirs_exist_ok=True),
    "all-of-a-delta": lambda scene, folder: shutil.copytree(scene.delta, folder, dirs_exist_ok=True),
    "sha256sum": lambda _, folder: by_sha256sum(folder),
    "its-list-of-ours": lambda scene, folder: copy(scene.run / "model" / SUMS, folder),
    "our-list-and-more": lambda _, folder: one_more_line(folder),
}


def copy(path: Path, folder: Path) -> None:
    shutil.copyfile(path, folder / path.name)


def other_settings(scene: Scene, folder: Path) -> None:
    header = read_json(scene.run / "run.json")
    header["recipe"]["seed"] = 99
    write_json(folder / "run.json", header)


def by_sha256sum(folder: Path) -> None:
    """A whole and right list, made by its owner's own ``sha256sum *``."""
    lines = [f"{value}  {name}\n" for name, value in sums_of(folder).items()]
    (folder / SUMS).write_text("".join(lines))


def one_more_line(folder: Path) -> None:
    """A list of moesmith's to which somebody added a file of his own."""
    (folder / "config.json").write_text("{}")
    write_sums(folder, {"config.json": sums_of(folder)["config.json"]})
    with open(folder / SUMS, "a") as file:
        file.write(f"{sums_of(folder)['thesis.txt']}  thesis.txt\n")


@pytest.fixture(scope="module")
def scene(finished: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Parent, data, a run of them, a delta, a run of a GGUF file, and foreign folders with each of our marks."""
    found = Scene(tmp_path_factory.mktemp("scene"))
    for name, source in (("m", home / "m"), ("d", home / "d"), ("run", finished)):
        shutil.copytree(source, found.top / name)
    header = read_json(found.run / "run.json")
    header["inputs"] |= {"model": str(found.m), "data": str(found.d)}
    write_json(found.run / "run.json", header)
    pack(found.run, found.delta)
    (found.top / "parent.gguf").write_bytes(b"GGUF and eight gigabytes of weights")
    os.link(found.top / "parent.gguf", found.top / "hard.gguf")
    shutil.copytree(found.run, found.grun)
    header["inputs"]["model"] = str(found.top / "parent.gguf")
    write_json(found.grun / "run.json", header)
    for name in ("home", "cwd"):
        (found.top / name).mkdir()
    for name in MARKS:
        folder = found.foreign / name
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("ten years of work")
        MARKS[name](found, folder)
    for name in ("x.gguf", "x.json", "x.html"):
        (found.foreign / name).write_text("mine")
        (found.foreign / f"listed-{name}").write_text("mine")
        by = hashlib.sha256(b"mine").hexdigest()
        (found.foreign / f"listed-{name}.sha256").write_text(f"{by}  listed-{name}\n")
    for name in ("m", "d", "run", "run/model", "home", "cwd", "delta", "parent.gguf"):
        (found.top / f"link-{name.replace('/', '-')}").symlink_to(found.top / name)
    for name in MARKS:
        (found.top / f"link-{name}").symlink_to(found.foreign / name)
    return found


@pytest.fixture
def here(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """The scene with its home and its current folder; no parent may be loaded, and nothing may change."""

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setenv("HOME", str(scene.home))
    monkeypatch.chdir(scene.cwd)
    for module in (conversion, folder, delta_module):
        monkeypatch.setattr(module, "load_parent", load)
    before = tree(scene.top)
    yield scene
    assert tree(scene.top) == before


FOLDERS: dict[str, Callable[[Scene, Path], list[object]]] = {
    **{
        name: lambda scene, out, name=name: ["export", scene.run, "--to", name, "--overwrite", "--out", out]
        for name in ("hf", "sglang", "native", "delta")
    },
    "pack": lambda scene, out: ["pack", scene.run, "--overwrite", "--out", out],
    "unpack": lambda scene, out: ["unpack", scene.delta, "--model", scene.m, "--out", out],
    "convert": lambda scene, out: [*arguments("dive-plus", scene.m, scene.d, out), "--reuse", scene.run],
}
FILES: dict[str, Callable[[Path, Path], list[object]]] = {
    "gguf": lambda run, out: ["export", run, "--to", "gguf", "--overwrite", "--out", out],
    "report": lambda run, out: ["report", run, "--overwrite", "--output", out],
    "eval": lambda run, out: ["eval", run, "--overwrite", "--json", out],
    "bench": lambda run, out: ["bench", run, "--overwrite", "--out", out],
}
PLACES = ("m", "d", "run", "run/model", "run/stages", "run/stages/carve", "home", "cwd", "parent.gguf")


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_is_never_put_there(here: Scene, command: str) -> None:
    places = [here.top / name for name in (*PLACES, *(("delta", "link-delta") if command == "unpack" else ()))]
    inside = [here.m / "new", here.run / "model" / "new"] + ([here.d / "new"] if command != "unpack" else [])
    links = [path for path in here.top.glob("link-*") if path.name != "link-delta"]  # ours, where it is not read
    foreigners = [here.foreign / name for name in (*MARKS, "x.json")]
    for out in (*places, *inside, *links, *foreigners, here.top, Path("/"), Path(), Path(".."), Path("../run")):
        if command != "unpack" or out not in inside[1:]:  # the run is nothing to unpack: a new folder in it is new
            refused(moesmith(*FOLDERS[command](here, out)), r"\S+ (is|holds|lies|exists)", golden=False)


@pytest.mark.parametrize("command", FILES)
def test_a_file_is_never_put_there(here: Scene, command: str) -> None:
    suffix = {"gguf": ".gguf", "report": ".html"}.get(command, ".json")
    folders = [here.top / name for name in (*PLACES[:-1], "link-run", "link-home")]
    inside = [here.top / name / f"new{suffix}" for name in ("m", "d", "run/model", "run/stages", "link-m")]
    given = [here.foreign / f"x{suffix}", here.foreign / f"listed-x{suffix}"]
    if suffix != ".gguf":
        given += [here.run / "run.json", here.run / "model", here.run / "stock", here.m / "config.json"]
        given += [next(here.d.glob("*.jsonl")), here.run / "model" / "README.md"]
    for out in (*folders, *inside, *given, Path("/"), Path()):
        refused(moesmith(*FILES[command](here.run, out)), r"\S+ (is|holds|lies|exists)", golden=False)
    for out in ("parent.gguf", "hard.gguf", "link-parent.gguf"):
        says = "another name of" if out == "hard.gguf" else "which this command reads"
        refused(moesmith(*FILES[command](here.grun, here.top / out)), says, golden=False)


def test_what_the_run_itself_holds_is_not_written_over(here: Scene, tmp_path: Path) -> None:
    """``report`` and ``bench`` without a name go into the run: not over what somebody else left there."""
    run = Path(shutil.copytree(here.run, tmp_path / "run"))
    for name, words in (("report.html", ["report", run]), ("bench.json", ["bench", run])):
        (run / name).write_text("mine")
        before = tree(run)
        refused(moesmith(*words), rf"{name} exists and is not in a list of moesmith's")
        assert tree(run) == before


def test_a_folder_of_ours_that_shares_a_file_with_the_parent(here: Scene, tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    (out / "a.txt").unlink()
    os.link(here.m / "config.json", out / "a.txt")
    write_sums(out)
    assert foreign(out) is None
    says = "another name of .*m/config.json, which this command reads"
    refused(moesmith("export", here.run, "--to", "hf", "--overwrite", "--out", out), says)
    (out / "a.txt").unlink()  # the parent has one name again


def test_a_parent_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesmith.files.outputs.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--x").mkdir(parents=True)
    from moesmith.files.outputs import existing

    for out in (tmp_path / "hub" / "models--x", tmp_path / "hub" / "new", tmp_path):
        with pytest.raises(MoesmithError, match="which this command reads"):
            check_place(out, existing("some/model"))


# What is ours ---------------------------------------------------------------------------------------------------------


def written(folder: Path, content: str = "old") -> Path:
    """A folder as moesmith leaves it."""
    with new_folder(folder) as work:
        (work / "deep").mkdir(parents=True)
        (work / "a.txt").write_text(content)
        (work / "deep" / "b.txt").write_text(content)
        write_sums(work)
    return folder


CHANGES: dict[str, Callable[[Path], Any]] = {
    "notes.txt is not in": lambda folder: (folder / "notes.txt").write_text("mine"),
    "deep/notes.txt is not in": lambda folder: (folder / "deep" / "notes.txt").write_text("mine"),
    "empty is not in": lambda folder: (folder / "empty").mkdir(),
    "link is not in": lambda folder: (folder / "link").symlink_to("a.txt"),
    "a.txt has changed": lambda folder: (folder / "a.txt").write_text("new"),
    "deep/b.txt has changed": lambda folder: (folder / "deep" / "b.txt").unlink(),
    "it has no SHA256SUMS": lambda folder: (folder / SUMS).write_text((folder / SUMS).read_text().lower() + "\n"),
    r"it has no SHA256SUMS of": lambda folder: (folder / SUMS).unlink(),
    r"a.txt is not in its": lambda folder: linked(folder),
}


def linked(folder: Path) -> None:
    """A listed file that has become a link to its like."""
    (folder / "a.txt").rename(folder.parent / "kept.txt")
    (folder / "a.txt").symlink_to(folder.parent / "kept.txt")


@pytest.mark.parametrize("says", CHANGES)
def test_one_change_makes_a_folder_somebodys(says: str, tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    assert foreign(out) is None
    CHANGES[says](out)
    before = tree(tmp_path)
    with pytest.raises(MoesmithError, match=f"holds something else: {says}"):
        check_folder(out, overwrite=True)
    with pytest.raises(MoesmithError, match=r"holds something else|exists\."):
        check_folder(out, overwrite=False)
    assert tree(tmp_path) == before


def test_what_changes_while_work_is_done_stays(tmp_path: Path) -> None:
    out = written(tmp_path / "out")

    def work() -> None:
        with new_folder(out, overwrite=True) as work:
            work.mkdir()
            (out / "notes.txt").write_text("mine")

    with pytest.raises(MoesmithError, match=r"notes\.txt is not in its"):
        work()
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def page(out: Path, content: str, *, overwrite: bool = False) -> None:
    with new_file(out, overwrite=overwrite) as work:
        work.write_text(content)
        (work.parent / "figures").mkdir()
        (work.parent / "figures" / "a.png").write_text(content)


def test_a_file_of_ours_and_what_lies_beside_it(tmp_path: Path) -> None:
    out, figure = tmp_path / "x.html", tmp_path / "figures" / "a.png"
    page(out, "old")
    assert list_of(out).read_text().splitlines()[1:] == [
        f"{v}  {n}" for n, v in sums_of(tmp_path).items() if n[-1] != "6"
    ]
    with pytest.raises(MoesmithError, match=r"exists\. Give --overwrite"):
        page(out, "new")
    page(out, "new", overwrite=True)
    assert (out.read_text(), figure.read_text()) == ("new", "new")
    other = tmp_path / "y.html"
    before = tree(tmp_path)
    with pytest.raises(MoesmithError, match=r"a\.png exists and is not in a list"):  # it is x.html's
        page(other, "new", overwrite=True)
    assert tree(tmp_path) == before
    figure.write_text("touched up by hand")
    with pytest.raises(MoesmithError, match=r"a\.png has changed since"):
        check_file(out, overwrite=True)
    figure.unlink()
    page(out, "newer", overwrite=True)
    assert figure.read_text() == "newer"


def test_a_list_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    out = tmp_path / "deep" / "x.json"
    out.parent.mkdir()
    for name in ("../thesis.txt", str(tmp_path / "thesis.txt")):
        write_list(list_of(out), {name: sums_of(tmp_path)["thesis.txt"]})
        with pytest.raises(MoesmithError, match=r"sha256 exists and is not moesmith's"):
            check_file(out, overwrite=True)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_after_a_failure_the_old_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Each move of the replacement fails once."""
    folder, file, replace = written(tmp_path / "out"), tmp_path / "x.html", os.replace
    page(file, "old")
    before, moves = tree(tmp_path), 0

    def both() -> None:
        page(file, "new", overwrite=True)
        with new_folder(folder, overwrite=True) as work:
            work.mkdir()
            (work / "a.txt").write_text("new")
            write_sums(work)

    for fails in range(1, 20):
        count = 0

        def moved(source: Any, target: Any) -> None:
            nonlocal count
            count += 1
            if count == fails:  # noqa: B023
                raise error
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", moved)
            try:
                both()
            except (MoesmithError, KeyboardInterrupt):
                moves += 1
            else:
                break
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"out", "x.html", "x.html.sha256", "figures"}
        if file.read_text() == "old":
            kept = {name: told for name, told in before.items() if not name.startswith("out")}
            assert {name: told for name, told in tree(tmp_path).items() if not name.startswith("out")} == kept
        else:
            page_is_new = [(tmp_path / "figures" / "a.png").read_text(), file.read_text()]
            assert page_is_new == ["new", "new"]
            page(file, "old", overwrite=True)
            before = tree(tmp_path)
        assert (folder / "a.txt").read_text() == "old"
        assert foreign(folder) is None
    assert moves >= 8
    assert (folder / "a.txt").read_text() == file.read_text() == "new"


def test_json_results_are_ours_to_replace(finished: Path, tmp_path: Path) -> None:
    words = ["eval", finished, "--tokens", "64", "--json", tmp_path / "x.json"]
    assert moesmith(*words).status == 0
    first = json.loads((tmp_path / "x.json").read_text())
    refused(moesmith(*words), r"x\.json exists\. Give --overwrite")
    assert moesmith(*words, "--overwrite").status == 0
    assert json.loads((tmp_path / "x.json").read_text()) == first
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.json.sha256"}
