"""Locks where a file system has none, other systems' Python, launchers of many processes, how moesmith is started."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from commands import environment, moesmith

from moesmith.arguments import LAUNCHERS
from moesmith.errors import MoesmithError
from moesmith.files.lock import HOLDER, LOCK, MARK, folder_lock

ROOT = Path(__file__).parents[1]


def hold(folder: Path, ready: object, go: object) -> None:
    """Another process at work."""
    with folder_lock(folder):
        ready.set()  # type: ignore[attr-defined]
        go.wait(60)  # type: ignore[attr-defined]


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A file system that answers every flock as the parameter says."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


none_there = pytest.mark.parametrize("without_locks", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], indirect=True)


def test_a_second_process_is_told_who_works_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready, go))
    other.start()
    try:
        assert ready.wait(60)
        says = rf"^process {other.pid} on {socket.gethostname()} is working in \S+run\. Wait for it, or stop it\.$"
        with pytest.raises(MoesmithError, match=says), folder_lock(tmp_path / "run"):
            pass
    finally:
        go.set()
        other.join()
    with folder_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {LOCK}


def test_what_a_killed_process_left_is_not_said_of_another(tmp_path: Path) -> None:
    (tmp_path / HOLDER).write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "started": 1.0}))
    with filelock.FileLock(tmp_path / LOCK), pytest.raises(MoesmithError, match=r"^another process is working in"):
        folder_lock(tmp_path).__enter__()


@none_there
def test_a_file_system_without_locks_is_said_and_worked_on(
    tmp_path: Path, without_locks: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with folder_lock(tmp_path / "run"):
        said = capfd.readouterr().err
        assert "has no locks" in said
        assert said.count("\n") == 1
        with pytest.raises(
            MoesmithError, match=rf"process {os.getpid()} on \S+ is working in .*delete \S+{MARK} if it is"
        ):
            folder_lock(tmp_path / "run").__enter__()
    assert {path.name for path in (tmp_path / "run").iterdir()} == set()


@none_there
@pytest.mark.parametrize("holder", ["gone", "elsewhere", "other start"])
def test_the_mark_of_a_killed_process_does_not_block_for_ever(tmp_path: Path, without_locks: None, holder: str) -> None:
    """It is removed where the process is seen to be gone, and named where nobody can see that."""
    host = "another-machine" if holder == "elsewhere" else socket.gethostname()
    pid = os.getpid() if holder == "other start" else 2**22 + 1
    (tmp_path / MARK).write_text(f"{pid}\n{host}\n")
    (tmp_path / HOLDER).write_text(json.dumps({"pid": pid, "host": host, "started": 1.0}))
    if holder == "elsewhere":
        with pytest.raises(MoesmithError, match=rf"process {pid} on another-machine is working in .*delete \S+{MARK}"):
            folder_lock(tmp_path).__enter__()
        assert (tmp_path / MARK).exists()
    else:
        with folder_lock(tmp_path):
            assert (tmp_path / MARK).exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_no_lock_held(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(MoesmithError, match=r"cannot write in \S+: Permission denied\. Give another --out"):
            folder_lock(tmp_path / "run").__enter__()
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_other_errors_are_said_as_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(MoesmithError, match=rf"cannot write in \S+: {os.strerror(code)}\. Give another --out"):
        folder_lock(tmp_path).__enter__()


WITHOUT = """
import importlib, os, pkgutil, sys

import accelerate, filelock, scipy.stats, torch, transformers, typer  # noqa: what we do not write imports what it likes
from transformers import LlamaForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM  # noqa

GONE = {"fcntl", "resource", "pwd", "grp", "termios", "posix"}
for name in GONE:
    sys.modules[name] = None  # an import of it raises ImportError
for name in ("sched_getaffinity", "fork", "getloadavg", "geteuid", "getuid", "uname", "O_NOFOLLOW", "killpg"):
    if hasattr(os, name):
        delattr(os, name)

import moesmith
found = 0
for module in pkgutil.walk_packages(moesmith.__path__, "moesmith."):
    if not module.name.endswith("__main__") and not module.name.endswith("_worker"):
        importlib.import_module(module.name)
        found += 1
assert found > 80, found
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from commands import moesmith as command
from conversions import arguments
from moesmith.testing.parents import save_tiny
from moesmith.testing.text import save_data
home = Path(sys.argv[2])
save_tiny("llama", home / "m")
save_data(home / "d")
off = ["stage1.tokens=0", "stage2.tokens=256"]
for words in (arguments("dive-plus", home / "m", home / "d", home / "run", off), ["inspect", home / "run"]):
    answer = command(*words)
    assert answer.status == 0, answer.err
"""


@pytest.mark.slow
def test_nothing_of_one_system_is_needed(tmp_path: Path) -> None:
    """Every module is imported, and a tiny conversion made, without what only Unix or only Linux has."""
    words = [sys.executable, "-c", WITHOUT, str(Path(__file__).parent), str(tmp_path)]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("module", ["moesmith", "moesmith.cli"])
@pytest.mark.parametrize("world", [None, "1", "2"])
def test_started_as_a_module(module: str, world: str | None) -> None:
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    given |= {} if world is None else {"WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0"}
    words = [sys.executable, "-m", module, "presets", "--json"]
    answer = subprocess.run(words, capture_output=True, text=True, env=given, check=False)
    if world == "2":
        assert answer.returncode == 2
        assert answer.stdout == ""
        says = "moesmith: started as one of 2 processes (WORLD_SIZE=2), and moesmith works in one. Run it without"
        assert answer.stderr.startswith(says)
        assert answer.stderr.count("\n") == 1
    else:
        assert answer.returncode == 0, answer.stderr
        assert "dive-plus" in json.loads(answer.stdout)


@pytest.mark.parametrize(("size", "rank"), LAUNCHERS.items())
def test_every_process_of_a_launcher_is_refused_and_the_first_one_says_so(
    monkeypatch: pytest.MonkeyPatch, size: str, rank: str
) -> None:
    monkeypatch.setenv(size, "4")
    monkeypatch.setattr("moesmith.cli.WAIT", 0)
    for number in range(4):
        monkeypatch.setenv(rank, str(number))
        answer = moesmith("presets")
        assert (answer.status, answer.out) == (2, "")
        assert answer.err.count("\n") == (number == 0)
