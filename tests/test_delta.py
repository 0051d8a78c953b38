"""A packed delta and its parent give the finished model back, bit for bit, wherever they lie."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from commands import moesmith
from conversions import TINY, convert
from golden import ASSETS
from refusals import refused

import moesmith as package
from moesmith.calibration.view import LayerView
from moesmith.errors import MoesmithError
from moesmith.export.delta import _parts, pack, unpack
from moesmith.files.artefact import read_json, read_tensors, sums_of, write_sums
from moesmith.files.write import write_json, write_tensors
from moesmith.methods import registry
from moesmith.methods.base import Carver, Routed
from moesmith.methods.registry import methods, register
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic, Layer
from moesmith.parent.load import Parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import save_tiny, tiny_parent
from moesmith.testing.text import DIALECTS, save_data

# name → preset, family of the parent, the finished folders and their format
RUNS = {
    "bias": ("dive-1of8", "llama", {"model": "stock"}),
    "masks": ("tomoe-60", "llama", {"model": "native", "stock": "stock"}),
    "plain": ("dive-1of8", "phi", {"model": "native"}),
}
SHORT = ["stage1.tokens=256", "stage2.tokens=256", "affinity.method=scores"]


@pytest.fixture(scope="module")
def runs(home: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by name: every compensation, both formats, with a stock twin and without."""
    folder, found = tmp_path_factory.mktemp("runs"), {"refit": finished}
    for name, (preset, family, _) in RUNS.items():
        model = save_tiny(family, folder / f"{name}-m")
        settings = SHORT if preset.startswith("dive") else []
        found[name] = convert(preset, model, home / "d", folder / name, settings, dtype=torch.bfloat16).folder
    return found


def parent_of(run: Path) -> Path:
    return Path(read_json(run / "run.json")["inputs"]["model"])


@pytest.mark.parametrize("name", ["refit", *RUNS])
def test_it_comes_back_bit_for_bit(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    run = runs[name]
    answer = moesmith("pack", run, "--out", tmp_path / "here" / "delta", "--json")
    assert (answer.status, answer.err) == (0, "")
    packed = json.loads(answer.out)
    folders = {"model": "stock"} if name == "refit" else RUNS[name][2]
    assert packed["folders"] == folders
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"delta"}

    away = tmp_path / "away"  # another place: nothing but the delta and the parent
    shutil.copytree(tmp_path / "here" / "delta", away / "d")
    shutil.copytree(parent_of(run), away / "m")
    shutil.rmtree(tmp_path / "here")
    answer = moesmith("unpack", away / "d", "--model", away / "m", "--out", away / "made", "--json")
    assert (answer.status, answer.err) == (0, "")
    assert json.loads(answer.out)["folders"] == folders
    assert {path.name for path in (away / "made").iterdir()} == folders.keys()
    for folder in folders:
        assert sums_of(away / "made" / folder) == sums_of(run / folder)  # the model card and the code as well
        assert "model.safetensors" in sums_of(run / folder)
        done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=away / "made" / folder, check=False)
        assert done.returncode == 0


def test_what_it_says_about_its_size(runs: dict[str, Path], tmp_path: Path) -> None:
    names = {"refit": "down_proj", "bias": "bias", "masks": "attention"}
    for name, part in names.items():
        found = pack(runs[name], tmp_path / name)
        on_disk = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert found["bytes"] == on_disk == sum(found["parts"].values())
        assert found["share"] == pytest.approx(on_disk / found["parent_bytes"])
        assert {part} == found["parts"].keys() & set(names.values())
    assert not [*(tmp_path / "masks" / "stock").glob("tokenizer*")]  # as the first folder's
    table = moesmith("pack", runs["bias"], "--out", tmp_path / "bias", "--overwrite").out
    for part in ("channels", "router", "bias", "lora", "norms", "files", "of the parent"):
        assert part in table


@pytest.mark.parametrize("compensation", ["none", "bias"])
def test_a_tenth_of_the_parent_at_most(compensation: str, tmp_path: Path) -> None:
    """DIVE's carving with LoRA, in SmolLM2-135M's shapes but for the number of layers, beside one layer of it."""
    D, F, H, rank = 576, 1536, 192, 8
    parent = tiny_parent("llama", hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=9,
                         num_key_value_heads=3, head_dim=64)  # fmt: skip
    carving = random_carving(parent, experts=8, compensation=compensation, noise=True)
    shapes = {"gate": (D, F // 2), "up": (D, F // 2), "down": (F // 2, D)}
    for name, (inner, outer) in shapes.items():
        carving.lora[f"0.{name}.A"] = torch.zeros(8, rank, inner, dtype=torch.bfloat16)
        carving.lora[f"0.{name}.B"] = torch.zeros(8, outer, rank, dtype=torch.bfloat16)
    carving.save(tmp_path)
    layer = 2 * (3 * D * F + 2 * D * D + 2 * D * H)  # bytes of a layer in bf16
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 0.1 * layer


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_shared_expert_and_rows_of_the_experts_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods()
    monkeypatch.setattr(registry, "_known", dict(registry._known))

    @register
    class Mixed(Carver):
        name = "mixed"

        class Settings(Routed):
            method: Literal["mixed"] = "mixed"

        def width(self, parent: Parent) -> int:
            return parent.F // 2

        def carve(self, view: LayerView) -> Layer:
            return random_carving(view.parent, self.experts, shared=8, trained=True).layers[view.index]

    assets, delta, made = ASSETS / "parents" / family, tmp_path / "delta", tmp_path / "made"
    settings = ["domains.tokens=512", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64"]
    settings += ["carve.experts=4", "stage2.tokens=0"]
    run = package.convert("mixed", assets, ASSETS / "text", tmp_path / "run", settings=settings, device="cpu")
    parts = pack(run.folder, delta)["parts"]
    tensors = read_tensors(delta / "carving.safetensors")
    own = sum(tensor.nbytes for name, tensor in tensors.items() if name.split(".")[1] in ("gate", "up"))
    assert (parts["gate_up"], parts["shared"]) == (own, 2 * 8 * 4)  # two layers, eight int32 channels
    unpack(delta, assets, made)
    assert sums_of(made / "model") == sums_of(run.folder / "model")


@pytest.mark.parametrize("reads", ["hidden", "gate"])
def test_every_tensor_of_a_carving_has_a_part(reads: Any, tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent, compensation="bias", noise=True, shared=8, trained=True)
    carving.layers[0].router = Analytic(torch.arange(4), reads)
    carving.layers[1].constant_D = torch.zeros(parent.D)
    carving.norms["model.norm.weight"] = torch.ones(parent.D)
    carving.lora["0.down.A"] = torch.zeros(4, 2, 32)
    carving.save(tmp_path)
    tensors = read_tensors(tmp_path / "carving.safetensors")
    parts = _parts(tmp_path / "carving.safetensors")
    assert parts.keys() == {"channels", "router", "bias", "gate_up", "shared", "lora", "norms"}
    assert sum(parts.values()) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["0.sieve", "sieve.0", "0", "0.router"])
def test_an_unknown_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "carving.safetensors", {"0.widths": torch.ones(2), name: torch.ones(2)})
    says = rf"^\S+carving\.safetensors holds '{re.escape(name)}', which no carving has\. Upgrade moesmith to pack it\.$"
    with pytest.raises(MoesmithError, match=says):
        _parts(tmp_path / "carving.safetensors")


def test_a_wrong_parent(runs: dict[str, Path], tmp_path: Path) -> None:
    pack(runs["bias"], tmp_path / "delta")
    other = save_tiny("llama", tmp_path / "m", seed=7)
    answer = moesmith("unpack", tmp_path / "delta", "--model", other, "--out", tmp_path / "made")
    refused(answer, r"m is not the parent of \S+delta \(weights \w{16}, not \w{16}\)\. Give the dense model that")
    assert {path.name for path in tmp_path.iterdir()} == {"delta", "m"}


def test_what_lies_there_is_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years of work")
    refused(
        moesmith("pack", runs["bias"], "--out", tmp_path / "mine"),
        "mine exists and holds something else: ",
    )
    delta, made = tmp_path / "delta", tmp_path / "made"
    pack(runs["bias"], delta)
    says = {tmp_path / "mine": "exists and holds something else: ", runs["bias"]: "exists and holds something else: "}
    for out, line in (says | {delta: "is .*delta, which this command reads"}).items():
        before = sums_of(out)
        answer = moesmith("unpack", delta, "--model", parent_of(runs["bias"]), "--out", out)
        refused(answer, line)
        assert sums_of(out) == before
    refused(
        moesmith("unpack", tmp_path / "mine", "--model", "x", "--out", made), r"delta\.json is missing. Give a whole"
    )
    refused(
        moesmith("pack", runs["bias"], "--out", tmp_path / "mine" / "thesis.txt" / "x"),
        "cannot write .*File exists. Give another",
    )


def test_a_newer_delta(runs: dict[str, Path], tmp_path: Path) -> None:
    pack(runs["bias"], tmp_path / "delta")
    facts = read_json(tmp_path / "delta" / "delta.json")
    write_json(tmp_path / "delta" / "delta.json", facts | {"format": 99})
    write_sums(tmp_path / "delta")
    answer = moesmith("unpack", tmp_path / "delta", "--model", parent_of(runs["bias"]), "--out", tmp_path / "made")
    refused(answer, r"was written by a newer moesmith \(.*\)\. Upgrade moesmith")


def test_a_run_from_before_there_were_lists(runs: dict[str, Path], tmp_path: Path) -> None:
    run = without_lists(runs["bias"], tmp_path / "run")
    pack(run, tmp_path / "delta")
    unpack(tmp_path / "delta", str(parent_of(run)), tmp_path / "made")
    assert sums_of(tmp_path / "made" / "model") == sums_of(run / "model")


def test_a_model_that_is_not_its_carvings(runs: dict[str, Path], tmp_path: Path) -> None:
    run = without_lists(runs["bias"], tmp_path / "run")
    flip(run / "model" / "model.safetensors")
    before = sums_of(tmp_path)
    answer = moesmith("pack", run, "--out", tmp_path / "delta")
    refused(answer, r"model/model\.safetensors is not what this moesmith makes of \S+experts. Delete \S+model and run")
    assert sums_of(tmp_path) == before


def without_lists(run: Path, copy: Path) -> Path:
    """A copy of a run as moesmith left it before it listed a model's files."""
    shutil.copytree(run, copy)
    (copy / "model" / "SHA256SUMS").unlink()
    path = copy / "stages" / "export" / "manifest.json"
    manifest: dict[str, Any] = read_json(path)
    del manifest["metrics"]["sums"]
    write_json(path, manifest)
    return copy


def flip(path: Path) -> None:
    """Change one bit in the middle of a file's second half, where the numbers are."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "share"), [("dive-1of8", 0.1), ("dive-plus", 1.5)])
def test_of_the_real_parent(preset: str, share: float, tmp_path: Path) -> None:
    save_data(tmp_path / "d")
    tiny = [s for s in TINY if not s.startswith("affinity")] + ["affinity.method=scores", "stage2.tokens=256"]
    run = convert(preset, "smollm2-135m", tmp_path / "d", tmp_path / "run", tiny, dtype=torch.bfloat16).folder
    found = pack(run, tmp_path / "delta")
    print(json.dumps(found, indent=2))
    assert found["share"] < share
    assert Carving.load(tmp_path / "delta").experts == len(DIALECTS)
    unpack(tmp_path / "delta", "smollm2-135m", tmp_path / "made")
    assert sums_of(tmp_path / "made" / "model") == sums_of(run / "model")
