"""Streaming statistics of the dense parent, taken by hooks in ordinary forward passes.

Two kinds of passes over calibration windows:

* :func:`channel_moments`: mean and variance per channel of the ``down_proj`` input, for one domain. They are
  exact over tokens (FLAP's published estimator sums over sequences and only holds for batches of one),
  small, and re-used for every ratio, method and clustering.
* ``stream.Stream``: second moments by group of text or by expert, one layer after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.arguments import ceil_div
from moesmith.console import meter
from moesmith.parent.accelerator import Sum, halving
from moesmith.parent.hooks import hooked
from moesmith.parent.layerwise import last_hidden
from moesmith.parent.load import Parent


@dataclass
class Moments:
    """Mean and variance per layer and channel over ``count`` tokens; ``mean_LF`` and ``var_LF`` are fp32 (L, F).

    ``slopes_MLF``, where they were taken, are gradients times weights (``methods.taylor.slopes``), (M, L, F) fp32.
    """

    count: int
    mean_LF: Tensor
    var_LF: Tensor
    slopes_MLF: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as named tensors, to save."""
        slopes = {} if self.slopes_MLF is None else {"slopes": self.slopes_MLF}
        return {"count": torch.tensor(self.count), "mean": self.mean_LF, "var": self.var_LF} | slopes

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Moments:
        """Read what :meth:`tensors` returned."""
        return cls(int(tensors["count"]), tensors["mean"], tensors["var"], tensors.get("slopes"))


def pool(parts: Sequence[Moments]) -> Moments:
    """Pool the moments of several domains, each domain with equal weight, whatever its token count."""
    if len(parts) == 1:
        return parts[0]
    mean_LF = torch.stack([part.mean_LF for part in parts]).mean(0)
    second_LF = torch.stack([part.var_LF + part.mean_LF**2 for part in parts]).mean(0)
    slopes = [part.slopes_MLF for part in parts if part.slopes_MLF is not None]
    slopes_MLF = torch.stack(slopes).mean(0) if len(slopes) == len(parts) else None
    return Moments(sum(part.count for part in parts), mean_LF, (second_LF - mean_LF**2).clamp_min(0), slopes_MLF)


class Channel:
    """Shifted sums of one layer's activations: exact mean and variance without cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self.shift_F: Tensor | None = None

    def add(self, a_TF: Tensor) -> None:
        if self.shift_F is None:
            self.shift_F = a_TF[:256].float().mean(0)
            self.sum_F, self.square_F = Sum(self.shift_F), Sum(self.shift_F)
        # on a CPU in blocks small enough to stay in cache between the conversion and the two sums; shifted sums of one
        # batch are small numbers, so fp32 holds them, and batches are added up in fp64
        sums, squares = [], []
        for block in a_TF.split(384 if a_TF.device.type == "cpu" else len(a_TF)):
            x_TF = block.float() - self.shift_F
            sums.append(x_TF.sum(0))
            squares.append(x_TF.square_().sum(0))
        self.sum_F.add(torch.stack(sums).sum(0))
        self.square_F.add(torch.stack(squares).sum(0))
        self.count += len(a_TF)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (F,) fp32 on the CPU."""
        assert self.shift_F is not None
        mean_F = self.sum_F.value() / self.count
        variance_F = (self.square_F.value() / self.count - mean_F**2).clamp_min(0)
        return (mean_F + self.shift_F.cpu()).float(), variance_F.float()


def watch(modules: Sequence[nn.Module], sinks: Sequence[Any]) -> AbstractContextManager[None]:
    """Feed each module's input, flattened to (T, width), to its sink while the ``with`` lasts."""

    def hook(sink: Any):  # type: ignore[no-untyped-def]
        return lambda _module, args: sink.add(args[0].detach().flatten(0, -2))

    return hooked([(m, hook(sink)) for m, sink in zip(modules, sinks, strict=True)], before=True)


def channel_moments(parent: Parent, windows: Tensor, batch: int = 8, label: str = "moments") -> Moments:
    """Compute mean and variance of every FFN channel over the tokens of ``windows`` (N, window) in one forward pass.

    The variance divides by the token count; a constant factor does not change any ranking.
    """

    def run(batch: int) -> Moments:
        sinks = [Channel() for _ in parent.ffns]
        with watch([ffn.down for ffn in parent.ffns], sinks), meter(label, windows.numel()) as bar, torch.no_grad():
            for _ in last_hidden(parent.decoder, windows.split(batch), bar=bar):  # no statistic needs logits
                pass
        means, variances = zip(*(sink.result() for sink in sinks), strict=True)
        return Moments(sinks[0].count, torch.stack(means), torch.stack(variances))

    parent.model.eval()
    return halving(label, parent.device, batch, run)


@dataclass
class Second:
    """First and second moments of one layer's input: ``mean_N`` (N,), ``gram_NN`` = E[x xᵀ] (N, N), both fp32.

    They stay on the model's device, where closed forms are solved.
    """

    count: int
    mean_N: Tensor
    gram_NN: Tensor


class Sums:
    def __init__(self, width: int = 0, device: torch.device | None = None) -> None:
        self.count = 0
        self.sum_N, self.gram_NN = torch.zeros(width, device=device), torch.zeros(width, width, device=device)

    def add(self, x_TN: Tensor, count: int | None = None) -> None:
        """Add rows; give ``count`` if some of them are padding."""
        x_TN = x_TN.float()
        if self.count == 0:
            self.sum_N = torch.zeros_like(x_TN[0])
            self.gram_NN = self.sum_N.new_zeros(len(self.sum_N), len(self.sum_N))
        self.sum_N += x_TN.sum(0)
        for rows in _blocks(x_TN.shape[1]):  # a Gram matrix is symmetric: its upper half is enough
            self.gram_NN[rows, rows.start :].addmm_(x_TN[:, rows].T, x_TN[:, rows.start :])
        self.count += len(x_TN) if count is None else count

    def result(self) -> Second:
        gram_NN = self.gram_NN.div_(max(1, self.count))
        for rows in _blocks(len(gram_NN)):
            gram_NN[rows.stop :, rows] = gram_NN[rows, rows.stop :].T
        return Second(self.count, self.sum_N / max(1, self.count), gram_NN)


BLOCK = 384  # rows of a Gram matrix that are computed together: products stay large, and little is computed twice


def _blocks(width: int) -> Iterator[slice]:
    """Cut ``width`` rows into consecutive slices."""
    for start in range(0, width, BLOCK):
        yield slice(start, min(start + BLOCK, width))


@contextmanager
def fast_products(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 matrix products multiply in fewer bits and add in fp32, if the factors have few bits anyway.

    A bf16 activation is exact in the product, so this costs no accuracy (relative error 4e-7 measured) and is
    about five times as fast on a CPU with bf16 units. CUDA's TF32 has the mantissa of fp16 and the range of bf16.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    if dtype == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        cuda.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


ALIGN = 16  # rows; a CPU's matrix kernels are made per shape, so few shapes serve every batch


def rows_of(x_TN: Tensor, ids_T: Tensor, experts: int) -> Iterator[tuple[int, Tensor, int]]:
    """Yield for each expert with tokens: its index, its rows padded with rows of zeros, and how many are its own."""
    counts = torch.bincount(ids_T, minlength=experts).tolist()  # the only wait for the device
    rows = ids_T.argsort(stable=True).split(counts)
    for expert, (mine_N, count) in enumerate(zip(rows, counts, strict=True)):
        if count:  # rows of zeros change no sum
            align = ALIGN if x_TN.device.type == "cpu" else 1
            padded_NF = x_TN.new_zeros(ceil_div(count, align) * align, x_TN.shape[1])
            padded_NF[:count] = x_TN[mine_N]
            yield expert, padded_NF, count


def merge(parts: Sequence[Second], weights: Sequence[float]) -> Second:
    """Compute a weighted mean of second moments, on their device; the weights are normalised."""
    total = sum(weights)
    mean = sum((w / total * part.mean_N for part, w in zip(parts, weights, strict=True)), torch.zeros(()))
    gram = sum((w / total * part.gram_NN for part, w in zip(parts, weights, strict=True)), torch.zeros(()))
    return Second(sum(part.count for part in parts), mean, gram)


def gram_bytes(D: int, F: int, groups: int, *, gram: bool) -> int:
    """Count the bytes of one layer's second moments: of router inputs, with ``gram`` also of channels, per group."""
    return 4 * groups * (D**2 + (F**2 if gram else 0))
