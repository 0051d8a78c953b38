"""Streaming moments against plain sums, and against FLAP's published estimator."""

from __future__ import annotations

import pytest
import torch
from flap import published_fluctuation

from moesmith.methods.moments import _Channel, _Second, channel_moments, group_moments, merge, pool
from moesmith.methods.scores import channel_scores, choose
from moesmith.parent.load import Parent
from moesmith.testing.parents import FAMILIES, tiny_parent

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
    channel = _Channel()
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


@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
def test_second_moments_in_layer_groups(family: str) -> None:
    parent = tiny_parent(family)
    texts = [list(ids.split(3)) for ids in WINDOWS.split(6)]
    together = group_moments(parent, texts, [0, 1], gram=True)
    for layer in range(2):
        apart = group_moments(parent, texts, [layer], gram=True, batch=2)
        for g, ids in enumerate(WINDOWS.split(6)):
            a_TF = activations(parent, layer, ids).flatten(0, 1)
            gram_FF = apart[g].channels[0].gram_NN
            assert torch.allclose(gram_FF, a_TF.T @ a_TF / len(a_TF), rtol=1e-3, atol=1e-6)
            assert torch.allclose(gram_FF, together[g].channels[layer].gram_NN, rtol=1e-3, atol=1e-6)
            assert apart[g].inputs[0].gram_NN.shape == (parent.D, parent.D)
    assert group_moments(parent, texts, [0], gram=False)[0].channels == []


@pytest.mark.parametrize("width", [1, 5, 383, 384, 385, 1000])
def test_a_gram_matrix_in_blocks_is_the_plain_product(width: int) -> None:
    second, parts = _Second(), [torch.randn(rows, width) for rows in (7, 40)]
    for part in parts:
        second.add(part)
    x_TN = torch.cat(parts)
    found = second.result()
    assert torch.allclose(found.gram_NN, x_TN.T @ x_TN / 47, atol=1e-5)
    assert torch.equal(found.gram_NN, found.gram_NN.T)


def test_one_pass_has_the_domains_moments_too() -> None:
    parent, texts = tiny_parent("llama"), [list(ids.split(3)) for ids in WINDOWS.split(6)]
    for group, text in zip(group_moments(parent, texts, [0, 1], gram=True), texts, strict=True):
        for found, ids in zip(group.domains, text, strict=True):
            alone = channel_moments(parent, ids)
            assert torch.equal(found.mean_LF, alone.mean_LF)
            assert torch.equal(found.var_LF, alone.var_LF)


def test_merge_is_a_weighted_mean() -> None:
    parent = tiny_parent("llama")
    a, b = (group_moments(parent, [[part]], [0], gram=True)[0].channels[0] for part in WINDOWS.split(6))
    whole = group_moments(parent, [[WINDOWS]], [0], gram=True)[0].channels[0]
    assert torch.allclose(merge([a, b], [3, 3]).gram_NN, whole.gram_NN, rtol=1e-4, atol=1e-7)
    assert torch.allclose(merge([a, b], [1, 0]).mean_N, a.mean_N)


def test_hooks_are_gone_afterwards() -> None:
    parent = tiny_parent("llama")
    channel_moments(parent, WINDOWS)
    assert not parent.ffns[0].down._forward_pre_hooks
