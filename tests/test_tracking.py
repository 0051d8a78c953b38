"""``report_to``: what a tracker is sent, that no result depends on it, and what happens when it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conversions import convert, weights
from test_keys import keys_of
from torch import nn

from moesmith.errors import MoesmithError
from moesmith.evaluation.routing import Routing
from moesmith.files.artefact import read_json
from moesmith.mixture.gates import GateSpec
from moesmith.native.gate import Router
from moesmith.run.folder import open_run
from moesmith.training import loop, tracking
from moesmith.training.tracking import Loads, Report, Tracking

FEW = ["stage1.tokens=512", "stage2.tokens=1024"]  # 2 and 4 steps
NUMBERS = {"loss", "lr", "grad_norm", "tokens_per_second", "load_over_ideal/mean", "load_over_ideal/max"}


class Stand(ModuleType):
    """A stand-in for trackio and wandb."""

    Histogram = list

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.seen: list[tuple[int, dict[str, Any]]] = []
        self.ended, self.breaks = 0, -1

    def init(self, **options: Any) -> None:
        self.begun.append(options)

    def log(self, numbers: dict[str, Any], step: int) -> None:
        if len(self.seen) == self.breaks:
            raise RuntimeError("no network\nat all")
        self.seen.append((step, numbers))

    def finish(self) -> None:
        self.ended += 1


@pytest.fixture
def stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """One of the two, installed."""
    name = getattr(request, "param", "trackio")
    found = Stand(name)
    found.__spec__ = object()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, name, found)
    return found


@pytest.mark.parametrize("stand", ["trackio", "wandb"], indirect=True)
def test_every_step_is_sent_and_nothing_changes(home: Path, tmp_path: Path, stand: Stand) -> None:
    to = stand.__name__
    plain = convert("dive-plus", home / "m", home / "d", tmp_path / "plain", FEW)
    told = convert("dive-plus", home / "m", home / "d", tmp_path / "told", [*FEW, f"report_to={to}"])
    assert weights(told.folder) == weights(plain.folder)
    assert keys_of(told) == keys_of(plain)
    assert read_json(told.folder / "run.json")["recipe"]["report_to"] == to
    names = [begun["name"] for begun in stand.begun]
    assert [name.rpartition("-")[0] for name in names] == ["told-router", "told-experts", "told-evaluate"]
    assert len({name.rpartition("-")[2] for name in names}) == 3
    for begun in stand.begun:
        assert (begun["project"], begun["resume"]) == ("moesmith", "allow")
        assert (begun.get("id"), begun.get("dir")) == (
            (begun["name"], str(told.folder)) if to == "wandb" else (None,) * 2
        )
    assert stand.begun[1]["config"]["lora_rank"] == told.settings["stage2"]["lora_rank"]
    assert [step for step, _ in stand.seen] == [1, 2, 1, 2, 3, 4, 1]
    assert stand.ended == 3
    for _, numbers in stand.seen[:6]:
        assert numbers.keys() == NUMBERS | {"load_over_ideal"}
        loads = numbers["load_over_ideal"]
        assert len(loads) == 2
        assert all(1 <= load <= 4 for load in loads)
        assert numbers["load_over_ideal/max"] == max(loads)
    final = stand.seen[-1][1]
    assert final["perplexity/experts"] == told.evaluation["stages"]["experts"]["geomean"]
    routing = Routing.load(told.path("evaluate") / "routing.npz")
    assert final["load_over_ideal"] == pytest.approx((routing.load_LE.max(-1) * 4).tolist())
    # stages are interchangeable, and a finished run may be continued with another tracker
    again = convert("dive-plus", home / "m", home / "d", tmp_path / "told", FEW)
    assert keys_of(again) == keys_of(plain)
    convert("dive-plus", home / "m", home / "d", tmp_path / "reused", [*FEW, f"report_to={to}"], reuse=plain.folder)
    assert len(stand.begun) == 3  # nothing was left to do


def test_a_killed_stage_continues_its_log(
    home: Path, tmp_path: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    log, settings = stand.log, [*FEW, "report_to=trackio"]

    def dies(numbers: dict[str, Any], step: int) -> None:
        log(numbers, step)
        if len(stand.seen) == 5:  # of stage 2 the third step
            raise KeyboardInterrupt

    monkeypatch.setattr(stand, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    monkeypatch.setattr(stand, "log", log)
    convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    _, before, after, _ = [begun["name"] for begun in stand.begun]
    assert before == after
    assert [step for step, _ in stand.seen] == [1, 2, 1, 2, 3, 3, 4, 1]  # behind the last checkpoint: once more
    assert stand.seen[4][1] | {"tokens_per_second": 0} == stand.seen[5][1] | {"tokens_per_second": 0}


def test_tensorboard(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    settings = [*FEW, "report_to=tensorboard"]

    log = tracking.TensorBoard.log

    def dies(self: tracking.TensorBoard, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tracking.TensorBoard, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    monkeypatch.setattr(tracking.TensorBoard, "log", log)
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings)
    assert {path.name for path in (run.folder / "tensorboard").iterdir()} == {"router", "experts", "evaluate"}
    found = EventAccumulator(str(run.folder / "tensorboard" / "experts"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == NUMBERS
    assert found.Tags()["histograms"] == ["load_over_ideal"]
    lines = [json.loads(line) for line in (run.path("experts") / "log.jsonl").read_text().splitlines()]
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


@pytest.mark.parametrize(("preset", "more", "extra"), [
    ("tomoe-50", [], {"kl", "active", "union", "load", "entropy"}),
    ("dot-moe", ["assign.tokens=256", "assign.window=32", "assign.batch=2"], {"text", "z", "balance"}),
])  # fmt: skip
def test_learned_routing_is_sent(
    home: Path, tmp_path: Path, stand: Stand, preset: str, more: list[str], extra: set[str]
) -> None:
    settings = [*more, *(["carve.experts=4"] if preset == "dot-moe" else [])]
    convert(preset, home / "m", home / "d", tmp_path / "run", [*settings, "report_to=trackio"])
    first = stand.seen[0][1]
    assert first.keys() == NUMBERS | extra | {"load_over_ideal"}
    assert all(1 <= load <= 4 for load in first["load_over_ideal"])


def test_a_tracker_that_fails_is_left_out(
    home: Path, tmp_path: Path, stand: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    stand.breaks = 1
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", [*FEW, "report_to=trackio"])
    assert len(stand.seen) == 1
    said = capsys.readouterr().err
    assert said.count("trackio does not take numbers: no network; going on without it") == 3  # once a stage
    assert open_run(run.folder).has("evaluate")


def test_a_missing_package_is_refused_before_work(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MoesmithError, match=r"package wandb is not installed\. Run pip install 'moesmith\[wandb\]'"):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", [*FEW, "report_to=wandb"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(MoesmithError, match="report_to"):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", [*FEW, "report_to=excel"])


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_loads_of_a_router(temperature: float | None) -> None:
    """Three of four tokens go to the first expert, also under the dense gate, which visits both."""
    router = Router(GateSpec(experts=2, top_k=1, noise=0.0), torch.eye(2)).train()
    router.temperature = temperature
    model = nn.Sequential(router)
    loads = Loads(type("Objective", (), {"model": model})())
    x_TD = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    with loads.watching():
        model(x_TD)
        model(x_TD)
    assert loads.over_ideal() == [1.5]
    model(x_TD)
    assert loads.over_ideal() == []


def test_nothing_is_sent_to_nobody() -> None:
    silent = Tracking(Report(), {})
    silent.log(1, {"loss": 1.0}, [1.0])
    silent.close()
    assert (silent.client, silent.mark) == (None, "")
