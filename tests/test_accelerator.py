"""Sums without fp64, and what happens when a device is out of memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretend
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesmith.conversion.stages.training import prepare
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import log_likelihoods, token_nll
from moesmith.methods.moments import channel_moments, group_moments, routed_moments
from moesmith.mixture.moe import build
from moesmith.parent import accelerator
from moesmith.parent.accelerator import CURE, Sum, halving
from moesmith.run.recipe import TrainSection
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_model, tiny_parent
from moesmith.training.loop import Outcome, Student, train

IDS = torch.randint(2, 250, (8, 32), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


def pair(like: Tensor) -> Sum:
    """A sum as on a device without fp64."""
    total = Sum(like)
    total.high, total.low = torch.zeros_like(like), torch.zeros_like(like)
    return total


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=60))
def test_a_pair_is_as_good_as_fp64(numbers: list[float]) -> None:
    total = pair(torch.zeros(1))
    for number in numbers:
        total.add(torch.tensor([number]))
    exact = torch.tensor(numbers, dtype=torch.float64)
    assert abs(float(total.value()) - float(exact.sum())) <= 1e-12 * float(exact.abs().sum()) + 1e-30


def test_a_pair_where_fp32_alone_fails() -> None:
    """A million that stays, small numbers beside it that fp32 drops, and all of it taken away again."""
    numbers = [1e6, *[1e-3] * 20_000, -1e6]
    total, plain = pair(torch.zeros(1)), torch.zeros(1)
    for number in numbers:
        total.add(torch.tensor([number]))
        plain += number
    wanted = 20_000 * float(torch.tensor(1e-3))
    assert float(total.value()) == pytest.approx(wanted, abs=1e-4)
    assert abs(float(plain) - wanted) > 1


def test_moments_in_pairs_are_those_of_fp64() -> None:
    accelerator.has_double.cache_clear()
    parent = tiny_parent("llama")
    wanted = channel_moments(parent, IDS, batch=2)
    parent.model.to("pretend")
    try:
        with pretend.without_double():
            found = channel_moments(parent, IDS, batch=2)
    finally:
        accelerator.has_double.cache_clear()
    assert found.mean_LF.device == found.var_LF.device == CPU
    torch.testing.assert_close(found.mean_LF, wanted.mean_LF, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.var_LF, wanted.var_LF, rtol=1e-6, atol=1e-10)


# ---- out of memory ----


class Small:
    """A module's forward pass with room for ``rows`` sequences at a time; ``sizes`` are what it was asked for."""

    def __init__(self, model: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, self.sizes = rows, []
        forward = model.base_model.forward

        def limited(*args: Any, **kwargs: Any) -> Any:
            size = len(kwargs["input_ids"])
            self.sizes.append(size)
            found = forward(*args, **kwargs)  # hooks have seen it: half of the work is done when memory is out
            if size > self.rows:
                raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
            return found

        monkeypatch.setattr(model.base_model, "forward", limited)


def test_statistics_go_on_with_smaller_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    parent = tiny_parent("llama")
    routers = [torch.randn(2, parent.D) for _ in range(2)]
    whole = channel_moments(parent, IDS), group_moments(parent, [[IDS]], [0], gram=True), token_nll(parent.model, IDS)
    routed = routed_moments(parent, routers, IDS, [0])
    small = Small(parent.model, 2, monkeypatch)
    again = channel_moments(parent, IDS), group_moments(parent, [[IDS]], [0], gram=True), token_nll(parent.model, IDS)
    assert small.sizes[:3] == [8, 4, 2]
    assert again[0].count == whole[0].count == IDS.numel()  # what the failed passes saw is not counted
    torch.testing.assert_close(again[0].var_LF, whole[0].var_LF)
    torch.testing.assert_close(again[1][0].channels[0].gram_NN, whole[1][0].channels[0].gram_NN)
    torch.testing.assert_close(again[2], whole[2])
    torch.testing.assert_close(routed_moments(parent, routers, IDS, [0])[0][1].gram_NN, routed[0][1].gram_NN)
    assert "out of memory on cpu, once more with 4 windows at a time" in capsys.readouterr().err


def test_likelihoods_go_on_with_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_parent("llama")
    pairs = [(f"the {word}", " runs home") for word in ("cat", "dog", "bird", "fox", "ant", "bee")]
    whole = log_likelihoods(parent.model, parent.tokenizer, pairs, batch=1)
    Small(parent.model, 6, monkeypatch)
    again = log_likelihoods(parent.model, parent.tokenizer, pairs, batch=1)
    assert [x.total for x in again] == pytest.approx([x.total for x in whole])


def test_nothing_smaller_than_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_parent("llama")
    Small(parent.model, 0, monkeypatch)
    with pytest.raises(MoesmithError, match="out of memory with a single sequence") as caught:
        token_nll(parent.model, IDS)
    assert CURE in str(caught.value)


def test_other_errors_are_not_memory() -> None:
    def fails(_batch: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        halving("work", CPU, 8, fails)


def trained(
    folder: Path, rows: int | None, monkeypatch: pytest.MonkeyPatch, dropout: float = 0.0
) -> tuple[Any, Outcome]:
    parent = tiny_parent("llama")
    model = build(parent, random_carving(parent))
    spec = TrainSection(tokens=768, window=32, batch=8, micro_batch=8, lr=0.01, lora_rank=2, lora_dropout=dropout,
                        gate="sparse", checkpointing=False)  # fmt: skip
    parameters = prepare(model, spec, 0)
    if rows is not None:
        Small(model, rows, monkeypatch)
    outcome = train(Student(model, None, spec), parameters, IDS, spec, folder)
    return parameters, outcome


def test_training_goes_on_with_a_smaller_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wanted, whole = trained(tmp_path / "whole", None, monkeypatch)
    found, outcome = trained(tmp_path / "small", 3, monkeypatch)
    said = capsys.readouterr().err
    assert "going on with a micro-batch of 4 from step 0" in said
    assert said.count("going on with a micro-batch") == 2  # 4, then 2, which stays
    assert outcome.last_loss == pytest.approx(whole.last_loss, rel=1e-4)
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-4)


def test_training_stops_when_one_sequence_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoesmithError, match="training: cpu is out of memory with a single sequence"):
        trained(tmp_path, 0, monkeypatch)


def test_free_memory_says_the_systems_where_a_device_does_not() -> None:
    model = tiny_model("llama")
    assert accelerator.free_memory(model.device) > 0
    assert accelerator.free_memory(torch.device("pretend")) > 0
    assert accelerator.peak_memory(model.device) is accelerator.peak_memory(torch.device("pretend")) is None
    accelerator.release(model.device)
    accelerator.release(torch.device("pretend"))


def test_memory_is_asked_of_the_devices_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's and Intel's module answers, and Apple's, which has other names."""
    device, emptied = torch.device("pretend"), []
    cuda = SimpleNamespace(
        mem_get_info=lambda _: (7, 9), empty_cache=lambda: emptied.append(1), max_memory_allocated=lambda: 3
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: cuda)
    accelerator.release(device)
    assert (accelerator.free_memory(device), accelerator.peak_memory(device), emptied) == (7, 3, [1])
    apple = SimpleNamespace(recommended_max_memory=lambda: 9, driver_allocated_memory=lambda: 4)
    monkeypatch.setattr(torch, "get_device_module", lambda _: apple)
    assert (accelerator.free_memory(device), accelerator.peak_memory(device)) == (5, 4)
