"""LLaMA-MoE's random shares: experts that all have the same text, which is read and kept once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import UNTRAINED, convert
from golden import ASSETS
from refusals import World, convert_is_refused

from moesmith.methods import steps
from moesmith.methods.refit import refit_down
from moesmith.methods.steps import windows_of
from moesmith.parent.load import load_parent

REFIT = ["carve.compensation=refit", *UNTRAINED]


def test_a_refit_reads_the_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's ``down_proj`` is the one that least squares over all text give."""
    given, stream = [], steps.Stream

    def noted(parent: Any, texts: Any, *args: Any, **options: Any) -> Any:
        given.append(texts)
        return stream(parent, texts, *args, **options)

    monkeypatch.setattr(steps, "Stream", noted)
    run = convert("llama-moe-1of8", ASSETS / "parents" / "llama", ASSETS / "text", tmp_path, REFIT, device="cpu")
    windows = windows_of(run)
    assert [len(texts) for texts in given] == [1]
    assert sum(map(len, given[0][0])) == sum(map(len, windows.values()))
    parent, caught = load_parent(ASSETS / "parents" / "llama", "fp32", device="cpu"), []
    for ffn in parent.ffns:
        ffn.down.register_forward_pre_hook(lambda _module, args: caught.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        parent.model(torch.cat(list(windows.values())))
    ridge = run.recipe.carve.ridge
    for ffn, a_TF, layer in zip(parent.ffns, caught, run.carving("carve").layers, strict=True):
        gram_FF = (a_TF.T @ a_TF / len(a_TF)).float()
        assert len({tuple(expert.channels.tolist()) for expert in layer.routed}) == 4
        for expert in layer.routed:
            assert expert.down_DF is not None
            wanted_DF = refit_down(ffn.down_DF, gram_FF, expert.channels, ridge)
            torch.testing.assert_close(expert.down_DF, wanted_DF, rtol=1e-3, atol=1e-4)


def test_a_router_cannot_tell_the_same_text_apart(world: World) -> None:
    says = r"router\.start is lda, which tells experts' texts apart, but those of llama-moe have the same\. Set"
    convert_is_refused(world, says, ["router.start=lda"], "llama-moe-1of8")
