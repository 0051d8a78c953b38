"""Send a stage's numbers to a tracker while it is made: TensorBoard, trackio or Weights & Biases (``report_to``).

No result and no key depends on it: routers are only watched, and a tracker that fails is left out with a warning. The
clients are called directly: accelerate's trackers need its process state, which decides on a device once per process.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.native.gate import Router
from moesmith.parent.checkpoint import first_line
from moesmith.parent.hooks import hooked
from moesmith.run.settings import Tracker
from moesmith.run.step import Job, Step

PROJECT = "moesmith"  # for trackio and wandb
FLUSH = 30  # seconds until TensorBoard's file is written


@dataclass(frozen=True)
class Report:
    """Where a stage's numbers go.

    Attributes:
        to: the tracker; ``none`` for nowhere.
        home: the run's folder; TensorBoard's files go to ``tensorboard/STAGE`` in it, wandb's to ``wandb``.
        stage: the stage's name.
    """

    to: Tracker = "none"
    home: Path = Path()
    stage: str = ""

    @classmethod
    def of(cls, step: Step, job: Job) -> Report:
        """Where a step's numbers go."""
        return cls(step.recipe.report_to, job.run.folder, step.name)


def check_report(to: str) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        MoesmithError: it is not installed.
    """
    if to != "none" and importlib.util.find_spec(to) is None:
        what = f"report_to is {to}, and the package {to} is not installed"
        raise MoesmithError(what, f"Run pip install 'moesmith[{to}]', or leave report_to out.")


class TensorBoard:
    """Event files in the run's folder; a continued stage replaces what was written behind its checkpoint."""

    def __init__(self, report: Report, mark: str, settings: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = report.home / "tensorboard" / report.stage
        self.writer: Any = SummaryWriter(str(folder), purge_step=done + 1, flush_secs=FLUSH)

    def log(self, step: int, numbers: Mapping[str, float], loads: Sequence[float]) -> None:
        """Write one step's numbers, and the loads of its layers as a histogram."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if loads:
            self.writer.add_histogram("load_over_ideal", np.array(loads), step)

    def close(self) -> None:
        """Write the rest."""
        self.writer.close()


class Client:
    """trackio or wandb, whose interfaces are the same; a continued stage continues its log, named by its mark."""

    def __init__(self, report: Report, mark: str, settings: Mapping[str, Any], done: int) -> None:
        self.module: Any = importlib.import_module(report.to)
        name = f"{report.home.absolute().name}-{report.stage}-{mark}"
        more = {"id": name, "dir": str(report.home)} if report.to == "wandb" else {}
        self.module.init(project=PROJECT, name=name, config=dict(settings), resume="allow", **more)

    def log(self, step: int, numbers: Mapping[str, float], loads: Sequence[float]) -> None:
        """Send one step's numbers, and the loads of its layers as a histogram."""
        more = {"load_over_ideal": self.module.Histogram(list(loads))} if loads else {}
        self.module.log(dict(numbers) | more, step=step)

    def close(self) -> None:
        """Say that this is all."""
        self.module.finish()


class Tracking:
    """A stage's log at a tracker, or nothing; the first failure of the tracker is said, and ends it.

    Attributes:
        mark: tells this log from others of the same name; kept in the stage's checkpoint.
    """

    def __init__(self, report: Report, settings: Mapping[str, Any], mark: str = "", done: int = 0) -> None:
        self.mark, self.to = mark, report.to
        self.client: TensorBoard | Client | None = None
        if report.to != "none":
            self.mark = mark or secrets.token_hex(3)
            kind = TensorBoard if report.to == "tensorboard" else Client
            with self._forgiving():
                self.client = kind(report, self.mark, settings, done)

    def log(self, step: int, numbers: Mapping[str, Any], loads: Sequence[float] = ()) -> None:
        """Send the numbers after step number ``step``, and of each routing layer its load over the ideal one."""
        if self.client is not None:
            finite = {name: float(v) for name, v in numbers.items() if name not in ("step", "tokens")}
            if loads:
                finite |= {"load_over_ideal/mean": math.fsum(loads) / len(loads), "load_over_ideal/max": max(loads)}
            with self._forgiving():
                self.client.log(step, finite, loads)

    def close(self) -> None:
        """End the log."""
        if self.client is not None:
            with self._forgiving():
                self.client.close()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a library's own, a network's, a disk's: training goes on
            self.client = None
            say(f"{self.to} does not take numbers: {first_line(error)}; going on without it", logging.WARNING)


class Loads:
    """How a model's layers divide tokens among their experts, since it was last asked.

    Args:
        objective: what is trained. Its ``loads()`` gives each layer's load, (E,), of its last forward pass, where
            experts are only being learned; else its ``model`` has routers, which are watched.
    """

    def __init__(self, objective: Any) -> None:
        self.own = getattr(objective, "loads", None)
        self.routers = [] if self.own else [m for m in objective.model.modules() if isinstance(m, Router)]
        self.counts: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count inside the ``with``."""

        def hook(index: int) -> Any:
            return lambda router, _args, output: self._take(index, router, output)

        with hooked((router, hook(index)) for index, router in enumerate(self.routers)):
            yield

    @torch.no_grad()
    def _take(self, index: int, router: Router, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, ids_TK = output
        chosen = router.spec.top_k
        if ids_TK.shape[-1] != chosen:  # the dense gate has all of them: whom it would choose counts
            ids_TK = logits_TE.topk(chosen, -1).indices
        counts_E = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[-1])
        self.counts[index] = self.counts[index] + counts_E if index in self.counts else counts_E

    @torch.no_grad()
    def over_ideal(self) -> list[float]:
        """Return, of each layer with several experts, the largest expert's load over that of equal ones: 1 to E."""
        loads = self.own() if self.own else [self.counts[index].double() for index in sorted(self.counts)]
        self.counts = {}
        largest = [load_E.max() * len(load_E) / load_E.sum() for load_E in loads if len(load_E) > 1]
        return torch.stack(largest).tolist() if largest else []
