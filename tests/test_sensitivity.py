"""How far predictions move when a hidden state is wrong: against the divergence itself, and where it decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesmith.calibration.view import Tokens
from moesmith.conversion.convert import convert
from moesmith.errors import MoesmithError
from moesmith.methods import sensitivity
from moesmith.methods.sensitivity import drawn, information, information_of, measure, relative
from moesmith.methods.token import Token
from moesmith.parent.head import head_of
from moesmith.parent.structure import decoder_layers
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import tiny_parent

ASSETS = Path(__file__).parent / "assets"
IDS = torch.randint(0, 100, (64, 16), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def moved(parent: Any, index: int, way_D: Tensor, size: float) -> float:
    """The mean over tokens of how far all predictions diverge if its state behind a layer is off by ‖h‖ · way."""
    where: list[int] = []

    def shift(_layer: Any, _args: Any, out: Any) -> Any:
        state_BSD = out[0] if isinstance(out, tuple) else out
        if where:
            state_BSD = state_BSD.clone()
            here_BD = state_BSD[:, where[0]]
            state_BSD[:, where[0]] = here_BD + size * here_BD.norm(dim=-1, keepdim=True) * way_D
        return (state_BSD, *out[1:]) if isinstance(out, tuple) else state_BSD

    handle = decoder_layers(parent.model)[1][index].register_forward_hook(shift)
    plain_BSV = parent.model(IDS).logits.double().log_softmax(-1)
    total = 0.0
    for position in range(IDS.shape[1]):
        where[:] = [position]
        other_BSV = parent.model(IDS).logits.double().log_softmax(-1)
        total += float(F.kl_div(other_BSV, plain_BSV, log_target=True, reduction="sum"))
    handle.remove()
    return total / IDS.numel()


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_predictions_move_by_half_of_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """½ eᵀ F e nats, for errors in a direction that matters and in one that hardly does."""
    monkeypatch.setattr(sensitivity, "SINK", 1e9)
    monkeypatch.setattr(sensitivity, "LOUDEST", 1e9)
    parent = tiny_parent(family)
    many = torch.cat([information(parent, IDS, seed)[None] for seed in range(24)]).mean(0)
    for index in range(parent.L):
        ways_DD = torch.linalg.eigh(many[index]).eigenvectors
        for way_D in (ways_DD[:, -1], ways_DD[:, len(ways_DD) // 2]):
            expected = 0.5 * 0.01**2 * float(way_D @ many[index] @ way_D)
            assert moved(parent, index, way_D, 0.01) == pytest.approx(expected, rel=0.15)


def test_sinks_are_not_read_and_no_token_decides_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    h_TD, slope_TD = (torch.randn(100, 8, generator=generator) for _ in range(2))
    h_TD[3] *= 50
    slope_TD[5] *= 1000
    found = relative(h_TD, slope_TD)
    lengths = found.norm(dim=-1)
    assert len(found) == 99
    assert float(lengths.max()) == pytest.approx(3 * float((slope_TD.norm(dim=-1) * h_TD.norm(dim=-1))[
        torch.arange(100) != 3].median()), rel=1e-4)  # fmt: skip
    plain = slope_TD[0] * h_TD[0].norm()
    torch.testing.assert_close(found[0], plain)


def test_the_measure_is_even_where_nothing_is_known() -> None:
    torch.testing.assert_close(measure(torch.zeros(5, 5)), sensitivity.FLOOR**0.5 * torch.eye(5))
    torch.testing.assert_close(measure(3 * torch.eye(5)), torch.eye(5))
    half_DD = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    given_DD = half_DD @ half_DD.T
    found_DD = measure(given_DD)
    wanted_DD = 0.95 * given_DD / given_DD.diagonal().mean() + 0.05 * torch.eye(5)
    torch.testing.assert_close(found_DD.T @ found_DD, wanted_DD)
    nothing = torch.zeros(1, 5)
    tokens = Tokens(nothing, nothing, torch.ones(1), torch.zeros(1), torch.zeros(1), found_DD)
    error_ND = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tokens.felt(error_ND).square().sum(-1), (error_ND @ wanted_DD * error_ND).sum(-1))


def test_tokens_are_drawn_from_predictions() -> None:
    parent = tiny_parent("llama")
    head, last_D = head_of(parent.model), torch.randn(parent.D, generator=torch.Generator().manual_seed(3))
    labels_T = drawn(head, last_D.expand(20_000, -1), torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted_V = head(last_D[None])[0].softmax(-1)
    counts_V = torch.bincount(labels_T, minlength=len(wanted_V)) / len(labels_T)
    assert float((counts_V - wanted_V).abs().sum()) < 0.2
    assert float((counts_V - wanted_V).abs().max()) < 0.01


def test_a_conversion_measures_in_it(tmp_path: Path) -> None:
    """The step is there by default, and not without it; other channels are kept."""
    given = ["domains.tokens=512", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64", "stage2.tokens=0"]
    given += ["carve.experts=2", "carve.passes=1", "carve.batch=32"]
    kept = []
    for tokens in (512, 0):
        out, settings = tmp_path / f"{tokens}", [*given, f"carve.sensitivity={tokens}"]
        run = convert("token", ASSETS / "parents" / "llama", ASSETS / "text", out, settings=settings)
        assert (out / "stages" / "sensitivity").is_dir() == bool(tokens)
        kept.append(run.carving("carve").layers[0].routed[0].channels)
        if tokens:
            assert run.metrics("sensitivity")["tokens"] == tokens
            assert all(part.shape == (32, 32) for part in information_of(run))
    assert not torch.equal(*kept)


def test_a_parent_without_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, method = tiny_parent("llama"), load_recipe("token", None, []).method
    assert isinstance(method, Token)
    monkeypatch.setattr(type(parent), "layerwise", property(lambda _self: True))
    with pytest.raises(MoesmithError, match=r"carve\.sensitivity takes gradients of the whole model.*sensitivity to 0"):
        method.check(parent)
