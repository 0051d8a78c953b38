"""Streaming moments against plain sums, and against FLAP's published estimator; layers as methods see them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flap import published_fluctuation
from torch import Tensor, nn

from moesmith.calibration.moments import (
    Channel,
    Second,
    Sums,
    channel_moments,
    fast_products,
    merge,
    pool,
    watch,
)
from moesmith.calibration.stream import Stream
from moesmith.calibration.view import Stats
from moesmith.methods.scores import channel_scores, choose
from moesmith.mixture.moe import build, carved_layer
from moesmith.parent.layerwise import layered
from moesmith.parent.load import Parent, load_parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, save_tiny, tiny_parent

WINDOWS = torch.randint(2, 250, (12, 32), generator=torch.Generator().manual_seed(3))


def activations(parent: Parent, layer: int, windows: torch.Tensor) -> torch.Tensor:
    """The ``down_proj`` input of one layer, (N, window, F), caught by an own hook."""
    caught: list[torch.Tensor] = []
    handle = parent.ffns[layer].down.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with torch.no_grad():
        parent.model(input_ids=windows)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_exact_for_any_batch_size(family: str) -> None:
    parent = tiny_parent(family)
    small, large = channel_moments(parent, WINDOWS, batch=1), channel_moments(parent, WINDOWS, batch=5)
    for layer in range(parent.L):
        a_TF = activations(parent, layer, WINDOWS).flatten(0, 1).double()
        for moments in (small, large):
            assert torch.allclose(moments.mean_LF[layer].double(), a_TF.mean(0), rtol=1e-4, atol=1e-6)
            assert torch.allclose(moments.var_LF[layer].double(), a_TF.var(0, correction=0), rtol=1e-4, atol=1e-8)
    assert small.count == WINDOWS.numel()


def test_no_cancellation_when_the_mean_is_large() -> None:
    x_TF = torch.randn(5000, 7, dtype=torch.float64) * 0.01 + 100
    channel = Channel()
    for part in x_TF.float().split(600):
        channel.add(part)
    expected = x_TF.float().double().var(0, correction=0)  # what fp32 input holds
    assert torch.allclose(channel.result()[1].double(), expected, rtol=1e-3)


def test_flap_parity() -> None:
    """Masks from streaming moments against the published estimator: IoU >= 0.985."""
    parent = tiny_parent("llama", intermediate_size=512)
    windows = torch.randint(2, 250, (128, 64), generator=torch.Generator().manual_seed(5))
    moments = channel_moments(parent, windows)
    ours = choose(channel_scores(parent, moments), 0.5)
    for layer, ffn in enumerate(parent.ffns):
        mean, fluctuation = published_fluctuation(activations(parent, layer, windows))
        score = fluctuation * ffn.down_DF.square().sum(0)
        theirs = score.argsort(descending=True)[: len(ours[layer])]
        both = set(ours[layer].tolist()) & set(theirs.tolist())
        assert len(both) / (2 * len(ours[layer]) - len(both)) >= 0.985
        assert torch.allclose(moments.mean_LF[layer], mean, rtol=1e-3, atol=1e-6)


def test_pool_weights_domains_alike() -> None:
    parent = tiny_parent("llama")
    parts = [channel_moments(parent, part) for part in WINDOWS.split(6)]
    whole, pooled = channel_moments(parent, WINDOWS), pool(parts)
    assert torch.allclose(pooled.mean_LF, whole.mean_LF, atol=1e-6)
    assert torch.allclose(pooled.var_LF, whole.var_LF, rtol=1e-4, atol=1e-8)
    doubled = channel_moments(parent, torch.cat([WINDOWS[:6], WINDOWS[:6]]))
    assert torch.allclose(pool([doubled, parts[1]]).mean_LF, pooled.mean_LF, atol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 383, 384, 385, 1000])
def test_a_gram_matrix_in_blocks_is_the_plain_product(width: int) -> None:
    second, parts = Sums(), [torch.randn(rows, width) for rows in (7, 40)]
    for part in parts:
        second.add(part)
    x_TN = torch.cat(parts)
    found = second.result()
    assert torch.allclose(found.gram_NN, x_TN.T @ x_TN / 47, atol=1e-5)
    assert torch.equal(found.gram_NN, found.gram_NN.T)


def test_merge_is_a_weighted_mean() -> None:
    parent = tiny_parent("llama")
    a, b = (collected(parent, [[part]], gram=True)[0][0].channels for part in WINDOWS.split(6))
    whole = collected(parent, [[WINDOWS]], gram=True)[0][0].channels
    assert a is not None
    assert b is not None
    assert whole is not None
    assert torch.allclose(merge([a, b], [3, 3]).gram_NN, whole.gram_NN, rtol=1e-4, atol=1e-7)
    assert torch.allclose(merge([a, b], [1, 0]).mean_N, a.mean_N)


def test_hooks_are_gone_afterwards() -> None:
    parent = tiny_parent("llama")
    channel_moments(parent, WINDOWS)
    collected(parent, [[WINDOWS]], gram=True, parts=True)
    with pytest.raises(ZeroDivisionError):
        collected(parent, [[WINDOWS]], assign=lambda x_TD, _group: x_TD.new_ones(1 // 0), experts=2)
    assert not parent.ffns[0].down._forward_pre_hooks
    assert not parent.ffns[0].module._forward_pre_hooks


# ---- layers as methods see them ----

TEXTS = [list(ids.split(size)) for ids, size in zip(WINDOWS.split(6), (3, 4), strict=True)]  # the last text is short


def collected(
    parent: Parent, texts: Sequence[Sequence[Tensor]], folder: Path | None = None, **asked: Any
) -> list[list[Stats]]:
    """Statistics by layer and group; tokens wait on disk in ``folder``."""
    with Stream(parent, texts, folder=folder, room=0) as stream:
        return [view.statistics(**asked) for view in stream.views(torch.Generator())]


class Keeps:
    """A sink that keeps what it sees, as fp32 rows."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, x_TN: Tensor) -> None:
        self.seen.append(x_TN.float())

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.seen)


def ordinary(parent: Parent, model: nn.Module, windows: Tensor, sinks: Sequence[Any], which: str, batch: int) -> None:
    """Ordinary forward passes of the whole model with plain hooks: ``module`` for networks, ``down`` for down_proj."""
    paths = [ffn.path for ffn in parent.ffns]
    modules = [model.get_submodule(path) for path in paths]
    if which == "down":
        down = {id(module): name for name, module in parent.ffns[0].module.named_children()}[id(parent.ffns[0].down)]
        modules = [getattr(module, down) for module in modules]
    with torch.no_grad(), fast_products(parent.dtype), watch(modules, sinks):
        for ids in windows.split(batch):
            model(input_ids=ids, use_cache=False)


def equal(one: Second | None, other: Second | None) -> bool:
    assert one is not None
    assert other is not None
    return (
        one.count == other.count and torch.equal(one.mean_N, other.mean_N) and torch.equal(one.gram_NN, other.gram_NN)
    )


def alike(one: Stats, other: Stats) -> bool:
    """The same bits."""
    assert len(one.parts) == len(other.parts)
    parts = all(
        torch.equal(a, b) for x, y in zip(one.parts, other.parts, strict=True) for a, b in zip(x, y, strict=True)
    )
    channels = one.channels is other.channels is None or equal(one.channels, other.channels)
    return equal(one.inputs, other.inputs) and channels and parts


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
def test_a_layer_sees_what_an_ordinary_pass_does(family: str, dtype: torch.dtype, batch: int) -> None:
    parent = tiny_parent(family, dtype=dtype)
    with Stream(parent, TEXTS, batch=batch) as stream:
        found = [view.statistics(gram=True, parts=True) for view in stream.views(torch.Generator())]
    assert len(found) == parent.L
    for g, group in enumerate(TEXTS):
        inputs, hidden = [Sums() for _ in parent.ffns], [Sums() for _ in parent.ffns]
        for t, ids in enumerate(group):
            parts = [Channel() for _ in parent.ffns]
            ordinary(parent, parent.model, ids, inputs, "module", batch)
            ordinary(parent, parent.model, ids, hidden, "down", batch)
            ordinary(parent, parent.model, ids, parts, "down", batch)
            for index, part in enumerate(parts):
                assert all(torch.equal(a, b) for a, b in zip(found[index][g].parts[t], part.result(), strict=True))
        for index, layer in enumerate(found):
            assert equal(layer[g].inputs, inputs[index].result())
            assert equal(layer[g].channels, hidden[index].result())
            assert layer[g].count == sum(ids.numel() for ids in group)


@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
def test_second_moments_by_hand(family: str) -> None:
    parent = tiny_parent(family)
    found = collected(parent, TEXTS, gram=True)
    for layer in range(2):
        for g, group in enumerate(TEXTS):
            a_TF = activations(parent, layer, torch.cat(group)).flatten(0, 1)
            stats = found[layer][g]
            assert stats.channels is not None
            assert torch.allclose(stats.channels.gram_NN, a_TF.T @ a_TF / len(a_TF), rtol=1e-3, atol=1e-6)
            assert torch.allclose(stats.channels.mean_N, a_TF.mean(0), rtol=1e-3, atol=1e-6)
            assert stats.inputs.gram_NN.shape == (parent.D, parent.D)
    plain = collected(parent, TEXTS)
    assert all(stats.channels is None and stats.parts == [] for layer in plain for stats in layer)
    assert all(equal(a.inputs, b.inputs) for x, y in zip(plain, found, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_one_pass_has_the_domains_moments_too(family: str) -> None:
    parent = tiny_parent(family)
    found = collected(parent, TEXTS, parts=True)
    for g, group in enumerate(TEXTS):
        for t, ids in enumerate(group):
            alone = channel_moments(parent, ids)
            for index, layer in enumerate(found):
                assert torch.equal(layer[g].parts[t][0], alone.mean_LF[index])
                assert torch.equal(layer[g].parts[t][1], alone.var_LF[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_tokens_of_an_assignment_by_hand(family: str, dtype: torch.dtype) -> None:
    """Every expert's tokens, of all text or of a group each; the last expert gets none."""
    parent, E = tiny_parent(family, dtype=dtype), 4
    router_ED = torch.randn(E - 1, parent.D)
    groups: list[int] = []

    def assign(x_TD: Tensor, group: int) -> Tensor:
        groups.append(group)
        return (x_TD.float() @ router_ED.T).argmax(-1)

    with Stream(parent, TEXTS, batch=3) as stream:
        found = [view.statistics(assign, E, gram=True) for view in stream.views(torch.Generator())]
    assert set(groups) == {0, 1}
    inputs, hidden = [Keeps() for _ in parent.ffns], [Keeps() for _ in parent.ffns]
    for ids in (ids for group in TEXTS for ids in group):
        ordinary(parent, parent.model, ids, inputs, "module", 3)
        ordinary(parent, parent.model, ids, hidden, "down", 3)
    for index, layer in enumerate(found):
        ids_T = (inputs[index].rows @ router_ED.T).argmax(-1)
        for expert, stats in enumerate(layer):
            assert stats.channels is not None
            assert stats.count == stats.channels.count == int((ids_T == expert).sum())
            for second, rows in ((stats.inputs, inputs[index].rows), (stats.channels, hidden[index].rows)):
                mine = rows[ids_T == expert].double()
                count = max(1, len(mine))
                torch.testing.assert_close(second.mean_N.double(), mine.sum(0) / count, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(second.gram_NN.double(), mine.T @ mine / count, rtol=1e-5, atol=1e-5)
        assert layer[-1].count == 0
        assert sum(stats.count for stats in layer) == WINDOWS.numel()


def test_an_assignment_may_ask_for_the_group() -> None:
    parent = tiny_parent("llama")
    by_group = collected(parent, TEXTS, gram=True)
    with Stream(parent, TEXTS) as stream:
        for view, wanted in zip(stream.views(torch.Generator()), by_group, strict=True):
            assert view.groups == 2
            found = view.statistics(lambda x_TD, group: torch.full((len(x_TD),), 1 - group), 2, gram=True)
            for mine, other in zip(found, reversed(wanted), strict=True):
                assert mine.channels is not None
                assert other.channels is not None
                assert mine.count == other.count
                torch.testing.assert_close(mine.inputs.gram_NN, other.inputs.gram_NN)
                torch.testing.assert_close(mine.channels.gram_NN, other.channels.gram_NN)


@pytest.mark.parametrize("activations", ["dense", "carved"])
def test_asking_again_gives_the_same(activations: Any) -> None:
    """However often a layer is asked, in whatever order, it answers alike, and later layers do not notice."""
    parent, carving = tiny_parent("llama"), random_carving(tiny_parent("llama"))
    router_ED = torch.randn(3, parent.D)

    def assign(x_TD: Tensor, _group: int) -> Tensor:
        return (x_TD @ router_ED.T).argmax(-1)

    once, often = [], []
    with Stream(parent, TEXTS, activations) as stream:
        for view in stream.views(torch.Generator()):
            once.append(view.statistics(gram=True, parts=True))
            stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023
    with Stream(parent, TEXTS, activations) as stream:
        for view in stream.views(torch.Generator()):
            few = view.sample(50)
            routed = view.statistics(assign, 3)
            first = view.statistics(gram=True, parts=True)
            assert all(map(alike, first, view.statistics(gram=True, parts=True)))
            assert all(map(alike, routed, view.statistics(assign, 3)))
            assert torch.equal(few, view.sample(50))
            often.append(first)
            stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023
    assert all(alike(a, b) for x, y in zip(once, often, strict=True) for a, b in zip(x, y, strict=True))
    with Stream(parent, TEXTS, activations) as stream:  # and a layer need not be asked at all
        for view in stream.views(torch.Generator()):
            if view.index + 1 == parent.L:
                assert all(map(alike, view.statistics(gram=True, parts=True), once[-1]))
            stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023


def test_a_sample_is_rows_that_the_layer_gets() -> None:
    parent = tiny_parent("llama")
    inputs = [Keeps() for _ in parent.ffns]
    ordinary(parent, parent.model, WINDOWS, inputs, "module", 8)
    with Stream(parent, [[WINDOWS]]) as stream:
        for view in stream.views(torch.Generator()):
            rows = {tuple(row.tolist()) for row in inputs[view.index].rows}
            for tokens in (1, 7, 40, WINDOWS.numel(), 10 * WINDOWS.numel()):
                found = view.sample(tokens)
                assert found.dtype == torch.float32
                assert min(tokens, WINDOWS.numel()) / 2 <= len(found) <= tokens
                assert {tuple(row.tolist()) for row in found} <= rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_keeps_no_batch_alive(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is taken there are only its own rows, whatever the parent computes in."""
    parent, cat = tiny_parent("llama", dtype=dtype), torch.cat
    kept: list[tuple[int, int]] = []

    def noted(parts: Sequence[Tensor], *args: Any) -> Tensor:
        kept.extend((part.untyped_storage().nbytes(), part.nbytes) for part in parts)
        return cat(parts, *args)  # type: ignore[arg-type]

    with Stream(parent, [[WINDOWS]], batch=3) as stream:
        view, go = next(stream.views(torch.Generator())), stream._pass

        def passes(*args: Any, **options: Any) -> None:
            go(*args, **options)
            monkeypatch.setattr(torch, "cat", noted)  # of what was taken from every batch

        monkeypatch.setattr(stream, "_pass", passes)
        found = view.sample(WINDOWS.numel() // 8)
    assert len(kept) == 4
    assert sum(size for _, size in kept) == found.nbytes
    assert all(storage == own for storage, own in kept)


def test_samples_are_spread_over_all_text() -> None:
    """The text is 300 windows, each of one token of its own: a sample meets windows from its start to its end."""
    parent = tiny_parent("llama")
    windows = torch.arange(300)[:, None].expand(300, 8).contiguous()
    with Stream(parent, [[windows[:150]], [windows[150:]]], batch=1) as stream:
        view = next(stream.views(torch.Generator()))
        rows: list[Tensor] = []
        with watch([view.ffn.module], [type("Rows", (), {"add": lambda _self, x_TD: rows.append(x_TD[0])})()]):
            stream._pass(stream.model.layer(0), keep=False)
        distance = torch.cdist(view.sample(60), torch.stack(rows))
        met = distance.argmin(-1).unique()
    assert int(met.min()) < 30
    assert int(met.max()) >= 270
    assert len(met) >= 20


@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("batch", [2, 8])
def test_dense_layers_see_the_parent_and_carved_ones_the_carving_so_far(family: str, batch: int) -> None:
    """What a carved layer sees is what it gets in the built model whose layers before it are carved, to the bit."""
    parent = tiny_parent(family, num_hidden_layers=3)
    carving = random_carving(parent, kept=24, compensation="bias")
    ids = WINDOWS
    seen: dict[str, list[Stats]] = {"dense": [], "carved": []}
    for activations in ("dense", "carved"):
        with Stream(parent, [[ids]], activations, batch=batch) as stream:  # type: ignore[arg-type]
            for view in stream.views(torch.Generator()):
                seen[activations] += view.statistics(gram=True)
                stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023
    for index in range(parent.L):
        for activations in ("dense", "carved"):
            model: nn.Module = parent.model
            if activations == "carved":
                model = build(parent, carving)
                # behind the carved layers the parent's own, whose network is hooked
                for later in range(index, parent.L):
                    layered_place(model)[later] = layered_place(parent.model)[later]
            sinks, hidden = [Sums() for _ in range(1)], [Sums() for _ in range(1)]
            ffn = parent.ffns[index]
            with torch.no_grad(), watch([ffn.module, ffn.down], [*sinks, *hidden]):
                for part in ids.split(batch):
                    model(input_ids=part, use_cache=False)
            assert equal(seen[activations][index].inputs, sinks[0].result())
            assert equal(seen[activations][index].channels, hidden[0].result())
    assert alike(seen["dense"][0], seen["carved"][0])
    assert not torch.equal(seen["dense"][2].inputs.gram_NN, seen["carved"][2].inputs.gram_NN)


def layered_place(model: Any) -> nn.ModuleList:
    """The decoder layers."""
    return model.get_submodule(layered(model).place)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activations", ["dense", "carved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_wait_on_disk_are_the_same(activations: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    parent = tiny_parent("llama", dtype=dtype, num_hidden_layers=3)
    carving = random_carving(parent)
    found: list[list[Stats]] = []
    for folder, room in ((None, 0), (tmp_path, 2**30), (tmp_path, 0)):
        stats = []
        with Stream(parent, TEXTS, activations, folder=folder, room=room) as stream:
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert bool(files) == (folder is not None and room == 0)
            size = WINDOWS.numel() * parent.D * dtype.itemsize
            assert [path.stat().st_size for path in files] == [size] * len(files)
            assert len(files) in (0, 2 if activations == "dense" else 1)
            for view in stream.views(torch.Generator()):
                stats += view.statistics(gram=True, parts=True)
                stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023
        assert list(tmp_path.iterdir()) == []
        found.append(stats)
    for other in found[1:]:
        assert all(map(alike, found[0], other))


def test_nothing_is_left_on_disk_by_an_error(tmp_path: Path) -> None:
    parent, lay = tiny_parent("llama"), []

    def killed(_x_TD: Tensor, _group: int) -> Tensor:
        lay.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(parent, TEXTS, tmp_path, assign=killed, experts=2)
    assert len(lay) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activations", ["dense", "carved"])
def test_a_parent_in_its_files_has_the_same_layers(activations: Any, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    whole = load_parent(tmp_path / "m", "fp32", device="cpu")
    turns = load_parent(tmp_path / "m", "fp32", 2**30, device="cpu")
    assert turns.layerwise
    carving = random_carving(whole)
    found = []
    for parent in (whole, turns, replace(whole, memory=2**30)):
        stats = []
        with Stream(parent, TEXTS, activations) as stream:
            for view in stream.views(torch.Generator()):
                stats += view.statistics(gram=True, parts=True)
                stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023
        found.append(stats)
    assert all(map(alike, found[0], found[1]))
    assert all(map(alike, found[0], found[2]))


def test_a_generator_goes_on_from_layer_to_layer() -> None:
    parent, draws = tiny_parent("llama"), []
    with Stream(parent, [[WINDOWS]]) as stream:
        for view in stream.views(torch.Generator().manual_seed(5)):
            draws.append(torch.rand(3, generator=view.generator))
    alone = torch.Generator().manual_seed(5)
    assert all(torch.equal(draw, torch.rand(3, generator=alone)) for draw in draws)


def test_a_copy_of_the_network_is_made_once_and_let_go() -> None:
    """Methods may ask for it as often as they like; before another form of the layer is made it is gone."""
    parent = tiny_parent("llama")
    with Stream(parent, [[WINDOWS]], "carved") as stream:
        for view in stream.views(torch.Generator()):
            network = view.network
            assert view.network is network
            known, left = weakref.ref(network), []
            del network
            stream.carved(lambda: left.append(known()) or stream.model.layer(view.index))  # noqa: B023
            assert left == ([None] if view.index + 1 < parent.L else [])


def test_layers_without_any_text() -> None:
    """A method that needs none still sees every layer."""
    parent = tiny_parent("llama")
    with Stream(parent, []) as stream:
        assert [view.index for view in stream.views(torch.Generator())] == [0, 1]
