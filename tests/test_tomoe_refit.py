"""What a refit of learned masks reads: layers behind those refitted before them, in what is left of attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import ASSETS
from torch import Tensor

from moesmith import convert
from moesmith.calibration.stream import Stream
from moesmith.calibration.view import HELD_OUT, LayerView, Tokens, held_out
from moesmith.errors import MoesmithError
from moesmith.methods.groups import Fitting, Groups
from moesmith.methods.refit import refit_down
from moesmith.methods.steps import around
from moesmith.methods.tomoe.method import Tomoe
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert
from moesmith.mixture.moe import build, carved_layer, moe_blocks
from moesmith.parent.layerwise import layered
from moesmith.run.recipe import load_recipe
from moesmith.testing.masks import harvested
from moesmith.testing.parents import tiny_parent

WINDOWS = torch.randint(2, 300, (6, 16), generator=torch.Generator().manual_seed(3))
SHORT = [f"masks.{x}" for x in ("tokens=1024", "window=32", "batch=2", "micro_batch=2", "lr=0.01", "budget=0.6")]
TEXT = ["domains.tokens=512", "domains.window=32", "affinity.tokens=256", "affinity.window=32"]
SMALL = [*SHORT, "carve.experts=4", "evaluate.tokens=512", "evaluate.window=64"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("attention", ["hybrid", "dynamic", "none"])
def test_a_layer_gets_what_it_gets_in_the_finished_model(family: str, attention: str) -> None:
    """And what it should give makes the parent's hidden state of what attention and earlier experts left."""
    parent = tiny_parent(family)
    carving = harvested(parent, attention=attention)
    model = build(parent, carving)
    inputs: list[Tensor] = []
    for block in moe_blocks(model):
        block.register_forward_pre_hook(lambda _block, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(WINDOWS)
        behind = parent.model(WINDOWS, output_hidden_states=True).hidden_states
        ours = model(WINDOWS, output_hidden_states=True).hidden_states
    options: dict[str, Any] = {"held": True, "repair": True, "batch": 3, "around": around(parent, carving)}
    with Stream(parent, [[WINDOWS]], "carved", **options) as stream:
        for view in stream.views(torch.Generator()):
            tokens = view.tokens()
            torch.testing.assert_close(tokens.x_TD, inputs[view.index], atol=1e-5, rtol=1e-4)
            if view.index + 1 < parent.L:  # the last state is behind the last norm
                with torch.no_grad():
                    given_TD = moe_blocks(model)[view.index](inputs[view.index][None])[0]
                lacks_TD = (behind[view.index + 1] - ours[view.index + 1]).flatten(0, 1)
                torch.testing.assert_close(tokens.y_TD, given_TD + lacks_TD, atol=1e-4, rtol=1e-3)
            made = layered(parent.model, lambda index: carved_layer(parent, carving, index))
            stream.carved(lambda: parent.turned(made).layer(view.index))  # noqa: B023


@torch.no_grad()
def tokens_of(view: LayerView) -> Tokens:
    found = view.tokens()
    return replace(found, x_TD=found.x_TD.clone())


def test_loud_tokens_do_not_decide() -> None:
    """A token of huge activations, which an expert cannot give, moves the fit no more than any other."""
    parent = tiny_parent("llama")
    ffn, generator = parent.ffns[0], torch.Generator().manual_seed(0)
    with Stream(parent, [[WINDOWS]], "carved", held=True) as stream:
        tokens = next(tokens_of(view) for view in stream.views(generator))
    ids_T = torch.arange(len(tokens.x_TD)) % 2
    quiet = Groups(ffn, tokens, ids_T, 2, Fitting(repair=False), sinks=False).fit(0)[1]
    tokens.x_TD[0] *= 100
    loud = Groups(ffn, tokens, ids_T, 2, Fitting(repair=False), sinks=False).fit(0)[1]
    tokens.weight_T[0] /= 1e8  # its channels are products of two such inputs
    weighed = Groups(ffn, tokens, ids_T, 2, Fitting(repair=False), sinks=False).fit(0)[1]
    assert (loud - quiet).norm() > 10 * quiet.norm()
    assert (weighed - quiet).norm() < 0.2 * quiet.norm()


def run_of(tmp_path: Path, *settings: str) -> Any:
    return convert(
        "tomoe-plus", ASSETS / "parents" / "llama", ASSETS / "text", tmp_path / "run",
        settings=[*SMALL, *TEXT, *settings],
        dtype="fp32", device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["hybrid", "none"])
def test_a_refit_that_errs_more_is_dropped(attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moesmith.methods.tomoe.refit.refit_down", lambda down_DF, _gram, kept, _ridge: down_DF[:, kept] / 0
    )
    run = run_of(tmp_path, f"masks.attention={attention}")
    before, after = (Carving.load(run.path(name)) for name in ("masks", "refit"))
    assert len(after.attention) == len(before.attention)
    assert all(expert.plain for layer in after.layers for expert in layer.routed)  # as it was: no copy of its columns
    found = run.metrics("refit")
    assert found["error_refitted"] == found["error_learned"] > 0
    stages = run.evaluation["stages"]
    assert stages["refit"]["geomean"] == pytest.approx(stages["masks"]["geomean"], rel=1e-5)


def test_a_refit_is_kept_where_unread_tokens_speak_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule of local training."""
    parent, method = tiny_parent("llama"), load_recipe("tomoe-plus").method
    assert isinstance(method, Tomoe)
    assert method.refit is not None
    with Stream(parent, [[WINDOWS]], "carved", held=True, repair=True) as stream:
        tokens = next(tokens_of(view) for view in stream.views(torch.Generator()))
    groups = Groups(parent.ffns[0], tokens, torch.zeros(len(tokens.x_TD), dtype=torch.int64), 1, Fitting())
    expert, none = Expert(torch.arange(0, parent.F, 2)), torch.zeros(0, dtype=torch.int64)
    _, gram_FF, down_DF = groups.fit(0)
    wanted_DF = refit_down(down_DF, gram_FF, expert.channels, method.settings.ridge)
    unread_N = held_out(replace(tokens, sequence_T=tokens.sequence_T + HELD_OUT - 1), torch.arange(16))[1]
    assert len(unread_N) == 16
    made, (before, after, _) = method.refit._refit(groups, 0, expert, unread_N, torch.float32)
    assert made.down_DF is not None
    torch.testing.assert_close(made.down_DF, wanted_DF)
    assert after < before
    wrong = [(wanted_DF, none), (wanted_DF * torch.nan, unread_N), (-2 * wanted_DF, unread_N)]
    for other_DF, rows_N in wrong:
        monkeypatch.setattr("moesmith.methods.tomoe.refit.refit_down", lambda *_given: other_DF)  # noqa: B023
        found, (before, after, _) = method.refit._refit(groups, 0, expert, rows_N, torch.float32)
        assert found is expert
        assert before == after


def test_a_refit_needs_sums(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    parent.additive = False
    with pytest.raises(MoesmithError, match=r"does something to its networks' outputs.*carve\.compensation to none"):
        convert("tomoe-plus", parent, ASSETS / "text", tmp_path / "run", settings=SMALL)
