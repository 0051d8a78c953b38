"""Whether attention's sinks are still there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversions import convert
from golden import ASSETS
from torch import Tensor, nn

from moesmith.evaluation.compare import compare
from moesmith.evaluation.sinks import first_tokens, sinks
from moesmith.testing.tokenizer import tiny_tokenizer


class Planted(nn.Module):
    """Hidden states of norm 2, but for the first token of windows that begin with a 1: 6 and 60 in two layers."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, **_options: Any) -> Any:
        states = [torch.full((*input_ids.shape, 4), 1.0) for _ in range(3)]
        for state, norm in zip(states[1:], (3.0, 30.0), strict=True):
            state[input_ids[:, 0] == 1, 0] = norm
        return SimpleNamespace(hidden_states=states)


def test_the_layer_with_the_largest_counts() -> None:
    ids_NS = torch.ones(12, 8, dtype=torch.int64)
    ids_NS[3] = 2
    found = first_tokens(Planted(), ids_NS)  # type: ignore[arg-type]
    assert found.tolist() == [1.0 if window == 3 else 30.0 for window in range(12)]


def test_lost_are_windows_far_below_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    norm_N = torch.tensor([100.0] * 7 + [11.0, 9.0, 1.0])
    monkeypatch.setattr("moesmith.evaluation.sinks.first_tokens", lambda *_: norm_N)
    monkeypatch.setattr(
        "moesmith.evaluation.sinks.evaluation_blocks", lambda *_: SimpleNamespace(blocks=norm_N[:, None])
    )
    found = sinks(Planted(), tiny_tokenizer(), [None])  # type: ignore[arg-type, list-item]
    assert found == {"norm": 100.0, "lost": pytest.approx(0.2)}


def test_the_command_measures_both_models(tmp_path: Path) -> None:
    run = convert("flap-static", ASSETS / "parents" / "llama", ASSETS / "text", tmp_path / "run", ["stage2.tokens=0"])
    rows = compare(run.folder, tasks="sinks", dtype="fp32", device="cpu")["results"]
    assert [row["metric"] for row in rows] == ["norm", "lost"]
    assert all(row["parent"] >= 0 and row["moe"] >= 0 for row in rows)
    assert rows[0]["parent"] != rows[0]["moe"]
