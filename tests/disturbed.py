"""Conversions by the command line that are disturbed: killed, moved, out of disk, with another clock.

Each is the real command, ``python -m moesmith convert``, alone or in two processes under torchrun, on a tiny parent of
``tests/assets``; ``impatient.py`` lets it keep unfinished work at every step. What it leaves must be what an
undisturbed run leaves, bit for bit.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from commands import environment, torchrun
from conversions import arguments, fitting, weights
from golden import ASSETS

from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, verify_files

MODEL, DATA = ASSETS / "parents" / "llama", ASSETS / "text"
METHODS = ("dive-1of8", "tomoe-50", "token")
LONGER = {  # enough text that a run works for seconds
    "dive-1of8": ["domains.tokens=4096", "affinity.tokens=2048", "stage1.tokens=8192", "stage2.tokens=16384"],
    "tomoe-50": ["masks.tokens=3072"],
    "token": ["domains.tokens=4096", "stage2.tokens=16384"],
}
PATIENCE = 120.0  # seconds in which a command ends whose process was killed
AT_START = 1 / 8  # share of kills before the first stage, while libraries are imported and the parent is read


@dataclass(frozen=True)
class Command:
    """A conversion by the command line.

    Attributes:
        preset: of the method.
        processes: one, or several under torchrun.
    """

    preset: str
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.preset}, {self.processes} process{'es' if self.processes > 1 else ''}"

    def words(self, out: Path) -> list[str]:
        """Return the whole command for a run's folder."""
        given = arguments(self.preset, MODEL, DATA, out, fitting(LONGER[self.preset], self.preset))
        given += ["--dtype", "fp32", "--device", "cpu", "--method-file", str(Path(__file__).parent / "impatient.py")]
        return [sys.executable, "-m", "moesmith", *given] if self.processes == 1 else torchrun(self.processes, given)

    def started(self, out: Path, more: dict[str, str] | None = None) -> Started:
        """Start it."""
        return Started(self.words(out), out, environment() | (more or {}))


class Started:
    """A command that was started, with everything that it prints on standard error.

    Args:
        words: the command.
        out: the run's folder.
        given: the environment.
    """

    def __init__(self, words: Sequence[str], out: Path, given: dict[str, str]) -> None:
        self.began = time.monotonic()
        self.said = tempfile.TemporaryFile()  # noqa: SIM115, not where the run is: its disk may be full
        self.log = out / "run.log"
        self.before = self.log.stat().st_size if self.log.is_file() else 0
        self.process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=self.said, env=given, start_new_session=True
        )

    def stages(self) -> list[str]:
        """Return the lines of the run's log about stages that this command has written so far."""
        try:
            with open(self.log, "rb") as file:
                file.seek(self.before)
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return re.findall(r"^\S+ \S+ INFO \[(\S+\](?: done before| [\d.,]+ s)?)$", text, re.MULTILINE)

    def working(self) -> bool:
        """Wait until the first stage begins; whether it did before the command ended."""
        while self.process.poll() is None:
            if self.stages():
                return True
            time.sleep(0.01)
        return bool(self.stages())

    def stage(self) -> str:
        """Name the stage that was being made when the command stopped."""
        lines = self.stages()
        if not lines:
            return "start"
        name, _, ended = lines[-1].partition("]")
        return f"after {name}" if ended else name

    def ended(self, seconds: float) -> bool:
        """Wait for the end, at most so long; whether it came."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def all(self) -> list[psutil.Process]:
        """Return the command's processes, the launcher first."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def kill(self, victim: str) -> None:
        """Kill ``all`` processes, or the one of a rank, and wait until none is left.

        Raises:
            TimeoutError: the others do not end.
        """
        everyone = self.all()
        for process in everyone:
            with suppress(psutil.Error):
                if victim == "all" or process.environ().get("RANK") == victim:
                    process.send_signal(signal.SIGKILL)
        if not self.ended(PATIENCE):
            self.kill("all")
            raise TimeoutError(f"{PATIENCE:.0f} s after the kill of rank {victim} the command had not ended")
        _, left = psutil.wait_procs(everyone, PATIENCE)
        if left:
            raise TimeoutError(f"{len(left)} processes outlived their launcher")

    def lines(self) -> str:
        """Return what was printed on standard error."""
        return os.pread(self.said.fileno(), 1 << 20, 0).decode(errors="replace")

    def complaint(self) -> str | None:
        """Say what is wrong with what was printed: a traceback with a line of moesmith's."""
        text = self.lines()
        if re.search(r'File ".*/moesmith/', text) or "Exception ignored" in text:
            return "a traceback: " + " | ".join(text.splitlines()[-3:])
        return None

    def refusal(self, says: str) -> str | None:
        """Say what is wrong with a command that should have ended with one line and status 2; ``None`` if nothing."""
        told = [line for line in self.lines().splitlines() if line.startswith("moesmith: ")]
        if self.process.returncode != 2 or len(told) != 1 or not re.search(says, told[0]):
            return f"status {self.process.returncode}, said {told or self.lines()[-300:]!r}"
        return self.complaint()


class Undisturbed:
    """What a command makes and how long it takes if nobody disturbs it.

    Args:
        command: which one.
        work: a folder for it.

    Attributes:
        start: seconds before the first stage.
        work: seconds of all stages.
    """

    def __init__(self, command: Command, work: Path) -> None:
        self.command, self.folder = command, work / f"{command.preset}-{command.processes}"
        running = command.started(self.folder)
        assert running.working(), running.lines()
        self.start = time.monotonic() - running.began
        while not any(line.startswith("evaluate] ") for line in running.stages()):
            assert running.process.poll() is None or running.process.returncode == 0, running.lines()
            time.sleep(0.01)
        self.work = time.monotonic() - running.began - self.start
        assert running.ended(PATIENCE)
        assert running.process.returncode == 0, running.lines()
        self.made, self.names = weights(self.folder), names(self.folder)

    def differs(self, out: Path) -> str | None:
        """Say in what a finished run differs from this one; ``None`` if in nothing."""
        found = weights(out)
        if odd := sorted(name for name in {*found, *self.made} if found.get(name) != self.made.get(name)):
            return f"{len(odd)} files differ: {', '.join(odd[:4])}"
        if odd := sorted(names(out) ^ self.names):
            return f"left behind or missing: {', '.join(odd[:4])}"
        return None


def names(folder: Path) -> set[str]:
    """Return the relative paths of everything in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def whole(out: Path) -> str | None:
    """Say which finished stage of a stopped run is not whole; ``None`` if all are."""
    try:
        for manifest in out.glob(f"stages/[!.]*/{MANIFEST}"):
            verify_files(manifest.parent)
    except MoesmithError as error:
        return f"not whole: {error}"
    return None


class Known:
    """The undisturbed runs, each made when it is first asked for.

    Args:
        work: a folder for them.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.found = work, dict[Command, Undisturbed]()
        work.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, command: Command) -> Undisturbed:
        if command not in self.found:
            self.found[command] = Undisturbed(command, self.work)
        return self.found[command]


def moment(rng: random.Random, running: Started, known: Undisturbed) -> bool:
    """Wait until a random moment of a command's work; whether it is still running then."""
    if rng.random() < AT_START:
        time.sleep(rng.uniform(0, known.start))
    elif running.working():
        time.sleep(rng.uniform(0, known.work))
    return running.process.poll() is None


def until_finished(
    known: Undisturbed, out: Path, more: dict[str, str] | None = None, seconds: float = 300.0
) -> str | None:
    """Run a command to its end; say what is wrong with it or with what it made."""
    running = known.command.started(out, more)
    if not running.ended(seconds):
        running.kill("all")
        return f"had not ended after {seconds:.0f} s"
    if running.process.returncode != 0:
        return f"status {running.process.returncode}: {running.lines()[-300:]!r}"
    return running.complaint() or known.differs(out)
