"""Upcycling: copies compute what the parent computes; what is drawn again has the statistics of what it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from conversions import convert, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesmith.calibration.view import LayerView
from moesmith.conversion.plan import make_plan
from moesmith.methods import steps as method_steps
from moesmith.methods.base import Carver
from moesmith.methods.llama_moe import LlamaMoe
from moesmith.methods.upcycling import DropUpcycling, redraw
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.mixture.moe import Form, build
from moesmith.native import modeling as _modeling  # noqa: F401 (a folder in our own format needs it)
from moesmith.parent.load import load_parent
from moesmith.parent.network import Network
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import FAMILIES, save_tiny, tiny_parent

IDS = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(1))
OFF = ["stage2.tokens=0"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def gave(run: Any, name: str = "carve") -> Carving:
    return Carving.load(run.path(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_the_parent(family: str, home: Path, tmp_path: Path) -> None:
    """In both forms, and in the folder that is written: a stock architecture wherever the parent has one."""
    run = convert("upcycling", save_tiny(family, tmp_path / "m"), home / "d", tmp_path / "run", OFF)
    parent = load_parent(tmp_path / "m", torch.float32, device="cpu")
    wanted, carving = logits(parent.model), gave(run)
    assert (carving.experts, carving.top_k) == (4, 2)
    forms: tuple[Form, ...] = ("masked", "sliced")
    for model in [*(build(parent, carving, form) for form in forms)]:
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    written = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(written), wanted, rtol=1e-4, atol=1e-4)
    holds = FAMILIES[family][2]
    assert written.config.model_type == ("moesmith" if holds == "native" else holds)
    stages = run.evaluation["stages"]
    assert stages["carve"]["geomean"] == pytest.approx(stages["parent"]["geomean"], rel=1e-4)
    made = {path.name for path in (run.folder / "stages").iterdir()}
    assert made == {"held-out", "corpus", "baseline", "carve", "export", "evaluate"}, "no calibration text is read"


def test_copies_are_trained(home: Path, tmp_path: Path) -> None:
    """Top-2 of copies, experts and router: they come out different, and better."""
    whole = ["stage2.whole=true"]
    run = convert("upcycling", home / "m", home / "d", tmp_path / "run", whole)
    stages = run.evaluation["stages"]
    assert stages["experts"]["geomean"] < stages["carve"]["geomean"]
    before, after = gave(run).layers[0], gave(run, "experts").layers[0]
    assert isinstance(before.router, Linear)
    assert isinstance(after.router, Linear)
    assert not torch.equal(before.router.weight_ED, after.router.weight_ED)
    own = [expert.down_DF for expert in after.routed]
    assert own[0] is not None
    assert own[1] is not None
    assert not torch.equal(own[0], own[1])


def test_every_command_reads_it(home: Path, tmp_path: Path) -> None:
    run = convert("drop-upcycling", home / "m", home / "d", tmp_path / "run", OFF)
    assert "50% of each copy's channels" in (run.folder / "model" / "README.md").read_text(encoding="utf-8")
    for words in (
        ["inspect"],
        ["report"],
        ["export", "--to", "gguf", "--quant", "f32", "--out", tmp_path / "moe.gguf"],
    ):
        answer = moesmith(words[0], run.folder, *words[1:])
        assert answer.status == 0, answer.err


def network(F: int = 1000, D: int = 64, *, gated: bool = True) -> Network:
    """Weights of two values: ±1 in the first half of the channels, 4 ± 3 in the second."""
    generator = torch.Generator().manual_seed(0)

    def part() -> Tensor:
        sign_FD = 2.0 * torch.randint(0, 2, (F, D), generator=generator) - 1
        sign_FD[F // 2 :] = 4 + 3 * sign_FD[F // 2 :]
        return sign_FD

    return Network(part(), part() if gated else None, part().T.contiguous(), torch.nn.functional.silu)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("half", [0, 1])
def test_new_weights_are_like_those_that_they_replace(half: int, gated: bool) -> None:
    ffn = network(gated=gated)
    dropped_N = torch.arange(500 * half, 500 * half + 500)
    stay_N = torch.arange(500 * (1 - half), 500 * (1 - half) + 500)
    found = redraw(ffn, dropped_N, torch.Generator().manual_seed(1))
    assert len(found) == 3 if gated else 2
    for old, new in zip(ffn.weights, found, strict=True):
        assert new.shape == old.shape
        before, after = (part.T if part.shape[0] == 64 else part for part in (old, new))
        assert torch.equal(after[stay_N], before[stay_N])
        drawn = after[dropped_N]
        assert float(drawn.mean()) == pytest.approx((0.0, 4.0)[half], abs=0.05)  # of the dropped, not of all weights
        assert float(drawn.std()) == pytest.approx((1.0, 3.0)[half], rel=0.02)
        normal = (drawn - drawn.mean()) / drawn.std()
        assert float(normal.pow(4).mean()) == pytest.approx(3, abs=0.15), "normal; two values have 1"
    assert torch.equal(ffn.gate_FD, network(gated=gated).gate_FD), "the parent's weights stay"
    assert all(map(torch.equal, redraw(ffn, torch.arange(0), torch.Generator()), ffn.weights))


def differing(expert: Expert, parent: Any, layer: int) -> list[list[int]]:
    """The channels in which an expert's matrices differ from the parent's, by matrix."""
    ffn = parent.ffns[layer]
    pairs = [(expert.gate_FD, ffn.gate_FD), (expert.up_FD, ffn.up_FD), (expert.down_DF, ffn.down_DF)]
    found = [(mine != its, mine is expert.down_DF) for mine, its in pairs if mine is not None]
    return [(part.T if turned else part).any(1).nonzero().flatten().tolist() for part, turned in found]


@pytest.mark.parametrize(("family", "share"), [("llama", 0.5), ("phi3", 0.3), ("phi", 0.5), ("qwen3", 1.0)])
def test_the_same_channels_in_all_of_an_experts_matrices(family: str, share: float, home: Path, tmp_path: Path) -> None:
    settings = [*OFF, f"carve.redrawn={share}"]
    run = convert("drop-upcycling", save_tiny(family, tmp_path / "m"), home / "d", tmp_path / "run", settings)
    parent = load_parent(tmp_path / "m", torch.float32, device="cpu")
    drawn = []
    for index, layer in enumerate(gave(run).layers):
        for expert in layer.routed:
            assert expert.channels.tolist() == list(range(64))
            first, *others = differing(expert, parent, index)
            assert len(first) == int(64 * share)
            assert all(other == first for other in others)
            assert len(others) == parent.ffns[0].matrices - 1
            drawn.append(tuple(first))
    assert len(set(drawn)) == (1 if share == 1 else len(drawn)), "other ones in every expert of every layer"
    written = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(written), logits(build(parent, gave(run))), rtol=1e-4, atol=1e-4)
    assert (logits(written) - logits(parent.model)).abs().max() > 0.01


def test_nothing_drawn_again_is_upcycling(home: Path, tmp_path: Path) -> None:
    run = convert("drop-upcycling", home / "m", home / "d", tmp_path / "run", [*OFF, "carve.redrawn=0"])
    parent = load_parent(home / "m", torch.float32, device="cpu")
    written = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(written), logits(parent.model), rtol=1e-4, atol=1e-4)


def test_draws_follow_the_seed_and_the_share(home: Path, tmp_path: Path) -> None:
    settings = [["seed=1"], ["seed=1"], ["seed=2"], ["seed=1", "carve.redrawn=0.25"]]
    runs = [
        convert("drop-upcycling", home / "m", home / "d", tmp_path / f"{n}", [*OFF, *more])
        for n, more in enumerate(settings)
    ]
    files = [(run.path("carve") / "carving.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]
    assert len(set(files)) == 3
    assert len({run.keys["carve"] for run in runs}) == 3


@pytest.mark.parametrize(("preset", "method"), [("drop-upcycling", DropUpcycling), ("llama-moe-1of8", LlamaMoe)])
def test_a_killed_carving_goes_on_behind_its_layers(
    preset: str,
    method: type[Carver],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Both draw at random: with one generator that goes on, and all beforehand."""
    off = [*OFF, *(["stage1.tokens=0"] if preset == "llama-moe-1of8" else [])]
    whole = convert(preset, home / "m", home / "d", tmp_path / "whole", off)
    monkeypatch.setattr(method_steps, "SAVE_SECONDS", -1.0)
    carve, seen = method.carve, []

    def dies(self: Carver, view: LayerView) -> Layer:
        seen.append(view.index)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return carve(self, view)

    monkeypatch.setattr(method, "carve", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(preset, home / "m", home / "d", tmp_path / "killed", off)
    killed = convert(preset, home / "m", home / "d", tmp_path / "killed", off)
    assert seen == [0, 1, 1]
    assert "continuing at layer 1" in capfd.readouterr().err
    assert weights(killed.folder) == weights(whole.folder)


@pytest.mark.parametrize("name", ["upcycling", "drop-upcycling"])
def test_the_plan_counts_the_copies(name: str) -> None:
    parent = tiny_parent("llama")
    plan = make_plan(load_recipe(name), parent, 4)
    networks = 2 * 3 * 32 * 64
    assert plan.calibration_tokens == 0
    assert plan.parameters_total - plan.parent_parameters == 7 * networks + 2 * 8 * 32
    assert plan.parameters_active - plan.parent_parameters == networks + 2 * 8 * 32
