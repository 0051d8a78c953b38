"""Parents that are stored otherwise: quantised weights unpacked, adapters merged, against plain torch and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moesmith.errors import MoesmithError
from moesmith.parent.dense import dequantize, merge
from moesmith.parent.load import load_parent
from moesmith.testing.parents import save_tiny

IDS = torch.arange(60).view(2, 30)
BLOCK = 32


def in_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite a tiny Llama's projections in fp8 with a scale for every block; return what they stand for."""
    stored, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = plain[name] = weight.bfloat16()
            continue
        blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (rows, 32, columns, 32)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        plain[name] = (packed.float() * scale[:, None, :, None]).view_as(weight).bfloat16()
        stored[name], stored[f"{name}_scale_inv"] = packed.view(weight.shape), scale
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return plain


def test_fp8_is_unpacked(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", hidden_size=64, intermediate_size=128, head_dim=32, num_attention_heads=2)
    plain = in_fp8(tmp_path / "m")
    with pytest.raises(MoesmithError, match=r"quantised \(fp8\).*moesmith dequantize"):
        load_parent(str(tmp_path / "m"))
    found = dequantize(str(tmp_path / "m"), tmp_path / "out")
    assert (found["method"], found["dtype"]) == ("fp8", "bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, plain[name], rtol=1e-2, atol=0)  # one rounding to bf16 apart
    parent = load_parent(str(tmp_path / "out"))
    assert parent.stored == torch.bfloat16
    assert parent.family == "mixtral"


def test_a_plain_model_is_not_unpacked(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    with pytest.raises(MoesmithError, match=r"are not quantised\. Give it to --model as it is"):
        dequantize(str(tmp_path / "m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_without_its_package_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoesmithError, match=r"\(awq\) cannot be unpacked: .*Install what it names") as error:
        dequantize(str(tmp_path / "m"), tmp_path / "out")
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "out").exists()


def adapted(folder: Path, **settings: Any) -> Any:
    """A tiny Llama in bf16 in ``m``, an adapter of it in ``a``; returns the two, side by side."""
    peft = pytest.importorskip("peft")
    save_tiny("llama", folder / "m", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    beside = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in beside.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    beside.save_pretrained(folder / "a")
    return beside


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 16}, {"use_dora": True}])
def test_an_adapter_is_merged(settings: dict[str, Any], tmp_path: Path) -> None:
    beside = adapted(tmp_path, **settings)
    found = merge(str(tmp_path / "a"), tmp_path / "out", base=str(tmp_path / "m"))
    assert (found["kind"], found["dtype"]) == ("LORA", "bfloat16")
    merged = load_parent(str(tmp_path / "out"), torch.float32)
    assert merged.stored == torch.bfloat16
    with torch.no_grad():
        wanted, ours = beside(IDS).logits, merged.model(IDS).logits
        dense = load_parent(str(tmp_path / "m"), torch.float32).model(IDS).logits
    assert float((ours - wanted).norm() / wanted.norm()) < 0.02  # rounded to bf16 once
    assert float((dense - wanted).norm() / wanted.norm()) > 0.2


def test_an_adapter_names_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(tmp_path)
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    monkeypatch.chdir(tmp_path)
    path.write_text(json.dumps(config | {"base_model_name_or_path": "m"}))
    assert merge("a", Path("out"))["base"] == "m"
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(MoesmithError, match=r"does not name its base\. Give --base"):
        merge("a", Path("other"))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapted(tmp_path)
    save_tiny("llama", tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(MoesmithError, match=r"does not fit to .*layers\.2"):
        merge(str(tmp_path / "a"), tmp_path / "out", base=str(tmp_path / "deeper"))
    save_tiny("llama", tmp_path / "wider", hidden_size=64)
    with pytest.raises(MoesmithError, match=r"cannot be merged into .*size mismatch|cannot be merged"):
        merge(str(tmp_path / "a"), tmp_path / "out", base=str(tmp_path / "wider"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    adapted(tmp_path)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(MoesmithError, match=r"has no adapter_model\.safetensors\. Save the adapter as safetensors"):
        merge(str(tmp_path / "a"), tmp_path / "out", base=str(tmp_path / "m"))
