"""How many processes work on one run, which of them this is, and how they agree: the only place that knows.

``torchrun`` and ``accelerate launch`` start the same command in every process. All of them check the command; the first
one locks the folder, writes and speaks. A step that several can share (``Step.parallel``) runs in all of them, inside
:func:`together`; every other step runs in the first one while the others wait. Code that divides its work asks
:func:`crew`, which is one process alone outside of such a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moesmith.arguments import LAUNCHERS
from moesmith.errors import MoesmithError

PATIENCE = timedelta(days=30)  # a step of the first process may take long; a process that dies ends its connections
LOST = ("gloo", "onnection", "NCCL")  # in what torch says where another process has ended
SMALL = 2**20  # bytes of a tensor below which it is sent together with others
Item = TypeVar("Item")
Value = TypeVar("Value")


class World:
    """The processes of a run.

    Attributes:
        rank: this one, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None) -> None:
        self.rank, self.size, self._control = rank, size, control

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def mine(self, items: Any) -> Any:
        """Take this process's share of a sequence or of a tensor's rows: every size-th."""
        return items[self.rank :: self.size]

    def exchange(self, value: Value) -> list[Value]:
        """Return every process's value, in the order of ranks; all must call it.

        Raises:
            MoesmithError: another process is gone.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self._control)
        except RuntimeError as error:  # gloo's connection to a process that has ended
            raise _gone(error) from error
        if not isinstance(value, _Said):  # a process that stops says so, whatever the others ask at that moment
            for rank, each in enumerate(found):
                if isinstance(each, _Said):
                    raise _stopped(rank, each)
        return found

    def share(self, value: Value) -> Value:
        """Return the first process's value; all must call it."""
        return self.exchange(value)[0]

    def merged(self, parts: Mapping[Any, Value]) -> dict[Any, Value]:
        """Return all processes' entries in one mapping; all must call it."""
        return {key: value for part in self.exchange(dict(parts)) for key, value in part.items()}

    def ordered(self, own: Sequence[Value]) -> list[Value]:
        """Return what all processes made of the items that :meth:`mine` divided, in the items' order; all call it."""
        parts = self.exchange(list(own))
        found: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            found[rank :: self.size] = part
        return found

    def add(self, *tensors: Tensor) -> None:
        """Add up every process's tensors, in place; all must call it.

        Small ones travel together: a message of its own for each costs more than what is in it.
        """
        if self.size == 1:
            return
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes < SMALL and len(tensors) > 1:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                dist.all_reduce(tensor)
        for some in small.values():
            flat = torch.cat([tensor.flatten() for tensor in some])
            dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def owner(self, number: int) -> int:
        """Return the rank of the process that has item ``number`` of what :meth:`mine` divides."""
        return number % self.size

    def reduce(self, owner: int, *tensors: Tensor) -> None:
        """Add up every process's tensors in the owner's, in place; the others' are lost. All must call it."""
        for tensor in tensors if self.size > 1 else ():
            dist.reduce(tensor, owner)

    def hand_out(self, owner: int, *tensors: Tensor) -> None:
        """Fill every process's tensors with the owner's, in place; contiguous, on the CPU. All must call it."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor.view(torch.uint8), owner, group=self._control)  # gloo does not know all dtypes

    def rows(self, part: Tensor) -> list[Tensor]:
        """Return every process's tensor, of any first dimension, on the CPU; all must call it."""
        if self.size == 1:
            return [part]
        counts = self.exchange(len(part))
        most = part.new_zeros(max(counts), *part.shape[1:], device="cpu")
        most[: len(part)] = part.cpu()
        flat = most.contiguous().view(torch.uint8).flatten()  # gloo does not know all dtypes
        found = [torch.empty_like(flat) for _ in counts]
        dist.all_gather(found, flat, group=self._control)
        return [each.view(part.dtype).view(most.shape)[:count] for each, count in zip(found, counts, strict=True)]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let all processes pass the end of the ``with`` or none: an error of one is an error of all.

        Raises:
            MoesmithError: this process's own, or what another one said.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as own:
            error = own
        if self.size > 1 and not getattr(error, "agreed", False):
            said = self.exchange(_Said(None if error is None else _words(error)))
            if error is None:
                for rank, each in enumerate(said):
                    if each.text is not None:
                        raise _stopped(rank, each)
        if error is not None:
            raise error


@dataclass(frozen=True)
class _Said:
    """What a process says at the end of an agreement: nothing, or why it stops."""

    text: str | None


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, MoesmithError) else f"{type(error).__name__}: {error}"


def _stopped(rank: int, said: _Said) -> MoesmithError:
    return _agreed(MoesmithError(f"process {rank} of this run stopped: {said.text}"))


def _gone(error: BaseException) -> MoesmithError:
    return _agreed(MoesmithError("another process of this run has ended", "What it said before tells why."))


def _agreed(error: Any) -> Any:
    """Mark an error of which the others know, or cannot be told."""
    error.agreed = True
    return error


ALONE = World()
_together = False


def world() -> World:
    """Return the processes that a launcher started; this one alone without a launcher.

    Raises:
        MoesmithError: a launcher says how many there are, but not how to reach them.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    return _joined(count) if count.isdigit() and int(count) > 1 else ALONE


@cache
def _joined(count: str) -> World:
    if not dist.is_initialized():
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise MoesmithError(f"WORLD_SIZE is {count}, but {missing[0]} is not set", "Start it with torchrun.")
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(kinds, timeout=PATIENCE)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), control)


def beside() -> int:
    """Return how many processes of the run share this machine, this one included; all if the launcher does not say."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(max(1, int(count)), world().size) if count.isdigit() else world().size


def refuse_others() -> None:
    """Refuse launchers whose processes this module cannot connect.

    Raises:
        MoesmithError: an MPI started several processes.
    """
    for name in LAUNCHERS:
        count = os.environ.get(name, "")
        if name != "WORLD_SIZE" and count.isdigit() and int(count) > 1 and "WORLD_SIZE" not in os.environ:
            raise MoesmithError(f"started as one of {count} processes ({name}={count})", "Start it with torchrun.")


def crew() -> World:
    """Return the processes that share the work at hand: all of a run inside :func:`together`, else this one alone."""
    return world() if _together else ALONE


@contextmanager
def together() -> Iterator[None]:
    """Inside the ``with``, all processes of the run do the same work and divide it where they can."""
    global _together
    before, _together = _together, True
    try:
        yield
    except Exception as error:
        if world().size == 1:
            raise
        # the others may wait for this one's share: it ends, and they see its connection end
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            raise _gone(error) from error
        error.untold = True  # type: ignore[attr-defined]
        raise _agreed(error) from None
    finally:
        _together = before


@contextmanager
def alone() -> Iterator[None]:
    """Inside the ``with``, this process works by itself, on a share that the others do not have."""
    global _together
    before, _together = _together, False
    try:
        yield
    finally:
        _together = before


def own_device(name: str | torch.device) -> str | torch.device:
    """Return the device of this process: of several on a machine with CUDA each takes one of its own."""
    if world().size == 1 or str(name) not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
