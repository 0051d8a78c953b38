"""How many channels each layer's experts get: against counting by hand, and against other choices of widths."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesmith.calibration.stream import Stream
from moesmith.conversion.convert import convert
from moesmith.errors import MoesmithError
from moesmith.methods.allocation import allocated, convex, dense_or_even, losses, step_of, widths_of
from moesmith.methods.refit import eliminate, eliminated, refit_down
from moesmith.methods.sensitivity import information, measure
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import tiny_parent

ASSETS = Path(__file__).parent / "assets"
IDS = torch.randint(0, 100, (64, 16), generator=torch.Generator().manual_seed(2))
GIVEN = ["domains.tokens=512", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64", "stage2.tokens=0"]
GIVEN += ["carve.experts=2", "carve.passes=1", "carve.batch=32", "carve.sensitivity=512"]


def test_rounds_cost_what_the_refitted_error_grows_by() -> None:
    generator = torch.Generator().manual_seed(0)
    a_TF = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    down_DF = torch.randn(5, 12, generator=generator)
    gram_FF, total = a_TF.T @ a_TF / len(a_TF), 0.0
    for left_F, cost in eliminated(down_DF, gram_FF, [3, 3, 2, 3], ridge=1e-6):
        total += float(cost)
        refitted_DF = refit_down(down_DF, gram_FF, left_F, ridge=1e-6)
        error_TD = a_TF @ down_DF.T - a_TF[:, left_F] @ refitted_DF.T
        assert total == pytest.approx(float(error_TD.square().sum(-1).mean()), rel=1e-3)
    rounds = [left_F for left_F, _ in eliminated(down_DF, gram_FF, [2, 3, 3, 3], ridge=1e-6)]
    torch.testing.assert_close(rounds[-1], eliminate(down_DF, gram_FF, 1, ridge=1e-6, rounds=4), rtol=0, atol=0)


def test_a_layer_loses_what_its_predictions_move_by() -> None:
    """½ eᵀ F e with e the refitted output's error over ‖h‖, token by token."""
    parent = tiny_parent("llama")
    found_L, step = information(parent, IDS), step_of(parent.F)
    with Stream(parent, [[IDS]], "carved", held=True) as stream:
        for view in stream.views(torch.Generator()):
            tokens, network = view.tokens(), view.network
            tokens = replace(tokens, sequence_T=torch.zeros_like(tokens.sequence_T))  # nothing is held out
            curve = losses(network, tokens, found_L[view.index], step, 1e-6)
            assert len(curve) == 1 + (parent.F - 1) // step
            assert curve[0] == 0
            a_TF = network.hidden(tokens.x_TD)
            length_T1 = (tokens.y_TD.square().sum(-1) / tokens.share_T).sqrt()[:, None]
            scaled_TF = a_TF / length_T1
            felt = found_L[view.index]
            root_DD = measure(felt) * felt.diagonal().mean().sqrt()
            gone = 2
            left_F = list(
                eliminated(root_DD @ network.down_DF, scaled_TF.T @ scaled_TF / len(a_TF), [step] * gone, 1e-6)
            )
            kept_F = left_F[-1][0]
            refitted_DF = refit_down(network.down_DF, scaled_TF.T @ scaled_TF / len(a_TF), kept_F, 1e-6)
            error_TD = scaled_TF @ network.down_DF.T - scaled_TF[:, kept_F] @ refitted_DF.T
            assert curve[gone] == pytest.approx(float(0.5 * (error_TD @ root_DD.T).square().sum(-1).mean()), rel=0.02)


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=2, max_size=3), st.integers(0, 8))
def test_no_other_widths_lose_less(costs: list[list[float]], drop: int) -> None:
    """Of convex curves; every layer of 10 channels can lose four steps of two."""
    curves = [[0.0, *itertools.accumulate(sorted(layer))] for layer in costs]
    widths = widths_of(curves, 10, len(curves) * 10 - 2 * drop, 2)
    assert sum(widths) == len(curves) * 10 - 2 * drop
    assert min(widths) > 0
    lost = sum(curve[(10 - width) // 2] for curve, width in zip(curves, widths, strict=True))
    others = (
        sum(curve[n] for curve, n in zip(curves, gone, strict=True))
        for gone in itertools.product(range(5), repeat=len(curves))
        if sum(gone) == drop
    )
    assert lost == pytest.approx(min(others), abs=1e-9)


def test_a_dent_in_a_curve_is_no_bargain() -> None:
    assert convex([0, 3, 4, 9]) == [2, 2, 5]
    assert widths_of([[0, 3, 4, 9], [0, 1, 2, 9]], 4, 5, 1) == [3, 2]


def test_budgets_that_steps_do_not_meet_are_not_exceeded() -> None:
    assert step_of(1536) == 32
    assert step_of(8960) == 192
    assert step_of(64) == 8
    assert step_of(5) == 1
    assert widths_of([[0.0, 1.0, 2.0]] * 2, 12, 19, 4) == [8, 8]


def test_a_conversion_gives_layers_their_widths(tmp_path: Path) -> None:
    """As many channels in all; a model in our own format, since a stock folder would be mostly zeros."""
    sizes = {}
    for how in ("even", "sensitivity"):
        out = tmp_path / how
        run = convert(
            "token", ASSETS / "parents" / "llama", ASSETS / "text", out, settings=[*GIVEN, f"carve.allocation={how}"]
        )
        sizes[how] = run.carving().widths().float().mean(1)
        assert (out / "stages" / "allocation").is_dir() == (how == "sensitivity")
    assert sizes["sensitivity"].tolist() == allocated(run)
    assert len(set(allocated(run))) > 1
    assert len(set(sizes["even"].tolist())) == 1
    assert float(sizes["sensitivity"].mean()) == pytest.approx(float(sizes["even"].mean()), abs=step_of(64) / 2)


def test_widths_need_a_measure() -> None:
    with pytest.raises(MoesmithError, match="needs sensitivity above 0"):
        load_recipe("token", settings=["carve.allocation=sensitivity", "carve.sensitivity=0"])


def test_layers_of_different_widths_are_written_in_our_own_format() -> None:
    """A stock folder has as many channels in every layer; a fifth of them may be zeros."""
    parent = tiny_parent("llama")
    for widths, native in (((64, 64), False), ((64, 40), False), ((64, 32), True)):
        layers = [Layer([Expert(torch.arange(width))], Linear(torch.zeros(1, parent.D))) for width in widths]
        assert Carving(layers, parent.F).is_native(parent) == native


def test_layers_alike_may_be_narrower_than_kernels_like() -> None:
    """Of 256 channels 26 stay: no multiple of 32, but a width; from 32 on, multiples."""
    curves = [[weight * n**2 for n in range(8)] for weight in (1.0, 2.0, 3.0)]
    assert dense_or_even(curves, 256, 3 * 26, 32) == [26] * 3
    assert dense_or_even(curves, 256, 3 * 40, 32) == [32] * 3
