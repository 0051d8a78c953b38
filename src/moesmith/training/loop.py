"""Run every stage's training in one loop, on accelerate.

A step is a pure function of (trained weights, optimiser state, step number): the data of a step and its random
numbers follow from the seed and the number, so resuming needs no random-generator state and ends with the same bits
as an undisturbed run. The model stays in its own dtype; the trained parameters have fp32 masters in the optimiser.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from moesmith.console import meter, say
from moesmith.errors import MoesmithError
from moesmith.files.write import write_tensors
from moesmith.parent.accelerator import full, out_of_memory, release
from moesmith.run.settings import LoopSection
from moesmith.training.checkpoint import Checkpoint
from moesmith.training.log import Log
from moesmith.training.sharding import is_spread, part
from moesmith.training.tracking import Loads, Report, Tracking
from moesmith.world import ALONE, World, crew

SAVE_SECONDS = 60.0


def learning_rate(step: int, steps: int, spec: LoopSection) -> float:
    """Return the rate at ``step`` (from 0) of ``steps``: linear warm-up, then constant or cosine to ``min_ratio``."""
    warm = math.ceil(spec.warmup * steps)
    if step < warm:
        return spec.lr * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.lr
    done = (step - warm) / max(1, steps - 1 - warm)
    return spec.lr * (spec.min_ratio + (1 - spec.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def steps_of(spec: LoopSection) -> int:
    """Return how many optimiser steps ``spec.tokens`` make, rounded up."""
    return math.ceil(spec.tokens / (spec.batch * spec.window))


class Masters:
    """AdamW on fp32 copies of the trained parameters; the model's own copies follow after each step.

    Args:
        parameters: what is trained, by name.
        spec: the stage's settings.
        team: the processes whose gradients of whole parameters are averaged here; this one alone where DDP does it.
            Gradients of parameters that are spread come averaged.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], spec: LoopSection, team: World = ALONE) -> None:
        self.parameters, self.team = parameters, team
        self.fp32 = {name: part(p.detach()).float().clone() for name, p in parameters.items()}
        self.spread = any(is_spread(p.data) for p in parameters.values())
        for master in self.fp32.values():
            master.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.fp32.values(), lr=spec.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=spec.weight_decay, fused=True
        )

    def step(self, lr: float, clip: float | None) -> float:
        """Clip, update and copy back; returns the gradient norm before clipping."""
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            self.fp32[name].grad = torch.zeros_like(self.fp32[name]) if grad is None else part(grad).float()
            parameter.grad = None
        whole, parts = self._gradients(spread=False), self._gradients(spread=True)
        if self.team.size > 1:
            self.team.add(*whole)
            for grad in whole:
                grad /= self.team.size
        length = nn.utils.get_total_norm(whole)
        if parts:
            crew().add(square := nn.utils.get_total_norm(parts).square())
            length = (length.square() + square).sqrt()
        nn.utils.clip_grads_with_norm_(self.fp32.values(), clip or math.inf, length)
        if math.isfinite(norm := float(length)):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            self.write_back()
        return norm

    def _gradients(self, *, spread: bool) -> list[Tensor]:
        """Return the masters' gradients of parameters that are spread, or of the others."""
        named = ((self.parameters[name].data, master.grad) for name, master in self.fp32.items())
        return [grad for weight, grad in named if grad is not None and is_spread(weight) is spread]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        for name, parameter in self.parameters.items():
            part(parameter.data).copy_(self.fp32[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything a checkpoint needs."""
        kept = {f"master.{name}": master for name, master in self.fp32.items()}
        for name, master in self.fp32.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                kept[f"{key}.{name}"] = value
        return kept

    def wanted(self) -> dict[str, Tensor]:
        """Return tensors of the shapes that a checkpoint holds."""
        kept = {f"{kind}.{name}": m for name, m in self.fp32.items() for kind in ("master", "exp_avg", "exp_avg_sq")}
        return kept | {f"step.{name}": torch.zeros(()) for name in self.fp32}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        with torch.no_grad():
            for name, master in self.fp32.items():
                master.copy_(tensors[f"master.{name}"])
                state = {key: tensors[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                # a fused optimiser counts its steps on the parameters' device
                self.optimizer.state[master] = {key: value.to(master.device) for key, value in state.items()}
        self.write_back()


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Inside the ``with``, compute as a fresh process does, whatever the caller has switched on.

    No ``no_grad`` or ``inference_mode``, under which nothing trains; no autocast and no other default dtype or device,
    which would change results.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for mode in (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)):
            stack.enter_context(mode)
        if torch.get_default_device().type != "cpu":  # only then: the mode costs something in every operation
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def refuse_inference(model: nn.Module) -> None:
    """Refuse weights that were made under ``torch.inference_mode``: no gradient goes through them.

    Raises:
        MoesmithError: a parameter is one of these; it is named.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise MoesmithError(
                f"{name} was made under torch.inference_mode(), and nothing can be trained through it",
                "Load or build the model outside of it.",
            )


@dataclass
class Outcome:
    """What a stage's training did."""

    steps: int
    tokens: int
    trainable: int
    first_loss: float
    last_loss: float
    seconds: float

    def metrics(self) -> dict[str, Any]:
        """Return the numbers for the stage's manifest."""
        return self.__dict__ | {"tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1)}


def batch_rows(blocks: int, step: int, batch: int, seed: int) -> Tensor:
    """Choose which of ``blocks`` sequences step number ``step`` sees: shuffled anew in every pass over them."""
    start = step * batch
    rows: list[int] = []
    for position in range(start, start + batch):
        epoch, offset = divmod(position, blocks)
        rows.append(int(_order(blocks, seed * 1_000_003 + epoch)[offset]))
    return torch.tensor(rows)


@lru_cache(maxsize=2)  # of a pass and the next one: a step may end one and begin the other
def _order(blocks: int, seed: int) -> Tensor:
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))


@ordinary_mode()
def train(
    objective: Any,
    parameters: dict[str, nn.Parameter],
    blocks: Tensor,
    spec: LoopSection,
    folder: Path,
    *,
    seed: int = 0,
    label: str = "training",
    report: Report | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Train ``parameters`` of ``objective`` on ``blocks`` as ``spec`` says; a checkpoint in ``folder`` is continued.

    Dropout and noise of a micro-batch follow from the seed, the step and its place in the batch, so several processes
    draw what one does with the same micro-batch. When the device is out of memory the step is repeated with half of
    the micro-batch, which stays: without random numbers its gradients are the same up to rounding, with them it draws
    other numbers from the same distribution.

    Args:
        objective: a module such as :class:`~moesmith.training.student.Student` that maps token ids (B, S) to the scalar
            loss of its ``model``, in which everything but ``parameters`` is frozen. Numbers in its ``measured`` go
            into the log; its ``begin(step, steps)`` is called before a step, if it has one.
        parameters: trained parameters by name, in the model's dtype.
        blocks: (N, window) token ids, of any integer type: each batch becomes int64 when it is used.
        spec: the stage's settings.
        folder: holds ``log.jsonl`` (a line per step) and a checkpoint (``training.checkpoint``).
        seed: seed of data order, dropout and router noise.
        label: what the progress line says.
        report: where the numbers of each step go besides ``log.jsonl``; of several processes the first one's routers
            are watched.
        on_step: called with the number of finished steps.

    Returns:
        What the training did. The model holds the trained weights.

    Raises:
        MoesmithError: the loss is not finite; the step's data is in ``folder``. Or the device has no room for a single
            sequence, or the processes cannot share a batch evenly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = objective.model
    refuse_inference(model)
    device = model.device
    accelerator = _processes(device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if spec.batch % world:
        raise MoesmithError(f"{label}: a batch of {spec.batch} sequences cannot be shared by {world} processes",
                            f"Give a batch that is a multiple of {world}.")  # fmt: skip
    steps = steps_of(spec)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    trainable = sum(p.numel() for p in parameters.values())
    parted = any(is_spread(weight) for weight in model.parameters())
    masters = Masters(parameters, spec, crew() if parted else ALONE)
    student = accelerator.prepare_model(objective) if accelerator and not parted else objective
    if spec.checkpointing:
        model.gradient_checkpointing_enable()
    first, last, done, before, mark, lines = math.nan, math.nan, 0, 0.0, "", None
    checkpoint = Checkpoint(folder, {name: p.data for name, p in parameters.items()})
    if (state := checkpoint.state()) is not None:
        masters.load(checkpoint.load(masters.wanted()))
        done, first, last, before = state["step"], state["first_loss"], state["last_loss"], state["seconds"]
        mark, lines = state.get("report", ""), state.get("log")
        say(f"{label}: continuing at step {done} of {steps}")
    log = Log(folder / "log.jsonl", done, lines) if rank == 0 else None
    share = spec.batch // world
    micro = min(spec.micro_batch, share)
    started = saved = time.monotonic()
    writing = 0.0

    def gradients(rows: Tensor, step: int, micro: int) -> float:
        """Leave the gradients of a step's rows on the parameters; return the mean loss."""
        losses = []
        for place, chosen in zip(range(rank * share, (rank + 1) * share, micro), rows.split(micro), strict=True):
            # a micro-batch draws by its place in the batch: the same numbers in whatever process it runs
            torch.manual_seed(seed * 1_000_003 + step + (place << 40))
            loss = student(blocks[chosen].to(device, torch.int64)) * (len(chosen) / len(rows))
            loss.backward()
            losses.append(loss.detach())
        return sum(float(loss) for loss in losses)  # read once the device has all of the step's work

    def save(step: int) -> None:
        state: dict[str, Any] = {"step": step, "first_loss": first, "last_loss": last, "report": tracking.mark}
        state |= {"seconds": before + time.monotonic() - started, "log": log.settled() if log is not None else None}
        checkpoint.save(masters.tensors(), state)

    tracking = Tracking(report if report and rank == 0 else Report(), spec.model_dump(mode="json"), mark, done)
    loads = Loads(objective)
    begin = getattr(objective, "begin", None)
    model.train()
    with ExitStack() as held:
        held.callback(tracking.close)
        if tracking.client is not None:
            held.enter_context(loads.watching())
        bar = held.enter_context(meter(label, (steps - done) * spec.batch * spec.window))
        for step in range(done, steps):
            everyones = batch_rows(len(blocks), step, spec.batch, seed)
            rows = everyones[rank * share : (rank + 1) * share]
            begun = time.monotonic()
            if begin is not None:
                begin(step, steps)
            while True:
                try:
                    loss = gradients(rows, step, micro)
                    break
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    if micro == 1 or world > 1:  # the other processes wait for this one's gradients
                        raise full(label, device) from None
                for parameter in parameters.values():  # after the except, whose traceback holds the step's tensors
                    parameter.grad = None
                micro //= 2
                release(device)
                say(f"{label}: out of memory on {device}, going on with a micro-batch of {micro} from step {step}")
            if accelerator:
                loss = float(accelerator.reduce(torch.tensor(loss, device=accelerator.device), "mean"))
            lr = learning_rate(step, steps, spec)
            norm = masters.step(lr, spec.clip) if math.isfinite(loss) else math.nan
            if not math.isfinite(loss + norm):
                where = folder / f"nonfinite-step-{step}.safetensors"
                write_tensors(where, {"ids": blocks[everyones]}, {"loss": str(loss), "step": str(step)})
                raise MoesmithError(f"{label}: the loss is not finite at step {step}; its data is in {where}",
                                    "Lower the stage's lr and start in a new folder.")  # fmt: skip
            first, last = (loss if step == 0 else first), loss
            seconds = time.monotonic() - begun
            if log is not None:
                record = {"step": step + 1, "tokens": (step + 1) * spec.batch * spec.window, "loss": round(loss, 5)}
                record |= {"lr": lr, "grad_norm": round(norm, 5)} | getattr(objective, "measured", {})
                record |= {"tokens_per_second": round(spec.batch * spec.window / seconds, 1)}
                log.write(record)
                if tracking.client is not None:
                    tracking.log(step + 1, record, loads.over_ideal())
            now = time.monotonic()
            due = now - saved > SAVE_SECONDS * max(1.0, writing)  # large checkpoints less often
            if crew().share(due) if masters.spread else due and rank == 0:
                save(step + 1)
                saved = time.monotonic()
                writing = saved - now
            bar.advance(spec.batch * spec.window, f"loss {loss:.3f}")
            if on_step is not None:
                on_step(step + 1)
    if masters.spread or rank == 0:
        save(steps)
    if accelerator:
        accelerator.wait_for_everyone()
    model.eval()
    if spec.checkpointing:
        model.gradient_checkpointing_disable()
    model.requires_grad_(False)
    seconds = before + time.monotonic() - started
    return Outcome(steps, steps * spec.batch * spec.window, trainable, first, last, round(seconds, 1))


def _processes(device: torch.device) -> Accelerator | None:
    """Return what several processes share; ``None`` for one, which needs only its model's device.

    Accelerate decides on a device once per process, so it is used only where needed: conversions on a GPU and on the
    CPU may follow each other.
    """
    if crew().size == 1:
        return None
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[unused])
