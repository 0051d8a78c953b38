"""A carving as an ordinary Hugging Face folder: Mixtral, Qwen2-MoE or Qwen3-MoE, whichever holds its attention.

Nobody needs moesmith to load the result. Experts are written one tensor each (``experts.N.…``), the layout that
transformers of every version, vLLM, SGLang and llama.cpp's converter read. A stock expert is
y = down(act(gate x) * (up x)) without a bias, and all experts have one width; so

* a compensation bias b becomes one more channel, fed by the constant direction v of the router input (v·x ≈ 1):
  gate row K·v, up row v, down column b / act(K);
* narrower experts are padded with zero channels, to the widest and to a multiple of :data:`ALIGN`.

Shapes: D model width, W expert width on disk, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN

from moesmith.artefact import read_json, write_json
from moesmith.attention import zeroed
from moesmith.carving import ALIGN, Carving
from moesmith.errors import MoesmithError
from moesmith.export.folder import whole_folder, write_companions, write_shards
from moesmith.export.verify import verify_folder
from moesmith.layerwise import Decoder, Layered
from moesmith.mapped import give_back
from moesmith.moe import SlicedExperts, decoder, moe_blocks
from moesmith.parents import Parent
from moesmith.proof import NATIVE, recomputes
from moesmith.rope import carried
from moesmith.structure import STREAM, attention_of, attention_weights, attention_window, decoder_layers, head_dim

__all__ = ["Layout", "stock_config", "stock_reference", "stock_refusal", "verify_folder", "write_stock"]

GROUPED = 8  # the width that transformers' grouped matrix kernel wants a multiple of, in every dtype
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# names of an expert's gate, up and down on disk
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "qwen2_moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    "qwen3_moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}
# fmt: off
CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout",
    "pad_token_id", "bos_token_id", "eos_token_id",
)
# fmt: on


@dataclass(frozen=True)
class Layout:
    """How a stock folder is written; as it is, the one for transformers and vLLM.

    Attributes:
        dialect: ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``; the parent's family if empty. Qwen2-MoE holds Mixtral's
            attention with zero biases. Mixtral's names with biases are for llama.cpp's converter only.
        untied: the head is a tensor of its own although the parent shares it with the embedding.
        context: the longest text, for runtimes without sliding windows: the window goes, which nothing shorter notices.
        shard_bytes: the most that a file holds; :data:`folder.SHARD_BYTES` if not given.
    """

    dialect: str = ""
    untied: bool = False
    context: int | None = None
    shard_bytes: int | None = None


@cache
def constant_gain(activation_name: str) -> float:
    """The K with which the constant channel s·act(K·s) / act(K), s = v·x ≈ 1, strays least from 1.

    v·x is 1 up to a standard deviation of about 0.05. With a positive K the channel is nearly s², so its error is
    twice that of s. s·act(K·s) has a stationary point at a negative K (−2.22 for SiLU): there the error is of second
    order, 0.3 % where s errs by 5 %, and large s are damped. Root mean square error on held-out text in layers 0, 5, 15
    and 29 of SmolLM2-135M: 0.009, 0.002, 0.056, 0.002 against 0.100, 0.054, 0.120, 0.043 with K = 4. Found on a grid,
    for any activation.
    """
    activation = ACT2FN[activation_name]
    s_N = torch.linspace(0.85, 1.15, 61, dtype=torch.float64)
    weight_N = torch.exp(-0.5 * ((s_N - 1) / 0.05) ** 2)
    gains = [
        k / 100 for k in range(-600, 601) if abs(float(activation(torch.tensor(k / 100, dtype=torch.float64)))) > 0.02
    ]

    def error(gain: float) -> float:
        channel_N = s_N * activation(gain * s_N) / activation(torch.tensor(gain, dtype=torch.float64))
        return float((weight_N * (channel_N - 1) ** 2).sum())

    return min(gains, key=error)


def constant_channel(parent: Parent, carving: Carving, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The channel that stands in for a layer's biases: gate row (D,), up row (D,), one down column per expert (E, D).

    ``None`` when the layer has no bias.

    Raises:
        MoesmithError: there is a bias and no constant direction.
    """
    carved, ffn = carving.layers[layer], parent.ffns[layer]
    if carved.bias_ED is None:
        return None
    if carved.constant_D is None:
        refusal = stock_refusal(parent, carving)
        raise MoesmithError(*refusal) if refusal else AssertionError("stock_refusal knows it")
    gain = constant_gain(ffn.activation_name)
    v_D = carved.constant_D.float()
    level = ffn.activation(torch.tensor(gain, dtype=torch.float64)).float()  # the same on every machine
    return gain * v_D, v_D, carved.bias_ED.float() / level


def stock_refusal(parent: Parent, carving: Carving) -> tuple[str, str] | None:
    """The one property that no stock architecture holds, and what to do; ``None`` if one holds the carving."""
    gate = carving.gate
    if parent.family == NATIVE and recomputes(parent.model):
        original = parent.config.rope_parameters["original_max_position_embeddings"]
        return (
            f"The parent computes its keys again, rotated otherwise, once a text outgrows {original:,} tokens "
            "(longrope), and no stock Mixture-of-Experts does while it generates",
            "Write the native format (native.write_native).",
        )
    if parent.family == NATIVE:
        return (
            "The parent's feed-forward networks have no gate, and no stock Mixture-of-Experts has experts without one",
            "Write the native format (native.write_native).",
        )
    if not (gate.renormalise or gate.order == "topk-softmax") or gate.scale != 1:
        return (
            "The carving's gate does not give weights that sum to 1, as every runtime of the stock architectures does",
            "Use renormalise = true and scale = 1, or write the native format.",
        )
    for index, layer in enumerate(carving.layers):
        if layer.bias_ED is not None and layer.constant_D is None:
            return (
                f"Layer {index} has a compensation bias and the carving holds no constant direction for it",
                "Set CarvedLayer.constant_D (router.constant_direction), or write the native format, which has biases.",
            )
    return None


def stock_config(parent: Parent, carving: Carving, layout: Layout = Layout()) -> PreTrainedConfig:
    """The stock architecture's config with every field of the parent that attention, embedding and tokens need.

    Raises:
        MoesmithError: a gate that the stock architectures do not have, or a parent that only the native format holds.
    """
    gate, old = carving.gate, parent.config
    if (refusal := stock_refusal(parent, carving)) is not None:
        raise MoesmithError(*refusal)
    fields: dict[str, Any] = {name: getattr(old, name) for name in CARRIED if hasattr(old, name)}
    fields["rope_parameters"] = carried(old)
    fields["head_dim"] = head_dim(old)
    fields["hidden_act"] = parent.ffns[0].activation_name
    fields["tie_word_embeddings"] = _tied(parent.model) and not layout.untied
    fields["num_experts_per_tok"] = gate.top_k
    fields["output_router_logits"] = False
    dialect = layout.dialect or parent.family
    fields["architectures"] = [ARCHITECTURES[dialect]]
    window, width = attention_window(old), carving.stock_width()
    if layout.context is not None:
        window, fields["max_position_embeddings"] = None, layout.context
    if dialect == "mixtral":
        return MixtralConfig(**fields, sliding_window=window, num_local_experts=gate.experts, intermediate_size=width)
    fields |= {"num_experts": gate.experts, "moe_intermediate_size": width, "intermediate_size": parent.F}
    fields |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    fields |= {"use_sliding_window": window is not None, "sliding_window": window}
    if dialect == "qwen3_moe":
        return Qwen3MoeConfig(**fields, attention_bias=False)
    kind = "full_attention" if window is None else "sliding_attention"
    # the architecture insists on a shared expert: an exact zero. At width 0 vLLM leaves it out and refuses its tensors
    return Qwen2MoeConfig(**fields, qkv_bias=True, shared_expert_intermediate_size=ALIGN, layer_types=[kind] * parent.L)


def stock_tensors(
    parent: Parent,
    carving: Carving,
    dtype: torch.dtype,
    layout: Layout = Layout(),
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder in ``dtype``, one at a time: (name on disk, tensor on the CPU)."""
    model, names = parent.model, {id(p): name for name, p in parent.model.named_parameters()}
    dialect = layout.dialect or parent.family

    def trained(module: Any) -> Tensor:  # a norm's weight, the carving's if it was trained
        return carving.norms.get(names[id(module.weight)], module.weight)

    def out(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name, tensor.detach().to("cpu", dtype, copy=True)

    embedding: Any = model.get_input_embeddings()
    yield out("model.embed_tokens.weight", embedding.weight)
    for index, layer in enumerate(decoder_layers(model)[1]):
        prefix, attention = f"model.layers.{index}", attention_of(layer)
        for name in STREAM:
            yield out(f"{prefix}.{name}.weight", trained(getattr(layer, name)))
        weights = attention_weights(layer, parent.config)
        if dialect == "qwen2_moe":  # it has biases
            rows = {f"{p}_proj": len(weights[f"{p}_proj.weight"]) for p in "qkv"}
            weights = {f"{name}.bias": torch.zeros(n) for name, n in rows.items()} | weights
        for name, tensor in weights.items():
            owner = name.rsplit(".", 1)[0]
            if carving.attention:
                tensor = zeroed(name, tensor, carving.attention[index])
            yield out(f"{prefix}.self_attn.{name}", trained(getattr(attention, owner)) if "norm" in owner else tensor)
        for name, tensor in _moe_tensors(parent, carving, index, dialect):
            yield out(f"{prefix}.{name}", tensor)
        if parent.layerwise:
            give_back()
    yield out("model.norm.weight", trained(model.base_model.norm))
    if layout.untied or not _tied(model):
        head: Any = model.get_output_embeddings()
        yield out("lm_head.weight", head.weight)


def _moe_tensors(parent: Parent, carving: Carving, index: int, dialect: str) -> Iterator[tuple[str, Tensor]]:
    """One layer's router and experts in fp32."""
    width, constant = carving.stock_width(), constant_channel(parent, carving, index)
    yield ("block_sparse_moe" if dialect == "mixtral" else "mlp") + ".gate.weight", carving.layers[index].router_ED
    for expert in range(carving.gate.experts):
        gate_FD, up_FD, down_DF = carving.expert_weights(parent, index, expert)
        assert up_FD is not None, "stock_config refuses such a parent"
        if constant is not None:
            gate_D, up_D, down_ED = (part.to(gate_FD.device) for part in constant)
            gate_FD, up_FD = torch.cat([gate_FD, gate_D[None]]), torch.cat([up_FD, up_D[None]])
            down_DF = torch.cat([down_DF, down_ED[expert][:, None]], 1)
        missing = width - len(gate_FD)
        padded = F.pad(gate_FD, (0, 0, 0, missing)), F.pad(up_FD, (0, 0, 0, missing)), F.pad(down_DF, (0, missing))
        for name, tensor in zip(EXPERT_NAMES[dialect], padded, strict=True):
            yield f"{name.format(expert)}.weight", tensor
    if dialect == "qwen2_moe":
        rows, columns = (ALIGN, parent.D), (parent.D, ALIGN)
        for name, shape in (("gate_proj", rows), ("up_proj", rows), ("down_proj", columns)):
            yield f"mlp.shared_expert.{name}.weight", torch.zeros(shape)
        yield "mlp.shared_expert_gate.weight", torch.zeros(1, parent.D)


def _tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight is embedding.weight


def write_stock(
    parent: Parent,
    carving: Carving,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    layout: Layout = Layout(),
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``folder`` whole or not at all: config, weights, tokenizer with chat template, generation config.

    Weights are made and written one shard at a time, so a model larger than the memory left fits. With
    ``overwrite`` a model that moesmith wrote there is replaced. Follow with :func:`verify_folder`.

    Returns:
        ``architecture``, ``expert_width`` (channels on disk), ``zero_channels`` (share of them that is padding) and
        ``bytes``.

    Raises:
        MoesmithError: the parent, the gate or a bias does not fit a stock architecture, ``folder`` holds something
            (:func:`folder.whole_folder`), or cannot be written.
    """
    config = stock_config(parent, carving, layout)
    config.dtype = dtype
    with whole_folder(folder, overwrite=overwrite) as work:
        size = write_shards(work, stock_tensors(parent, carving, dtype, layout), layout.shard_bytes)
        config.save_pretrained(work)
        _add_fields(work / "config.json")
        write_companions(parent, work)
    width = carving.stock_width()
    used = carving.widths().double().mean() + (carving.compensation == "bias")
    return {
        "architecture": ARCHITECTURES[layout.dialect or parent.family],
        "expert_width": width,
        "zero_channels": round(1 - float(used) / width, 4),
        "bytes": size,
    }


def _add_fields(path: Path) -> None:
    """Repeat under their names before transformers 5 what older readers would replace by defaults without a word.

    And where the model's width is one that transformers' grouped kernel refuses, name the kernel that takes it, which
    ``from_pretrained`` reads from the config but its own writing leaves out.
    """
    config = read_json(path)
    if config["hidden_size"] % GROUPED:
        config["experts_implementation"] = "eager"
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config["num_local_experts"]
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if rope.get("rope_type") == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    write_json(path, config)


def stock_reference(parent: Parent, carving: Carving) -> Decoder:
    """What a folder of :func:`write_stock` must compute: ``moe.decoder``'s model with biases as constant channels,
    and without the masks over attention that depend on the token."""
    static = [attention.without_gate() for attention in carving.attention]
    model = decoder(parent, replace(carving, attention=static))
    if isinstance(model, Layered):
        made = model.layer
        return replace(model, layer=lambda index: _with_channel(parent, carving, index, made(index)))
    for index, layer in enumerate(decoder_layers(model)[1]):
        _with_channel(parent, carving, index, layer)
    return model


def _with_channel(parent: Parent, carving: Carving, index: int, layer: nn.Module) -> nn.Module:
    """A decoder layer with its experts' biases as constant channels."""
    if (constant := constant_channel(parent, carving, index)) is not None:
        (block,) = moe_blocks(layer)
        old = block.experts
        assert isinstance(old, SlicedExperts)
        gate_D, up_D, down_ED = (part.to(old.down_proj) for part in constant)
        gate_EFD, up_EFD = old.gate_up_proj.chunk(2, 1)
        rows = [part.expand(len(down_ED), 1, -1) for part in (gate_D, up_D)]
        gate_up_EGD = torch.cat([gate_EFD, rows[0], up_EFD, rows[1]], 1)
        block.experts = SlicedExperts(gate_up_EGD, torch.cat([old.down_proj, down_ED[..., None]], 2), old.activation)
    return layer
