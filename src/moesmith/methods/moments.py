"""Streaming statistics of the dense parent, taken by hooks in ordinary forward passes.

Two kinds of passes over calibration windows:

* :func:`channel_moments`: mean and variance per channel of the ``down_proj`` input, for one domain. They are
  exact over tokens (FLAP's public estimator sums over sequences and only holds for batches of one, dive.md §3.1),
  small, and re-used for every ratio, method and clustering.
* :func:`group_moments`: the same, and second moments per group of domains: the Gram matrix of the ``down_proj`` input
  for a refit, and of the router input for a closed-form router. F² numbers per layer and group, so layers are
  taken in groups that fit in memory; where all fit at once this is the only pass that a recipe needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.console import Meter, meter
from moesmith.native.experts import ALIGN
from moesmith.parent.accelerator import Sum, halving
from moesmith.parent.layerwise import last_hidden
from moesmith.parent.load import Parent


@dataclass
class Moments:
    """Mean and variance per layer and channel over ``count`` tokens; ``mean_LF`` and ``var_LF`` are fp32 (L, F)."""

    count: int
    mean_LF: Tensor
    var_LF: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, to save."""
        return {"count": torch.tensor(self.count), "mean": self.mean_LF, "var": self.var_LF}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Moments:
        """The reverse of :meth:`tensors`."""
        return cls(int(tensors["count"]), tensors["mean"], tensors["var"])


def pool(parts: Sequence[Moments]) -> Moments:
    """Moments of several domains together, each domain with equal weight, whatever its token count."""
    if len(parts) == 1:
        return parts[0]
    mean_LF = torch.stack([part.mean_LF for part in parts]).mean(0)
    second_LF = torch.stack([part.var_LF + part.mean_LF**2 for part in parts]).mean(0)
    return Moments(sum(part.count for part in parts), mean_LF, (second_LF - mean_LF**2).clamp_min(0))


class _Channel:
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
        """Mean and variance, (F,) fp32 on the CPU."""
        assert self.shift_F is not None
        mean_F = self.sum_F.value() / self.count
        variance_F = (self.square_F.value() / self.count - mean_F**2).clamp_min(0)
        return (mean_F + self.shift_F.cpu()).float(), variance_F.float()


@contextmanager
def _watch(modules: Sequence[nn.Module], sinks: Sequence[Any]) -> Iterator[None]:
    """Feed each module's input, flattened to (T, width), to its sink while the ``with`` lasts."""

    def hook(sink: Any):  # type: ignore[no-untyped-def]
        return lambda _module, args: sink.add(args[0].detach().flatten(0, -2))

    handles = [m.register_forward_pre_hook(hook(sink)) for m, sink in zip(modules, sinks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(parent: Parent, windows: Tensor, batch: int, bar: Meter) -> None:
    """Forward passes without the output head: no statistic needs logits."""
    parent.model.eval()
    with torch.no_grad():
        for _ in last_hidden(parent.decoder, windows.split(batch), bar=bar):
            pass


def channel_moments(parent: Parent, windows: Tensor, batch: int = 8, label: str = "moments") -> Moments:
    """Mean and variance of every FFN channel over the tokens of ``windows`` (N, window), in one forward pass.

    The variance divides by the token count; a constant factor does not change any ranking (dive.md §10.1).
    """

    def run(batch: int) -> Moments:
        sinks = [_Channel() for _ in parent.ffns]
        with _watch([ffn.down for ffn in parent.ffns], sinks), meter(label, windows.numel()) as bar:
            _run(parent, windows, batch, bar)
        return _moments(sinks)

    return halving(label, parent.device, batch, run)


def _moments(sinks: Sequence[_Channel]) -> Moments:
    means, variances = zip(*(sink.result() for sink in sinks), strict=True)
    return Moments(sinks[0].count, torch.stack(means), torch.stack(variances))


@dataclass
class Second:
    """First and second moments of one layer's input: ``mean_N`` (N,), ``gram_NN`` = E[x xᵀ] (N, N), both fp32.

    They stay on the model's device, where closed forms are solved.
    """

    count: int
    mean_N: Tensor
    gram_NN: Tensor


class _Second:
    def __init__(self, width: int = 0, device: torch.device | None = None) -> None:
        self.count = 0
        self.sum_N, self.gram_NN = torch.zeros(width, device=device), torch.zeros(width, width, device=device)

    def add(self, x_TN: Tensor, count: int | None = None) -> None:
        """Add rows; ``count`` where some of them are padding."""
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
    """Consecutive slices that cover ``width`` rows."""
    for start in range(0, width, BLOCK):
        yield slice(start, min(start + BLOCK, width))


@contextmanager
def fast_products(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 matrix products multiply in fewer bits and add in fp32, when the factors came from such a model anyway.

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


@dataclass
class Group:
    """What one group of domains has, lists over the layers that were watched.

    Attributes:
        inputs: second moments of the router's input.
        channels: of the ``down_proj`` input; empty unless asked for.
        domains: channel moments of each of its domains.
    """

    inputs: list[Second]
    channels: list[Second]
    domains: list[Moments]


def group_moments(
    parent: Parent, texts: Sequence[Sequence[Tensor]], layers: Sequence[int], *, gram: bool, batch: int = 8
) -> list[Group]:
    """Moments of groups of domains, in one pass.

    Args:
        parent: the dense model.
        texts: by group and domain (N, window) token ids.
        layers: which layers to watch in this pass.
        gram: also collect the Gram matrix of the ``down_proj`` input, and the domains' channel moments.
        batch: windows per forward pass.
    """
    watched = [parent.ffns[index] for index in layers]
    total = sum(windows.numel() for group in texts for windows in group)

    def run(batch: int) -> list[Group]:
        results = []
        with fast_products(parent.dtype), meter("second moments", total) as bar:
            for group in texts:
                inputs, channels = [_Second() for _ in watched], [_Second() for _ in watched if gram]
                domains = []
                with (
                    _watch([ffn.module for ffn in watched], inputs),
                    _watch([ffn.down for ffn in watched] if gram else [], channels),
                ):
                    for windows in group:
                        sinks = [_Channel() for _ in watched if gram]
                        with _watch([ffn.down for ffn in watched] if gram else [], sinks):
                            _run(parent, windows, batch, bar)
                        domains += [_moments(sinks)] if gram else []
                results.append(Group([s.result() for s in inputs], [s.result() for s in channels], domains))
        return results

    return halving("second moments", parent.device, batch, run)


def routed_moments(
    parent: Parent, routers: Sequence[Tensor], ids_NS: Tensor, layers: Sequence[int], *, batch: int = 8
) -> list[list[Second]]:
    """Gram matrices of the ``down_proj`` input per expert, over the dense parent's tokens that a router sends to it.

    Args:
        parent: the dense model.
        routers: every layer's router matrix (E, D), top-1.
        ids_NS: token ids.
        layers: which layers to watch in this pass.
        batch: windows per forward pass.

    Returns:
        Per layer a list over experts; an expert that no token reaches has ``count`` 0 and a Gram matrix of zeros.
    """
    watched = [parent.ffns[index] for index in layers]

    def run(batch: int) -> list[list[Second]]:
        sinks = [_Routed(routers[index].to(parent.device), parent.F) for index in layers]
        with (
            fast_products(parent.dtype),
            meter("routed moments", ids_NS.numel()) as bar,
            _watch([ffn.module for ffn in watched], [sink.inputs for sink in sinks]),
            _watch([ffn.down for ffn in watched], sinks),
        ):
            _run(parent, ids_NS, batch, bar)
        return [[expert.result() for expert in sink.experts] for sink in sinks]

    return halving("routed moments", parent.device, batch, run)


class _Routed:
    """Second moments by expert: what the network's input decides, its ``down`` input is added to."""

    def __init__(self, router_ED: Tensor, width: int) -> None:
        self.inputs = _Choice(router_ED)
        self.experts = [_Second(width, router_ED.device) for _ in router_ED]

    def add(self, a_TF: Tensor) -> None:
        ids_T = self.inputs.ids_T
        counts = torch.bincount(ids_T, minlength=len(self.experts)).tolist()  # the one question to the device
        rows = ids_T.argsort(stable=True).split(counts)
        for expert, mine_N, count in zip(self.experts, rows, counts, strict=True):
            if count:
                # rows of zeros change no sum; a CPU's kernels are made per shape, so few shapes serve every batch
                align = ALIGN if a_TF.device.type == "cpu" else 1
                padded_NF = a_TF.new_zeros(-(-count // align) * align, a_TF.shape[1])
                padded_NF[:count] = a_TF[mine_N]
                expert.add(padded_NF, count)


class _Choice:
    def __init__(self, router_ED: Tensor) -> None:
        self.router_ED = router_ED

    def add(self, x_TD: Tensor) -> None:
        self.ids_T = torch.nn.functional.linear(x_TD, self.router_ED.to(x_TD.dtype)).argmax(-1)


def merge(parts: Sequence[Second], weights: Sequence[float]) -> Second:
    """A weighted mean of second moments, on their device; the weights are normalised."""
    total = sum(weights)
    mean = sum((w / total * part.mean_N for part, w in zip(parts, weights, strict=True)), torch.zeros(()))
    gram = sum((w / total * part.gram_NN for part, w in zip(parts, weights, strict=True)), torch.zeros(()))
    return Second(sum(part.count for part in parts), mean, gram)
