"""Conversions that are killed. Run as a program, it reads jobs and forks a process for each.

    python tests/killable.py FOLDER

``FOLDER`` holds a parent in ``m`` and data in ``d``. A job is a line of JSON on standard input: ``{"out": folder}``
converts, ``"kill": n`` kills the process by SIGKILL at its n-th event, ``"limit": n`` lets no file grow beyond n bytes,
as a disk without room does, ``"full": n`` fails the n-th write with ENOSPC, half done; ``preset``, ``settings`` and
``reuse`` go to the conversion. The answer is a line of JSON: ``signal`` (0 if the process ended by itself), ``error``
(the one line of a MoesmithError), ``crash`` (the traceback of anything else), events per stage (``counts``) and
``writes``.

An event is a moment at which something may be lost: before and after each rename and each deletion, while a file is
half-written, before and after a training step, before a batch goes through a model.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# dive-plus, and what else keeps state between processes: the perplexity matrix
PRESET, SETTINGS = "dive-plus", ["affinity.method=perplexity", "stage2.lora_dropout=0.1"]


class Events:
    """Counts events and kills its process at the chosen one."""

    def __init__(self, kill: int | None, full: int | None) -> None:
        self.kill, self.full = kill, full
        self.stage, self.total, self.writes = "before", 0, 0
        self.counts: Counter[str] = Counter()

    def __call__(self) -> None:
        self.total += 1
        self.counts[self.stage] += 1
        if self.total == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with an event before it and one after it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self()
            result = function(*args, **kwargs)
            self()
            return result

        return watched

    def halfway(self, function: Callable[..., Any], path_at: int) -> Callable[..., Any]:
        """A writing function with an event when half of its file is there."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            path = Path(args[path_at])
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            self.writes += 1
            if self.writes == self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self()
            path.write_bytes(content)
            return result

        return watched


def install(events: Events) -> None:
    """Put events into everything a conversion does."""
    import torch
    from transformers import PreTrainedModel

    from moesmith.files import write
    from moesmith.methods import steps
    from moesmith.run.pipeline import Pipeline
    from moesmith.training import loop as train

    os.replace = events.around(os.replace)
    shutil.rmtree = events.around(shutil.rmtree)  # type: ignore[assignment]
    write.save_file = events.halfway(write.save_file, 1)
    Path.write_text = events.halfway(Path.write_text, 0)  # type: ignore[method-assign]
    train.Masters.step = events.around(train.Masters.step)  # type: ignore[method-assign]
    train.SAVE_SECONDS = steps.SAVE_SECONDS = -1.0  # unfinished work is kept after every step and layer

    def batch(module: Any, _args: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            events()

    torch.nn.modules.module.register_module_forward_pre_hook(batch)
    make = Pipeline.step

    def step(self: Pipeline, step: Any, job: Any) -> Path:
        events.stage = step.name
        return make(self, step, job)

    Pipeline.step = step  # type: ignore[method-assign]


def work(home: Path, job: dict[str, Any]) -> dict[str, Any]:
    """One conversion, in a process of its own; what came of it, if it lives."""
    from conversions import convert, fitting

    from moesmith.errors import MoesmithError

    events = Events(job.get("kill"), job.get("full"))
    outcome: dict[str, Any] = {"error": None}
    install(events)
    if limit := job.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores the signal: a write fails, EFBIG
    try:
        preset = job.get("preset", PRESET)
        settings = [*fitting(SETTINGS, preset), *job.get("settings", ())]
        convert(preset, home / "m", home / "d", Path(job["out"]), settings, reuse=job.get("reuse", ()))
    except MoesmithError as error:
        outcome["error"] = str(error)
    except BaseException:
        outcome["crash"] = traceback.format_exc()
    return outcome | {"counts": events.counts, "writes": events.writes, "modules": sorted(sys.modules)}


def run(home: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Fork a job and wait for its end."""
    gc.freeze()  # a collection in the child would copy the page of every object
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            os.write(writing, json.dumps(work(home, job)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    outcome: dict[str, Any] = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
    outcome |= json.loads(answer) if answer else {}
    for name in outcome.pop("modules", ()):  # what this job imported, those after it find there
        if name not in sys.modules:
            with suppress(ImportError):
                importlib.import_module(name)
    return outcome


@contextmanager
def server(home: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Give a function that runs a job in a forked process of its own, out of the way of this one's threads."""
    program = [sys.executable, __file__, str(home)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout

        def ask(out: Path, **options: Any) -> dict[str, Any]:
            print(json.dumps({"out": str(out), **options}), file=process.stdin, flush=True)
            assert process.stdout
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            assert "crash" not in answer, answer["crash"]
            return answer

        yield ask
        process.stdin.close()


def main() -> None:
    """Read jobs from standard input, print an outcome for each."""
    home = Path(sys.argv[1])
    import conversions  # noqa: F401
    import torch

    import moesmith.conversion.convert
    import moesmith.testing.parents  # noqa: F401
    from moesmith.conversion import pace

    pace.MEASURE = 0.0  # the same number of batches, and so of events, every time

    torch.set_num_threads(1)
    # everything is imported and nothing computed: no thread exists that a fork could lose
    for line in sys.stdin:
        print(json.dumps(run(home, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
