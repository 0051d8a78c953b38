"""What a run must survive: kills, no room, a disk that turns read-only, another clock, another place, company.

Every ordeal takes ``Options`` and gives a tally. What was wrong is described so that it can be repeated.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disturbed import METHODS, Command, Known, Undisturbed, moment, until_finished, whole
from tally import Tally

from moesmith.errors import MoesmithError
from moesmith.report.overview import describe
from moesmith.report.page import write_report
from moesmith.run.folder import open_run

ROOM = "Free disk space and run the same command again|Free space or give an --out on another disk"
READ_ONLY = "Read-only file system|Input.output error|os error (30|5)"
CLOCKS = [Path(f"/usr/lib/x86_64-linux-gnu/faketime/{name}.so.1") for name in ("libfaketimeMT", "libfaketime")]
YEAR = 365 * 24 * 3600


@dataclass
class Options:
    """What every ordeal is given.

    Attributes:
        work: a folder of its own.
        known: what undisturbed commands make.
        seed: of all that is random.
        kills: how many.
        trials: how many damaged files.
        times: how often everything else is tried.
        methods: the presets.
        processes: one, or several under torchrun; each in turn.
    """

    work: Path
    known: Known
    seed: int = 0
    kills: int = 100
    trials: int = 1000
    times: int = 6
    methods: tuple[str, ...] = METHODS
    processes: tuple[int, ...] = (1, 2)

    def rng(self, name: str) -> random.Random:
        """Return an ordeal's own random numbers."""
        return random.Random(f"{self.seed} {name}")

    def fresh(self, name: str) -> Path:
        """Return a path that does not exist."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name


def kills(options: Options) -> Iterator[Tally]:
    """Kill at random moments; the same command goes on until it finishes, then a fresh run begins."""
    rng = options.rng("kills")
    commands = [Command(preset, count) for count in options.processes for preset in options.methods]
    for number, command in enumerate(commands):
        wanted = options.kills * (number + 1) // len(commands) - options.kills * number // len(commands)
        if not wanted:
            continue
        known, tally, hits = options.known[command], Tally(f"kills: {command}"), Counter[str]()
        finished = 0
        while tally.tried < wanted:
            out = options.fresh("killed")
            story: list[str] = []  # of this run
            while tally.tried < wanted:
                running = command.started(out)
                if not moment(rng, running, known):
                    break
                victim = rng.choice(["0", "1", "all"]) if command.processes > 1 else "all"
                try:
                    running.kill(victim)
                    problem = running.complaint() if victim != "all" else None
                except TimeoutError as error:
                    problem = str(error)
                if running.process.returncode == 0:  # it had just finished
                    break
                stage = running.stage()
                hits[stage] += 1
                story.append(f"{stage} (of {victim})" if command.processes > 1 else stage)
                problem = problem or whole(out)
                tally.count(
                    None if problem is None else f"{problem}; killed at {', '.join(story)}; seed {options.seed}"
                )
            problem = until_finished(known, out)
            finished += 1
            if problem is not None:
                tally.wrong.append(f"{problem}; killed at {', '.join(story)}; seed {options.seed}; kept in {out}")
                shutil.move(out, options.fresh(f"wrong-{command.preset}-{len(tally.wrong)}"))
        tally.notes.append(
            f"{finished} runs finished; " + ", ".join(f"{name} {count}" for name, count in sorted(hits.items()))
        )
        yield tally


def stopped(options: Options, rng: random.Random, number: int) -> tuple[Undisturbed, Path, str]:
    """Kill a conversion at a random moment: what it would have made, its folder, and the stage that it was at."""
    known = options.known[Command(options.methods[number % len(options.methods)])]
    out = options.fresh("stopped")
    running = known.command.started(out)
    if moment(rng, running, known):
        running.kill("all")
    return known, out, running.stage()


def moved(options: Options) -> Iterator[Tally]:
    """Kill, move the run's folder, go on at the new place."""
    rng, tally = options.rng("moved"), Tally("run folder moved between two tries")
    for number in range(options.times):
        known, out, stage = stopped(options, rng, number)
        there = options.fresh("there") / "run"
        there.parent.mkdir()
        if out.exists():
            shutil.move(out, there)
        problem = until_finished(known, there)
        tally.count(problem and f"{problem}; {known.command}, moved at {stage}; seed {options.seed}")
    yield tally


def clock(options: Options) -> Iterator[Tally]:
    """Kill, set the clock back by a year for the next try."""
    rng = options.rng("clock")
    library = next((path for path in CLOCKS if path.is_file()), None)
    tally = Tally("clock set back a year between two tries" if library else "files a year in the future")
    if library is None:
        tally.notes.append("no libfaketime here: files were dated a year ahead instead")
    for number in range(options.times):
        known, out, stage = stopped(options, rng, number)
        more = {}
        if library is not None:
            more = {"LD_PRELOAD": str(library), "FAKETIME": "-365d"}
        else:
            for path in [out, *out.rglob("*")]:
                os.utime(path, (time.time() + YEAR,) * 2)
        problem = until_finished(known, out, more)
        tally.count(problem and f"{problem}; {known.command}, killed at {stage}; seed {options.seed}")
    yield tally


def run(*words: str) -> bool:
    """Run a system command; whether it succeeded."""
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@contextmanager
def mounted(place: Path, *words: str) -> Iterator[bool]:
    """Mount something at a folder inside the ``with``; gives whether that was possible."""
    place.mkdir(parents=True, exist_ok=True)
    done = run("mount", *words, str(place))
    try:
        yield done
    finally:
        if done and not run("umount", str(place)):
            run("umount", "--lazy", str(place))


def room(options: Options) -> Iterator[Tally]:
    """Fill a small disk: a command ends in one line, gets a little more room, and goes on, until all fits."""
    rng = options.rng("room")
    for preset in options.methods:
        tally, known = Tally(f"disk full: {preset}"), options.known[Command(preset)]
        whole_size = sum(4 + path.stat().st_size // 1024 for path in known.folder.rglob("*"))
        place = options.fresh("small")
        size = rng.randrange(4, 64)
        with mounted(place, "-t", "tmpfs", "-o", f"size={size}k", "none") as possible:
            if not possible:
                tally.notes.append("skipped: nothing can be mounted here (try it as root, or inside 'unshare -rm')")
                yield tally
                continue
            out, sizes = place / "run", []
            while True:
                running = known.command.started(out)
                ended = running.ended(300)
                if ended and running.process.returncode == 0:
                    break
                sizes.append(size)
                problem = running.refusal(ROOM) if ended else "it did not end"
                tally.count(problem and f"{problem}; at {size} kB; seed {options.seed}")
                if problem or size > 8 * whole_size:
                    break
                size += 4 * rng.randrange(1, max(2, whole_size // 2 // options.times))
                run("mount", "-o", f"remount,size={size}k", str(place))
            problem = known.differs(out) or running.complaint()
            if problem is not None:
                tally.wrong.append(f"{problem}; after sizes of {sizes} kB; seed {options.seed}")
        yield tally


def read_only(options: Options) -> Iterator[Tally]:
    """Let a file system turn read-only by an error of its own, as a failing disk makes it; mend it and go on.

    The kernel remounts nothing read-only in which a file is open for writing, and a run's lock is. An error does it.
    """
    rng, tally = options.rng("read-only"), Tally("file system turned read-only")
    image, place = options.fresh("disk.img"), options.fresh("disk")
    options.work.mkdir(parents=True, exist_ok=True)
    for number in range(options.times):
        known = options.known[Command(options.methods[number % len(options.methods)])]
        image.unlink(missing_ok=True)
        made = run("truncate", "-s", "64M", str(image)) and run("mkfs.ext4", "-q", "-F", str(image))
        with mounted(place, "-o", "loop,errors=remount-ro", str(image)) as possible:
            if not (made and possible):
                tally.notes.append("skipped: no ext4 image can be mounted here (it takes root and a loop device)")
                break
            running = known.command.started(place / "run")
            still = moment(rng, running, known) and fail(place)
            ended, stage = running.ended(300), running.stage()
            problem = None if ended else "it did not end"
            if still and ended and running.process.returncode != 0:
                problem = running.refusal(READ_ONLY)
        subprocess.run(["e2fsck", "-fy", str(image)], capture_output=True, check=False)
        with mounted(place, "-o", "loop,errors=remount-ro", str(image)):
            problem = problem or until_finished(known, place / "run")
        tally.count(problem and f"{problem}; {known.command}, at {stage}; seed {options.seed}")
    yield tally


def fail(place: Path) -> bool:
    """Let the file system at a place find an error, after which it is read-only; whether that was possible."""
    device = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", str(place)], capture_output=True, text=True, check=False
    ).stdout.strip()
    try:
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("made by tests/ordeals.py\n")
    except OSError:
        return False
    return True


def company(options: Options) -> Iterator[Tally]:
    """Start the same command twice: one refuses in one line, the other finishes undisturbed."""
    rng, tally = options.rng("company"), Tally("two at once on one run")
    for number in range(options.times):
        known = options.known[Command(options.methods[number % len(options.methods)])]
        out = options.fresh("both")
        first = known.command.started(out)
        if number % 2:
            moment(rng, first, known)
        second = known.command.started(out)
        both = [first, second]
        problem = None if all(each.ended(300) for each in both) else "they did not end"
        losers = [each for each in both if each.process.returncode != 0]
        problem = problem or next(filter(None, (each.refusal("is working in") for each in losers)), None)
        if len(losers) > 1:
            problem = "both refused"
        problem = problem or known.differs(out)
        tally.count(problem and f"{problem}; {known.command}; seed {options.seed}", effect=bool(losers))
    tally.notes.append("without effect: one had finished before the other asked")
    yield tally


def readers(options: Options) -> Iterator[Tally]:
    """Read a run again and again while it is made: each answer is part of the final one, or a line says why not."""
    for number in range(max(1, options.times // 2)):
        preset = options.methods[number % len(options.methods)]
        known, out = options.known[Command(preset)], options.fresh("read")
        tally, told = Tally(f"readers of a run being made: {preset}"), Counter[str]()
        answers: list[tuple[str, Any]] = []
        asks: dict[str, Callable[[], Any]] = {
            "inspect": lambda out=out: describe(out)["stages"],
            "open_run": lambda out=out: weights_of(out),
            "report": lambda out=out: page_of(out, options.fresh("page")),
        }
        running = known.command.started(out)
        while running.process.poll() is None:
            for name, ask in asks.items():
                try:
                    answers.append((name, ask()))
                    told[name] += 1
                except MoesmithError as error:
                    tally.count(None if len(str(error).splitlines()) == 1 else f"{name}: {error}", effect=False)
                except Exception as error:
                    tally.count(f"{name}: {type(error).__name__}: {error}; {preset}, at {running.stage()}")
        problem = running.complaint() or known.differs(out)
        if problem is not None or running.process.returncode != 0:
            tally.wrong.append(f"{problem}, status {running.process.returncode}")
        last = {"inspect": describe(out)["stages"], "open_run": weights_of(out), "report": {}}
        for name, answer in answers:
            odd = [key for key in answer if answer[key] != last[name].get(key)]
            tally.count(f"{name}: another answer about {odd[0]} than in the end" if odd else None)
        tally.notes.append(f"answered: {dict(told)}; the others were told in one line that it is too early")
        yield tally


def weights_of(out: Path) -> dict[str, Any]:
    """Read everything that :func:`moesmith.open_run` gives of a run, as plain values by name."""
    run = open_run(out)
    found: dict[str, Any] = {f"manifest of {name}": value for name, value in run.manifests.items()}
    for name in run.carved:
        found[f"carving of {name}"] = run.carving(name).union().tolist()
    if run.has("held-out"):
        found["held out"] = {name: int(ids.sum()) for name, ids in run.held_out.items()}
    if run.has("evaluate"):
        found["evaluation"] = run.evaluation
    return found


def page_of(out: Path, folder: Path) -> dict[str, Any]:
    """Write a report of a run; its answer is that there is a whole page."""
    folder.mkdir(parents=True)
    page = write_report(out, folder / "page.html")
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return {}
