"""Plans: from a config alone as from the weights, and held against what conversions take."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import moesmith
from conversions import convert, tiny_settings
from golden import ASSETS
from refusals import refused

import moesmith.conversion.convert as conversion
from moesmith.arguments import parse_size
from moesmith.conversion.plan import check_room, make_plan
from moesmith.errors import MoesmithError
from moesmith.parent.compute import DTYPES
from moesmith.parent.load import load_skeleton
from moesmith.run.recipe import load_recipe, parse
from moesmith.run.shapes import Pace
from moesmith.testing.parents import FAMILIES, save_tiny, tiny_parent

ROOT = Path(__file__).parents[1]
UNTRAINED = ["stage1.tokens=0", "stage2.tokens=0", "affinity.method=scores"]
# known facts of the published models: parameters and feed-forward width
PUBLISHED = {
    "tinyllama-1.1b": (1_100_048_384, "mixtral"),
    "llama-2-7b": (6_738_415_616, "mixtral"),
    "qwen2.5-14b": (14_770_033_664, "qwen2_moe"),
}


@pytest.mark.parametrize("preset", ["dive-1of8", "dive-plus", "tomoe-50"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_enough(family: str, preset: str, tmp_path: Path) -> None:
    parent = tiny_parent(family, dtype=torch.bfloat16)
    parent.model.config.save_pretrained(tmp_path)
    whole = ["masks.attention=none"] if (preset, family) == ("tomoe-50", "biased") else []  # not proved
    recipe = load_recipe(preset, None, [*tiny_settings(preset), *whole])
    for source in (tmp_path, tmp_path / "config.json"):
        skeleton = load_skeleton(str(source))
        assert skeleton.family == parent.family
        assert replace(make_plan(recipe, skeleton, 4), device="cpu") == make_plan(recipe, parent, 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_examples_are_the_published_models(name: str) -> None:
    skeleton = load_skeleton(str(ROOT / "examples" / "configs" / f"{name}.json"))
    plan = make_plan(load_recipe("dive-1of8", None, UNTRAINED), skeleton, 24)
    assert (plan.parent_parameters, plan.architecture) == PUBLISHED[name]
    assert plan.memory_layerwise is not None
    assert plan.memory_layerwise < 0.6 * 2 * plan.parameters_total < plan.memory


@pytest.mark.parametrize(
    ("preset", "settings"),
    [("dive-1of8", UNTRAINED), ("dive-plus", UNTRAINED), ("dive-plus", []), ("tomoe-50", ["masks.tokens=64"])],
)
def test_disk_is_foretold(preset: str, settings: list[str], home: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    save_tiny("llama", tmp_path / "m", dtype=torch.bfloat16, **sizes)
    options = {"settings": settings, "dtype": torch.bfloat16}
    run = convert(preset, tmp_path / "m", home / "d", tmp_path / "run", **options)  # type: ignore[arg-type]
    plan = make_plan(parse(run.settings, stored=True), load_skeleton(str(tmp_path / "m")), 4)
    used = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    assert plan.disk == pytest.approx(used, rel=0.3)


def test_the_stock_twin_is_counted() -> None:
    skeleton = load_skeleton(str(ROOT / "examples" / "configs" / "tinyllama-1.1b.json"))
    pace = Pace(1000, 1000, 1e11)
    whole, pruned = (
        make_plan(load_recipe("tomoe-50", None, [f"masks.attention={how}"]), skeleton, 8, pace)
        for how in ("none", "hybrid")
    )
    assert pruned.evaluation_tokens == 1.5 * whole.evaluation_tokens  # parent and masks; RUN/stock as well
    assert pruned.seconds["export"] > whole.seconds["export"]


@pytest.mark.parametrize("allocation", ["dense", "sensitivity"])
def test_layers_that_differ_are_all_counted(allocation: str) -> None:
    skeleton = load_skeleton(str(ROOT / "examples" / "configs" / "tinyllama-1.1b.json"))
    even, uneven = (
        make_plan(load_recipe("token", None, [f"carve.allocation={how}"]), skeleton, 8) for how in ("even", allocation)
    )
    assert uneven.memory == pytest.approx(
        even.memory, rel=0.2
    )  # as many channels on average; a dense layer has one copy
    assert uneven.disk == pytest.approx(even.disk, rel=0.2)


def test_matrices_of_experts_are_on_disk(home: Path, tmp_path: Path) -> None:
    """Token carving keeps every expert's three matrices: once by layer, once in the carving, once in the model."""
    skeleton = load_skeleton(str(ROOT / "examples" / "configs" / "tinyllama-1.1b.json"))
    plan = make_plan(load_recipe("token", None, ["stage2.tokens=0"]), skeleton, 8)
    experts = 22 * 8 * 3 * 2048 * 2816 * 2
    assert 2 * experts < plan.disk < 2.3 * experts
    assert plan.disk_passing >= experts


def test_what_is_there_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = load_skeleton(save_tiny("llama", tmp_path / "m"))
    plan = make_plan(load_recipe("dive-1of8", None, tiny_settings("dive-1of8")), parent, 4)
    needs = plan.disk + plan.disk_passing
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needs // 2))
    with pytest.raises(MoesmithError, match="of disk"):
        check_room(plan, tmp_path / "run", parent, 2**40)
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "stages" / "half").write_bytes(bytes(needs - needs // 2))
    check_room(plan, tmp_path / "run", parent, 2**40)


def test_what_does_not_fit_is_run_layer_by_layer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    recipe = load_recipe("dive-1of8", None, [*tiny_settings("dive-1of8"), *UNTRAINED])
    plan = make_plan(recipe, load_skeleton(str(tmp_path / "m")), 4)
    shapes = conversion._skeleton(str(tmp_path / "m"), "fp32", "cpu")
    for room, layerwise in ((plan.memory, False), (plan.memory - 1, True)):
        parent = conversion._open(str(tmp_path / "m"), shapes, "fp32", "cpu", recipe, 4, room)
        assert parent.layerwise is layerwise
        check_room(plan, tmp_path / "run", parent, room)
    with pytest.raises(MoesmithError, match=r"needs about 0\.5 GiB of memory, but 0\.2 GiB are free"):
        check_room(plan, tmp_path / "run", parent, 2 * 10**8)
    trained = load_recipe("dive-1of8", None, tiny_settings("dive-1of8"))
    assert make_plan(trained, parent, 4).memory_layerwise is None
    assert not conversion._open(str(tmp_path / "m"), shapes, "fp32", "cpu", trained, 4, 1).layerwise


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dtype_that_was_chosen_stays_where_the_accelerator_is_full(dtype: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "m")
    shapes = conversion._skeleton(model, dtype, "cpu")
    shapes.choice = replace(shapes.choice, device=torch.device("meta"))  # type: ignore[type-var]
    trained = load_recipe("dive-1of8", None, tiny_settings("dive-1of8"))  # so it cannot go layer by layer
    parent = conversion._open(model, shapes, dtype, "auto", trained, 4, 1)
    assert (parent.device.type, parent.dtype) == ("cpu", DTYPES[dtype])


def test_too_little_memory_is_one_line(home: Path, tmp_path: Path) -> None:
    words = ["convert", "dive-1of8", "--model", home / "m", "--data", home / "d", "--out", tmp_path / "run"]
    words += [word for setting in tiny_settings("dive-1of8") for word in ("--set", setting)]
    refused(moesmith(*words, "--memory", "1MB"), r"of memory, but 0\.0 GiB are free")
    assert not (tmp_path / "run").exists()
    refused(moesmith(*words, "--memory", "much"), "is no size of memory")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("3.5 GiB", 3758096384),
        ("500mb", 5 * 10**8),
        ("1024", 1024),
        (7, 7),
        (None, None),
        ("2TB", 2 * 10**12),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2 mib", 2**21),
        ("1TiB", 2**40),
        ("3K", 3000),
        (2.5, 2),
    ],
)
def test_sizes_of_memory(text: str | float | None, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 bananas", "0", "1IB", "1PB", 0, -1, math.inf, math.nan, True])
def test_no_sizes_of_memory(text: Any) -> None:
    with pytest.raises(MoesmithError, match="is no size of memory"):
        parse_size(text)


def test_a_config_that_makes_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}')
    with pytest.raises(MoesmithError):
        load_skeleton(str(tmp_path))


@pytest.mark.slow
def test_memory_is_foretold(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 8000}
    (tmp_path / "c.json").write_text(json.dumps(config))
    words = ["--config", tmp_path / "c.json", "--out", tmp_path / "found.json", "--share", "4"]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "larger.py", *map(str, words)], check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["planned_memory_bytes"] == pytest.approx(found["peak_bytes"], rel=0.3)
    assert found["planned_disk_bytes"] == pytest.approx(found["disk_bytes"], rel=0.3)


def test_names_that_are_no_hub_ids_are_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesmith.parent.load.refuse_remote_code", lambda _: pytest.fail("asked"))
    with pytest.raises(MoesmithError, match=r"no file model\.gguf"):
        load_skeleton("model.gguf")
    skeleton = load_skeleton("smollm2-135m")
    assert (skeleton.L, skeleton.D, skeleton.F, skeleton.stored) == (30, 576, 1536, torch.bfloat16)
    assert sum(p.numel() for p in skeleton.model.parameters()) == 134_515_008


def test_other_machines_and_several_processes() -> None:
    """Two FLOPs for every parameter and token; what is shared out takes its share of the time, exports do not."""
    config = str(Path(__file__).parents[1] / "examples" / "configs" / "llama-2-7b.json")
    few = ["carve.experts=4"]  # as many as there are domains in the text
    one = conversion.predict("dive-1of8", config, str(ASSETS / "text"), settings=few, rate="100")
    eight = conversion.predict("dive-1of8", config, str(ASSETS / "text"), settings=few, rate="100", ranks=8)
    assert one["forward_tokens_per_second"] == pytest.approx(
        100e12 / (2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)), rel=1e-3
    )
    for kind in ("calibration", "affinity", "training", "evaluation"):
        assert eight["seconds"][kind] == pytest.approx(one["seconds"][kind] / 8, abs=0.1)
    assert eight["seconds"]["export"] == one["seconds"]["export"]
    assert eight["memory"] == one["memory"]
    assert (eight["ranks"], eight["computes"]) == (8, "bf16 at 100")
    fast = conversion.predict("dive-1of8", config, str(ASSETS / "text"), settings=few, rate="h100")
    assert fast["seconds"]["training"] == pytest.approx(one["seconds"]["training"] / (0.4 * 9.89), rel=1e-3)
    for wrong in ("h101", "0", "nan", "-3"):
        with pytest.raises(MoesmithError, match="is no rate"):
            conversion.predict("dive-1of8", config, str(ASSETS / "text"), settings=few, rate=wrong)
    with pytest.raises(MoesmithError, match="ranks is 0"):
        conversion.predict("dive-1of8", config, str(ASSETS / "text"), settings=few, ranks=0)
