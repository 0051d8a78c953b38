"""Whole conversions: every preset, family and affinity, what they leave on disk, and running them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conversions import SHARED, STAGES, convert, snapshot, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import perplexity
from moesmith.export.stock.write import stock_reference
from moesmith.files.artefact import read_json, verify_files
from moesmith.methods.affinity import cluster, perplexity_similarity
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.moe import build
from moesmith.parent.load import load_parent
from moesmith.parent.proof.family import NATIVE
from moesmith.report.overview import describe, show
from moesmith.run.pipeline import Pipeline as Run
from moesmith.run.pipeline import _taken_over
from moesmith.run.recipe import load_recipe
from moesmith.run.step import Job, Step
from moesmith.testing.parents import FAMILIES, save_tiny, tiny_parent
from moesmith.testing.text import DIALECTS

PRESETS = ("dive-1of8", "dive-2of8", "dive-plus", "flap-static", "flap-static-refit", "llama-moe-1of8")


@pytest.fixture(scope="module")
def made(home: Path) -> Callable[[str], Run]:
    """A preset's conversion of that Llama, made once."""
    runs: dict[str, Run] = {}

    def get(preset: str) -> Run:
        if preset not in runs:
            runs[preset] = convert(preset, home / "m", home / "d", home / preset)
        return runs[preset]

    return get


def check(run: Run) -> Any:
    """What holds for every finished run; returns its model as plain transformers loads it."""
    stages = {path.name for path in (run.folder / "stages").iterdir()}
    assert stages == set(STAGES) - ({"router"} if run.recipe.method.experts == 1 else set())
    for name in stages:
        verify_files(run.path(name))
        manifest = run.manifest(name)
        assert manifest["key"] == run.keys[name]
        assert manifest["inputs"] == run.inputs
        present = {str(p.relative_to(run.path(name))) for p in run.path(name).rglob("*") if p.is_file()}
        assert present == {*manifest["files"], "manifest.json"}
    left = [p.name for p in run.folder.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    assert left == []
    model: Any = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
    parent = load_parent(run.inputs["model"], torch.float32)
    carving = Carving.load(run.path("experts"))
    # stock files have no bias: a channel stands in for it, in the reference too
    channel = carving.biased and parent.family != NATIVE
    reference = stock_reference(parent, carving) if channel else build(parent, carving, "sliced")
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    assert run.manifest("export")["metrics"]["logits_difference"] < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    assert tokenizer.chat_template == parent.tokenizer.chat_template
    return model


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_ends_in_a_model(made: Callable[[str], Run], preset: str) -> None:
    run = made(preset)
    model = check(run)
    evaluation = read_json(run.path("evaluate") / "evaluation.json")
    measured = [name for name in ("carve", "router", "experts") if run.path(name).is_dir()]
    assert list(evaluation["stages"]) == ["parent", *measured]
    for stage in evaluation["stages"].values():
        assert list(stage["domains"]) == sorted(DIALECTS)
        assert all(value > 1 for value in stage["domains"].values())
    # the last row is the finished folder's own perplexity, recomputed here
    blocks = run.held_out
    last = evaluation["stages"]["experts"]["domains"]
    assert {name: perplexity(model, block) for name, block in blocks.items()} == pytest.approx(last, rel=1e-6)
    assert evaluation["tokens"] == sum(block.numel() for block in blocks.values())
    # training did something, and what it was meant to
    before, after = (Carving.load(run.path(name)) for name in ("carve", "experts"))
    assert after.lora
    assert after.norms
    pairs = zip(before.layers, after.layers, strict=True)
    routed = any(not torch.equal(a.router.weight_ED, b.router.weight_ED) for a, b in pairs)
    assert routed == (run.recipe.method.experts > 1)
    assert evaluation["stages"]["experts"]["geomean"] < evaluation["stages"]["carve"]["geomean"]


@pytest.mark.parametrize("preset", ["dive-1of8", "dive-plus"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_converts(home: Path, tmp_path: Path, family: str, preset: str) -> None:
    save_tiny(family, tmp_path / "m")
    run = convert(preset, tmp_path / "m", home / "d", tmp_path / "run")
    model = check(run)
    assert model.config.model_type == FAMILIES[family][2].replace(NATIVE, "moesmith")


AFFINITIES = [
    ("perplexity", ["affinity.profile=both", "affinity.linkage=complete"]),
    ("perplexity", ["affinity.profile=columns", "affinity.linkage=single"]),
    ("moments", ["affinity.profile=both"]),
    ("scores", []),
    ("random", []),
]


@pytest.mark.parametrize(("method", "settings"), AFFINITIES)
def test_every_affinity_gives_clusters(home: Path, tmp_path: Path, method: str, settings: list[str]) -> None:
    off = ["stage1.tokens=0", "stage2.tokens=0", "carve.experts=3"]
    run = convert("dive-1of8", home / "m", home / "d", tmp_path / "run", [f"affinity.method={method}", *settings, *off])
    folder = run.path("affinity")
    clusters = read_json(folder / "clusters.json")["clusters"]
    if method == "random":  # the control: every expert draws from all domains
        assert clusters == [sorted(DIALECTS)] * 3
        assert not (folder / "affinity.csv").exists()
        masks = Carving.load(run.path("carve")).mask(0)
        assert not torch.equal(masks[0], masks[1])
    else:
        assert sorted(name for group in clusters for name in group) == sorted(DIALECTS)
        assert len(clusters) == 3
        assert all(clusters)
        table = (folder / "affinity.csv").read_text().splitlines()
        assert table[0].split(",") == ["", *sorted(DIALECTS)]
        assert float(table[1].split(",")[1]) == pytest.approx(1)
        assert len((folder / "linkage.csv").read_text().splitlines()) == len(DIALECTS) - 1
    assert (folder / "matrix.csv").exists() == (method == "perplexity")
    assert Carving.load(run.path("carve")).provenance["clusters"] == clusters


def test_a_domain_that_is_best_everywhere_stands_alone() -> None:
    """Its profile is constant, so that no correlation with it is defined."""
    matrix = np.array([[5.0, 6, 7, 8], [6, 7, 8, 9.5], [9, 6.5, 9, 8.5], [9.5, 6.6, 9.1, 8.8]])
    similarity = perplexity_similarity(matrix)
    assert similarity[0].tolist() == [1, 0, 0, 0]
    assert np.isfinite(similarity).all()
    assert cluster(similarity, 3)[1] == [[0], [1], [2, 3]]


def test_published_clusters_place_domains_by_name(home: Path, tmp_path: Path) -> None:
    names = dict(zip(DIALECTS, ("c4", "logiqa", "gsm8k", "mathqa"), strict=True))
    (tmp_path / "d").mkdir()
    for name, known in names.items():
        for split in ("train", "test"):
            shutil.copy(home / "d" / f"{name}.{split}.jsonl", tmp_path / "d" / f"{known}.{split}.jsonl")
    settings = ["affinity.method=published", "affinity.published=tinyllama-50", "carve.experts=3"]
    run = convert("dive-1of8", home / "m", tmp_path / "d", tmp_path / "run", [*settings, "stage2.tokens=0"])
    clusters = read_json(run.path("affinity") / "clusters.json")["clusters"]
    assert clusters == [["c4"], ["logiqa"], ["gsm8k", "mathqa"]]
    assert not (run.path("affinity") / "linkage.csv").exists()


def test_adaptive_selection_gives_ragged_layers_that_export(home: Path, tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", ["carve.selection=adaptive"])
    widths_LE = Carving.load(run.path("carve")).widths()
    assert len(set(widths_LE.flatten().tolist())) > 1
    assert (widths_LE.sum(0) == 2 * 32).all()  # the quota holds over all layers of an expert
    check(run)


def test_nothing_to_train_is_a_model_too(home: Path, tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", ["stage1.tokens=0", "stage2.tokens=0"])
    assert not run.path("router").exists()
    assert not run.path("experts").exists()
    stages = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    assert list(stages) == ["parent", "carve"]
    assert "trained: nothing" in (run.folder / "model" / "README.md").read_text()


def test_a_parent_in_memory_and_on_disk_are_the_same(home: Path, made: Callable[[str], Run], tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    run = convert("dive-plus", parent, home / "d", tmp_path / "run")
    assert weights(run.folder) == weights(made("dive-plus").folder)
    assert run.inputs["model_digest"] == made("dive-plus").inputs["model_digest"]
    fresh = tiny_parent("llama")
    assert all(map(torch.equal, parent.model.parameters(), fresh.model.parameters()))  # the parent is as it was


def test_the_second_time_nothing_is_done(
    home: Path, made: Callable[[str], Run], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = made("dive-plus").folder
    before = snapshot(folder)
    capfd.readouterr()
    convert("dive-plus", home / "m", home / "d", folder)
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("[")] == [f"[{name}] done before" for name in STAGES]
    assert snapshot(folder) == before


def test_a_lost_model_is_written_again(home: Path, tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run")
    before = weights(run.folder)
    shutil.rmtree(run.folder / "model")
    convert("dive-plus", home / "m", home / "d", run.folder)
    assert weights(run.folder) == before
    assert (run.folder / "model" / "README.md").is_file()


def test_a_lost_stage_is_made_again(home: Path, tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run")
    before = weights(run.folder)
    for name in ("moments", "router"):
        shutil.rmtree(run.path(name))
    convert("dive-plus", home / "m", home / "d", run.folder)
    assert weights(run.folder) == before


def test_reuse_takes_over_what_does_not_differ(
    home: Path, made: Callable[[str], Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["stage2.lr=0.003"]
    other = made("dive-plus").folder
    before = snapshot(other)
    alone = convert("dive-plus", home / "m", home / "d", tmp_path / "alone", settings)
    capfd.readouterr()
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings, reuse=[other])
    said = [line for line in capfd.readouterr().err.splitlines() if "taken over" in line]
    assert said == [f"[{name}] taken over from {other}" for name in SHARED]
    assert weights(run.folder) == weights(alone.folder)
    check(run)
    assert snapshot(other) == before


def test_other_evaluation_text_trains_nothing_again(
    home: Path, made: Callable[[str], Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = made("dive-plus")
    capfd.readouterr()
    settings = ["evaluate.tokens=256"]
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", settings, reuse=[other.folder])
    said = [line for line in capfd.readouterr().err.splitlines() if "taken over" in line]
    anew = {"held-out", "baseline", "export", "evaluate"}
    assert said == [f"[{name}] taken over from {other.folder}" for name in STAGES if name not in anew]
    before, after = (read_json(each.path("evaluate") / "evaluation.json") for each in (other, run))
    assert (before["tokens"], after["tokens"]) == (4 * 512, 4 * 256)
    assert after["stages"]["experts"]["geomean"] != before["stages"]["experts"]["geomean"]
    check(run)


def test_reuse_of_the_same_recipe_gives_a_whole_run(home: Path, made: Callable[[str], Run], tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", reuse=[made("dive-plus").folder])
    assert weights(run.folder) == weights(made("dive-plus").folder)
    check(run)


def test_reuse_of_a_damaged_stage_is_refused(home: Path, tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", ["stage1.tokens=0", "stage2.tokens=0"])
    (run.path("moments") / "beast.safetensors").write_bytes(b"broken")
    with pytest.raises(MoesmithError, match=r"moments/beast\.safetensors is missing or damaged\. Delete"):
        convert("dive-plus", home / "m", home / "d", tmp_path / "new", reuse=[run.folder])


def test_changes_are_refused_and_named(home: Path, made: Callable[[str], Run], tmp_path: Path) -> None:
    folder = made("dive-plus").folder
    before = snapshot(folder)
    again: dict[str, Any] = {"preset": "dive-plus", "model": home / "m", "data": home / "d", "out": folder}

    def refused(says: str, **change: Any) -> None:
        with pytest.raises(MoesmithError, match=rf"other settings: {says}.*Give another --out"):
            convert(**(again | change))
        assert snapshot(folder) == before

    refused(r"stage1\.lr was 0\.01, is 0\.02\.", settings=["stage1.lr=0.02"])
    refused(r"carve\.ratio was 0\.5, is 0\.25; seed was 42, is 1", settings=["seed=1", "carve.ratio=0.25"])
    refused("affinity.method was scores, is perplexity", preset="dive-1of8")
    save_tiny("llama", tmp_path / "m", seed=1)
    refused(rf"model was {home}/m \(\w+\), is {tmp_path}/m \(\w+\)", model=tmp_path / "m")
    shutil.copytree(home / "d", tmp_path / "d")
    with open(tmp_path / "d" / "sum.train.jsonl", "a") as file:
        file.write('{"text": "1 + 1"}\n')
    refused(rf"data was {home}/d \(\w+\), is {tmp_path}/d \(\w+\)", data=tmp_path / "d")


def test_the_same_weights_and_text_elsewhere_are_no_change(home: Path, tmp_path: Path) -> None:
    off = ["stage1.tokens=0", "stage2.tokens=0"]
    shutil.copytree(home / "m", tmp_path / "m")
    shutil.copytree(home / "d", tmp_path / "d")
    run = convert("dive-plus", tmp_path / "m", tmp_path / "d", tmp_path / "run", off)
    shutil.rmtree(tmp_path / "m")
    before = weights(run.folder)
    convert("dive-plus", home / "m", home / "d", tmp_path / "run", off)
    assert read_json(run.folder / "run.json")["inputs"]["model"] == str(home / "m")  # eval looks for the parent there
    assert weights(run.folder) == before


def test_a_run_without_a_finished_stage_does_not_bind(home: Path, tmp_path: Path) -> None:
    wrong = convert("dive-plus", home / "m", home / "d", tmp_path / "run", ["stage2.tokens=0"])
    shutil.rmtree(wrong.folder / "stages")
    shutil.rmtree(wrong.folder / "model")
    run = convert("dive-plus", home / "m", home / "d", wrong.folder)
    assert read_json(run.folder / "run.json")["recipe"]["stage2"]["tokens"] == 2048


def test_what_a_killed_try_left_counts_only_for_the_same_settings(home: Path, tmp_path: Path) -> None:
    inputs = dict.fromkeys(("model", "model_digest", "data", "data_digest"), "x")
    recipe = load_recipe("dive-plus")
    run = Run(tmp_path / "run", recipe, inputs)
    found: list[list[str]] = []

    class Rows(Step):
        name, window = "rows", 0

        def settings(self, job: Job) -> dict[str, Any]:
            return {"window": self.window}

        def make(self, job: Job, work: Path) -> dict[str, Any]:
            found.append(sorted(path.name for path in work.iterdir() if path.name[0] != "."))
            (work / "row").write_text("half of the work")
            raise KeyboardInterrupt

    for window in (1, 1, 2):
        step = Rows(recipe)
        step.window = window
        with run.lock(), pytest.raises(KeyboardInterrupt):
            run.step(step, Job(run, tiny_parent("llama"), []))
    assert found == [[], ["row"], []]
    assert not run.path("rows").exists()


def test_inspect_tells_it_all(made: Callable[[str], Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = made("dive-plus")
    found = json.loads(json.dumps(describe(run.folder)))
    carving = Carving.load(run.path("experts"))
    assert found["recipe"] == "dive-plus"
    assert found["gate"] == carving.layers[0].gate().model_dump() | {"shared_channels": 0}
    assert (found["gate"]["experts"], found["gate"]["top_k"], found["compensation"]) == (4, 1, "refit")
    assert sorted(name for group in found["clusters"] for name in group) == sorted(DIALECTS)
    assert found["parameters"] == parameters(tiny_parent("llama"), carving)
    assert [layer["channels"] for layer in found["layers"]] == [[32] * 4] * 2
    pairs = carving.overlap()[:, ~torch.eye(4, dtype=torch.bool)].mean(1)
    assert [layer["overlap"] for layer in found["layers"]] == pytest.approx(pairs.tolist())
    assert [layer["union"] for layer in found["layers"]] == pytest.approx(carving.union().tolist())
    assert set(found["stages"]) == set(STAGES)
    show(found)
    printed = capsys.readouterr().out
    for part in ("dive-plus", "4 experts, top-1", "mean overlap", "MixtralForCausalLM, largest logits difference"):
        assert part in printed


def test_the_model_card_holds_lineage_recipe_and_numbers(made: Callable[[str], Run]) -> None:
    run = made("dive-plus")
    text = (run.folder / "model" / "README.md").read_text()
    header, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "base_model" not in yaml.safe_load(header)  # a folder on this machine is no hub id
    assert str(run.folder.parent) not in text
    assert run.inputs["model_digest"] in body
    assert "recipe `dive-plus`" in body
    evaluation = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    parent, last = evaluation["parent"], evaluation["experts"]
    for name in DIALECTS:
        assert f"| {name} | {parent['domains'][name]:.2f} | {last['domains'][name]:.2f} |" in body
    assert f"**{parent['geomean']:.2f}** | **{last['geomean']:.2f}**" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == run.recipe.model_dump(mode="json")


def test_the_model_card_names_a_parent_from_the_hub(home: Path, tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    parent.source = "somebody/tiny-llama"
    run = convert("flap-static", parent, home / "d", tmp_path / "run", ["stage2.tokens=0"])
    assert "base_model: somebody/tiny-llama" in (run.folder / "model" / "README.md").read_text()


def test_numbers_of_a_seeded_conversion(made: Callable[[str], Run]) -> None:
    """Golden numbers, to three digits: a change here is a change of results and belongs into the changelog."""
    stages = read_json(made("dive-plus").path("evaluate") / "evaluation.json")["stages"]
    found = {name: stage["geomean"] for name, stage in stages.items()}
    assert found == pytest.approx(
        {"parent": 381.787, "carve": 390.270, "router": 389.341, "experts": 374.324}, rel=1e-3
    )


def test_a_stage_that_goes_while_it_is_taken_over_is_made_instead(tmp_path: Path) -> None:
    """A comparison that keeps no models deletes a row's stages while another row looks for some."""
    assert not _taken_over(tmp_path / "gone" / "stages" / "carve", tmp_path / "mine" / "carve")
    assert list((tmp_path / "mine").iterdir()) == []
