"""Learned masks on disk: narrow folder = masked model, in moesmith's format and in a stock architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moesmith.errors import MoesmithError
from moesmith.export import folder as folders
from moesmith.export.native import CODE, write_native
from moesmith.export.stock.write import stock_reference, verify_folder, write_stock
from moesmith.mixture.attention import CarvedAttention
from moesmith.mixture.carving import Carving
from moesmith.mixture.folder import load_folder
from moesmith.mixture.moe import build
from moesmith.native.heads import PrunedAttention
from moesmith.parent.load import Parent
from moesmith.parent.structure import attention_of, attention_weights, decoder_layers, head_dim
from moesmith.testing.masks import ATTENTION, IDS, harvested
from moesmith.testing.parents import FAMILIES, STOCK, tiny_parent

MULTI_HEAD = {"num_key_value_heads": 4}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def written(parent: Parent, folder: Path, **settings: Any) -> tuple[Carving, Any]:
    carving = harvested(parent, **settings)
    write_native(parent, carving, folder)
    return carving, load(folder, parent.model.dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("heads", ["grouped", "multi"])
def test_the_folder_computes_the_masked_model(family: str, attention: str, heads: str, tmp_path: Path) -> None:
    parent = tiny_parent(family, **(MULTI_HEAD if heads == "multi" else {}))
    carving, model = written(parent, tmp_path / "moe", attention=attention)
    masked = build(parent, carving)
    wanted, found = logits_of(masked), logits_of(model)
    assert (wanted - logits_of(parent.model)).abs().max() > 0.1
    assert (found - wanted).abs().max() <= (0 if attention == "none" else 1e-4)
    greedy = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(IDS[:1], **greedy), masked.generate(IDS[:1], **greedy))


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3"])
def test_a_cache_changes_nothing(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    _, model = written(parent, tmp_path / "moe", budget=0.5)
    with torch.no_grad():
        whole = model(IDS[:1]).logits
        step = model(IDS[:1, :10], use_cache=True)
        parts = [step.logits]
        for position in range(10, IDS.shape[1]):
            step = model(IDS[:1, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_the_decoder_alone_serves_a_kernel_with_a_cache_of_whole_heads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads ``AutoModel``, hands over one row without a mask, and stores keys and values of the config's width."""
    parent = tiny_parent(family)
    _, model = written(parent, tmp_path / "moe", attention="hybrid")

    def kernel(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        assert {q.shape[-1], k.shape[-1], v.shape[-1]} == {head_dim(parent.config)}
        k, v = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2).flatten(2)[0], None  # (S, heads * width): no batch

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", kernel)  # type: ignore[arg-type]
    decoder = AutoModel.from_pretrained(tmp_path / "moe", attn_implementation="vllm")
    with torch.no_grad():
        found = decoder(input_ids=IDS[:1], use_cache=False, return_dict=False)[0]
        wanted = model(IDS[:1], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert decoder.get_decoder().get_input_embeddings() is decoder.get_input_embeddings()


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_eager_attention_gives_the_same_and_its_scores(family: str, attention: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    _, model = written(parent, tmp_path / "moe", attention=attention)
    eager = load(tmp_path / "moe", attn_implementation="eager")
    torch.testing.assert_close(logits_of(eager), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_padded_sequences_are_those_alone(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    _, model = written(parent, tmp_path / "moe")
    short, mask = IDS[:2].clone(), torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        batch = model(short, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits[0, 9:]
        torch.testing.assert_close(batch, model(short[:1, 9:]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_really_gone(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    h, heads, kv = head_dim(parent.config), 4, 2
    carving, model = written(parent, tmp_path / "moe", budget=0.5)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    narrow = 0
    for index, (layer, carved) in enumerate(zip(decoder_layers(parent.model)[1], carving.attention, strict=True)):
        w, u = int(carved.qk_h.sum()), int(carved.vo_h.sum())
        narrow += 2 * h - w - u
        path = next(name for name, m in parent.model.named_modules() if m is attention_of(layer))
        shapes = {name: tuple(tensors[f"inner.{path}.{name}_proj.weight"].shape) for name in "qkvo"}
        assert shapes == {"q": (heads * w, 32), "k": (kv * w, 32), "v": (kv * u, 32), "o": (32, heads * u)}
        dense = attention_weights(layer, parent.config)
        kept = carved.qk_h.repeat(heads).nonzero()[:, 0]
        assert torch.equal(tensors[f"inner.{path}.q_proj.weight"], dense["q_proj.weight"][kept])
        for name, projection in (("q", "q_proj.bias"), ("o", "o_proj.bias")):
            bias = dense.get(projection)
            if bias is not None:
                rows = bias[kept] if name == "q" else bias
                assert torch.equal(tensors[f"inner.{path}.{projection}"], rows)
        prefix, ffn = f"inner.{parent.ffns[index].path}.experts", parent.ffns[index]
        union = carving.mask(index).any(0).nonzero()[:, 0]
        assert torch.equal(tensors[f"{prefix}.gate_UD"], ffn.gate_FD[union])
        assert torch.equal(tensors[f"{prefix}.down_DU"], ffn.down_DF[:, union])
        assert (f"{prefix}.up_UD" in tensors) is (family != "phi")
        if ffn.up_FD is not None:
            assert torch.equal(tensors[f"{prefix}.up_UD"], ffn.up_FD[union])
        places = tensors[f"{prefix}.index_EF"]
        assert places.dtype == torch.int32
        for row, expert in zip(places, carving.layers[index].routed, strict=True):
            assert torch.equal(union[row[row >= 0].long()], expert.channels)
            assert (row[expert.width :] == -1).all()
    assert narrow > 0
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    widths = [max(int(a.qk_h.sum()), int(a.vo_h.sum())) for a in carving.attention]
    keys = [layer.keys.shape[-1] for layer in cache.layers]
    assert keys == [int(a.qk_h.sum()) for a in carving.attention]
    assert max(keys) <= max(widths)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_bf16_keeps_gates_in_fp32_and_kinds(family: str, attention: str, tmp_path: Path) -> None:
    parent = tiny_parent(family, dtype=torch.bfloat16)
    carving, model = written(parent, tmp_path / "moe", attention=attention)
    gates = [m.head_gate for m in model.modules() if isinstance(m, PrunedAttention)]
    for gate, carved in zip(gates, carving.attention, strict=True):
        for name, tensor in carved.tensors().items():
            assert getattr(gate, name).dtype == tensor.dtype
            assert torch.equal(getattr(gate, name), tensor)
    assert model.dtype == torch.bfloat16
    found, wanted = logits_of(model).float(), logits_of(build(parent, carving)).float()
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("family", STOCK)
def test_the_stock_folder_is_the_model_without_masks_by_token(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving = harvested(parent)
    write_stock(parent, carving, tmp_path / "stock", torch.float32)
    static = replace(carving, attention=[attention.without_gate() for attention in carving.attention])
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval())
    write_native(parent, static, tmp_path / "native")
    for same in (stock_reference(parent, carving), build(parent, static), load(tmp_path / "native")):
        assert (found - logits_of(same)).abs().max() <= 1e-4
    assert (found - logits_of(build(parent, carving))).abs().max() > 0.01
    assert verify_folder(parent, tmp_path / "stock", stock_reference(parent, carving), IDS)["argmax_agreement"] == 1.0


def test_shards_and_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 60_000)
    parent = tiny_parent("llama")
    carving, model = written(parent, tmp_path / "moe")
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(files) > 2
    assert (logits_of(model) - logits_of(build(parent, carving))).abs().max() <= 1e-4
    files[1].unlink()
    with pytest.raises(MoesmithError, match=r"moe cannot be loaded: .* Delete the folder and run the"):
        load_folder(tmp_path / "moe", torch.float32)


@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_dimensions_that_are_gone_stay_gone(attention: str, tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = harvested(parent, budget=0.9, attention=attention)
    for carved in carving.attention:  # other text than the harvest's: tokens that would keep what is not there
        carved.vo_h, carved.top_k = torch.arange(8) % 3 == 0, torch.tensor(3)
    write_native(parent, carving, tmp_path / "moe")
    assert (logits_of(load(tmp_path / "moe")) - logits_of(build(parent, carving))).abs().max() <= 1e-4


def test_whole_attention_is_the_parents(tmp_path: Path) -> None:
    parent = tiny_parent("qwen2")
    carving = harvested(parent, attention="none")
    whole = replace(carving, attention=[CarvedAttention(*torch.ones(2, 8).bool().unbind()) for _ in range(2)])
    write_native(parent, whole, tmp_path / "moe")
    for model in (load(tmp_path / "moe"), build(parent, whole)):
        torch.testing.assert_close(logits_of(model), logits_of(build(parent, carving)), rtol=1e-4, atol=1e-4)


def test_one_near_tie_of_a_head_gate_is_not_a_disagreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_parent("llama")
    carving = harvested(parent, budget=0.5)
    write_native(parent, carving, tmp_path / "moe")
    reference = build(parent, carving)
    gate: Any = reference.model.layers[1].self_attn.head_gate
    read, where = gate.read, int(gate.vo_h.nonzero()[0])

    def tipped(x_BSD: torch.Tensor) -> None:
        read(x_BSD)
        gate.vo = gate.vo.clone()
        gate.vo[1, 20, where] = 1 - gate.vo[1, 20, where]

    monkeypatch.setattr(gate, "read", tipped)
    metrics = verify_folder(parent, tmp_path / "moe", reference, IDS)
    assert metrics["compared_tokens"] == IDS.numel() - (IDS.shape[1] - 20)
    assert metrics["logits_difference"] < 1e-4


SPOILT = ("self_attn.q_proj.weight", "self_attn.head_gate.proj_out_hR", "mlp.experts.down_DU")


@pytest.mark.parametrize("name", SPOILT)
def test_a_folder_that_disagrees(name: str, tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving, _ = written(parent, tmp_path / "moe", budget=0.5)
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"inner.model.layers.1.{name}"] = tensors[f"inner.model.layers.1.{name}"].flip(0).contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MoesmithError, match="does not compute what the carving computes"):
        verify_folder(parent, tmp_path / "moe", build(parent, carving), IDS)


# --- where moesmith is not installed ----------------------------------------------------------------------------

ALONE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moesmith":
            raise ModuleNotFoundError("moesmith is not installed here")

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
try:
    import moesmith
except ModuleNotFoundError:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(ids).logits
    new = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    save_file({"logits": logits, "new": new}, sys.argv[3])
    model.save_pretrained(sys.argv[4])
    print(type(model).__module__.split(".")[0])
"""


INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def alone(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Load a folder in an isolated process that cannot import moesmith; its results go to ``out``."""
    home = str(out.parent / "home")
    environment = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "", "HOME": home}
    # bits are equal where both processes may use the same instructions
    environment |= {name: os.environ[name] for name in INSTRUCTIONS if name in os.environ}
    words = [sys.executable, "-I", "-c", ALONE, folder, json.dumps(IDS.tolist()), out, out.parent / "again"]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("family", "attention"), [("qwen3", "hybrid"), pytest.param("phi", "dynamic", marks=pytest.mark.slow)]
)
def test_the_folder_needs_no_moesmith(family: str, attention: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving, model = written(parent, tmp_path / "moe", attention=attention)
    assert {path.stem for path in (tmp_path / "moe").glob("*.py")} == set(CODE)
    done = alone(tmp_path / "moe", tmp_path / "out")
    assert done.stdout.strip() == "transformers_modules", done.stderr
    found = load_file(tmp_path / "out")
    assert torch.equal(found["logits"], logits_of(model))
    assert (found["logits"] - logits_of(build(parent, carving))).abs().max() <= 1e-4
    assert torch.equal(found["new"], model.generate(IDS[:1], max_new_tokens=5, do_sample=False))
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))


def test_a_folder_without_its_code_says_what_is_missing(tmp_path: Path) -> None:
    written(tiny_parent("llama"), tmp_path / "moe")
    (tmp_path / "moe" / "heads.py").unlink()
    done = alone(tmp_path / "moe", tmp_path / "out")
    assert done.returncode != 0
    assert "heads.py" in done.stderr.splitlines()[-1]
    assert load(tmp_path / "moe") is not None  # where moesmith is installed its own code runs
