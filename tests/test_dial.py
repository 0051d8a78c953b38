"""The dial: from a loss that is accepted to a share of active channels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import moesmith
from golden import ASSETS
from hypothesis import given
from hypothesis import strategies as st

from moesmith.conversion import dial
from moesmith.conversion.dial import active_for, parse_loss, share_for
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json

MODEL, DATA = str(ASSETS / "parents" / "llama"), str(ASSETS / "text")


def records(folder: str, split: str) -> list[str]:
    lines = [line for f in Path(folder).glob(f"*.{split}.jsonl") for line in f.read_text(encoding="utf-8").splitlines()]
    return sorted(json.dumps(json.loads(line)) for line in lines)


def test_losses_are_shares() -> None:
    assert parse_loss("10%") == parse_loss("0.1") == parse_loss(0.1) == 0.1
    for text in ("-5%", "0", "much", "nan", "2000%"):
        with pytest.raises(MoesmithError, match="is no loss"):
            parse_loss(text)


@given(st.floats(0.5, 4), st.floats(0.05, 3), st.floats(0.3, 0.9))
def test_points_of_the_curve_are_found_again(b: float, a: float, share: float) -> None:
    def loss(s: float) -> float:
        return math.expm1(a * (1 - s) ** b)

    found = share_for({s: loss(s) for s in (0.5, 0.75)}, loss(share))
    assert share - 1e-6 <= found <= share + 0.011


def test_the_dial_stays_inside_its_scale() -> None:
    assert share_for({0.5: 0.0, 0.75: 0.0}, 0.5) == dial.LEAST
    assert share_for({0.5: 1.0, 0.75: 0.4}, 1e-9) == 1.0
    assert share_for({0.75: 0.1, 0.5: 0.5}, 0.1) == 0.75
    steady = {0.5: 0.5, 0.75: 0.6}  # more channels lose more: nothing is promised that was not measured
    assert share_for(steady, 0.55) > 0.5


def test_what_is_tried_reads_calibration_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, list[str], list[str]]] = []

    def tried(recipe: Any, _model: Any, data: str, _out: Path, **_: Any) -> Any:
        seen.append((recipe.carve.ratio, records(data, "train"), records(data, "test")))
        assert recipe.stage2.tokens == 0
        losses = {0.5: 2.0, 0.25: 1.2}
        stages = {"parent": {"geomean": 10.0}, "carve": {"geomean": 10 * losses[recipe.carve.ratio]}}
        return SimpleNamespace(evaluation={"stages": stages})

    monkeypatch.setattr(dial, "convert", tried)
    share = active_for("20%", "token", MODEL, DATA, tmp_path / "run", settings=["carve.experts=2"])
    assert share == 0.75
    assert [ratio for ratio, _, _ in seen] == [0.5, 0.25]
    _, rest, back = seen[0]
    train = records(DATA, "train")
    assert sorted(rest + back) == train
    assert not set(rest) & set(back)
    assert len(back) >= len(train) // dial.BACK - 8


def test_the_command_finds_a_share_and_keeps_it(tmp_path: Path) -> None:
    small = ["domains.tokens=256", "domains.window=32", "evaluate.tokens=256", "evaluate.window=64", "carve.experts=2"]
    small += ["carve.sample=64", "carve.batch=32", "carve.prior=50", "stage2.tokens=0"]
    sets = [part for setting in small for part in ("--set", setting)]
    command = ["convert", "token", "--model", MODEL, "--data", DATA, "--out", str(tmp_path / "run"), *sets]
    first = moesmith(*command, "--max-loss", "0.1%")
    assert "for at most" in first.err
    again = moesmith(*command, "--max-loss", "0.1%")
    assert "trying" not in again.err
    assert 0 <= read_json(tmp_path / "run" / "run.json")["recipe"]["carve"]["ratio"] <= 0.95
    refused = moesmith(*command, "--max-loss", "10%", "--active", "0.5")
    assert refused.status
    assert "decide the same" in refused.err


def test_a_method_without_such_a_share_is_refused_also_where_a_run_began(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(MoesmithError, match=r"Set masks\.budget"):
        active_for("10%", "tomoe-50", MODEL, DATA, tmp_path)
