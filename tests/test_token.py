"""Token carving: groups of a layer's tokens, elimination with a refit, local reconstruction."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import moesmith
from golden import ASSETS
from torch import Tensor

from moesmith.calibration.moments import Second
from moesmith.calibration.stream import HEAVIEST, Stream
from moesmith.calibration.view import LayerView, Tokens, held_out
from moesmith.conversion.convert import convert
from moesmith.data.records import Domain
from moesmith.data.sampling import packed_windows
from moesmith.errors import MoesmithError
from moesmith.methods import steps as method_steps
from moesmith.methods.base import Carver
from moesmith.methods.clusters import centre_router, kmeans, nearest, root
from moesmith.methods.groups import Fitting, Groups, sinks_of
from moesmith.methods.refit import eliminate, fit_down, refit_down
from moesmith.methods.router import constant_direction
from moesmith.methods.token import Token
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer
from moesmith.mixture.moe import build, carved_layer
from moesmith.parent.layerwise import layered
from moesmith.parent.load import load_parent
from moesmith.parent.network import Network
from moesmith.run.folder import open_run
from moesmith.run.recipe import load_recipe
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.training.local import LocalSection, at_once, order_of, reconstruct, squared_error

WINDOWS = torch.randint(0, 100, (96, 32), generator=torch.Generator().manual_seed(1))
SMALL = [
    *("domains.tokens=1024", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64", "stage2.tokens=0"),
    *("carve.experts=3", "carve.sample=64", "carve.batch=32", "carve.passes=2", "carve.prior=50"),
]


def tokens_of(parent: Any, layer: int = 1, **options: Any) -> Tokens:
    with Stream(parent, [[WINDOWS]], "carved", held=True, **options) as stream:
        for view in stream.views(torch.Generator()):
            if view.index == layer:
                found = view.tokens()
                return replace(found, x_TD=found.x_TD.clone(), y_TD=found.y_TD.clone())
    raise AssertionError


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_all_tokens_of_a_layer(family: str, tmp_path: Path) -> None:
    """What the network gets and gives in an ordinary forward pass, weighted by the hidden state after the layer."""
    parent = tiny_parent(family)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = parent.ffns[0].module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        hidden = parent.model(WINDOWS, output_hidden_states=True).hidden_states[1]
    hook.remove()
    found = tokens_of(parent, 0)
    torch.testing.assert_close(found.x_TD, seen[0][0].flatten(0, 1))
    torch.testing.assert_close(found.y_TD, seen[0][1].flatten(0, 1))
    wanted_T = 1 / hidden.square().sum(-1).flatten()
    wanted_T = wanted_T.clamp_max(HEAVIEST * wanted_T.mean())
    torch.testing.assert_close(found.weight_T, wanted_T / wanted_T.mean())
    shares_T = found.y_TD.square().sum(-1) / hidden.square().sum(-1).flatten()
    torch.testing.assert_close(found.share_T, shares_T)
    assert found.sequence_T.tolist() == [n for n in range(96) for _ in range(32)]
    on_disk = tokens_of(parent, 0, folder=tmp_path, room=0)
    assert torch.equal(on_disk.x_TD, found.x_TD)
    assert torch.equal(on_disk.y_TD, found.y_TD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
@pytest.mark.parametrize("repair", [False, True])
def test_tokens_behind_a_carved_layer(family: str, repair: bool) -> None:
    """What a layer sees, and what its experts should give, against ordinary forward passes of parent and mixture."""
    parent = tiny_parent(family, num_hidden_layers=3)
    carving = random_carving(parent, experts=2)
    made = layered(parent.model, lambda index: carved_layer(parent, carving, index))
    model = build(parent, carving, "sliced")
    seen: list[Tensor] = []
    ffns = [parent.ffns[1].module, model.get_submodule(parent.ffns[1].path)]
    hooks = [ffn.register_forward_hook(lambda _m, args, out: seen.extend((args[0], out))) for ffn in ffns]
    with torch.no_grad():
        intact, carved = (m(WINDOWS, output_hidden_states=True).hidden_states[1:3] for m in (parent.model, model))
    for hook in hooks:
        hook.remove()
    _, _, x_BSD, got_BSD = seen
    with Stream(parent, [[WINDOWS]], "carved", held=True, repair=repair) as stream:
        for view in stream.views(torch.Generator()):
            tokens = view.tokens()
            assert view.tokens() is tokens
            if view.index == 1:
                break
            stream.carved(lambda: made.layer(view.index))  # noqa: B023
            with pytest.raises(MoesmithError, match="last"):
                view.sample(10)
    torch.testing.assert_close(tokens.x_TD, x_BSD.flatten(0, 1))
    with torch.no_grad():
        own_TD = parent.ffns[1].output(tokens.x_TD)
    rest_TD = (carved[1] - got_BSD).flatten(0, 1)
    wanted_TD = intact[1].flatten(0, 1) - rest_TD if repair else own_TD
    torch.testing.assert_close(tokens.y_TD, wanted_TD, rtol=1e-4, atol=1e-5)
    energy_T = (rest_TD + own_TD).square().sum(1)
    if repair:
        energy_T = torch.maximum(energy_T, intact[1].flatten(0, 1).square().sum(1))
    wanted_T = (1 / energy_T).clamp_max(HEAVIEST * float((1 / energy_T).mean()))
    torch.testing.assert_close(tokens.weight_T, wanted_T / wanted_T.mean(), rtol=1e-4, atol=1e-5)


def test_a_token_that_became_a_sink_decides_nothing() -> None:
    """Where the parent's network shouts at what carved layers made of a token, an error counts relative to that."""
    parent = tiny_parent("llama", num_hidden_layers=3)
    ffn = parent.ffns[1]
    norm = parent.model.get_submodule(ffn.path.rsplit(".", 1)[0]).post_attention_layernorm
    with Stream(parent, [[WINDOWS]], "carved", held=True, repair=True) as stream:
        for view in stream.views(torch.Generator()):
            if view.index == 1:
                # one token's state has become another's, and channel 0 shouts at that alone
                stream.waiting[0][0, 5] = 7.0 * torch.randn(parent.D, generator=torch.Generator().manual_seed(3))
                with torch.no_grad():
                    x_D = norm(stream.waiting[0][0, 5])
                    ffn.gate_FD[0], ffn.up_FD[0] = 4 * x_D, 4 * x_D
                    ffn.down_DF[:, 0] *= 1e3
                tokens = view.tokens()
                break
            stream.carved(lambda: parent.model.get_submodule(ffn.path.rsplit(".", 1)[0]))
    others_T = torch.arange(len(tokens.weight_T)) != 5
    shouted = tokens.weight_T[5] * ffn.output(tokens.x_TD[5:6]).square().sum()
    assert float(shouted) < 5 * float((tokens.weight_T * tokens.y_TD.square().sum(1))[others_T].max())


def refitted_error(down_DF: Tensor, gram_FF: Tensor, kept: Tensor, ridge: float) -> float:
    """The least tr((W − W') H (W − W')ᵀ), H = C + λI, with all other columns of W' zero: least squares by hand."""
    damped_FF = gram_FF + ridge * gram_FF.diagonal().mean() * torch.eye(len(gram_FF), dtype=gram_FF.dtype)
    cross_DS = down_DF @ damped_FF[:, kept]
    solved_DS = torch.linalg.solve(damped_FF[kept][:, kept], cross_DS.T).T
    return float(((down_DF @ damped_FF) * down_DF).sum() - (cross_DS * solved_DS).sum())


def test_elimination_drops_what_a_refit_makes_up_for() -> None:
    """One channel at a time, what goes is what brute force finds; a copy of a channel goes however loud it is."""
    generator = torch.Generator().manual_seed(0)
    a_TF = torch.randn(500, 9, generator=generator).double() @ torch.randn(9, 9, generator=generator).double()
    down_DF = torch.randn(4, 9, generator=generator).double()
    gram_FF = a_TF.T @ a_TF / 500
    left = list(range(9))
    for keep in range(8, 2, -1):
        cost = {j: refitted_error(down_DF, gram_FF, torch.tensor([i for i in left if i != j]), 0.01) for j in left}
        left.remove(min(cost, key=lambda j: cost[j]))
        assert eliminate(down_DF.float(), gram_FF.float(), keep, 0.01, rounds=9 - keep).tolist() == left
    best = min(refitted_error(down_DF, gram_FF, torch.tensor(c), 0.01) for c in itertools.combinations(range(9), 3))
    kept = eliminate(down_DF.float(), gram_FF.float(), 3, 0.01, rounds=6)
    loud = (gram_FF.diagonal() * down_DF.square().sum(0)).topk(3).indices
    assert best <= refitted_error(down_DF, gram_FF, kept, 0.01) <= refitted_error(down_DF, gram_FF, loud, 0.01)
    twins_TF = torch.cat([a_TF[:, :4], 3 * a_TF[:, :1]], 1)  # channels 0 and 4 do the same
    kept = eliminate(down_DF[:, :5].float(), (twins_TF.T @ twins_TF / 500).float(), 4, 1e-4)
    assert sorted({0, 4} & set(kept.tolist())) in ([0], [4])
    assert eliminate(down_DF.float(), gram_FF.float(), 9).tolist() == list(range(9))


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_where_nothing_was_lost_the_fit_is_the_parents(family: str) -> None:
    """In the first layer experts should give what the network gives, its bias aside."""
    parent = tiny_parent(family)
    ffn, tokens = parent.ffns[0], tokens_of(parent, 0, repair=True)
    with torch.no_grad():
        torch.testing.assert_close(tokens.y_TD, ffn.output(tokens.x_TD), rtol=1e-4, atol=1e-5)
        one_T = torch.zeros(len(tokens.x_TD), dtype=torch.int64)
        gram_FF, cross_DF = Groups(ffn, tokens, one_T, 1, Fitting()).pooled
    torch.testing.assert_close(fit_down(ffn.down_DF, gram_FF, cross_DF), ffn.down_DF, rtol=1e-3, atol=1e-4)
    if family == "phi":
        assert ffn.down_bias_D is not None
        assert float(ffn.down_bias_D.abs().max()) > 1e-3, "a bias to forget"
    away_DF = fit_down(ffn.down_DF, gram_FF, 2 * cross_DF, 1e-6)  # other outputs: another matrix
    torch.testing.assert_close(away_DF, 2 * ffn.down_DF, rtol=0.05, atol=0.01)


def test_what_is_held_out_is_not_fitted_to() -> None:
    """Otherwise training, which does not read it either, would be compared with a start that knows it by heart."""
    parent = tiny_parent("llama")
    ffn, tokens = parent.ffns[1], tokens_of(parent, 1, repair=True)
    ids_T = torch.arange(len(tokens.x_TD)) % 2
    before = Groups(ffn, tokens, ids_T, 2, Fitting()).fit(1)
    read_N, others_N = held_out(tokens, torch.arange(len(ids_T)))
    tokens.y_TD[others_N] += 1
    tokens.x_TD[others_N] *= 2
    for now, was in zip(Groups(ffn, tokens, ids_T, 2, Fitting()).fit(1), before, strict=True):
        assert torch.equal(now, was)
    tokens.y_TD[read_N] += 1
    assert not torch.equal(Groups(ffn, tokens, ids_T, 2, Fitting()).fit(1)[2], before[2])


def test_elimination_among_the_loudest_channels() -> None:
    """It chooses among them alone, and what is left is the least squares of its choice."""
    parent = tiny_parent("llama")
    ffn, tokens = parent.ffns[1], tokens_of(parent, 1, repair=True)
    ids_T = torch.arange(len(tokens.x_TD)) % 3
    groups = Groups(ffn, tokens, ids_T, 3, Fitting(), sinks=False)
    every_F, gram_FF, down_DF = groups.fit(1)
    some_S, gram_SS, down_DS = groups.fit(1, 40)
    energy_F = gram_FF.diagonal() * ffn.down_DF.square().sum(0)
    assert every_F.tolist() == list(range(parent.F))
    assert some_S.tolist() == energy_F.topk(40).indices.sort().values.tolist()
    torch.testing.assert_close(gram_SS, gram_FF[some_S][:, some_S])
    assert torch.equal(groups.fit(1, parent.F)[2], down_DF)
    own = Groups(ffn, tokens, ids_T, 3, Fitting(1e-6, repair=False), sinks=False)
    for given, rtol, atol in ((groups, 0.1, 0.02), (own, 0.01, 1e-3)):
        (_, gram_FF, down_DF), (_, gram_SS, down_DS) = given.fit(1), given.fit(1, 40)
        chosen = eliminate(down_DS, gram_SS, 20, 0.03)
        straight_DS = refit_down(down_DF, gram_FF, some_S[chosen], 1e-6)  # through the fit of all channels
        narrow_DS = refit_down(down_DS, gram_SS, chosen, 1e-6)
        torch.testing.assert_close(straight_DS, narrow_DS, rtol=rtol, atol=atol)


def test_a_router_without_bias_finds_the_nearest_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    means_ED = 3 * torch.randn(5, 16, generator=generator)
    x_TD = means_ED.repeat(200, 1) + 0.3 * torch.randn(1000, 16, generator=generator)
    x_TD[:, 0] = 2.0  # as an RMS-normalised input holds an almost constant direction
    centres_ED = kmeans(x_TD, 5, generator)
    ids_T = nearest(x_TD, centres_ED)
    assert torch.equal(ids_T, torch.cdist(x_TD, centres_ED).argmin(-1))
    distance_T = torch.cdist(x_TD, centres_ED).min(-1).values
    assert float(distance_T.mean()) < 1.5, "every group has a centre"
    constant_D, error = constant_direction(Second(1000, x_TD.mean(0), x_TD.T @ x_TD / 1000))
    assert error < 1e-3
    router_ED = centre_router(centres_ED, constant_D)
    assert (x_TD @ router_ED.T).argmax(-1).eq(ids_T).float().mean() > 0.99


def test_angles_do_not_see_how_long_a_row_is() -> None:
    """Groups of directions, of very different lengths: the nearest centre by angle is a linear router's choice."""
    generator = torch.Generator().manual_seed(0)
    ways_ED = torch.nn.functional.normalize(torch.randn(5, 16, generator=generator))
    x_TD = ways_ED.repeat(200, 1) + 0.05 * torch.randn(1000, 16, generator=generator)
    x_TD = x_TD * torch.rand(1000, 1, generator=generator).add(0.01)
    centres_ED = kmeans(x_TD, 5, generator, angles=True)
    torch.testing.assert_close(centres_ED.norm(dim=1), torch.ones(5))
    cosine_ET = torch.nn.functional.cosine_similarity(centres_ED[:, None], x_TD[None], dim=-1)
    ids_T = (x_TD @ centres_ED.T).argmax(-1)
    assert torch.equal(ids_T, cosine_ET.argmax(0))
    wanted_T = torch.arange(5).repeat(200)
    assert all(len(set(ids_T[wanted_T == way].tolist())) == 1 for way in range(5))
    assert len(set(ids_T.tolist())) == 5
    lengths_T = kmeans(x_TD, 5, torch.Generator().manual_seed(0))
    assert any(len(set(nearest(x_TD, lengths_T)[wanted_T == way].tolist())) > 1 for way in range(5))


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_metric_of_angles_is_half_of_what_the_network_makes(family: str) -> None:
    network = tiny_parent(family).ffns[1]
    root_DD = root(network)
    torch.testing.assert_close(root_DD, root_DD.T)
    made = [network.gate_FD, *([] if network.up_FD is None else [network.up_FD])]
    x_TD = torch.randn(7, 32)
    square_T = sum((x_TD @ part.T).square().sum(1) for part in made)
    torch.testing.assert_close((x_TD @ root_DD @ root_DD).square().sum(1), square_T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clusters", ["angle", "distance"])
def test_tokens_go_where_the_router_sends_them(clusters: str, tmp_path: Path) -> None:
    given = [*SMALL, f"carve.clusters={clusters}"]
    run = convert("token", tiny_parent("llama"), ASSETS / "text", tmp_path / "run", settings=given)
    assert run.metrics("export")["logits_difference"] < 1e-3
    assert run.metrics("carve")["least_load"] > 0


def start_of(parent: Any, layer: int = 1, keep: int = 24) -> tuple[Any, Network, Tokens, Tensor]:
    ffn, tokens = parent.ffns[layer], tokens_of(parent, layer)
    rows_N = torch.arange(len(tokens.x_TD))[::2]
    with torch.no_grad():
        a_NF = ffn.hidden(tokens.x_TD[rows_N]).float()
    gram_FF = a_NF.T @ a_NF / len(a_NF)
    kept = eliminate(ffn.down_DF, gram_FF, keep)
    return ffn, ffn.narrowed(kept, refit_down(ffn.down_DF, gram_FF, kept)), tokens, rows_N


def trained(start: Network, tokens: Tokens, rows_N: Tensor, spec: Any) -> tuple[Network, Any]:
    """One expert's own training, its order drawn from one seed."""
    order = order_of(tokens, rows_N, spec, torch.Generator().manual_seed(0))
    shares: list[float] = []
    [found] = reconstruct([start], tokens, [rows_N], [order], spec, shares.append)
    assert sum(shares) == pytest.approx(1.0 if len(order) else 0.0)
    return found


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_reconstruction_lowers_the_error_where_it_did_not_train(family: str) -> None:
    parent = tiny_parent(family)
    ffn, start, tokens, rows_N = start_of(parent)
    spec = LocalSection(passes=6, batch=32, lr=0.02)
    found, outcome = trained(start, tokens, rows_N, spec)
    mine_N, others_N = held_out(tokens, rows_N)
    assert not set(tokens.sequence_T[mine_N].tolist()) & set(tokens.sequence_T[others_N].tolist())
    assert outcome.after < 0.97 * outcome.before
    assert outcome.after == pytest.approx(squared_error(found, tokens, others_N))
    again, same = trained(start, tokens, rows_N, spec)
    assert same == outcome
    assert torch.equal(again.gate_FD, found.gate_FD)
    assert not torch.equal(found.gate_FD, start.gate_FD)
    assert (found.up_FD is None) == (family == "phi")
    with torch.no_grad():  # with all channels an expert is the network
        whole = ffn.to(torch.float32)
        torch.testing.assert_close(whole.output(tokens.x_TD), tokens.y_TD)


def test_what_does_not_help_is_dropped() -> None:
    _, start, tokens, rows_N = start_of(tiny_parent("llama"))
    for spec in (LocalSection(passes=1, batch=32, lr=1e3), LocalSection(passes=0), LocalSection(passes=1, batch=4096)):
        found, outcome = trained(start, tokens, rows_N, spec)
        assert found is start
        assert outcome.after == outcome.before
    nothing, outcome = trained(start, tokens, rows_N[:0], LocalSection())
    assert nothing is start
    assert (outcome.before, outcome.energy) == (0, 0)


def test_what_no_unread_token_speaks_for_is_dropped() -> None:
    _, start, tokens, rows_N = start_of(tiny_parent("llama"))
    mine_N, _ = held_out(tokens, rows_N)
    found, outcome = trained(start, tokens, mine_N, LocalSection(passes=1, batch=32))
    assert found is start
    assert (outcome.before, outcome.after, outcome.energy) == (0, 0, 0)


@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_side_by_side_is_each_alone(family: str) -> None:
    """Experts of 20, 9 and 1 steps and one of none, each with biases of its own."""
    _, start, tokens, rows_N = start_of(tiny_parent(family))
    shifted = [start.replaced([part * scale for part in start.weights]) for scale in (0.9, 1.0, 1.1, 1.2)]
    for number, expert in enumerate(shifted):
        if expert.gate_bias_F is not None:
            expert.gate_bias_F = expert.gate_bias_F + 0.1 * number
    spec, generator = LocalSection(passes=3, batch=32, lr=0.02), torch.Generator().manual_seed(5)
    rows = [rows_N[: 9 * 32], rows_N[::2], rows_N[:35], rows_N[:8]]
    orders = [order_of(tokens, mine, spec, generator) for mine in rows]
    steps = [len(order) // 32 for order in orders]
    assert len(set(steps)) == 4
    assert min(steps) == 0
    together = reconstruct(shifted, tokens, rows, orders, spec)
    for expert, mine, order, (found, outcome) in zip(shifted, rows, orders, together, strict=True):
        [(one, expected)] = reconstruct([expert], tokens, [mine], [order], spec)
        assert (found is expert) == (one is expert)
        assert outcome.after == pytest.approx(expected.after, rel=1e-4)
        for part, other in zip(found.weights, one.weights, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-5)


def test_experts_are_trained_one_after_the_other_on_a_cpu() -> None:
    assert at_once(tiny_parent("llama").ffns[0], 8) == 1


def test_text_that_is_read_once() -> None:
    parent = tiny_parent("llama")
    records = tuple({"text": f"number {n} of a list that goes on"} for n in range(40))
    domain = Domain("numbers", calibration=records, evaluation=())
    every = packed_windows(domain, parent.tokenizer, 10**6, 8, 0)
    few = packed_windows(domain, parent.tokenizer, 64, 8, 0)
    assert torch.equal(few, every[:8])
    assert not torch.equal(packed_windows(domain, parent.tokenizer, 64, 8, 1), few)
    ids = [parent.tokenizer(record["text"])["input_ids"] for record in records]
    assert every.numel() <= sum(map(len, ids)) + len(ids) < every.numel() + 8
    with pytest.raises(MoesmithError, match="fewer than one window"):
        packed_windows(domain, parent.tokenizer, 10**6, 10**5, 0)


def words(command: str, family: str, *more: Any) -> list[Any]:
    given = [command, "token", "--model", ASSETS / "parents" / family, "--data", ASSETS / "text"]
    return [*given, *(word for setting in SMALL for word in ("--set", setting)), *more]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_it_goes_all_the_way(family: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = json.loads(moesmith(*words("plan", family, "--json")).out)
    answer = moesmith(*words("convert", family, "--out", run, "--dtype", "fp32"))
    assert answer.status == 0, answer.err
    opened = open_run(run)
    carving, metrics = opened.carving(), opened.metrics("carve")
    assert carving.widths().tolist() == [[32] * 3] * 2
    (lines,) = metrics["layers"].values()
    assert all(after <= before for after, before in zip(lines["trained"], lines["refitted"], strict=True))
    assert metrics["error"] < metrics["error_refitted"]
    found = json.loads(moesmith("inspect", run, "--json").out)
    counted = {name: plan[name] for name in ("parent_parameters", "parameters_total", "parameters_active")}
    assert found["parameters"] == counted
    assert moesmith("report", run).status == 0
    assert (run / "figures" / "layers-carve-0.png").is_file()
    assert "error of the network" in (run / "report.html").read_text(encoding="utf-8")
    assert opened.metrics("export")["logits_difference"] < 1e-3


MODEL, DATA = str(ASSETS / "parents" / "llama"), str(ASSETS / "text")


def settings(*more: str) -> list[str]:
    return [*SMALL, *more]


def test_with_every_channel_it_is_the_parent(tmp_path: Path) -> None:
    run = convert("token", MODEL, DATA, tmp_path, settings=settings("carve.ratio=0"), dtype="fp32")
    parent = load_parent(MODEL, dtype="fp32")
    mine, ids = build(parent, run.carving()), WINDOWS[:2]
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, parent.model(ids).logits, atol=2e-3, rtol=1e-3)


def test_a_killed_carving_goes_on_behind_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Layers that are done are kept; the rest is made as an undisturbed run makes it, to the bit."""
    whole = convert("token", MODEL, DATA, tmp_path / "whole", settings=settings(), dtype="fp32")
    monkeypatch.setattr(method_steps, "SAVE_SECONDS", 0.0)
    made, carve = [], Token.carve

    def dies(self: Token, view: LayerView) -> Layer:
        made.append(view.index)
        if made == [0, 1]:
            raise KeyboardInterrupt
        return carve(self, view)

    monkeypatch.setattr(Token, "carve", dies)
    with pytest.raises(KeyboardInterrupt):
        convert("token", MODEL, DATA, tmp_path / "killed", settings=settings(), dtype="fp32")
    made.append(-1)
    killed = convert("token", MODEL, DATA, tmp_path / "killed", settings=settings(), dtype="fp32")
    assert made == [0, 1, -1, 1], "the first layer was not made again"
    assert "continuing at layer 1" in capsys.readouterr().err
    assert killed.metrics("carve") == whole.metrics("carve")
    files = [run.path("carve") / "carving.safetensors" for run in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (killed.path("carve") / "layers").exists()


def test_a_kill_between_two_layers_loses_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were written without the state behind them do not count: numbers and draws would be later ones."""
    monkeypatch.setattr(method_steps, "SAVE_SECONDS", 0.0)
    layers, save, written = random_carving(tiny_parent("llama")).layers, Carving.save, []

    def dies(self: Carving, folder: Path) -> None:
        written.append(folder.name)
        if written == ["0", "1"]:
            raise KeyboardInterrupt
        save(self, folder)

    monkeypatch.setattr(Carving, "save", dies)
    method, generator = load_recipe("token").method, torch.Generator().manual_seed(0)
    assert isinstance(method, Carver)
    method.note(error=0.5)
    begun = method_steps.Begun(tmp_path, method, generator, 64, "carve")
    with pytest.raises(KeyboardInterrupt):
        begun.keep(layers)
    before = generator.get_state()
    assert method_steps.Begun(tmp_path, method, generator, 64, "carve").restore() == []
    assert method.measured == {}
    method.note(error=0.25)
    method_steps.Begun(tmp_path, method, generator, 64, "carve").keep(layers[:1])
    torch.rand(3, generator=generator)
    method.note(error=0.125)
    assert len(method_steps.Begun(tmp_path, method, generator, 64, "carve").restore()) == 1
    assert method.measured == {"error": [0.25]}
    assert torch.equal(generator.get_state(), before)


def test_tokens_that_hardly_count_make_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens of huge activations, as a text's first ones have, are not clustered, but routed like all others."""
    parent = tiny_parent("llama")
    x_TD = torch.randn(2000, parent.D, generator=torch.Generator().manual_seed(0))
    weight_T = torch.ones(2000)
    x_TD[::100] *= 300
    weight_T[::100] = 1e-4
    nothing = torch.zeros(2000, dtype=torch.int32)
    tokens = Tokens(x_TD, torch.zeros_like(x_TD), weight_T / weight_T.mean(), nothing, nothing.float())
    seen: list[Tensor] = []

    def clustered(sample_ND: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(sample_ND)
        return kmeans(sample_ND, *rest, **options)

    monkeypatch.setattr("moesmith.methods.token.kmeans", clustered)
    method: Any = load_recipe("token", None, ["carve.experts=2"]).method
    view: Any = SimpleNamespace(parent=parent, network=parent.ffns[0], generator=torch.Generator().manual_seed(1))
    router_ED, ids_T = method.route(view, tokens, 2)
    seen[0] = seen[0] @ root(parent.ffns[0]).inverse()
    assert (len(seen[0]), len(ids_T), router_ED.shape) == (1980, 2000, (2, parent.D))
    assert float(seen[0].abs().max()) < 10


def test_sinks_are_few_tokens_that_a_network_makes() -> None:
    """A text's first token, whose hidden state one network makes; not a first layer, which makes every token's."""
    share_T = torch.full((1000,), 0.05)
    share_T[::100] = 1.0
    assert sinks_of(share_T).nonzero().flatten().tolist() == list(range(0, 1000, 100))
    assert not sinks_of(torch.full((1000,), 0.99)).any()


@pytest.mark.parametrize("learned", [True, False])
def test_every_expert_learns_the_sinks(learned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, seen = tiny_parent("llama"), list[list[int]]()

    def first_of_windows(share_T: Tensor) -> Tensor:
        return torch.arange(len(share_T)) % 32 == 0

    def spied(starts: Any, tokens: Tokens, rows: list[Tensor], *rest: Any) -> Any:
        seen.extend(rows_N.tolist() for rows_N in rows)
        return reconstruct(starts, tokens, rows, *rest)

    monkeypatch.setattr("moesmith.methods.groups.sinks_of", first_of_windows)
    monkeypatch.setattr("moesmith.methods.token.reconstruct", spied)
    convert(
        "token", parent, str(ASSETS / "text"), tmp_path / "run", settings=[*SMALL, f"carve.sinks={learned}".lower()]
    )
    layers = [seen[n : n + 3] for n in range(0, len(seen), 3)]
    assert len(layers) == parent.L
    for experts in layers:
        everyones = set.intersection(*map(set, experts))
        tokens = len(set.union(*map(set, experts)))
        assert everyones == (set(range(0, tokens, 32)) if learned else set())
        assert sum(map(len, experts)) == tokens + 2 * len(everyones)
