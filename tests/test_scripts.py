"""The programs of scripts/: what they pin, what they count, and that they notice what is wrong."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    """A program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "expected"), [("numpy>=2.0", "2.2"), ("numpy>=2.3,!=2.10", None), ("numpy<2", "1.26"), ("numpy", "1.26")]
)
def test_the_lowest_version_is_compared_as_a_version(line: str, expected: str | None) -> None:
    assert script("try_lowest").lowest(Requirement(line), ["2.10", "2.2", "2.0rc1", "1.26"]) == expected


def test_direct_dependencies_are_found_once() -> None:
    text = """
    [project]
    dependencies = ["torch>=2", "numpy>=1"]
    [project.optional-dependencies]
    eval = ["lm-eval>=3", "datasets>=4"]
    data = ["datasets>=4"]
    docs = ["mkdocs>=1"]
    dev = ["moesmith[eval]", "pytest>=8", "ruff>=0.1"]
    """
    found = script("try_lowest").requirements(text, ("eval", "data"), ("pytest",))
    assert [str(each) for each in found] == ["torch>=2", "numpy>=1", "lm-eval>=3", "datasets>=4", "pytest>=8"]


def test_the_core_tests_are_there() -> None:
    module = script("try_lowest")
    assert [name for name in module.TESTS if not (ROOT / "tests" / f"{name}.py").is_file()] == []
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in module.KEPT)


def test_every_module_can_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process; test_systems.py imports them in one that has none of them yet."""
    assert script("import_all").main() is None
    assert int(capsys.readouterr().out.split()[0]) > 100


@pytest.mark.parametrize("change", ["none", "a preset is missing", "something else is in it"])
def test_the_wheels_files_are_counted(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "moesmith").rglob("*") if p.is_file()}
    names = {name for name in names if "__pycache__" not in name} | {"moesmith-1.dist-info/METADATA"}
    if change == "a preset is missing":
        names -= {next(name for name in names if "/presets/" in name)}
    if change == "something else is in it":
        names |= {"tests/test_scripts.py"}
    with zipfile.ZipFile(tmp_path / "m.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "")
    check = script("try_wheel").check_files
    if change == "none":
        check(tmp_path / "m.whl")
        assert ".yaml" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match=r"presets/|test_scripts"):
            check(tmp_path / "m.whl")
