"""What a run that learned masks (ToMoE) says about itself: inspect, model card, report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import convert
from safetensors.torch import load_file
from test_report import SECTIONS, Reader, text_of

from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import active_share, parameters
from moesmith.mixture.folder import load_folder
from moesmith.parent.load import load_parent
from moesmith.report import masks
from moesmith.report.numbers import number, percent
from moesmith.report.overview import describe, show
from moesmith.report.page import write_report
from moesmith.run.folder import finished_of
from moesmith.run.pipeline import Pipeline as Run

QUICK = ["stage1.tokens=0", "stage2.tokens=0", "masks.tokens=2048", "masks.window=32", "masks.lr=0.003"]


@pytest.fixture(scope="module")
def learned(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Masks from scratch over a tiny Llama, in the dtype that ``convert`` has by default."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    return convert("tomoe-60", home / "m", home / "d", folder, QUICK, dtype=torch.bfloat16)


def test_inspect_tells_what_was_learned(learned: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(json.dumps(describe(learned.folder)))
    carving, metrics = Carving.load(learned.path("masks")), learned.manifest("masks")["metrics"]
    assert found["clusters"] is None
    spec = found["masks"]
    assert (spec["budget"], spec["start"], spec["attention"], spec["head"]) == (0.6, "random", "hybrid", 8)
    assert spec["active_share"] == metrics["active_share"] <= 0.6
    assert [layer["channels"] for layer in found["layers"]] == carving.widths().tolist()
    assert [layer["union"] for layer in found["layers"]] == pytest.approx(carving.union().tolist())
    assert [(layer["qk"], layer["vo"]) for layer in found["layers"]] == [
        (attention.width_qk, attention.width_vo) for attention in carving.attention
    ]
    assert list(found["stages"]) == ["held-out", "corpus", "baseline", "masks", "export", "evaluate"]
    show(found)
    printed = capsys.readouterr().out
    for part in ("masks over frozen weights", "60.0% of the block parameters", "Q/K of 8", "V/O of 8", "MixtralFor"):
        assert part in printed
    show(found, brief=True)
    assert "V/O of a head" in capsys.readouterr().out


def test_parameters_are_those_in_the_file(learned: Run) -> None:
    tensors = load_file(learned.folder / "model" / "model.safetensors")
    count = sum(t.numel() for t in tensors.values() if t.is_floating_point() and t.dim())
    assert describe(learned.folder)["parameters"]["parameters_total"] == count
    parent, carving = load_parent(learned.inputs["model"]), Carving.load(learned.path("masks"))
    found = parameters(parent, carving)
    assert found["parameters_active"] < found["parameters_total"]
    # experts of equal width, the widest token: what is left of the blocks is the active share
    carving.layers = [type(x)([x.routed[0]] * carving.experts, x.router) for x in carving.layers]
    gates = sum(attention.gate_parameters() for attention in carving.attention)
    routers = sum(layer.router.weight_ED.numel() for layer in carving.layers)
    gone = found["parent_parameters"] - parameters(parent, carving)["parameters_active"] + gates + routers
    blocks = sum(p.numel() for name, p in parent.model.named_parameters() if "proj" in name)
    assert 1 - gone / blocks == pytest.approx(active_share(parent, carving), abs=1e-6)


def test_the_card_says_what_was_learned_and_how_to_load_it(learned: Run) -> None:
    text = (learned.folder / "model" / "README.md").read_text()
    stages = read_json(learned.path("evaluate") / "evaluation.json")["stages"]
    assert list(stages) == ["parent", "masks", "stock"]
    for part in (
        "learned by a hypernetwork over frozen weights (ToMoE, arXiv:2501.15316)",
        "budget: 60.0% of the block parameters",
        "of a V/O head, chosen by token",
        "masks learned on 2,048 tokens",
        "trust_remote_code=True",
        "those masks are dropped there",
        f"Geometric mean of its perplexity: {stages['stock']['geomean']:.2f}",
        f"**{stages['parent']['geomean']:.2f}** | **{stages['masks']['geomean']:.2f}**",
    ):
        assert part in text, part


def test_the_finished_model_is_never_the_twin() -> None:
    results: dict[str, Any] = dict.fromkeys(("parent", "carve", "masks", "stock"))
    assert finished_of(results) == "masks"
    assert finished_of(["parent", "carve"]) == "carve"


def test_masks_that_began_as_a_carving_name_its_clusters(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = [*QUICK, "carve.start.method=dive", "masks.attention=none", "masks.budget=0.7", "masks.tokens=256"]
    run = convert("tomoe-50", home / "m", home / "d", tmp_path / "run", [*warm, "carve.start.score=ifv"])
    found = describe(run.folder)
    assert len(found["clusters"]) == 4
    assert found["masks"]["head"] is None
    show(found)
    printed = capsys.readouterr().out
    assert "expert 0 began as" in printed
    assert "from a carving" in printed
    assert "Q/K" not in printed
    text = (run.folder / "model" / "README.md").read_text()
    assert "started from a carving (dive, score ifv)" in text
    assert "attention: the parent's, whole" in text
    assert "trust_remote_code" not in text
    assert "folder `stock`" not in text
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "that began as its own" in page
    assert "Attention is whole" in page
    assert "svg" in page


def test_the_report_shows_masks_without_clusters(learned: Run) -> None:
    page = write_report(learned.folder).read_text(encoding="utf-8")
    found = Reader(page)
    assert tuple(found.sections) == (*SECTIONS[:3], "masks", *SECTIONS[3:])
    assert found.figures == {"perplexity": 1, "overlap": 2, "masks": 1, "training": 1, "routing": 3}
    assert re.findall(r'<p class="absent">(?!The colours)([^<]*)', page) == [
        "This run did not mine affinity: no matrix decided which domains share an expert."
    ]
    metrics = learned.manifest("masks")["metrics"]
    stages = read_json(learned.path("evaluate") / "evaluation.json")["stages"]
    assert f"{number(stages['masks']['geomean'])}</strong> for the converted model" in page
    for section, words in {
        "perplexity": ("masks learned", "stock format", "without the masks that attention has by token"),
        "masks": (percent(metrics["active_share"]), number(metrics["threshold"]), "Q/K, of 8", "same dimensions"),
        "training": ("Masks", "KL to the parent", "2,048", "Masks start open"),
        "provenance": ("active share", "union", "threshold"),
    }.items():
        assert all(word in found.sections[section] for word in words), (section, found.sections[section])
    assert "made for it" not in page
    data = json.loads(re.findall(r'<script type="application/json" id="routes">(.*?)</script>', page, re.DOTALL)[0])
    assert data["clusters"] == []
    assert {sample["home"] for sample in data["samples"]} == {None}
    assert len(data["samples"][0]["ids"]) == 2  # layers
    assert (learned.folder / "figures" / "masks.png").is_file()


def test_the_report_without_attention_and_unfinished(learned: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(learned.folder, run)
    carving = Carving.load(run / "stages" / "masks")
    carving.attention = []
    carving.save(run / "stages" / "masks")
    manifest = read_json(run / "stages" / "masks" / "manifest.json")
    write_json(run / "stages" / "masks" / "manifest.json", manifest | {"files": {}})  # or it would notice
    for name in ("export", "evaluate"):
        shutil.rmtree(run / "stages" / name)
    found = Reader(write_report(run).read_text(encoding="utf-8"))
    assert "Attention is whole" in found.sections["masks"]
    assert "Q/K" not in found.sections["masks"]
    assert found.figures == {"overlap": 2, "masks": 1, "training": 1}


def test_chance_is_what_random_masks_give() -> None:
    generator = np.random.default_rng(0)
    share = np.array([[0.5, 0.5, 0.5], [0.2, 0.4, 0.8]])
    iou, union = masks.chance(share)
    assert (iou[0], union[0]) == pytest.approx((1 / 3, 7 / 8))
    for layer in range(2):
        kept = generator.random((3, 200_000)) < share[layer, :, None]
        pairs = [(kept[a] & kept[b]).sum() / (kept[a] | kept[b]).sum() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert np.mean(pairs) == pytest.approx(iou[layer], abs=0.005)
        assert kept.any(0).mean() == pytest.approx(union[layer], abs=0.005)


def test_figures_of_masks_name_what_they_show() -> None:
    share, iou = np.full((3, 4), 0.5), np.ones((3, 4, 4))
    words = text_of(masks.layers_figure(share, share.mean(1), iou, [(0.5, 1.0)] * 3))
    for part in ("share of channels", "any expert", "Q and K", "V and O, at most", "intersection over union"):
        assert part in words
    assert "Q and K" not in text_of(masks.layers_figure(share[:, :1], share.mean(1), iou[:, :1, :1]))
    steps = [{"tokens": 10 * i, "kl": 1.0, "active": 0.9, "union": 1.0, "entropy": 1.0} for i in range(1, 4)]
    words = text_of(masks.training_figure(steps, 0.5, 4))
    for part in ("KL (nats per token)", "share of the blocks", "entropy / log E", "training tokens", "budget"):
        assert part in words


ALONE = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moesmith":
            raise ImportError(name)
sys.meta_path.insert(0, Without())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.dtype, model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.float().sum().item())
"""


@pytest.mark.slow
def test_the_model_loads_without_moesmith(learned: Run, tmp_path: Path) -> None:
    """As the card says: the code beside the weights is enough, in the dtype of the file."""
    folder = learned.folder / "model"
    known = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)], env=known, capture_output=True, text=True, timeout=300, check=False
    )
    assert answer.returncode == 0, answer.stderr
    dtype, total = answer.stdout.split()
    assert dtype == "torch.float32"
    model = load_folder(folder, torch.float32)
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.float().sum().item()
    assert float(total) == pytest.approx(ours, rel=1e-3, abs=1e-2)
