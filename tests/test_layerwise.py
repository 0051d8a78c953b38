"""What is done layer by layer is what is done whole, to the last bit; and it takes the memory of a layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert, tiny_settings, weights
from recording import record_routing
from safetensors.torch import load_file, save_file
from test_tomoe_export import harvested

from moesmith.conversion.convert import predict
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import perplexities
from moesmith.export.native import write_native
from moesmith.export.stock.write import stock_reference, write_stock
from moesmith.export.verify import verify_folder
from moesmith.mixture.folder import layered_folder, load_folder
from moesmith.mixture.moe import build, decoder
from moesmith.parent import layerwise
from moesmith.parent.layerwise import cast, last_hidden, layered
from moesmith.parent.load import Parent, load_parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, STOCK, save_tiny, tiny_parent

IDS = [torch.randint(300, shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 40), (1, 7), (2, 64))]
UNTRAINED = ["stage1.tokens=0", "stage2.tokens=0", "router.start=lda"]


def hidden(model: Any, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(last_hidden(model if dtype is None else cast(model, dtype), IDS))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def on_disk(parent: Parent) -> Parent:
    """The same parent, run layer by layer."""
    return replace(parent, memory=2**30)


@pytest.mark.parametrize("held", [1, 2**28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_turn_are_the_model(
    family: str, dtype: torch.dtype, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "HELD", held)  # every batch alone, or all together
    model = tiny_parent(family, dtype=dtype).model
    assert same(hidden(layered(model)), hidden(model))
    assert len(model.base_model.layers) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_carving_and_its_folder_in_turn(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving = random_carving(parent, top_k=2, compensation="bias", ragged=True)
    write_native(parent, carving, tmp_path / "moe")
    whole = hidden(build(parent, carving))
    assert same(hidden(decoder(on_disk(parent), carving)), whole)
    assert same(hidden(layered_folder(tmp_path / "moe", torch.float32, parent.device)), whole)


@pytest.mark.parametrize("family", STOCK)
def test_a_stock_folder_in_turn(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family, dtype=torch.bfloat16, num_hidden_layers=3)
    carving = random_carving(parent, compensation="bias")
    for layer in carving.layers:
        layer.constant_D = torch.randn(parent.D) / parent.D
    write_stock(parent, carving, tmp_path / "moe")
    for dtype in (torch.bfloat16, torch.float32):
        found = layered_folder(tmp_path / "moe", dtype, parent.device)
        assert same(hidden(found), hidden(load_folder(tmp_path / "moe", dtype)))
    whole, turns = stock_reference(parent, carving), stock_reference(on_disk(parent), carving)
    assert same(hidden(turns), hidden(whole))
    assert same(hidden(turns, torch.float32), hidden(whole, torch.float32))
    texts = {"a": IDS[0], "b": IDS[2]}
    assert perplexities(turns, texts, 2) == perplexities(whole, texts, 2)
    one, other = (record_routing(model, parent.tokenizer, texts, 2) for model in (whole, turns))
    assert (one.counts_DLE == other.counts_DLE).all()
    assert (one.entropy_DL == other.entropy_DL).all()
    assert all((a.ids_LTK == b.ids_LTK).all() for a, b in zip(one.samples, other.samples, strict=True))


def test_pruned_attention_in_turn(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = harvested(parent)
    write_native(parent, carving, tmp_path / "moe")
    assert same(hidden(decoder(on_disk(parent), carving)), hidden(build(parent, carving)))
    found = layered_folder(tmp_path / "moe", torch.float32, parent.device)
    assert same(hidden(found), hidden(load_folder(tmp_path / "moe", torch.float32)))


SPOILT = (
    "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("name", SPOILT)
def test_verified_in_turn(name: str, lost: bool, tmp_path: Path) -> None:
    parent = on_disk(tiny_parent("llama3"))
    carving = random_carving(parent)
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    found = verify_folder(parent, tmp_path / "moe", stock_reference(parent, carving), IDS[2])
    assert found["verified"] == "layerwise"
    assert found["logits_difference"] < 1e-4
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    old = tensors.pop(name)
    if not lost:
        tensors[name] = old.roll(1, 0).contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        MoesmithError,
        match="missing tensors|cannot be loaded" if lost else "does not compute what the carving computes",
    ):
        verify_folder(parent, tmp_path / "moe", stock_reference(parent, carving), IDS[2])


@pytest.mark.parametrize(
    ("preset", "family", "settings"),
    [
        ("dive-1of8", "llama", []),
        ("dive-1of8", "phi", ["affinity.method=scores"]),
        ("dive-plus", "qwen2", []),
    ],
)
def test_a_conversion_in_little_memory_has_the_same_bits(
    preset: str, family: str, settings: list[str], home: Path, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "m", dtype=torch.bfloat16)
    options: Any = {"settings": [*UNTRAINED, *settings], "dtype": torch.bfloat16}
    whole = convert(preset, tmp_path / "m", home / "d", tmp_path / "whole", **options)
    turns = convert(
        preset,
        load_parent(str(tmp_path / "m"), torch.bfloat16, memory=2**30),
        home / "d",
        tmp_path / "turns",
        **options,
    )
    assert weights(turns.folder) == weights(whole.folder)
    said = [run.manifest("export")["metrics"] for run in (whole, turns)]
    assert [metrics["verified"] for metrics in said] == ["whole", "layerwise"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_parent_in_memory_is_run_in_turn_where_the_rest_does_not_fit(
    stored: torch.dtype, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Comparisons and studies hold their parent, and convert it again and again."""
    save_tiny("llama", tmp_path / "m", dtype=stored)
    parent = load_parent(tmp_path / "m", torch.bfloat16)
    settings = [*tiny_settings("dive-plus", UNTRAINED), *UNTRAINED]
    plan = predict("dive-plus", parent, home / "d", settings=settings)
    options: Any = {"settings": UNTRAINED, "dtype": torch.bfloat16}
    mapped = load_parent(tmp_path / "m", torch.bfloat16, memory=2**30)
    files = convert("dive-plus", mapped, home / "d", tmp_path / "files", **options)
    convert("dive-plus", parent, home / "d", tmp_path / "whole", **options)
    assert "layer by layer" not in capsys.readouterr().err
    room = (plan["memory"] + plan["memory_layerwise"]) // 2
    turns = convert("dive-plus", parent, home / "d", tmp_path / "turns", **options, memory=room)
    assert "layer by layer: whole, it needs about" in capsys.readouterr().err
    assert weights(turns.folder) == weights(files.folder)
    assert turns.manifest("export")["metrics"]["verified"] == "layerwise"
    assert not parent.layerwise
