"""Experts that divide the channels: formulas worked out by hand, whole partitions, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moesmith.calibration.stream import Stream
from moesmith.conversion.steps.training import prepare
from moesmith.errors import MoesmithError
from moesmith.methods.parts import (
    EqualParts,
    channel_energies,
    coactivation,
    expert_norms,
    rows_normalised,
    similarity_router,
)
from moesmith.methods.router import fitted_router
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import block, build
from moesmith.parent.load import Parent
from moesmith.parent.network import Network
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import FAMILIES, tiny_parent

KINDS = [
    ("llama-moe-partition", []),
    ("llama-moe-partition", ["carve.split=cluster", "carve.selector=norm"]),
    ("llama-moe-partition", ["carve.split=co-activation", "carve.rescale=false"]),
    ("llama-moe-shared", []),
    ("llama-moe-shared", ["carve.split=cluster", "carve.shared=2", "carve.selector=norm"]),
    ("moefication", []),
    ("moefication", ["carve.split=co-activation", "carve.selector=similarity"]),
]


def text() -> torch.Tensor:
    return torch.randint(2, 300, (12, 32), generator=torch.Generator().manual_seed(5))


def carved(parent: Parent, preset: str, settings: list[str], seed: int = 0) -> tuple[EqualParts, Carving]:
    """The method, and what it makes of a parent."""
    method: Any = load_recipe(preset, None, settings).method
    method.check(parent)
    with Stream(parent, [[text()]]) as stream:
        layers = [method.carve(view) for view in stream.views(torch.Generator().manual_seed(seed))]
    for layer in layers:
        layer.check(parent.D, parent.F)
    return method, Carving(layers, parent.F)


def network(gated: bool) -> Network:
    """Six channels of a model of width four."""
    gate_FD, up_FD, down_DF = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    return Network(
        gate_FD, up_FD if gated else None, down_DF, torch.nn.functional.silu, None if gated else torch.randn(6)
    )


@pytest.mark.parametrize("gated", [True, False])
def test_statistics_of_channels(gated: bool) -> None:
    ffn, x_TD = network(gated), torch.randn(40, 4)
    a_TF = torch.zeros(40, 6)
    for t in range(40):
        for j in range(6):
            z = ffn.gate_FD[j] @ x_TD[t] + (0 if ffn.gate_bias_F is None else ffn.gate_bias_F[j])
            a_TF[t, j] = z * torch.sigmoid(z) * (1 if ffn.up_FD is None else ffn.up_FD[j] @ x_TD[t])
    added_F = [sum(float((a_TF[t, j] * ffn.down_DF[:, j]).square().sum()) for t in range(40)) / 40 for j in range(6)]
    assert channel_energies(ffn, x_TD).tolist() == pytest.approx(added_F, rel=1e-4)
    together = [[float((a_TF[:, i].abs() * a_TF[:, j].abs()).mean()) for j in range(6)] for i in range(6)]
    torch.testing.assert_close(coactivation(ffn, x_TD), torch.tensor(together), rtol=1e-4, atol=1e-5)
    norms_TE = expert_norms(ffn, x_TD, [torch.tensor([0, 3, 5]), torch.tensor([1, 2])])
    by_hand = torch.stack([a_TF[:, [0, 3, 5]].norm(dim=1), a_TF[:, [1, 2]].norm(dim=1)], 1)
    torch.testing.assert_close(norms_TE, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-6, 0.05])
def test_the_fitted_router_is_the_least_squares_one(ridge: float) -> None:
    x_TD, norms_TE = torch.randn(200, 12) + 0.5, torch.rand(200, 5)
    x, n = x_TD.double().numpy(), norms_TE.double().numpy()
    damping = ridge * float(np.mean(np.square(x)))
    rows = np.concatenate([x / np.sqrt(200), np.sqrt(damping) * np.eye(12)])
    targets = np.concatenate([n / np.sqrt(200), np.zeros((12, 5))])
    solved_ED = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    expected_ED = torch.from_numpy(solved_ED - solved_ED.mean(0)).float()
    torch.testing.assert_close(fitted_router(x_TD, norms_TE, ridge), expected_ED, rtol=1e-3, atol=1e-5)


def test_the_similarity_router_ranks_by_cosines() -> None:
    rows_FD, x_TD = torch.randn(12, 8), torch.randn(30, 8)
    routed = [torch.tensor([0, 4, 5, 9]), torch.tensor([1, 2, 3, 6]), torch.tensor([7, 8, 10, 11])]
    normal_FD = torch.stack([row / row.norm() for row in rows_FD])
    centres = [normal_FD[kept].mean(0) for kept in routed]
    cosines_TE = torch.tensor([[float(torch.cosine_similarity(x, c, dim=0)) for c in centres] for x in x_TD])
    logits_TE = x_TD @ similarity_router(rows_normalised(rows_FD), routed).T
    assert torch.equal(logits_TE.argsort(-1), cosines_TE.argsort(-1))


@pytest.mark.parametrize(("preset", "settings"), KINDS)
def test_parts_cover_every_channel_once(preset: str, settings: list[str]) -> None:
    parent = tiny_parent("llama")
    method, carving = carved(parent, preset, settings)
    assert method.shared + method.top_k == 4
    for layer in carving.layers:
        assert (layer.mix, layer.top_k, layer.widths) == ("sum", method.top_k, [8] * method.experts)
        assert sorted(torch.cat([expert.channels for expert in layer.experts]).tolist()) == [*range(64)]
        assert all(torch.equal(expert.channels, expert.channels.sort().values) for expert in layer.experts)
        assert (layer.shared.width if layer.shared else 0) == 8 * method.shared
        assert layer.active_width == 32
    again, other = carved(parent, preset, settings)[1], carved(parent, preset, settings, seed=1)[1]
    for one, two in zip(carving.layers, again.layers, strict=True):
        assert all(torch.equal(a.channels, b.channels) for a, b in zip(one.experts, two.experts, strict=True))
        assert torch.equal(one.router.weight_ED, two.router.weight_ED)
    if preset == "llama-moe-partition" and not settings:
        assert not torch.equal(carving.mask(0), other.mask(0))
    outline = method.outline(parent).layers[0]
    assert (outline.widths, outline.top_k, outline.mix) == (carving.layers[0].widths, method.top_k, "sum")
    assert [e.plain for e in outline.experts] == [e.plain for e in carving.layers[0].experts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("preset", "settings"), [KINDS[0], KINDS[4], KINDS[5]])
def test_all_parts_together_are_the_parent(family: str, preset: str, settings: list[str]) -> None:
    parent = tiny_parent(family)
    _, carving = carved(parent, preset, [*settings, "carve.ratio=0"])
    ids = text()[:2]
    with torch.no_grad():
        expected = parent.model(input_ids=ids).logits
        for form in ("masked", "sliced"):
            torch.testing.assert_close(
                build(parent, carving, form)(input_ids=ids).logits, expected, atol=2e-3, rtol=1e-3
            )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_what_a_layer_computes(family: str, rescale: bool) -> None:
    """Shared channels once; each of the K routed parts with the largest logits, times E/K or as it is."""
    parent = tiny_parent(family)
    _, carving = carved(parent, "llama-moe-shared", [f"carve.rescale={rescale}"])
    assert carving.compensation == ("none" if not rescale else "refit")  # the run's provenance says rescaled
    layer, ffn, x_TD = carving.layers[1], parent.ffns[1], torch.randn(9, parent.D)
    assert layer.shared is not None
    with torch.no_grad():
        found_TD = block(parent, carving, 1)(x_TD)
        a_TF = ffn.hidden(x_TD)
    for t, x_D in enumerate(x_TD):
        y_D = ffn.down_DF[:, layer.shared.channels] @ a_TF[t, layer.shared.channels]
        y_D = y_D + (0 if ffn.down_bias_D is None else ffn.down_bias_D)
        for expert in (layer.router.weight_ED @ x_D).topk(3).indices.tolist():
            kept = layer.routed[expert].channels
            y_D = y_D + (7 / 3 if rescale else 1) * ffn.down_DF[:, kept] @ a_TF[t, kept]
        torch.testing.assert_close(found_TD[t], y_D, atol=1e-3, rtol=1e-3)


def test_shared_parts_are_those_of_most_energy() -> None:
    parent = tiny_parent("llama")
    with torch.no_grad():
        for ffn in parent.ffns:
            ffn.down_DF[:, 10:18] *= 30
    _, carving = carved(parent, "llama-moe-shared", [])
    for layer in carving.layers:
        assert layer.shared is not None
        assert layer.shared.channels.tolist() == [*range(10, 18)]


@pytest.mark.parametrize(("preset", "matrix"), [("llama-moe-partition", "up_FD"), ("moefication", "gate_FD")])
def test_clusters_are_of_the_published_rows(preset: str, matrix: str) -> None:
    """Directions planted in one matrix, of any length, are found as parts."""
    parent = tiny_parent("llama")
    planted_F = torch.arange(8).repeat(8)
    directions_ED = torch.linalg.qr(torch.randn(32, 8)).Q.T
    with torch.no_grad():
        for ffn in parent.ffns:
            noise_FD = 0.05 * torch.randn(64, 32)
            getattr(ffn, matrix).copy_((directions_ED[planted_F] + noise_FD) * (0.1 + torch.rand(64, 1)))
    _, carving = carved(parent, preset, ["carve.split=cluster"])
    for layer in carving.layers:
        assert sorted(sorted(e.channels.tolist()) for e in layer.routed) == [[*range(e, 64, 8)] for e in range(8)]


def test_the_fitted_router_chooses_better_than_chance() -> None:
    parent = tiny_parent("llama")
    method, _ = carved(parent, "moefication", [])
    found = method.metrics()
    assert 0.5 < found["energy"] <= found["energy_best"] < 1
    assert f"{found['energy']:.3f}" in method.headline(found)
    assert carved(parent, "llama-moe-partition", [])[0].metrics() == {}


def test_numbers_of_parts_that_are_refused() -> None:
    for settings, says in (
        (["carve.ratio=0.3"], r"ratio 0\.3 leaves 5\.6 of 8 parts; give 0\.25 or 0\.375"),
        (["carve.ratio=0.95"], r"ratio 0\.95 leaves 0\.4 of 8 parts; give 0\.875"),
        (["carve.experts=3"], r"ratio 0\.5 leaves 1\.5 of 3 parts; give 0\.333333 or 0\.666667"),
        (["carve.shared=4"], "shared 4 leaves no part to choose: a token uses 4 of 8"),
        (["carve.sample=100"], "sample has no effect: nothing depends on text"),
        (["carve.ridge=0.5"], "ridge has no effect: carve.selector is not norm"),
    ):
        with pytest.raises(MoesmithError, match=says):
            load_recipe("llama-moe-partition", None, settings)
    assert load_recipe("moefication", None, ["carve.experts=3", "carve.ratio=0.333333"]).method.top_k == 2
    method: Any = load_recipe("moefication", None, ["carve.experts=7", "carve.ratio=0"]).method
    with pytest.raises(MoesmithError, match=r"64 channels cannot be cut into 7 equal parts.*experts to 4 or 8"):
        method.check(tiny_parent("llama"))


def test_the_share_that_is_active() -> None:
    for preset, used in (("moefication", (2, 6, 8)), ("llama-moe-shared", (1, 5, 7))):
        for share, top_k in zip((0.25, 0.75, 1.0), used, strict=True):
            method: Any = load_recipe(preset, active=share).method
            assert (method.active, method.top_k) == (share, top_k)
    assert load_recipe("dive-2of8").method.active == 0.5
    assert [load_recipe("moefication").method.at_least(share) for share in (0.01, 0.5, 0.51)] == [0.125, 0.5, 0.625]
    assert load_recipe("llama-moe-shared").method.at_least(0.01) == 0.25
    assert load_recipe("token").method.at_least(0.51) == 0.51


def test_routers_of_added_experts_learn_straight_through_alone() -> None:
    """A mixture that adds gives its routers no gradient through their weights, which are always 1."""
    parent = tiny_parent("llama")
    _, carving = carved(parent, "moefication", [])
    for gradient, trained in (("none", False), ("straight-through", True)):
        recipe = load_recipe("moefication", None, ["stage2.tokens=512", f"stage2.router_gradient={gradient}"])
        parameters = prepare(build(parent, carving, "sliced"), recipe.stage2, 0)
        assert ("router.0" in parameters) == trained
