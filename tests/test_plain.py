"""Parents without a gate: what fits is proved, what does not is refused, and the result is moesmith's own format."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from conversions import convert
from safetensors.torch import load_file, save_file
from torch import nn

from moesmith.conversion.steps.training import prepare
from moesmith.errors import MoesmithError
from moesmith.export.native import write_native
from moesmith.export.stock.write import write_stock
from moesmith.export.verify import verify_folder
from moesmith.files.artefact import read_json
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.recipe import load_recipe
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import save_tiny, tiny_model, tiny_parent
from moesmith.testing.text import save_data
from moesmith.testing.tokenizer import tiny_tokenizer
from moesmith.training.student import Student

IDS = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(1))


def test_the_network_is_found_with_its_biases() -> None:
    parent = tiny_parent("phi")
    for ffn, layer in zip(parent.ffns, parent.model.model.layers, strict=True):
        assert ffn.up_FD is None
        assert ffn.matrices == 2
        assert ffn.gate_bias_F is not None
        assert ffn.gate_bias_F.data_ptr() == layer.mlp.fc1.bias.data_ptr()  # a view
        assert torch.equal(ffn.down_bias_D, layer.mlp.fc2.bias)
        assert ffn.down is layer.mlp.fc2


BENT: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "embedding": (lambda m: m.model.embed_tokens, "input to layer 0"),
    "norm": (lambda m: m.model.layers[1].input_layernorm, "norm of layer 1"),
    "final norm": (lambda m: m.model.final_layernorm, "final norm"),
    "layer": (lambda m: m.model.layers[0], "residual sum of layer 0"),
    "query": (lambda m: m.model.layers[1].self_attn.q_proj, "attention of layer 1"),
    "value": (lambda m: m.model.layers[0].self_attn.v_proj, "attention of layer 0"),
    "output": (lambda m: m.model.layers[1].self_attn.dense, "attention of layer 1"),
    "network": (lambda m: m.model.layers[1].mlp, r"layers\.1 holds no gated"),
}


@pytest.mark.parametrize("name", BENT)
def test_every_part_of_the_decoder_is_proved(name: str) -> None:
    model = tiny_model("phi")
    where, reason = BENT[name]
    where(model).register_forward_hook(lambda _module, _args, output: output * 1.05)
    with pytest.raises(MoesmithError, match=reason):
        Parent.from_model(model, tiny_tokenizer())


def test_logits_and_inputs_are_proved() -> None:
    model = tiny_model("phi")
    model.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits + 0.1))
    with pytest.raises(MoesmithError, match="logits are not"):
        Parent.from_model(model, tiny_tokenizer())
    model = tiny_model("phi")
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda _m, args: (args[0] * 1.05,) if args[0].shape[1] > 8 else args)
    with pytest.raises(MoesmithError, match="feed-forward input of layer 0"):
        Parent.from_model(model, tiny_tokenizer())


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_any_part_of_a_head_may_rotate(factor: float) -> None:
    parent = tiny_parent("phi", partial_rotary_factor=factor, hidden_size=64)
    assert parent.model.model.layers[0].self_attn.rotary_ndims == int(16 * factor)
    assert parent.family == "native"


def test_the_loss_of_training_is_the_models_own() -> None:
    parent = tiny_parent("phi")
    model = build(parent, random_carving(parent, compensation="bias"))
    spec = load_recipe("dive-plus", None, ["stage2.loss=next-token"]).stage2
    with torch.no_grad():
        ours, theirs = Student(model, None, spec)(IDS), model(input_ids=IDS, labels=IDS).loss
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_norms_train_with_their_biases_and_the_parent_keeps_its_own() -> None:
    parent = tiny_parent("phi")
    model = build(parent, random_carving(parent))
    parameters = prepare(model, load_recipe("dive-plus").stage2, seed=0)
    norms = {name: p for name, p in parameters.items() if name.startswith("norm.")}
    assert len(norms) == 2 * (parent.L + 1)
    assert {name.rsplit(".", 1)[1] for name in norms} == {"weight", "bias"}
    with torch.no_grad():
        for p in norms.values():
            p.add_(1.0)
    assert torch.equal(parent.model(IDS).logits, tiny_parent("phi").model(IDS).logits)
    assert not any("up_" in name for name in parameters)  # no pair for a matrix that is not there


def test_a_stock_architecture_is_refused(tmp_path: Path) -> None:
    parent = tiny_parent("phi")
    with pytest.raises(
        MoesmithError, match=r"have no gate, and no stock .* Write the native format.*--to native"
    ) as error:
        write_stock(parent, random_carving(parent), tmp_path / "moe")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compensation", ["none", "bias", "refit"])
def test_the_native_folder_is_judged(compensation: str, tmp_path: Path) -> None:
    parent = tiny_parent("phi")
    carving = random_carving(parent, top_k=2, ragged=True, compensation=compensation)
    metrics = write_native(parent, carving, tmp_path / "moe")
    assert (metrics["architecture"], metrics["expert_width"]) == ("MoesmithForCausalLM", 32)
    shared = compensation != "refit"  # channels stored once have no padding
    assert metrics["zero_channels"] == pytest.approx(0 if shared else 1 - 30.5 / 32, abs=1e-4)
    weights = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(weights)
    assert metrics["bytes"] == sum(t.nbytes for t in tensors.values())
    found = verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)
    assert found["logits_difference"] == 0
    tensors[f"inner.model.layers.1.mlp.experts.gate_bias_{'U' if shared else 'EF'}"] += 0.1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(MoesmithError, match="does not compute what the carving computes"):
        verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)


# --- a whole run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """dive-1of8 of a tiny Phi-2 on disk."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("phi")
    return convert("dive-1of8", save_tiny("phi", folder / "m"), save_data(folder / "d"), folder / "run")


@pytest.mark.parametrize("preset", ["dive-plus", "dive-2of8", "flap-static", "flap-static-refit", "llama-moe-1of8"])
def test_every_preset_takes_it(run: Run, preset: str, tmp_path: Path) -> None:
    home = run.folder.parent
    other = convert(preset, home / "m", home / "d", tmp_path / "run", ["stage2.tokens=1024"])
    metrics = other.manifest("export")["metrics"]
    assert metrics["logits_difference"] < 1e-4
    assert "constant_channel_logits_kl" not in metrics  # the bias itself is there


@pytest.mark.parametrize("score", ["ifv", "wifn", "magnitude"])
def test_every_score_takes_it(run: Run, score: str, tmp_path: Path) -> None:
    home = run.folder.parent
    off = ["stage1.tokens=0", "stage2.tokens=0", f"carve.score={score}"]
    other = convert("dive-1of8", home / "m", home / "d", tmp_path / "run", off)
    assert not torch.equal(*(Carving.load(r.path("carve")).mask(0) for r in (run, other)))


def test_training_helps_and_changes_what_it_should(run: Run) -> None:
    stages = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    assert stages["experts"]["geomean"] < stages["carve"]["geomean"]
    carving = Carving.load(run.path("experts"))
    assert set(carving.norms) == {name for name, _ in tiny_model("phi").named_parameters() if "norm" in name}
    assert {name.split(".")[1] for name in carving.lora} == {"gate", "down"}


def test_the_commands_read_the_run(run: Run) -> None:
    for words in (
        ["eval", run.folder, "--tasks", "domains", "--tokens", "256"],
        ["generate", run.folder, "one two", "--tokens", "3"],
        ["inspect", run.folder],
        ["report", run.folder],
        [
            "plan",
            "dive-plus",
            "--model",
            run.folder.parent / "m",
            "--data",
            run.folder.parent / "d",
            "--set",
            "carve.experts=4",
        ],
    ):
        answer = moesmith(*words)
        assert answer.status == 0, answer.err
    assert (run.folder / "report.html").is_file()
    assert "MoesmithForCausalLM" in moesmith("inspect", run.folder).out


@pytest.mark.slow
def test_the_folder_loads_elsewhere_and_its_card_says_how(run: Run) -> None:
    card = (run.folder / "model" / "README.md").read_text()
    assert "import moesmith.native.modeling" in card
    code = (
        "import sys, moesmith.native.modeling; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.folder / "model")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.stdout.strip() == "MoesmithForCausalLM", done.stderr
