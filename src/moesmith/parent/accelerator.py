"""Ask a device about fp64 and its memory, retry with less when that is full, and sum more precisely than fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from moesmith.console import say
from moesmith.errors import MoesmithError

T = TypeVar("T")
CURE = "Lower its window, give --memory, or take another device; 'moesmith plan' says what each needs."


@cache
def has_double(device: torch.device) -> bool:
    """Whether the device computes in fp64; Apple's and some of Intel's do not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True


def closed_form_device(device: torch.device) -> torch.device:
    """Return the device that solves linear systems: the given one, or the CPU where that has no fp64.

    Devices without fp64 lack half of the decompositions as well, and a system is one matrix per layer.
    """
    return device if has_double(device) else torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Return the device's free bytes; if it shares the system's memory, or does not say, at most the system's."""
    system = psutil.virtual_memory().available
    if device.type == "cpu":
        return system
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):  # CUDA, XPU
        return int(module.mem_get_info(device)[0])
    if hasattr(module, "recommended_max_memory"):  # MPS: a part of the system's memory is for the GPU
        return min(system, int(module.recommended_max_memory()) - int(module.driver_allocated_memory()))
    return system


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors took on the device so far, else what it holds now, else ``None``."""
    module = torch.get_device_module(device)
    for name in ("max_memory_allocated", "driver_allocated_memory"):
        if device.type != "cpu" and hasattr(module, name):
            return int(getattr(module, name)())
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory is full; some back ends have no exception of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def release(device: torch.device) -> None:
    """Return the allocator's reserve to the device, so that smaller blocks can be made of it."""
    empty = getattr(torch.get_device_module(device), "empty_cache", None)  # torch.accelerator's leaves Apple's out
    if empty is not None:
        empty()


def halving(what: str, device: torch.device, batch: int, run: Callable[[int], T]) -> T:
    """Call ``run(batch)``, and again from its start with half of the batch whenever the device is out of memory.

    Args:
        what: names the work in messages.
        device: where it runs.
        batch: windows per forward pass at first.
        run: the work; it must leave nothing behind when it raises.

    Raises:
        MoesmithError: a batch of one window does not fit either.
    """
    while True:
        try:
            return run(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if batch == 1:
                raise full(what, device) from None
        batch //= 2  # after the except: the error's traceback holds the tensors of the attempt
        release(device)
        say(f"{what}: out of memory on {device}, trying again with {batch} windows at a time")


def full(what: str, device: torch.device) -> MoesmithError:
    """Return the error to raise when the smallest batch does not fit."""
    return MoesmithError(f"{what}: {device} is out of memory with a single sequence at a time", CURE)


class Sum:
    """A running sum of fp32 tensors of one shape, more precise than fp32 on every device.

    It is kept in fp64 where the device has it, else as two fp32 numbers: the sum, and what rounding took from it so far
    (Knuth's two-sum, which is exact for every two numbers). An addition then errs by about 2⁻⁴⁷ of the sum.
    """

    def __init__(self, like: Tensor) -> None:
        double = has_double(like.device)
        self.high = torch.zeros_like(like, dtype=torch.float64 if double else torch.float32)
        self.low = None if double else torch.zeros_like(self.high)

    def add(self, x: Tensor) -> None:
        """Add a tensor."""
        if self.low is None:
            self.high += x
            return
        total = self.high + x
        mine = total - self.high
        lost = (self.high - (total - mine)) + (x - mine) + self.low
        self.high = total + lost  # low keeps what fits into no bit of high
        self.low = lost - (self.high - total)

    def value(self) -> Tensor:
        """The sum so far, fp64 on the CPU."""
        high = self.high.cpu().double()
        return high if self.low is None else high + self.low.cpu().double()

    def single(self) -> Tensor:
        """The sum so far, on its device: fp64, or rounded to fp32."""
        return self.high if self.low is None else self.high + self.low
