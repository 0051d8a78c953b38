"""How long a conversion takes, and how much text fits into a given time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import moesmith
from conversions import arguments, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from moesmith.conversion import convert as conversion
from moesmith.conversion.order import steps_of
from moesmith.conversion.pace import Pace, measure, parse_time, scaled, tokens_of, with_tokens
from moesmith.conversion.plan import fit_time, make_plan
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import tiny_parent

PRESETS = ["dive-1of8", "dive-plus", "flap-static", "llama-moe-1of8", "tomoe-50", "tomoe-plus"]
PACE = Pace(2e5, 5e5, 1e11)


@pytest.mark.parametrize(
    ("text", "seconds"), [("15m", 900), ("1.5h", 5400), ("90s", 90), ("1h30m", 5400), ("2 H 5 m", 7500), ("1d", 86400)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "-3m", "15 minutes", "1h30", "soon"])
def test_no_times(text: str) -> None:
    with pytest.raises(MoesmithError, match=r"is not a time\. Write it like 15m"):
        parse_time(text)


@given(st.sampled_from(PRESETS), st.floats(0, 50))
def test_scaled_text_is_whole_windows_and_steps(preset: str, factor: float) -> None:
    recipe = load_recipe(preset, "demo")
    found = scaled(recipe, factor)
    type(found).model_validate(found.model_dump())  # no setting is broken by it
    training = {step.trains: step.loop for step in steps_of(found) if step.trains}
    assert training.keys() == {step.trains for step in steps_of(recipe) if step.trains}
    for name, spec in training.items():
        assert spec == getattr(found, name)
        assert spec.tokens > 0
        assert spec.tokens % (spec.batch * spec.window) == 0, name
    assert all(step.recipe == found for step in steps_of(found))  # none works by the counts that there were before
    assert found.domains.tokens % found.domains.window == 0
    assert found.evaluate.tokens <= max(recipe.evaluate.tokens, recipe.evaluate.window)
    assert with_tokens(recipe, tokens_of(found)) == found


@pytest.mark.parametrize("preset", PRESETS)
def test_text_that_fits_into_a_time(preset: str) -> None:
    recipe, parent = load_recipe(preset, "demo"), tiny_parent("llama")
    found, times = [], []
    for minutes in (2, 8, 40):
        fitted = fit_time(recipe, parent, 8, 60 * minutes, PACE)
        times.append(sum(make_plan(fitted, parent, 8, PACE).seconds.values()))
        assert times[-1] <= 60 * minutes + 0.5  # of rounding
        found.append(sum(tokens_of(fitted).values()))
    assert found == sorted(found)
    assert times[-1] > 0.8 * 60 * 40  # it is made use of
    with pytest.raises(MoesmithError, match=r"takes at least \d+ s on this machine, however little text"):
        fit_time(recipe, parent, 8, 3, PACE)
    shared = fit_time(recipe, parent, 8, 60 * 40, PACE, 4)
    assert sum(tokens_of(shared).values()) > 3 * found[-1]
    assert 0.8 * 60 * 40 < sum(make_plan(shared, parent, 8, PACE, 4).seconds.values()) <= 60 * 40 + 0.5


def test_the_pace_is_measured() -> None:
    pace = measure(tiny_parent("qwen3"), load_recipe("token"))
    assert 10 < pace.blocks < 1e9
    assert 10 < pace.head < 1e9


def test_a_run_within_a_time_says_its_text(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Pace(PACE.blocks / 10, PACE.head / 10, PACE.solves / 10)  # so that little text fits
    monkeypatch.setattr(conversion, "measure", lambda *_: slow)
    words = arguments("flap-static", home / "m", home / "d", tmp_path / "run")
    answer = moesmith(*words, "--time", "13s")
    assert answer.status == 0, answer.err
    said = dict(re.findall(r"(\w+\.tokens)=(\d+)", answer.err))
    recipe = read_json(tmp_path / "run" / "run.json")["recipe"]
    assert said
    for key, tokens in said.items():
        section, _, field = key.partition(".")
        assert recipe[section][field] == int(tokens)
    assert re.search(r"about \d+ s on this machine, of which \d+ s training", answer.err)
    # on a machine of another pace the same command continues the same run
    monkeypatch.setattr(conversion, "measure", lambda *_: pytest.fail("measured again"))
    again = moesmith(*words, "--time", "13s")
    assert again.status == 0
    assert "[evaluate] done before" in again.err
    assert "a continued run keeps its text" in again.err
    assert moesmith(*words, "--time", "banana").err.startswith("moesmith: 'banana' is not a time")
    # and the counts make the same recipe elsewhere
    settings = [word for key, tokens in said.items() for word in ("--set", f"{key}={tokens}")]
    monkeypatch.setattr(conversion, "measure", lambda *_: slow)
    elsewhere = [*words[:-1], words[-1], *settings]
    elsewhere[elsewhere.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert moesmith(*elsewhere, "--reuse", tmp_path / "run").status == 0
    assert read_json(tmp_path / "other" / "run.json")["recipe"] == recipe


def test_a_plan_within_a_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "measure", lambda *_: PACE)
    words = ["plan", "flap-static", "--model", home / "m", "--data", home / "d"]
    words += [word for setting in tiny_settings("flap-static") for word in ("--set", setting)]
    answer = moesmith(*words, "--time", "1h")
    assert answer.status == 0
    assert "--set stage2.tokens=" in answer.err
    assert "computes in" in answer.out
    assert moesmith(*words, "--time", "soon").err.startswith("moesmith: 'soon' is not a time")
