"""Choose the device and the dtype that models compute in; the weights may be stored in another dtype.

A parent's weights are *stored* in the dtype of its files: digests, carvings and exports are made from those. What a
model *computes* in is chosen per machine: a CPU without bf16 units emulates bf16 at a fraction of its fp32 speed, one
with them runs it faster. So products of the parent's own shapes are timed, and the fastest sound dtype wins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.parent.accelerator import free_memory
from moesmith.parent.hooks import hooked

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO = "auto"
ACCELERATORS = ("cuda", "xpu", "mps")
HALF_RANGE = 65504.0  # the largest fp16 number
HEADROOM = 16  # activations of unseen text may be this many times larger than those that were examined
PRODUCT = 5e8  # most FLOPs of a timed product: a fraction of a second where bf16 is emulated
ROUNDS = 3

DType = str | torch.dtype
Device = str | torch.device


def parse_dtype(name: DType | None) -> torch.dtype | None:
    """Return the dtype for ``bf16``, ``fp16``, ``fp32``, a long name or a ``torch.dtype``; ``None`` for ``auto``.

    Raises:
        MoesmithError: models do not compute in it.
    """
    if name is None or name == AUTO:
        return None
    found = DTYPES.get(name) or getattr(torch, name, None) if isinstance(name, str) else name
    if found not in DTYPES.values():
        raise MoesmithError(f"models do not compute in {name}", f"Give one of auto, {', '.join(DTYPES)}.")
    return found


def short(dtype: torch.dtype) -> str:
    """Return a dtype's short name: ``bf16`` for ``torch.bfloat16``, and so on."""
    return next((name for name, known in DTYPES.items() if known == dtype), long_name(dtype))


def long_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in headers and configs: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def keep_dtype(what: str, before: torch.dtype | None, dtype: DType) -> DType:
    """Return the dtype that something began to compute in, for ``auto``; the one asked for if nothing has begun.

    Args:
        what: says what is continued: ``"runs/mine holds a run"``.
        before: the dtype that it began in; ``None`` if it is new.
        dtype: the one asked for.

    Raises:
        MoesmithError: the one asked for is another.
    """
    if before is None:
        return dtype
    if parse_dtype(dtype) not in (None, before):
        raise MoesmithError(
            f"{what} that computes in {short(before)}, not {dtype}",
            "Leave --dtype out to continue it, or give another --out.",
        )
    return before


def named(long: str) -> torch.dtype:
    """Return the dtype of a :func:`long_name`, such as a run's header has.

    Raises:
        MoesmithError: models are not stored in it.
    """
    for dtype in DTYPES.values():
        if long == long_name(dtype):
            return dtype
    raise MoesmithError(f"models are not stored in {long!r:.40}", "Fetch or make the folder that says so again.")


# --- devices


def accelerators() -> list[torch.device]:
    """List every accelerator of this machine that torch can use."""
    found = []
    for kind in ACCELERATORS:
        module: Any = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found += [torch.device(kind, index) for index in range(module.device_count())]
    return found


def choose_device(name: Device = AUTO) -> torch.device:
    """Return the named device; for ``auto`` the accelerator with the most free memory, or the CPU.

    Raises:
        MoesmithError: there is no such device here; the error names those there are.
    """
    known = accelerators()
    if name == AUTO:
        return max(known, key=free_memory, default=torch.device("cpu"))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise MoesmithError(f"there is no device {name!r}", f"Give one of {_named(known)}.") from error
    if device.type in ACCELERATORS:
        mine = [other for other in known if other.type == device.type]
        if device.index is None and mine:
            return max(mine, key=free_memory)
        if device not in mine:
            built = "" if torch.version.cuda or device.type != "cuda" else ": this torch was built for the CPU only"
            raise MoesmithError(f"there is no device {name} here{built}", f"Give one of {_named(known)}.")
    return device


def _named(known: Sequence[torch.device]) -> str:
    return ", ".join([AUTO, "cpu", *map(str, known)])


# --- dtypes


@dataclass(frozen=True)
class Choice:
    """The device and the dtype that were chosen, and why.

    Attributes:
        device: where models compute.
        dtype: what they compute in.
        rates: FLOPs per second of the parent's products by dtype, where they were measured.
    """

    device: torch.device
    dtype: torch.dtype
    rates: dict[torch.dtype, float]

    def __str__(self) -> str:
        text = f"{short(self.dtype)} on {self.device}"
        if not self.rates:
            return text
        said = [f"{short(d)} {rate / 1e9:,.0f}" for d, rate in sorted(self.rates.items(), key=lambda x: -x[1])]
        return f"{text} (measured, GFLOP/s: {', '.join(said)})"


def product_rates(D: int, F: int, device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, float]:
    """Measure FLOPs per second of a feed-forward network's products in each dtype, (T, D) by (D, F) and back.

    The best of a few rounds counts. Dtypes take turns in them, so that a machine that is busy for a moment does not
    decide the result. Only a part of a large network is timed.
    """
    D, F = min(D, 4096), min(F, 8192)
    T = max(16, min(512, int(PRODUCT / (4 * D * F))))
    best = dict.fromkeys(dtypes, 0.0)
    sides = {
        dtype: (
            torch.full((T, D), 0.5, dtype=dtype, device=device),
            torch.full((F, D), 0.5, dtype=dtype, device=device),
            torch.full((D, F), 0.5, dtype=dtype, device=device),
        )
        for dtype in dtypes
    }
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for dtype, (x_TD, up_FD, down_DF) in sides.items():
                started = time.perf_counter()
                y_TD = nn.functional.linear(nn.functional.linear(x_TD, up_FD), down_DF)
                float(y_TD[0, 0])  # an accelerator works asynchronously: wait for it
                if turn:  # the first turn builds kernels
                    best[dtype] = max(best[dtype], 4 * T * D * F / (time.perf_counter() - started))
    return best


def choose_dtype(
    D: int, F: int, device: torch.device, stored: torch.dtype, half: Callable[[], bool] | None = None
) -> Choice:
    """Choose the fastest sound dtype for a parent of widths ``D`` and ``F``.

    bf16 has the range of fp32 and is what language models are trained in, so both are sound for every parent. fp16 is
    sound where its range suffices: ``half`` checks that, and is called only if fp16 is the fastest.
    """
    dtypes = [torch.bfloat16, torch.float32, *([] if half is None else [torch.float16])]
    rates = product_rates(D, F, device, dtypes)
    # a near tie goes to the dtype of the files: its weights are not copied
    order = sorted(dtypes, key=lambda dtype: -rates[dtype] * (1.1 if dtype == stored else 1.0))
    if order[0] == torch.float16 and half is not None and not half():
        del order[0]
    return Choice(device, order[0], rates)


@torch.no_grad()
def fits_half(model: PreTrainedModel, ids_BS: Tensor) -> bool:
    """Whether weights and activations stay far inside fp16's range, on the text ``ids_BS`` (B, S)."""
    largest = 0.0

    def look(_module: nn.Module, _args: Any, out: Any) -> None:
        nonlocal largest
        for part in out if isinstance(out, tuple) else (out,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.numel():
                largest = max(largest, float(part.abs().max()))

    if any(float(p.abs().max()) * HEADROOM > HALF_RANGE for p in model.parameters()):
        return False
    with hooked((module, look) for module in model.modules() if not list(module.children())):
        model(input_ids=ids_BS.to(model.device), use_cache=False)
    return largest * HEADROOM <= HALF_RANGE


def move(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Move a model's weights to a device and a dtype, in place and one tensor at a time.

    Buffers keep their dtype: rotary frequencies are fp32 whatever the weights are.
    """
    for parameter in model.parameters():
        if parameter.dtype != dtype or parameter.device != device:
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else parameter.dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))
    return model
