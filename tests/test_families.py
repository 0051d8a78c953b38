"""Decoders that no stock architecture holds: carved in our own format, or refused by the property in the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from conversions import convert
from golden import ASSETS
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from moesmith.calibration.stream import Stream
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import token_nll
from moesmith.export.native import write_native
from moesmith.export.target import Options
from moesmith.export.targets import explain_run, export_run
from moesmith.export.verify import run, verify_folder
from moesmith.mixture.folder import layered_folder, load_folder
from moesmith.mixture.moe import build, decoder
from moesmith.parent.load import Parent, load_parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.structure import decoder_layers
from moesmith.testing.carvings import random_carving
from moesmith.testing.tokenizer import tiny_tokenizer
from moesmith.training.student import token_loss

SMALL: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
OWN = {name: SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
# name → its config, what no stock architecture has of it, and whether its layers add networks' outputs as they are
CARVABLE: dict[str, tuple[PreTrainedConfig, str, bool]] = {
    "Gemma: scaled embeddings": (GemmaConfig(**SMALL, head_dim=8), "input to layer 0", True),
    "Gemma 3: norms after, two rotations": (
        Gemma3TextConfig(**SMALL, head_dim=8, layer_types=KINDS, sliding_window=8, query_pre_attn_scalar=8),
        "differs between layers", False,
    ),
    "OLMo 2: norms after": (Olmo2Config(**SMALL), "other norms", False),
    "StableLM: layer norms, partial rotation": (StableLmConfig(**SMALL), "partial_rotary_factor", True),
    "GLM-4: norms after, fused gate": (Glm4Config(**SMALL, head_dim=8), "partial_rotary_factor", False),
    "SmolLM3: layers without positions": (SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1]), "rotary|attention", True),
    "Granite: residual multiplier": (GraniteConfig(**SMALL, residual_multiplier=0.2), "residual_multiplier", False),
    "Llama: output bias": (LlamaConfig(**SMALL, attention_bias=True), "o_proj.bias", True),
    "Qwen3: norms and biases": (Qwen3Config(**SMALL, head_dim=8, attention_bias=True), "bias", True),
    "Qwen2: windows in some layers": (
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1), "differs", True,
    ),
    "StarCoder 2: no gate, in sequence": (Starcoder2Config(**SMALL), "2 layer norms", True),
    "Nemotron: squared ReLU": (NemotronConfig(**SMALL), "2 layer norms", True),
    "Arcee: no gate, RMS norms": (ArceeConfig(**SMALL), "layer norms", True),
    "Phi: norms of queries and keys": (PhiConfig(**SMALL, qk_layernorm=True), "k_layernorm", True),
    "GPT-2: matrices the other way round": (
        GPT2Config(**OWN, n_embd=32, n_inner=64, n_layer=3, n_head=4, n_positions=256), "of another kind", True,
    ),
    "LFM2: convolutions, no activation named": (
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3), "rms_norm_eps", True,
    ),
    "Gemma 2: capped logits": (
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0), "final_logit_softcapping|softcapping", False,
    ),
    "Cohere: scaled logits": (CohereConfig(**SMALL, tie_word_embeddings=False), "logit_scale", True),
    "Granite: scaled logits": (GraniteConfig(**SMALL, logits_scaling=4.0), "logits_scaling", True),
    "GPT-J: layers return more": (
        GPTJConfig(**OWN, n_embd=32, n_inner=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=4),
        "of another kind", True,
    ),
    "Falcon: layers return more": (
        FalconConfig(**OWN, hidden_size=32, ffn_hidden_size=64, num_hidden_layers=3, num_attention_heads=4),
        "of another kind", True,
    ),
    "GPT-NeoX: fused attention": (GPTNeoXConfig(**SMALL | {"hidden_act": "gelu"}), "no attention with q/k/v/o", True),
}  # fmt: skip


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Random, with every part of it large enough to change the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.1 * noise if "norm" in name or p.dim() == 1 else 1.5 * noise / p.shape[1] ** 0.5)
    return model.eval()


def parent_of(name: str) -> Parent:
    return Parent.from_model(model_of(CARVABLE[name][0]), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize("name", CARVABLE)
def test_it_is_known_to_be_carvable(name: str) -> None:
    """All experts together are the parent, and both forms of a mixture are one function."""
    _, why, additive = CARVABLE[name]
    parent = parent_of(name)
    assert (parent.family, parent.additive) == (NATIVE, additive)
    assert re.search(why, parent.why), parent.why
    ids = torch.arange(60).view(2, 30) % 256
    carving = random_carving(parent, compensation="refit")
    with torch.no_grad():
        masked, sliced = (build(parent, carving, form)(ids).logits for form in ("masked", "sliced"))
        whole = build(parent, random_carving(parent, kept=parent.F))(ids).logits
        assert torch.allclose(whole, parent.model(ids).logits, atol=1e-4)
    for block in (masked, sliced):
        assert not torch.allclose(block, whole, atol=1e-2)
    assert torch.allclose(masked, sliced, atol=1e-4)


@pytest.mark.parametrize("name", CARVABLE)
def test_it_goes_all_the_way(name: str, tmp_path: Path) -> None:
    """Carved, trained, written, read again and compared by logits; other targets say why they cannot hold it."""
    parent = parent_of(name)
    parent.model.save_pretrained(tmp_path / "m")
    parent.tokenizer.save_pretrained(tmp_path / "m")
    run = convert("dive-plus", tmp_path / "m", ASSETS / "text", tmp_path / "run", ["stage1.tokens=0"])
    assert run.metrics("export")["architecture"] == "MoesmithForCausalLM"
    assert run.metrics("export")["logits_difference"] < 1e-3
    stages = run.evaluation["stages"]
    assert stages["carve"]["geomean"] != stages["parent"]["geomean"]
    fits = {row["target"]: row for row in explain_run(run.folder)}
    assert fits["native"]["fits"]
    assert not fits["hf"]["fits"]
    with pytest.raises(MoesmithError, match="no stock Mixture-of-Experts"):
        export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")


@pytest.mark.parametrize("name", ["OLMo 2: norms after", "Granite: residual multiplier", "Gemma: scaled embeddings"])
def test_methods_that_hold_tokens_fit_what_is_normed_later_too(name: str, tmp_path: Path) -> None:
    """Experts with all channels are the parent; what earlier layers lost is made up for only where outputs are sums."""
    parent, additive = parent_of(name), CARVABLE[name][2]
    given = ["carve.passes=0", "carve.experts=2", "domains.window=32", "stage2.tokens=0"]
    if not additive:
        with pytest.raises(MoesmithError, match=r"does something to its networks' outputs.*Set carve.repair to false"):
            convert("token", parent, ASSETS / "text", tmp_path / "refused", given)
        given.append("carve.repair=false")
    whole = convert("token", parent, ASSETS / "text", tmp_path / "whole", [*given, "carve.ratio=0"])
    assert whole.metrics("carve")["error"] < 1e-3
    assert whole.evaluation["stages"]["carve"]["geomean"] == pytest.approx(
        whole.evaluation["stages"]["parent"]["geomean"], rel=1e-3
    )
    half = convert("token", parent, ASSETS / "text", tmp_path / "half", given)
    assert 1e-3 < half.metrics("carve")["error"] < 1


@pytest.mark.parametrize("name", ["OLMo 2: norms after", "Granite: residual multiplier"])
def test_held_tokens_are_the_parents_own_networks(name: str) -> None:
    """Against hooks on the parent: what its networks get and give, and what becomes of an output behind them."""
    parent, ids = parent_of(name), torch.arange(64).view(2, 32) % 256
    seen: dict[str, list[torch.Tensor]] = {"x": [], "y": [], "before": [], "behind": []}
    layers = decoder_layers(parent.model)[1]
    for ffn, layer in zip(parent.ffns, layers, strict=True):
        ffn.module.register_forward_hook(lambda _m, args, out: seen["y"].append(out) or seen["x"].append(args[0]))
        layer.register_forward_hook(lambda _m, args, out: seen["behind"].append(out))
    with torch.no_grad():
        parent.model(ids)
    wanted = {kind: [part.flatten(0, 1).clone() for part in parts] for kind, parts in seen.items()}
    with Stream(parent, [[ids]], "carved", held=True) as stream:
        for view in stream.views(torch.Generator()):
            tokens = view.tokens()
            torch.testing.assert_close(tokens.x_TD, wanted["x"][view.index], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tokens.y_TD, wanted["y"][view.index], rtol=1e-4, atol=1e-5)
            energy_T = wanted["behind"][view.index].square().sum(1)
            if name.startswith("Granite"):  # one factor for all tokens
                expected_T = 1 / energy_T
                torch.testing.assert_close(tokens.weight_T, expected_T / expected_T.mean(), rtol=1e-3, atol=1e-4)
            stream.carved(lambda: layers[view.index])  # noqa: B023


def test_attention_is_pruned_only_where_it_is_proved(tmp_path: Path) -> None:
    given = ["masks.tokens=128", "masks.window=32", "masks.batch=2", "masks.micro_batch=1"]
    parent = parent_of("Llama: output bias")
    with pytest.raises(MoesmithError, match=r"attention is pruned where it is proved.*Set masks\.attention to none"):
        convert("tomoe-50", parent, ASSETS / "text", tmp_path / "run", given)
    run = convert("tomoe-50", parent, ASSETS / "text", tmp_path / "run", [*given, "masks.attention=none"])
    assert run.metrics("export")["logits_difference"] < 1e-3


@pytest.mark.parametrize("name", ["Gemma 2: capped logits", "Cohere: scaled logits", "Granite: scaled logits"])
@pytest.mark.parametrize("where", ["parent", "masked", "sliced", "native"])
def test_losses_are_of_the_logits_that_the_model_returns(name: str, where: str, tmp_path: Path) -> None:
    """Both are computed from hidden states, here; plain transformers and autograd compute the same."""
    parent, ids = parent_of(name), torch.arange(60).view(2, 30) % 256
    model: Any = parent.model
    if where in ("masked", "sliced"):
        model = build(parent, random_carving(parent, compensation="refit"), where)  # type: ignore[arg-type]
    if where == "native":
        write_native(parent, random_carving(parent), tmp_path / "out")
        model = load_folder(tmp_path / "out", torch.float32)
    embedded = model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(input_ids=ids).logits[:, :-1]
    wanted = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_nll(model, ids).flatten(), wanted.detach(), rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(loss, embedded)[0] for loss in (wanted.mean(), token_loss(model, ids, None, 0.0))]
    if not model.config.tie_word_embeddings:  # the head's own gradient is not computed
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)


def test_a_class_that_transformers_does_not_know_is_refused() -> None:
    class Mine(Olmo2ForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.more = torch.nn.Linear(2, 2)

    model = Mine(CARVABLE["OLMo 2: norms after"][0]).eval()
    with pytest.raises(
        MoesmithError, match=r"than its class does with its config and weights: more\.weight, more\.bias"
    ):
        Parent.from_model(model, tiny_tokenizer())


def test_what_a_config_does_not_say_is_refused() -> None:
    """A model that computes something else than its class, here by a hook, could not be written."""
    model = model_of(CARVABLE["OLMo 2: norms after"][0])
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, out: out * 1.05)
    with pytest.raises(MoesmithError, match="something else than its class does"):
        Parent.from_model(model, tiny_tokenizer())


@pytest.mark.parametrize("name", ["Gemma 3: norms after, two rotations", "Gemma 2: capped logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_that_a_class_rounds_are_those_of_the_folder(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Gemma scales embeddings by √D, rounded to the dtype that it is loaded in; whichever the parent computed in."""
    config = CARVABLE[name][0]
    folder = tmp_path / "m"
    model_of(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    parent = load_parent(str(folder), dtype).as_stored()
    carving = random_carving(parent)
    write_native(parent, carving, tmp_path / "out")
    found = verify_folder(parent, tmp_path / "out", decoder(parent, carving), torch.arange(60).view(2, 30) % 256)
    assert found["logits_difference"] < 1e-4


@pytest.mark.parametrize("name", ["Gemma 3: norms after, two rotations", "Qwen2: windows in some layers"])
def test_layers_that_differ_are_loaded_one_by_one(name: str, tmp_path: Path) -> None:
    parent, ids = parent_of(name), torch.arange(60).view(2, 30) % 256
    write_native(parent, random_carving(parent), tmp_path / "out")
    whole = load_folder(tmp_path / "out", torch.float32)
    one_by_one = layered_folder(tmp_path / "out", torch.float32, parent.device)
    torch.testing.assert_close(run(one_by_one, ids).logits, run(whole, ids).logits, rtol=1e-4, atol=1e-5)


def test_a_table_of_rotations_by_kind_of_layer_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    parent_of("Gemma 3: norms after, two rotations")
    assert "nothing reads" not in capfd.readouterr().err
