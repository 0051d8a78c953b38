"""Sums without fp64, and what happens when a device is out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretend
import pytest
import torch
from conversions import convert, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesmith.calibration.moments import channel_moments
from moesmith.calibration.stream import Stream
from moesmith.calibration.view import LayerView, Stats
from moesmith.conversion.steps.training import prepare
from moesmith.data.text import load_domains
from moesmith.errors import MoesmithError
from moesmith.evaluation.likelihoods import log_likelihoods
from moesmith.evaluation.perplexity import token_nll
from moesmith.methods import steps
from moesmith.methods.base import Carver, Kept, Routed
from moesmith.methods.steps import Carve
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.mixture.moe import build
from moesmith.parent import accelerator
from moesmith.parent.accelerator import CURE, Sum, halving
from moesmith.parent.load import Parent, load_parent
from moesmith.parent.structure import decoder_layers
from moesmith.run.recipe import load_recipe
from moesmith.run.settings import TrainSection
from moesmith.run.step import Job
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_model, tiny_parent
from moesmith.training.loop import Outcome, train
from moesmith.training.student import Student

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
    whole = channel_moments(parent, IDS), token_nll(parent.model, IDS)
    small = Small(parent.model, 2, monkeypatch)
    again = channel_moments(parent, IDS), token_nll(parent.model, IDS)
    assert small.sizes[:3] == [8, 4, 2]
    assert again[0].count == whole[0].count == IDS.numel()  # what the failed passes saw is not counted
    torch.testing.assert_close(again[0].var_LF, whole[0].var_LF)
    torch.testing.assert_close(again[1], whole[1])
    assert "out of memory on cpu, trying again with 4 windows at a time" in capsys.readouterr().err


@contextmanager
def small_layers(parent: Parent, rows: int) -> Iterator[list[int]]:
    """The last layer has room for ``rows`` sequences; the list is what it was asked for."""
    sizes: list[int] = []

    def limited(_module: Any, args: Any, _out: Any) -> None:  # hooks inside have seen it, and the layers before as well
        sizes.append(len(args[0]))
        if len(args[0]) > rows:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")

    handle = decoder_layers(parent.model)[1][-1].register_forward_hook(limited)
    try:
        yield sizes
    finally:
        handle.remove()


def test_a_stream_starts_again_with_smaller_batches(tmp_path: Path) -> None:
    parent, routers = tiny_parent("llama"), torch.randn(2, 2, 32)

    def run(batch: int) -> list[list[Stats]]:
        found = []
        with Stream(parent, [[IDS]], folder=tmp_path, room=0, batch=batch) as stream:
            for view in stream.views(torch.Generator()):
                router_ED = routers[view.index]
                found.append(view.statistics(gram=True, parts=True))
                found.append(view.statistics(lambda x_TD, _g: (x_TD @ router_ED.T).argmax(-1), 2, gram=True))  # noqa: B023
        return found

    whole = run(8)
    with small_layers(parent, 2) as sizes:
        again = halving("work", CPU, 8, run)
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[2:]) == 2
    assert list(tmp_path.iterdir()) == []
    for one, other in zip(whole, again, strict=True):
        assert [stats.count for stats in one] == [stats.count for stats in other]
        for a, b in zip(one, other, strict=True):
            assert a.channels is not None
            assert b.channels is not None
            torch.testing.assert_close(b.inputs.gram_NN, a.inputs.gram_NN)
            torch.testing.assert_close(b.channels.gram_NN, a.channels.gram_NN)
            for part, same in zip(a.parts, b.parts, strict=True):
                torch.testing.assert_close(same, part)


class Largest(Carver):
    """Keeps the channels with the most energy behind the layers carved so far; routers are drawn."""

    name, activations = "largest", "carved"

    class Settings(Routed, Kept):
        """Experts and what they keep."""

    def carve(self, view: LayerView) -> Layer:
        """One layer."""
        grams = [stats.channels for stats in view.statistics(gram=True)]
        energy = [gram.gram_NN.diagonal() for gram in grams if gram is not None]
        router = Linear(torch.rand(len(energy), view.parent.D, generator=view.generator))
        return Layer([Expert(scores.topk(32).indices.sort().values) for scores in energy], router)


# each with something that goes on from layer to layer: errors that are averaged, draws, what carved layers send on
CARVED = {
    "dive-plus": ["stage1.tokens=0", "stage2.tokens=0"],
    "llama-moe-1of8": ["stage1.tokens=0", "stage2.tokens=0", "carve.compensation=bias"],
    "tomoe-plus": [],
    "largest": [],
}


@pytest.mark.parametrize("name", CARVED)
def test_a_carving_starts_again_with_smaller_batches(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same carving and the same numbers, as if nothing had happened."""
    preset = "dive-1of8" if name == "largest" else name
    run = convert(preset, home / "m", home / "d", tmp_path / "run", CARVED[name])
    recipe = load_recipe(preset, None, [*tiny_settings(preset), *CARVED[name]])
    job = Job(run, load_parent(home / "m", "fp32", device="cpu"), load_domains(home / "d"))
    made = recipe.method.steps() if name != "largest" else [Carve(recipe, Largest(recipe, Largest.Settings(experts=4)))]
    step = next(step for step in reversed(made) if step.name in ("carve", "refit"))
    for folder in ("whole", "small"):
        (tmp_path / folder).mkdir()
    whole = dict(step.make(job, tmp_path / "whole"))
    capsys.readouterr()
    with small_layers(job.parent, 2) as sizes:
        small = dict(step.make(job, tmp_path / "small"))
    assert "out of memory on cpu, trying again with 4 windows at a time" in capsys.readouterr().err
    assert {4, 2} <= set(sizes)
    shares = [numbers.pop("share_by_expert", 0) for numbers in (small, whole)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    curves = [numbers.pop("layers", {}) for numbers in (small, whole)]
    for name, lines in curves[1].items():
        for line, values in lines.items():
            assert curves[0][name][line] == pytest.approx(values, rel=1e-4)
    assert small == pytest.approx(whole, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["carving.json", "carving.safetensors"]
    wanted, found = (Carving.load(tmp_path / folder) for folder in ("whole", "small"))
    for mine, its in zip(found.layers, wanted.layers, strict=True):
        assert isinstance(mine.router, Linear)
        assert isinstance(its.router, Linear)
        torch.testing.assert_close(mine.router.weight_ED, its.router.weight_ED, rtol=1e-3, atol=1e-5)
        for a, b in zip(mine.routed, its.routed, strict=True):
            assert torch.equal(a.channels, b.channels)
            torch.testing.assert_close(a.down_DF, b.down_DF, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(a.bias_D, b.bias_D, rtol=1e-3, atol=1e-4)


def test_gram_matrices_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the free memory is for one layer's; of ``--memory``, which weights and tokens share, a quarter."""
    parent = tiny_parent("llama")
    bytes_needed = 4 * 3 * (32**2 + 64**2)
    for room, fits in ((2 * bytes_needed, True), (2 * bytes_needed - 2, False)):
        monkeypatch.setattr(steps, "free_memory", lambda _device, room=room: room)
        with nullcontext() if fits else pytest.raises(MoesmithError, match="Gram matrices of one layer need"):
            steps.check_gram(parent, 3, gram=True)
        steps.check_gram(parent, 3, gram=False)  # router inputs alone are smaller
    with pytest.raises(MoesmithError, match=r"set carve\.compensation to bias"):
        steps.check_gram(replace(parent, memory=4 * bytes_needed - 4), 3, gram=True)
    steps.check_gram(replace(parent, memory=4 * bytes_needed), 3, gram=True)


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
