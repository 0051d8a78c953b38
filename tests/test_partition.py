"""CMoE and ExpertWeaver: formulas against loops and enumeration, exact partitions, routers, plans."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from golden import ASSETS
from scipy.optimize import linear_sum_assignment
from several import several
from torch import Tensor

from moesmith.calibration.moments import Second
from moesmith.calibration.stream import BATCH, Stream
from moesmith.errors import MoesmithError
from moesmith.methods.balanced import balanced_assignment, balanced_kmeans
from moesmith.methods.cmoe import centres, distances, divide, fit_router, marks
from moesmith.methods.expert_weaver import mean_router, profiles, variation
from moesmith.methods.partition import Partition, sizes
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic, Linear
from moesmith.mixture.moe import build, carved_layer, moe_blocks
from moesmith.parent.layerwise import layered
from moesmith.parent.load import Parent
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import FAMILIES, tiny_parent
from moesmith.world import together

WINDOWS = torch.randint(0, 100, (12, 16), generator=torch.Generator().manual_seed(1))
X_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
SETTINGS = {
    "cmoe": ["carve.marked=4", "carve.sample=192"],
    "expert-weaver": ["carve.experts=8", "carve.threshold=0.3", "carve.rounds=3"],
}


def carved(parent: Parent, name: str, *more: str, seed: int = 0, batch: int = BATCH) -> tuple[Carving, Partition]:
    """All layers of a parent, as the step makes them."""
    method: Any = load_recipe(name, None, [*SETTINGS[name], *more]).method
    method.length, layers = WINDOWS.shape[1], []
    with Stream(parent, [[WINDOWS[:5]], [WINDOWS[5:]]], method.activations, batch=batch) as stream:
        for view in stream.views(torch.Generator().manual_seed(seed)):
            layers.append(method.carve(view))
            so_far = Carving([*layers, *layers[-1:] * (parent.L - len(layers))], parent.F)
            model = layered(parent.model, lambda index: carved_layer(parent, so_far, index))  # noqa: B023
            stream.carved(lambda: parent.turned(model).layer(view.index))  # noqa: B023
    return Carving(layers, parent.F), method


def shared_out(rank: int, folder: str, name: str, batch: str) -> None:
    """Write what a process makes of the layers when several share the text."""
    torch.set_num_threads(1)
    place = Path(folder) / f"{rank}"
    place.mkdir(exist_ok=True)
    with together():
        carved(tiny_parent("biased"), name, batch=int(batch))[0].save(place)


@pytest.mark.parametrize(("processes", "batch"), [(2, 2), (3, 8)])
@pytest.mark.parametrize("name", SETTINGS)
def test_several_processes_look_at_all_text(name: str, processes: int, batch: int, tmp_path: Path) -> None:
    """Seven batches between two, and two between three: one has none. Each makes what one alone makes."""
    several(processes, shared_out, tmp_path, name, batch)
    alone, _ = carved(tiny_parent("biased"), name, batch=batch)
    for rank in range(processes):
        for ours, theirs in zip(alone.layers, Carving.load(tmp_path / f"{rank}").layers, strict=True):
            assert [e.channels.tolist() for e in theirs.experts] == [e.channels.tolist() for e in ours.experts]
            assert type(theirs.router) is type(ours.router)
            if isinstance(ours.router, Linear):
                assert isinstance(theirs.router, Linear)
                torch.testing.assert_close(theirs.router.weight_ED, ours.router.weight_ED)


def test_sizes_follow_from_what_a_token_leaves_out() -> None:
    assert sizes(64, 6, 2, 0.5) == (16, [8] * 6)  # S2A2E8
    assert sizes(64, 5, 3, 0.25) == (24, [8] * 5)  # S3A3E8
    assert sizes(64, 8, 4, 0.5) == (0, [8] * 8)  # all that 4 of 8 can leave out
    assert sizes(64, 4, 4, 0.0) == (0, [16] * 4)
    for F, experts, top_k, ratio in itertools.product((37, 64, 1536), (2, 7), (1, 2), (0.2, 0.45)):
        if ratio > 1 - top_k / experts:
            continue
        shared, widths = sizes(F, experts, top_k, ratio)
        assert shared + sum(widths) == F
        assert max(widths) - min(widths) <= 1
        used = shared + top_k * sum(widths) / experts
        assert abs(used - (1 - ratio) * F) <= 1
    with pytest.raises(MoesmithError, match=r"at carve\.ratio 0 there are 0 of 64 channels for 6 .*Give fewer experts"):
        sizes(64, 6, 2, 0.0)
    with pytest.raises(MoesmithError, match="fewer experts"):
        load_recipe("cmoe", None, ["carve.experts=64", "carve.ratio=0.25"]).method.check(tiny_parent("llama"))


@pytest.mark.parametrize(
    ("name", "wanted", "says"),
    [
        ("cmoe", ["carve.ratio=0.7"], r"carve: ratio 0\.7 is above 0\.666667, all that 2 of 6 experts leave out"),
        ("cmoe", ["carve.top_k=6"], r"ratio 0\.5 is above 0, all that 6 of 6"),
        ("cmoe", ["carve.top_k=7"], "top_k 7 is above experts 6"),
        ("cmoe", ["carve.ridge=0.1"], r"ridge has no effect: carve\.router is not linear"),
        ("expert-weaver", ["carve.ratio=0.99"], r"ratio 0\.99 is above"),
        ("expert-weaver", ["carve.least=0.8"], r"least 0\.8 is above most 0\.7"),
        ("expert-weaver", ["carve.shares=equal", "carve.threshold=0.5"], "threshold has no effect"),
    ],
)
def test_settings_that_do_not_fit(name: str, wanted: list[str], says: str) -> None:
    with pytest.raises(MoesmithError, match=says):
        load_recipe(name, None, wanted)


@pytest.mark.parametrize("widths", [[2, 2, 2], [3, 3], [1, 3, 2], [6]])
def test_a_balanced_assignment_is_the_cheapest_of_all(widths: list[int]) -> None:
    cost_NE = torch.rand(6, len(widths), generator=torch.Generator().manual_seed(3))
    places = [group for group, width in enumerate(widths) for _ in range(width)]
    every = set(itertools.permutations(places))
    best = min(every, key=lambda order: sum(float(cost_NE[row, group]) for row, group in enumerate(order)))
    assert torch.from_numpy(balanced_assignment(cost_NE.numpy(), widths)).tolist() == list(best)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("rows", "widths"), [(60, [20, 20, 20]), (61, [9, 30, 1, 21]), (40, [5] * 8), (7, [7])])
def test_a_balanced_assignment_costs_what_a_linear_sum_assignment_does(
    rows: int, widths: list[int], ties: bool
) -> None:
    for seed in range(4):
        cost_NE = torch.randn(rows, len(widths), generator=torch.Generator().manual_seed(seed)).double()
        cost_NE[:, 0] -= 1.0  # most rows want to be in the same group
        cost_NE = (2 * cost_NE).round() if ties else cost_NE
        ids_N = torch.from_numpy(balanced_assignment(cost_NE.numpy(), widths))
        assert torch.bincount(ids_N, minlength=len(widths)).tolist() == widths
        places_N = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
        taken, columns = linear_sum_assignment(cost_NE[:, places_N].numpy())
        best = float(cost_NE[:, places_N].numpy()[taken, columns].sum())
        assert float(cost_NE[torch.arange(rows), ids_N].sum()) == pytest.approx(best)


def dense_markers(ids_TK: Tensor, F: int) -> Tensor:
    found_TF = torch.zeros(len(ids_TK), F)
    for token, ids in enumerate(ids_TK.tolist()):
        for channel in ids:
            found_TF[token, channel] = 1
    return found_TF


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_marks_and_their_rates(family: str) -> None:
    ffn = tiny_parent(family).ffns[0]
    ids_TK = marks(ffn, X_TD, 5)
    counts = [0] * 64
    for token in range(50):
        row = [abs(float(value)) for value in ffn.hidden(X_TD[token : token + 1])[0]]
        largest = sorted(range(64), key=lambda channel: -row[channel])[:5]
        assert set(ids_TK[token].tolist()) == set(largest)
        for channel in largest:
            counts[channel] += 1
    assert torch.bincount(ids_TK.flatten(), minlength=64).tolist() == counts
    assert marks(ffn, X_TD, 100).shape == (50, 64)  # at most all


def test_distances_of_markers() -> None:
    generator = torch.Generator().manual_seed(4)
    ids_TK = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(40)])
    group_F = torch.tensor([0, 1, 2, 2, 1, 0, 3, 1, 3])  # 3: of no group
    markers_TF = dense_markers(ids_TK, 9)
    means_TE = torch.stack([markers_TF[:, group_F == group].mean(1) for group in range(3)], 1)
    found_TE = centres(ids_TK, group_F, 3)
    torch.testing.assert_close(found_TE, means_TE)
    far_FE, common_FE = distances(ids_TK, found_TE, 9)
    torch.testing.assert_close(far_FE, torch.cdist(markers_TF.T, means_TE.T, p=1))
    torch.testing.assert_close(common_FE, markers_TF.T @ means_TE)


def test_channels_divided_by_marks_are_what_enumeration_finds() -> None:
    """One round on 6 of 8 channels, from the two that are marked most."""
    generator = torch.Generator().manual_seed(5)
    ids_TK = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(60)])
    markers_TF = dense_markers(ids_TK, 8)
    rest = torch.bincount(ids_TK.flatten(), minlength=8).argsort(descending=True, stable=True)[2:]
    experts, heads_E = divide(ids_TK, rest, [3, 3], 8)

    def total(groups: Any) -> float:
        pairs = ((seed, channel) for seed, group in zip(rest[:2], groups, strict=True) for channel in group)
        return sum(float((markers_TF[:, seed] - markers_TF[:, channel]).abs().sum()) for seed, channel in pairs)

    ordered = sorted(rest.tolist())
    every = [(first, [c for c in ordered if c not in first]) for first in itertools.combinations(ordered, 3)]
    assert total([group.tolist() for group in experts]) == pytest.approx(min(map(total, every)))
    assert sorted(torch.cat(experts).tolist()) == ordered
    _, cosines_E = divide(ids_TK, rest, [3, 3], 8, cosine=True)
    for group, head, cosine in zip(experts, heads_E, cosines_E, strict=True):
        mean_T = markers_TF[:, group].mean(1)
        far = {c: float((markers_TF[:, c] - mean_T).abs().sum()) for c in group.tolist()}
        assert far[int(head)] == pytest.approx(min(far.values()))
        near = {c: float(markers_TF[:, c] @ mean_T / markers_TF[:, c].norm()) for c in group.tolist()}
        assert near[int(cosine)] == pytest.approx(max(near.values()))


def test_more_rounds_do_not_make_groups_worse() -> None:
    generator = torch.Generator().manual_seed(6)
    ids_TK = torch.rand(200, 24, generator=generator).topk(4).indices
    rest, markers_TF = torch.arange(24), dense_markers(ids_TK, 24)

    def spread_of(rounds: int) -> float:
        experts, _ = divide(ids_TK, rest, [8, 8, 8], 24, rounds)
        means = [markers_TF[:, group].mean(1, keepdim=True) for group in experts]
        return sum(float((markers_TF[:, g] - m).square().sum()) for g, m in zip(experts, means, strict=True))

    assert spread_of(6) <= spread_of(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_with_all_experts_it_is_the_parent(name: str, family: str) -> None:
    """Every channel is somewhere once; a token that visits all experts gets what the parent computes."""
    parent = tiny_parent(family)
    carving, method = carved(parent, name)
    for layer in carving.layers:
        layer.check(parent.D, parent.F)
        channels = torch.cat([expert.channels for expert in layer.experts])
        assert torch.equal(channels.sort().values, torch.arange(parent.F))
        assert layer.mix == "sum"
        assert layer.shared is not None
    whole = Carving([replace(layer, top_k=len(layer.routed)) for layer in carving.layers], parent.F)
    with torch.no_grad():
        wanted = parent.model(input_ids=WINDOWS).logits
        torch.testing.assert_close(build(parent, whole)(input_ids=WINDOWS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (build(parent, carving)(input_ids=WINDOWS).logits - wanted).abs().max() > 1e-3
    again, other = carved(parent, name)
    assert other.measured == method.measured
    for mine, its in zip(carving.layers, again.layers, strict=True):
        pairs = zip(mine.experts, its.experts, strict=True)
        assert all(torch.equal(a.channels, b.channels) for a, b in pairs), "the same seed, the same experts"


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_an_analytic_router_is_what_its_channels_compute(family: str) -> None:
    parent = tiny_parent(family)
    carving, _ = carved(parent, "cmoe")
    for layer, block, ffn in zip(carving.layers, moe_blocks(build(parent, carving)), parent.ffns, strict=True):
        router = layer.router
        assert isinstance(router, Analytic)
        for expert, channel in zip(layer.routed, router.channels, strict=True):
            assert int(channel) in expert.channels.tolist(), "an expert is represented by one of its own"
        with torch.no_grad():
            wanted_TE = torch.stack([ffn.hidden(X_TD)[:, channel].abs() for channel in router.channels], 1)
            torch.testing.assert_close(block.router.logits(X_TD), wanted_TE)


def test_shared_channels_are_those_that_are_marked_most() -> None:
    parent = tiny_parent("llama")
    carving, method = carved(parent, "cmoe")
    seen: list[Tensor] = []
    hook = parent.ffns[0].down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        parent.model(WINDOWS)
    hook.remove()
    rate_F = torch.zeros(64)
    for row_F in seen[0].abs():
        rate_F[row_F.topk(4).indices] += 1 / len(seen[0])
    shared = carving.layers[0].shared
    assert shared is not None
    others = [channel for channel in range(64) if channel not in shared.channels.tolist()]
    assert rate_F[shared.channels].min() >= rate_F[others].max() - 1e-6
    assert method.measured["shared_marks"][0] == pytest.approx(float(rate_F[shared.channels].sum()) / 4, abs=1e-3)


def test_a_linear_router_is_the_least_squares_fit() -> None:
    parent = tiny_parent("llama")
    ffn, heads_E = parent.ffns[0], torch.tensor([3, 17, 40])
    x_TD = torch.randn(400, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        score_TE = ffn.hidden(x_TD)[:, heads_E].abs()
        found_ED = fit_router(ffn, x_TD, heads_E, 1e-9)
    target_TE = score_TE - score_TE.mean(1, keepdim=True)
    torch.testing.assert_close(found_ED.T, torch.linalg.lstsq(x_TD, target_TE).solution, rtol=1e-3, atol=1e-4)
    carving, _ = carved(parent, "cmoe", "carve.router=linear")
    assert all(isinstance(layer.router, Linear) for layer in carving.layers)
    assert not carving.is_native(parent)
    assert carved(parent, "cmoe")[0].is_native(parent)


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_profiles_of_the_gate(family: str) -> None:
    ffn = tiny_parent(family).ffns[0]
    with torch.no_grad():
        found_FS = profiles(ffn, X_TD, 10)
        assert found_FS.shape == (64, 5)
        for sample, channel in ((0, 0), (4, 63), (2, 31)):
            total = 0.0
            for x_D in X_TD[10 * sample : 10 * sample + 10]:
                pre = ffn.gate_FD[channel] @ x_D + (0 if ffn.gate_bias_F is None else ffn.gate_bias_F[channel])
                total += abs(float(ffn.activation(pre)))
            assert float(found_FS[channel, sample]) == pytest.approx(total / 10, rel=1e-4)
    values = [float(value) for value in found_FS[7]]
    mean = sum(values) / 5
    deviation = (sum((value - mean) ** 2 for value in values) / 5) ** 0.5
    assert float(variation(found_FS)[7]) == pytest.approx(deviation / mean, rel=1e-3)


def test_balanced_kmeans_finds_groups_of_equal_size() -> None:
    generator = torch.Generator().manual_seed(8)
    truth = torch.arange(30) % 3
    rows_FD = 5 * torch.randn(3, 4, generator=generator)[truth] + 0.1 * torch.randn(30, 4, generator=generator)
    ids_F = balanced_kmeans(rows_FD, 3, torch.Generator().manual_seed(0), 5)
    assert len({(int(a), int(b)) for a, b in zip(truth, ids_F, strict=True)}) == 3
    uneven_F = balanced_kmeans(rows_FD[:20], 3, torch.Generator().manual_seed(0), 5)
    assert sorted(torch.bincount(uneven_F).tolist()) == [6, 7, 7]
    assert torch.equal(ids_F, balanced_kmeans(rows_FD, 3, torch.Generator().manual_seed(0), 5))
    same_F = balanced_kmeans(torch.ones(8, 2), 4, torch.Generator().manual_seed(0), 3)  # nothing to tell apart
    assert torch.bincount(same_F).tolist() == [2] * 4


def test_how_many_experts_a_layer_visits() -> None:
    """Experts of one width, as many used in every layer; the published bounds hold at a ratio of 0.25."""
    method: Any = load_recipe("expert-weaver", None, ["carve.ratio=0.25"]).method
    for specialised, visited, routed in ((0.0, 3, 19), (0.5, 19, 35), (1.0, 35, 51)):  # by hand: 48 of 64 are used
        common, widths, top_k = method.divided(14336, specialised)
        assert (top_k, widths) == (visited, [224] * routed)
        assert common == 14336 - 224 * routed
    half: Any = load_recipe("expert-weaver").method
    for specialised in (0.0, 0.3, 1.0):
        common, widths, top_k = half.divided(1537, specialised)
        assert common + sum(widths) == 1537
        assert max(widths) - min(widths) <= 1
        assert common + top_k * 24 == pytest.approx(1537 / 2, abs=13)
    for ratio in (0.1, 0.9, 0.98):
        other: Any = load_recipe("expert-weaver", None, [f"carve.ratio={ratio}", "carve.most=1.0"]).method
        assert all(1 <= other.divided(1536, r)[2] <= 63 for r in (0.0, 0.5, 1.0))
    with pytest.raises(MoesmithError, match="64 channels are too few for 65 experts"):
        load_recipe("expert-weaver", None, ["carve.experts=65"]).method.check(tiny_parent("llama"))


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_shares_by_layer_and_a_router_of_gate_rows(family: str) -> None:
    parent = tiny_parent(family)
    carving, method = carved(parent, "expert-weaver")
    inputs: list[Tensor] = []
    hooks = [f.module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for f in parent.ffns]
    with torch.no_grad():
        parent.model(WINDOWS)
    for hook in hooks:
        hook.remove()
    for index, (layer, ffn, x_BSD) in enumerate(zip(carving.layers, parent.ffns, inputs, strict=True)):
        profile_FS = profiles(ffn, x_BSD.flatten(0, 1), 16)
        specialised = sum(float(v) > 0.3 for v in variation(profile_FS)) / 64
        assert method.measured["specialised"][index] == pytest.approx(specialised, abs=0.02)
        common, widths, top_k = method.divided(64, method.measured["specialised"][index])  # type: ignore[attr-defined]
        assert (layer.top_k, layer.widths) == (top_k, widths)
        assert layer.shared is None or layer.shared.width == common
        assert layer.shared is not None
        mean_F = profile_FS.mean(1)
        others = torch.cat([expert.channels for expert in layer.routed])
        assert mean_F[layer.shared.channels].min() >= mean_F[others].max() - 1e-5
        router = layer.router
        assert isinstance(router, Linear)
        rows_ED = torch.stack([ffn.gate_FD[expert.channels].mean(0) for expert in layer.routed])
        if family == "llama":
            torch.testing.assert_close(router.weight_ED, rows_ED)
        else:  # its gate has a bias, which moves all logits of an expert
            assert ffn.gate_bias_F is not None
            bias_E = torch.stack([ffn.gate_bias_F[expert.channels].mean() for expert in layer.routed])
            x_TD = x_BSD.flatten(0, 1)
            count = Second(len(x_TD), x_TD.mean(0), x_TD.T @ x_TD / len(x_TD))
            kept = [expert.channels for expert in layer.routed]
            torch.testing.assert_close(router.weight_ED, mean_router(ffn, kept, count), rtol=1e-3, atol=1e-4)
            assert (router.weight_ED - rows_ED).abs().max() > 1e-4
            assert float(bias_E.std()) > 0
    equal, _ = carved(parent, "expert-weaver", "carve.shares=equal", "carve.threshold=0.6")
    assert equal.alike


@pytest.mark.parametrize(
    ("name", "more"),
    [("cmoe", []), ("cmoe", ["carve.router=linear"]), ("expert-weaver", ["carve.experts=4", "carve.shares=equal"])],
)
def test_a_plan_counts_what_a_run_has(name: str, more: list[str], tmp_path: Any) -> None:
    sets = ["domains.tokens=512", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64", *more]
    words = ["--model", ASSETS / "parents" / "llama", "--data", ASSETS / "text"]
    words += [word for setting in sets for word in ("--set", setting)]
    plan = json.loads(moesmith("plan", name, *words, "--json").out)
    answer = moesmith("convert", name, *words, "--out", tmp_path / "run", "--dtype", "fp32")
    assert answer.status == 0, answer.err
    found = json.loads(moesmith("inspect", tmp_path / "run", "--json").out)
    counted = {key: plan[key] for key in ("parent_parameters", "parameters_total", "parameters_active")}
    assert found["parameters"] == counted
    assert (plan["architecture"] == "native") == (name == "cmoe" and not more)
    assert moesmith("report", tmp_path / "run").status == 0
