"""Scores that need more than a layer's moments: gradients times weights (LLM-Pruner's), and draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversions import UNTRAINED, convert, weights
from torch import Tensor

from moesmith.calibration.moments import Moments, pool
from moesmith.conversion.plan import make_plan
from moesmith.errors import MoesmithError
from moesmith.methods import steps as method_steps
from moesmith.methods import taylor
from moesmith.methods.scores import channel_scores, choose, drawn_scores
from moesmith.methods.steps import moments_of, windows_of
from moesmith.methods.taylor import Scaled, slopes
from moesmith.mixture.carving import Carving
from moesmith.parent.load import load_parent
from moesmith.parent.structure import close
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import FAMILIES, tiny_model, tiny_parent

WINDOWS = torch.randint(2, 250, (6, 16), generator=torch.Generator().manual_seed(3))
TAYLOR = ["carve.score=taylor", "carve.compensation=none", *UNTRAINED[1:]]


def literal(family: str, windows: Tensor) -> list[Tensor]:
    """Gradient times weight of every channel's rows and columns, by autograd over all weights: (M, F) per layer."""
    model: Any = tiny_model(family).requires_grad_(True)
    logits = model(input_ids=windows).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
    found = []
    for layer in model.model.layers:
        mlp = layer.mlp
        if family == "phi3":
            parts = [(mlp.gate_up_proj.weight * mlp.gate_up_proj.weight.grad).sum(1)]
            parts = [*parts[0].chunk(2), (mlp.down_proj.weight * mlp.down_proj.weight.grad).sum(0)]
        else:
            names = ("fc1", "fc2") if family == "phi" else ("gate_proj", "up_proj", "down_proj")
            products = [(part := getattr(mlp, name).weight) * part.grad for name in names]
            parts = [product.sum(1) for product in products[:-1]] + [products[-1].sum(0)]
        found.append(torch.stack(parts).detach())
    return found


@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_gradients_times_weights(family: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taylor, "BATCH", batch)
    found_MLF = slopes(tiny_parent(family), WINDOWS)
    wanted_MLF = torch.stack(literal(family, WINDOWS), 1)
    assert found_MLF.shape == wanted_MLF.shape == (2 if family == "phi" else 3, 2, 64)
    torch.testing.assert_close(found_MLF, wanted_MLF, rtol=1e-3, atol=1e-5 * float(wanted_MLF.abs().max()))
    scores_LF = channel_scores(tiny_parent(family), Moments(1, torch.zeros(0), torch.zeros(0), found_MLF), "taylor")
    torch.testing.assert_close(scores_LF, sum(part.abs() for part in wanted_MLF), rtol=1e-3, atol=1e-7)
    assert (scores_LF >= 0).all()


def test_slopes_say_how_the_loss_changes() -> None:
    """Smaller by a little, a channel's three parts change the loss by as much as their slopes say."""
    parent, channel, step = tiny_parent("llama"), 5, 2e-2
    wanted = float(slopes(parent, WINDOWS)[:, 1, channel].sum())
    losses = []
    for factor in (1 + step, 1 - step):
        model = tiny_model("llama").double()
        mlp = model.model.layers[1].mlp
        with torch.no_grad():
            for rows in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
                rows[channel] *= factor
            logits = model(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
        losses.append(float(F.cross_entropy(logits, WINDOWS[:, 1:].flatten())))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "biased"])
def test_factors_of_one_change_nothing(family: str, dtype: torch.dtype) -> None:
    parent = tiny_parent(family, dtype=dtype)
    ffn, x = parent.ffns[0], torch.randn(2, 5, parent.D).to(dtype)
    assert close(Scaled(ffn)(x), ffn.module(x))
    before = dict(parent.model.named_modules())
    slopes(parent, WINDOWS)
    assert all(module is before[name] for name, module in parent.model.named_modules())
    assert all(parameter.grad is None for parameter in parent.model.parameters())


def test_what_gives_no_gradient_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match=r"run layer by layer\. Load it without a limit of memory"):
        slopes(replace(tiny_parent("llama"), memory=2**30), WINDOWS)
    with pytest.raises(MoesmithError, match="fp16 is too narrow"):
        slopes(tiny_parent("llama", dtype=torch.float16), WINDOWS)
    with pytest.raises(MoesmithError, match="these moments hold none"):
        channel_scores(tiny_parent("llama"), Moments(1, torch.zeros(2, 64), torch.zeros(2, 64)), "taylor")
    mapped = load_parent(home / "m", torch.float32, memory=2**30, device="cpu")
    with pytest.raises(MoesmithError, match="run layer by layer"):
        convert("static", mapped, home / "d", tmp_path / "run", TAYLOR, dtype="auto")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_whole_model() -> None:
    parent, settings = tiny_parent("llama"), ["domains.window=32", "domains.tokens=512", "stage2.tokens=0"]
    plans = {name: make_plan(load_recipe(name, None, settings), parent, 4) for name in ("llm-pruner", "wanda-sp")}
    assert plans["llm-pruner"].memory_layerwise is None
    assert plans["wanda-sp"].memory_layerwise is not None
    start = [f"masks.{x}" for x in ("tokens=64", "window=32")] + ["carve.start={method: static, score: taylor}"]
    with pytest.raises(MoesmithError, match="run layer by layer"):
        make_plan(load_recipe("tomoe", None, start), replace(parent, memory=2**30), 4)


def test_pooled_slopes_weigh_domains_alike() -> None:
    parent, zeros = tiny_parent("llama"), torch.zeros(2, 64)
    parts = [Moments(n, zeros, zeros, slopes(parent, WINDOWS[:n])) for n in (1, 6)]
    found_MLF = pool(parts).slopes_MLF
    assert found_MLF is not None
    torch.testing.assert_close(found_MLF, (slopes(parent, WINDOWS[:1]) + slopes(parent, WINDOWS)) / 2)
    assert pool([parts[0], Moments(1, zeros, zeros)]).slopes_MLF is None


def kept(run: Any) -> list[list[list[int]]]:
    return [[e.channels.tolist() for e in layer.routed] for layer in Carving.load(run.path("carve")).layers]


@pytest.mark.parametrize("selection", ["uniform", "adaptive"])
def test_a_static_mask_keeps_what_matters_by_its_gradients(home: Path, tmp_path: Path, selection: str) -> None:
    """As worked out from all weights' gradients of each domain's text; the mean over domains, then absolute values."""
    run = convert("static", home / "m", home / "d", tmp_path / "run", [*TAYLOR, f"carve.selection={selection}"])
    texts = windows_of(run)
    assert len(texts) == 4
    mean_MLF = torch.stack([torch.stack(literal("llama", ids), 1) for ids in texts.values()]).mean(0)
    wanted = choose(mean_MLF.abs().sum(0), 0.5, selection)  # type: ignore[arg-type]
    assert kept(run) == [[channels.tolist()] for channels in wanted]
    found = moments_of(run, "sum").slopes_MLF
    assert found is not None
    torch.testing.assert_close(found, torch.stack(literal("llama", texts["sum"]), 1), rtol=1e-3, atol=1e-5)
    assert run.manifest("moments")["settings"] == {"tokens": 4096, "gradients": 4096}


def test_gradients_are_taken_once_and_survive_a_kill(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = convert("static", home / "m", home / "d", tmp_path / "whole", TAYLOR)
    taken: list[int] = []

    def dies(*args: Any) -> Tensor:
        taken.append(len(args[1]))
        if len(taken) == 3:
            raise KeyboardInterrupt
        return slopes(*args)

    monkeypatch.setattr(method_steps.taylor, "slopes", dies)
    with pytest.raises(KeyboardInterrupt):
        convert("static", home / "m", home / "d", tmp_path / "killed", TAYLOR)
    killed = convert("static", home / "m", home / "d", tmp_path / "killed", TAYLOR)
    assert len(taken) == 3 + 2, "two domains were done before"
    assert weights(killed.folder) == weights(whole.folder)
    capfd.readouterr()
    more = [*TAYLOR, "carve.ratio=0.25"]
    other = convert("static", home / "m", home / "d", tmp_path / "other", more, reuse=whole.folder)
    assert "[moments] taken over" in capfd.readouterr().err
    assert len(taken) == 5
    assert other.manifest("moments")["key"] == whole.manifest("moments")["key"]
    plain = convert("static", home / "m", home / "d", tmp_path / "plain", [*TAYLOR, "carve.score=wifn"])
    changed = {name for name in ("domains", "moments", "carve") if plain.keys[name] != whole.keys[name]}
    assert changed == {"moments", "carve"}


@pytest.mark.parametrize("score", ["taylor", "random"])
@pytest.mark.parametrize("affinity", ["scores", "perplexity", "random"])
def test_clusters_by_these_scores(home: Path, tmp_path: Path, affinity: str, score: str) -> None:
    compensation = {"scores": "refit", "perplexity": "bias", "random": "none"}[affinity]
    settings = [f"carve.score={score}", f"affinity.method={affinity}", f"carve.compensation={compensation}"]
    run = convert("dive", home / "m", home / "d", tmp_path / "run", [*settings, *UNTRAINED])
    for layer in kept(run):
        assert [len(channels) for channels in layer] == [32] * 4
        assert len({tuple(channels) for channels in layer}) == 4


def test_draws_follow_the_seed(home: Path, tmp_path: Path) -> None:
    one, two = drawn_scores(2, 64, 2, 7), drawn_scores(2, 64, 1, 7)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], drawn_scores(2, 64, 1, 8)[0])
    settings = ["carve.score=random", "carve.compensation=none", UNTRAINED[1]]
    runs = [
        convert("static", home / "m", home / "d", tmp_path / f"{n}", [*settings, f"seed={n % 2}"]) for n in range(3)
    ]
    assert kept(runs[0]) == kept(runs[2]) != kept(runs[1])
    wanted = choose(drawn_scores(2, 64, 1, 0)[0], 0.5)
    assert kept(runs[0]) == [[channels.tolist()] for channels in wanted]
    share = torch.stack([scores for n in range(40) for scores in drawn_scores(2, 64, 1, n)]).mean()
    assert float(share) == pytest.approx(0.5, abs=0.02)
