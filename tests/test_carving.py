"""The carving: what it says about itself, and that it comes back from disk as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from moesmith.calibration.view import LayerView
from moesmith.conversion.plan import make_plan
from moesmith.conversion.steps.training import prepare
from moesmith.errors import MoesmithError
from moesmith.export.native import write_native
from moesmith.export.stock.write import write_stock
from moesmith.files.write import write_json, write_tensors
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN
from moesmith.parent.proof.family import NATIVE
from moesmith.run.folder import Run
from moesmith.run.recipe import load_recipe
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer


def same(a: Any, b: Any) -> bool:
    """Equal values, tensors to the last bit and in dtype."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Layer | Expert | Linear):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def add_extras(carving: Carving) -> None:
    """What training adds: LoRA pairs, norms, a constant direction."""
    widest = int(carving.widths().max())
    carving.lora = {"0.down.A": torch.randn(4, 2, widest), "0.down.B": torch.randn(4, 32, 2)}
    carving.norms = {"model.norm.weight": torch.randn(32).bfloat16()}
    carving.layers[0].constant_D = torch.randn(32)
    carving.provenance = {"clusters": [["ä", "b"], ["c"]], "parent": {"model_digest": "0" * 16}}


@pytest.mark.parametrize("compensation", ["none", "bias", "refit"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_carving_comes_back(tmp_path: Path, compensation: str, ragged: bool) -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent, top_k=2, compensation=compensation, ragged=ragged, noise=ragged)
    if ragged:
        add_extras(carving)
    carving.save(tmp_path)
    found = Carving.load(tmp_path)
    assert same(found.__dict__ | {"layers": None}, carving.__dict__ | {"layers": None})
    assert all(same(a.__dict__, b.__dict__) for a, b in zip(found.layers, carving.layers, strict=True))
    assert (found.widths().float().std(1) > 0).all() == ragged
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        ours, theirs = (build(parent, c, "sliced")(input_ids=ids).logits for c in (carving, found))
    assert torch.equal(ours, theirs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["carving.json", "carving.safetensors"]


def test_a_newer_format_or_no_carving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match=r"carving\.json is missing"):
        Carving.load(tmp_path)
    random_carving(tiny_parent("llama")).save(tmp_path)
    header = json.loads((tmp_path / "carving.json").read_text())
    (tmp_path / "carving.json").write_text(json.dumps(header | {"format": header["format"] + 1}))
    with pytest.raises(MoesmithError, match=r"newer moesmith .*\. Upgrade"):
        Carving.load(tmp_path)


def test_overlap_and_union_by_hand() -> None:
    layers = [
        Layer.of([torch.tensor(c) for c in channels], torch.zeros(3, 4))
        for channels in ([[0, 1, 2], [2, 3], [4]], [[0, 1], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    ]
    carving = Carving(layers, d_ff=8)
    expected = [
        [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 1]],
        [[1, 1, 1 / 4], [1, 1, 1 / 4], [1 / 4, 1 / 4, 1]],
    ]
    torch.testing.assert_close(carving.overlap(), torch.tensor(expected))
    assert carving.union().tolist() == [5 / 8, 1.0]
    assert carving.widths().tolist() == [[3, 2, 1], [2, 2, 8]]
    assert carving.mask(0).int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0] * 4 + [1] + [0] * 3,
    ]


@pytest.mark.parametrize(("ratio", "iou", "union"), [(0.5, 1 / 3, 0.996), (0.75, 1 / 7, 0.900)])
def test_independent_random_choices_overlap_as_predicted(
    ratio: float, iou: float, union: float, tmp_path: Path
) -> None:
    """Two random halves share a third of their union, two random quarters a seventh."""

    def drawn(seed: int) -> list[list[Tensor]]:
        """What four layers of TinyLlama's width keep."""
        recipe = load_recipe("llama-moe-1of8", None, [f"carve.ratio={ratio}", f"seed={seed}"])
        job: Any = SimpleNamespace(run=Run(tmp_path), parent=parent)
        assert recipe.method.begin(job) == []  # nothing is looked at
        views = [LayerView(parent, index, torch.Generator(), 0, cast(Any, None)) for index in range(parent.L)]
        return [recipe.method.choose(view, []) for view in views]

    parent: Any = SimpleNamespace(F=5632, L=4)
    write_json(tmp_path / "stages" / "affinity" / "clusters.json", {"clusters": [["a"]] * 8})
    write_tensors(tmp_path / "stages" / "domains" / "windows.safetensors", {"a": torch.zeros(2, 8, dtype=torch.int32)})
    channels = drawn(seed=0)
    carving = Carving([Layer.of(kept, torch.zeros(8, 1)) for kept in channels], 5632)
    assert (carving.widths() == 5632 * (1 - ratio)).all()
    pairs = carving.overlap()[:, ~torch.eye(8, dtype=torch.bool)]
    assert float(pairs.mean()) == pytest.approx(iou, abs=0.003)
    assert float(carving.union().mean()) == pytest.approx(union, abs=0.003)
    assert same(channels, drawn(seed=0))
    assert not same(channels, drawn(seed=1))


def tinyllama() -> Parent:
    """TinyLlama's shapes without its weights."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ffns = [
        FFN(
            m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight, m.act_fn,
            path=f"model.layers.{i}.mlp", down=m.down_proj, module=m, activation_name="silu",
        )
        for i, m in enumerate(layer.mlp for layer in model.model.layers)
    ]  # fmt: skip
    return Parent(model.eval(), tiny_tokenizer(), "tinyllama", "", ffns, "mixtral")


def published(parent: Parent, top_k: int, width: int) -> Carving:
    """A carving of the published size; which channels does not matter."""
    kept = torch.arange(width)
    router = Linear(torch.zeros(8, 2048), torch.zeros(8, 2048))
    expert = Expert(kept, bias_D=torch.zeros(2048))
    return Carving([Layer([expert] * 8, router, top_k, noise=5e-4) for _ in range(22)], 5632)


NOISE = 22 * 8 * 2048  # second router matrix: training only, we do not ship it and do not count it
O_BIAS = 22 * 2048  # the published module gives every o_proj a bias of zeros; ours has none


@pytest.mark.parametrize(
    ("top_k", "width", "total", "lora"), [(1, 2816, 3_384_973_312, 20_545_536), (2, 1408, 1_862_440_960, 14_598_144)]
)
def test_parameters_are_those_of_the_paper(top_k: int, width: int, total: int, lora: int) -> None:
    """DIVE's table of parameters: for the carving's own count and for what stage 2 really trains."""
    parent = tinyllama()
    carving = published(parent, top_k, width)
    # as the published code stores it: exact biases, no expert sharing channels with another
    found = parameters(parent, replace(carving, lora={"trained": torch.zeros(0)}), native=True)
    assert found["parent_parameters"] == 1_100_048_384
    assert found["parameters_total"] == total - NOISE - O_BIAS
    assert round((found["parameters_active"] + O_BIAS) / 1e6, 1) == 719.9
    assert round((found["parameters_active"] + O_BIAS - 2 * 32000 * 2048) / 1e6, 1) == 588.8
    name = f"dive-{top_k}of8"
    model = build(parent, carving, "sliced")
    trained = {key: p.numel() for key, p in prepare(model, load_recipe(name).stage2, seed=0).items()}
    assert sum(n for key, n in trained.items() if key.startswith("lora.")) == lora
    assert sum(n for key, n in trained.items() if key.startswith("norm.")) == 92_160
    routers = sum(n for key, n in trained.items() if key.startswith(("router.", "noise.")))
    # the published code lists the routers as trained in both, but with one active expert their gradient is zero (§6.2)
    assert routers == (0 if top_k == 1 else 720_896)
    assert sum(trained.values()) == lora + 92_160 + routers
    first = prepare(build(parent, carving, "masked"), load_recipe(name).stage1, seed=0)
    assert sum(p.numel() for p in first.values()) == 720_896


def weights_in(folder: Path) -> dict[str, int]:
    """Number of weights by name in a folder's safetensors; index lists, masks and single numbers are no weights."""
    found = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    return {name: t.numel() for name, t in found.items() if t.is_floating_point() and t.dim()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_in_the_files(family: str, tied: bool, tmp_path: Path) -> None:
    parent = tiny_parent(family, tie_word_embeddings=tied)
    for compensation in ("none", "bias", "refit"):
        carving = random_carving(parent, experts=4, top_k=1, kept=20, compensation=compensation, ragged=True)
        for layer in carving.layers:
            layer.constant_D = torch.randn(parent.D)
        for native in {True, parent.family == NATIVE}:
            folder = tmp_path / f"{compensation}{native}"
            write_native(parent, carving, folder) if native else write_stock(parent, carving, folder, torch.float32)
            found, there = parameters(parent, carving, native), weights_in(folder)
            assert found["parameters_total"] == sum(there.values())
            shared = native and compensation != "refit"
            inner = {"phi": 1, "biased": 2}.get(family, 0)  # biases of gate and up
            bias = (native and compensation == "bias") or inner > 0
            experts = sum(n for name, n in there.items() if ".experts." in name)
            if shared:  # of one network: a token reads its expert's channels, 18.5 in the mean, and its bias
                channel = parent.ffns[0].matrices * parent.D + inner
                read = 2 * 18.5 * channel + 2 * bias * parent.D
                assert found["parameters_active"] == sum(there.values()) - experts + read
            else:  # one in four
                assert found["parameters_active"] == sum(there.values()) - experts * 3 // 4
        default = parameters(parent, carving)
        assert default == parameters(parent, carving, native=parent.family == NATIVE)
    one = random_carving(parent, experts=1, kept=64)
    (write_native if parent.family == NATIVE else write_stock)(parent, one, tmp_path / "one")
    assert parameters(parent, one)["parameters_total"] == sum(weights_in(tmp_path / "one").values())
    assert parameters(parent, one)["parameters_total"] == parameters(parent, one)["parameters_active"]


def test_layers_may_differ_in_biases_and_experts_of_one_may_not(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent, compensation="bias")
    first, second = carving.layers
    for expert in first.routed:
        expert.bias_D = None
    write_native(parent, carving, tmp_path / "m")
    assert parameters(parent, carving, native=True)["parameters_total"] == sum(weights_in(tmp_path / "m").values())
    second.routed[2].bias_D = None
    with pytest.raises(MoesmithError, match=r"has a bias_D for some experts only\. Give the others zeros\."):
        second.check(parent.D, parent.F)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "biased"])
def test_the_plan_counts_as_the_files(family: str) -> None:
    """Every expert as wide as planned and with as little in common as that allows: the plan is exact."""
    parent = tiny_parent(family)
    recipe = load_recipe("dive-1of8", None, ["carve.experts=4", "carve.ratio=0.5", "stage2.tokens=0"])
    channels = [torch.arange(32), torch.arange(32, 64)] * 2
    experts = [Expert(kept, bias_D=torch.zeros(32)) for kept in channels]
    carving = Carving([Layer(experts, Linear(torch.zeros(4, 32))) for _ in range(2)], 64)
    plan = make_plan(recipe, parent, 4)
    found = parameters(parent, carving)
    assert (plan.parameters_total, plan.parameters_active) == (found["parameters_total"], found["parameters_active"])
