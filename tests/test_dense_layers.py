"""Layers with an ordinary network between layers with experts: stock folders hold them, and everything reads them."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import moesmith
from recording import record_routing
from safetensors.torch import load_file
from sources import IDS

from moesmith.bench.bounds import of_folder
from moesmith.conversion.convert import convert
from moesmith.errors import MoesmithError
from moesmith.evaluation.routing import Routing
from moesmith.export.target import Options, Source
from moesmith.export.targets import TARGETS
from moesmith.export.verify import run as forward
from moesmith.files.artefact import read_json
from moesmith.methods import allocation
from moesmith.methods.allocation import dense_or_even
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.folder import layered_folder, load_folder
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.mixture.moe import build
from moesmith.report.numbers import number
from moesmith.report.page import write_report
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import STOCK, save_tiny, tiny_parent

ASSETS = Path(__file__).parent / "assets"


def source_of(family: str, top_k: int = 1, width: int = 64) -> Source:
    """Three layers; the first and the last have one expert, with a ``down_proj`` of its own."""
    parent = tiny_parent(family, num_hidden_layers=3)
    carving = random_carving(parent, top_k=top_k)
    own_DF = torch.randn(parent.D, width, generator=torch.Generator().manual_seed(5))
    single = Layer([Expert(torch.arange(width), own_DF)], Linear(torch.zeros(1, parent.D)))
    return Source(parent, replace(carving, layers=[single, carving.layers[1], single]), Path("run"), IDS)


@pytest.mark.parametrize("family", STOCK)
def test_stock_folders_hold_dense_layers(family: str, tmp_path: Path) -> None:
    source, out = source_of(family), tmp_path / "out"
    assert source.carving.dense == (0, 2)
    assert not source.carving.is_native(source.parent)
    for name in ("hf", "sglang"):
        if (why := TARGETS[name].explain(source)) is not None:
            assert (name, family) == ("sglang", "llama3"), why
            continue
        target, out = TARGETS[name], tmp_path / name
        target.write(source, out, Options())
        found = target.verify(source, out, IDS)
        assert found["logits_difference"] <= 1e-4
        assert found["argmax_agreement"] == 1
        config = read_json(out / "config.json")
        assert config["mlp_only_layers"] == [0, 2]
        assert config["model_type"] in ("qwen2_moe", "qwen3_moe")
    out = tmp_path / "hf"
    stored = load_file(out / "model.safetensors")
    assert (
        sum(part.numel() for part in stored.values()) == parameters(source.parent, source.carving)["parameters_total"]
    )
    whole, one_by_one = load_folder(out, torch.float32), layered_folder(out, torch.float32, source.parent.device)
    torch.testing.assert_close(forward(one_by_one, IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)
    sliced, masked = (build(source.parent, source.carving, form)(IDS).logits for form in ("sliced", "masked"))
    torch.testing.assert_close(sliced, whole(IDS).logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(masked, sliced, rtol=1e-3, atol=1e-4)


def test_tokens_that_visit_several_experts_visit_one_network_there(tmp_path: Path) -> None:
    source = source_of("llama", top_k=2)
    TARGETS["hf"].write(source, tmp_path / "out", Options())
    assert TARGETS["hf"].verify(source, tmp_path / "out", IDS)["logits_difference"] <= 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_llamacpp_has_a_graph_for_them(family: str, tmp_path: Path) -> None:
    """Each of two texts alike: the server goes back to the beginning between them, and no layer has a window."""
    source, gguf = source_of(family), TARGETS["gguf"]
    for quant, largest in (("f32", 1e-4), ("q8_0", 1.0)):
        out = tmp_path / f"{quant}.gguf"
        assert gguf.write(source, out, Options(quant=quant))["architecture"] == "mimo2"
        found = gguf.verify(source, out, IDS)
        assert found["within_tolerance"] >= (1.0 if quant == "f32" else 0.8)
        assert found["logprob_difference"] < largest


@pytest.mark.parametrize(
    ("family", "top_k", "why"),
    [
        ("qwen2", 1, "no biases or norms of queries"),
        ("qwen3", 1, "no biases or norms of queries"),
        ("llama", 2, "no softmax over several"),
        ("llama3", 1, "does not scale positions"),
    ],
)
def test_llamacpp_is_refused_by_its_reason(family: str, top_k: int, why: str) -> None:
    assert why in str(TARGETS["gguf"].explain(source_of(family, top_k)))


def test_one_mask_for_all_tokens_has_no_dense_layers() -> None:
    parent = tiny_parent("llama")
    layers = [Layer([Expert(torch.arange(32))], Linear(torch.zeros(1, parent.D)))] * 2
    assert Carving(layers, parent.F).dense == ()
    assert not Carving(layers, parent.F).is_native(parent)


def test_routing_counts_a_dense_layer_as_one_expert(tmp_path: Path) -> None:
    source = source_of("llama")
    TARGETS["hf"].write(source, tmp_path / "out", Options())
    model = load_folder(tmp_path / "out", torch.float32)
    found = record_routing(model, source.parent.tokenizer, {"text": IDS})
    assert found.sizes_L.tolist() == [1, 4, 1]
    assert found.counts_DLE.sum((0, 2)).tolist() == [IDS.numel()] * 3
    assert found.counts_DLE[0, 0].tolist() == [IDS.numel(), 0, 0, 0]
    assert found.samples[0].ids_LTK[2].tolist() == [[0]] * IDS.shape[1]


def test_a_bound_counts_what_every_token_reads(tmp_path: Path) -> None:
    source = source_of("llama")
    TARGETS["hf"].write(source, tmp_path / "out", Options())
    weights = of_folder(tmp_path / "out", source.parent.config, torch.float32)
    D, F = source.parent.D, source.parent.F
    (layer,) = weights.entries.layers
    assert (layer.count, layer.active, layer.one) == (4, 1, 3 * D * F // 2)
    assert weights.entries.always >= 2 * 3 * D * F


def test_the_layers_that_lose_most_stay_dense() -> None:
    steep, flat = [0.0, 5.0, 20.0, 60.0], [0.0, 1.0, 2.0, 4.0]
    assert dense_or_even([flat, steep, flat], 12, 24, 3) == [6, 12, 6]
    assert dense_or_even([flat, flat, flat], 12, 24, 3) == [8, 8, 8]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_conversion_leaves_layers_dense(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, exported, compared and evaluated like any other."""
    lost = iter([[8.0 * n**2 for n in range(8)], [0.01 * n for n in range(8)], [0.01 * n for n in range(8)]])
    monkeypatch.setattr(allocation, "losses", lambda *_: next(lost))
    given = ["domains.tokens=512", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64"]
    given += ["carve.experts=2", "carve.passes=1", "carve.batch=32", "carve.sensitivity=512", "carve.ratio=0.25"]
    given += ["stage2.tokens=512", "stage2.window=32", "carve.allocation=dense"]
    parent = save_tiny(family, tmp_path / "parent", num_hidden_layers=3)
    run = convert("token", parent, ASSETS / "text", tmp_path / "run", settings=given)
    assert run.carving().widths().tolist() == [[64, 0], [40, 40], [40, 40]]
    assert run.metrics("export")["architecture"] in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
    iou_LEE = run.carving("carve").overlap()
    assert run.metrics("carve")["overlap"] == pytest.approx(float(iou_LEE[1:, 0, 1].mean()), abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(tmp_path / "run").read_text()
    assert not re.search(r"\bnan\b", page)
    routing = Routing.load(run.path("evaluate") / "routing.npz")
    assert f"router probabilities: mean {number(routing.entropy_L[1:].mean())};" in page  # the dense layer has none
    layers = json.loads(moesmith("inspect", tmp_path / "run", "--json").out)["layers"]
    assert [row["channels"] for row in layers] == [[64], [40, 40], [40, 40]]
    assert layers[0]["overlap"] is None
    assert read_json(run.model / "config.json")["mlp_only_layers"] == [0]
    with pytest.raises(MoesmithError, match="needs sensitivity above 0"):
        convert("token", parent, ASSETS / "text", tmp_path / "other", settings=[*given, "carve.sensitivity=0"])
