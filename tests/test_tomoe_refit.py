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
from moesmith.calibration.view import LayerView, Tokens
from moesmith.errors import MoesmithError
from moesmith.methods.groups import Fitting, Groups
from moesmith.methods.steps import around
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import build, carved_layer, moe_blocks
from moesmith.parent.layerwise import layered
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
        "moesmith.methods.tomoe.refit.refit_down", lambda down_DF, _gram, kept, _ridge: -2 * down_DF[:, kept]
    )
    run = run_of(tmp_path, f"masks.attention={attention}")
    before, after = (Carving.load(run.path(name)) for name in ("masks", "refit"))
    assert len(after.attention) == len(before.attention)
    found = run.metrics("refit")
    assert found["error_refitted"] == found["error_learned"] > 0
    stages = run.evaluation["stages"]
    assert stages["refit"]["geomean"] == pytest.approx(stages["masks"]["geomean"], rel=1e-5)


def test_a_refit_needs_sums(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    parent.additive = False
    with pytest.raises(MoesmithError, match=r"does something to its networks' outputs.*carve\.compensation to none"):
        convert("tomoe-plus", parent, ASSETS / "text", tmp_path / "run", settings=SMALL)
