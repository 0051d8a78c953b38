"""Write a carving as an ordinary Hugging Face folder: config, tensors, and the model it must compute as.

Loading the result does not need moesmith. Experts are written one tensor each (``experts.N.…``), the layout that
transformers of every version, vLLM, SGLang and llama.cpp's converter read. What the architectures do not have is
rewritten exactly (``mixture/home.py``).

Shapes: D model width, W expert width on disk, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from moesmith.errors import MoesmithError
from moesmith.export.folder import whole_folder, write_companions, write_shards
from moesmith.export.stock.constant import constant_channel
from moesmith.export.stock.experts import Level, StockLayer
from moesmith.export.verify import verify_folder
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.mixture.attention import zeroed
from moesmith.mixture.carving import Carving
from moesmith.mixture.home import Home, home_of, padding
from moesmith.mixture.layer import Analytic, Expert
from moesmith.mixture.moe import SlicedExperts, decoder, moe_blocks
from moesmith.parent.layerwise import Decoder, Layered
from moesmith.parent.load import Parent
from moesmith.parent.mapped import give_back
from moesmith.parent.proof.family import NATIVE, recomputes
from moesmith.parent.proof.rope import carried
from moesmith.parent.structure import (
    STREAM,
    attention_of,
    attention_weights,
    attention_window,
    decoder_layers,
    head_dim,
)
from moesmith.world import crew

__all__ = ["Layout", "stock_config", "stock_reference", "stock_refusal", "verify_folder", "write_stock"]

GROUPED = 8  # transformers' grouped matrix kernel needs widths that are multiples of it, in every dtype
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mimo2": "MiMoV2FlashForCausalLM",
}
# names of an expert's gate, up and down on disk
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
} | dict.fromkeys(
    ("qwen2_moe", "qwen3_moe", "mimo2"),
    ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
)
# fmt: off
CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout",
    "pad_token_id", "bos_token_id", "eos_token_id",
)
# fmt: on


HELD = "Write the native format, which holds it (moesmith export RUN --to native)."


@dataclass(frozen=True)
class Layout:
    """How a stock folder is written; the defaults are for transformers and vLLM.

    Attributes:
        dialect: ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``; if empty, the carving's home. Qwen2-MoE can hold
            Mixtral's attention, with zero biases.
        llamacpp: for llama.cpp's converter, which takes biases under Mixtral's names (``home.home_of``).
        untied: the head is a tensor of its own although the parent shares it with the embedding.
        context: the longest text, for runtimes without sliding windows: the window is dropped, which changes nothing
            for shorter text.
        shard_bytes: the most bytes in a file; :data:`folder.SHARD_BYTES` if not given.
    """

    dialect: str = ""
    llamacpp: bool = False
    untied: bool = False
    context: int | None = None
    shard_bytes: int | None = None

    def home(self, parent: Parent, carving: Carving) -> Home:
        """Choose how the carving is stored with this layout."""
        return home_of(self.dialect or parent.family, carving, llamacpp=self.llamacpp)

    def ties(self, parent: Parent, home: Home) -> bool:
        """Whether head and embedding are one tensor in the file, which two of llama.cpp's graphs cannot read."""
        apart = self.llamacpp and home.dialect in ("qwen2_moe", "mimo2")
        return _tied(parent.model) and not self.untied and not apart


def stock_refusal(parent: Parent, carving: Carving) -> tuple[str, str] | None:
    """Name the property that no stock architecture holds, and what to do; ``None`` if one holds the carving."""
    if parent.family == NATIVE and recomputes(parent.model):
        original = parent.config.rope_parameters["original_max_position_embeddings"]
        return (
            f"The parent computes its keys again, rotated otherwise, once a text outgrows {original:,} tokens "
            "(longrope), and no stock Mixture-of-Experts does while it generates",
            HELD,
        )
    if parent.why:
        return f"{parent.why}, and no stock Mixture-of-Experts has that", HELD
    if parent.family == NATIVE:
        return (
            "The parent's feed-forward networks have no gate, and no stock Mixture-of-Experts has experts without one",
            HELD,
        )
    if not carving.alike:
        counts = sorted({f"{len(layer.routed)} (top-{layer.top_k})" for layer in carving.layers})
        return (
            f"Its layers have {' and '.join(counts)} experts, and a stock Mixture-of-Experts has as many in all",
            HELD,
        )
    for index, layer in enumerate(carving.layers):
        if isinstance(layer.router, Analytic) and layer.router.folded(parent.ffns[index]) is None:
            return (
                f"Layer {index} routes by what its channels compute, and a stock router is linear",
                HELD,
            )
        if any(expert.bias_D is not None for expert in layer.experts) and layer.constant_D is None:
            return (
                f"Layer {index} has a compensation bias and the carving holds no constant direction for it",
                f"Set carve.compensation to refit. {HELD}",
            )
    return None


def stock_config(parent: Parent, carving: Carving, layout: Layout = Layout()) -> PreTrainedConfig:
    """Make the stock architecture's config, with every field of the parent that attention, embedding and tokens need.

    Raises:
        MoesmithError: a gate that the stock architectures do not have, or a parent that only the native format holds.
    """
    old = parent.config
    if (refusal := stock_refusal(parent, carving)) is not None:
        raise MoesmithError(*refusal)
    fields: dict[str, Any] = {name: getattr(old, name) for name in CARRIED if hasattr(old, name)}
    fields["rope_parameters"] = carried(old)
    fields["head_dim"] = head_dim(old)
    fields["hidden_act"] = parent.ffns[0].activation_name
    home = layout.home(parent, carving)
    fields["tie_word_embeddings"] = layout.ties(parent, home)
    fields["num_experts_per_tok"] = home.top_k
    fields["output_router_logits"] = False
    fields["architectures"] = [ARCHITECTURES[home.dialect]]
    window = attention_window(old)
    if layout.context is not None:
        window, fields["max_position_embeddings"] = None, layout.context
    if home.dialect == "mixtral":
        return MixtralConfig(
            **fields, sliding_window=window, num_local_experts=home.experts, intermediate_size=home.width
        )
    fields |= {"moe_intermediate_size": home.width, "intermediate_size": home.dense_width or parent.F}
    if home.dialect == "mimo2":
        return _mimo2(fields, home, parent.L)
    fields |= {"num_experts": home.experts, "mlp_only_layers": list(home.dense)}
    fields |= {"norm_topk_prob": home.divided, "decoder_sparse_step": 1}
    fields |= {"use_sliding_window": window is not None, "sliding_window": window}
    if home.dialect == "qwen3_moe":
        return Qwen3MoeConfig(**fields, attention_bias=False)
    kind = "full_attention" if window is None else "sliding_attention"
    fields["shared_expert_intermediate_size"] = home.shared
    return Qwen2MoeConfig(**fields, qkv_bias=True, layer_types=[kind] * parent.L)


def _mimo2(fields: dict[str, Any], home: Home, layers: int) -> PreTrainedConfig:
    """Make what llama.cpp's converter reads of MiMo-V2: attention without windows, as wide for values as for keys."""
    heads, width = fields["num_attention_heads"], fields["head_dim"]
    fields["rope_parameters"] = fields["rope_parameters"] | {"partial_rotary_factor": 1.0}
    fields |= {"n_routed_experts": home.experts, "topk_method": "noaux_tc", "layernorm_epsilon": fields["rms_norm_eps"]}
    fields |= {"hybrid_layer_pattern": [0] * layers, "sliding_window": 0}
    fields |= {"swa_num_attention_heads": heads, "swa_num_key_value_heads": fields["num_key_value_heads"]}
    fields |= {"swa_head_dim": width, "v_head_dim": width, "swa_v_head_dim": width}
    return LlamaConfig(**fields)


def stock_tensors(
    parent: Parent,
    carving: Carving,
    dtype: torch.dtype,
    layout: Layout = Layout(),
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the folder in ``dtype``, one at a time: (name on disk, tensor on the CPU)."""
    model, names = parent.model, {id(p): name for name, p in parent.model.named_parameters()}
    home = layout.home(parent, carving)

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
        if home.dialect == "qwen2_moe":  # it has biases
            rows = {f"{p}_proj": len(weights[f"{p}_proj.weight"]) for p in "qkv"}
            weights = {f"{name}.bias": torch.zeros(n) for name, n in rows.items()} | weights
        for name, tensor in weights.items():
            owner = name.rsplit(".", 1)[0]
            if carving.attention:
                tensor = zeroed(name, tensor, carving.attention[index])
            yield out(f"{prefix}.self_attn.{name}", trained(getattr(attention, owner)) if "norm" in owner else tensor)
        for name, tensor in _moe_tensors(StockLayer(parent, carving, index, home)):
            yield out(f"{prefix}.{name}", tensor)
        if parent.layerwise:
            give_back()
    yield out("model.norm.weight", trained(model.base_model.norm))
    if not layout.ties(parent, home):
        head: Any = model.get_output_embeddings()
        yield out("lm_head.weight", head.weight)


def _moe_tensors(layer: StockLayer) -> Iterator[tuple[str, Tensor]]:
    """Yield one layer's router and experts in fp32, or its ordinary network."""
    home = layer.home
    if layer.index in home.dense:
        for name, tensor in zip(("gate_proj", "up_proj", "down_proj"), layer.dense(), strict=True):
            yield f"mlp.{name}.weight", tensor
        return
    yield ("block_sparse_moe" if home.dialect == "mixtral" else "mlp") + ".gate.weight", layer.router()
    for expert in range(home.experts):
        for name, tensor in zip(EXPERT_NAMES[home.dialect], layer.routed(expert), strict=True):
            yield f"{name.format(expert)}.weight", tensor
    if home.dialect == "qwen2_moe":
        for name, tensor in zip(("gate_proj", "up_proj", "down_proj"), layer.shared(), strict=True):
            yield f"mlp.shared_expert.{name}.weight", tensor
        yield "mlp.shared_expert_gate.weight", layer.shared_gate()


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

    Weights are made and written one shard at a time, so a model may be larger than the free memory. With
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
        if crew().first:
            config.save_pretrained(work)
            _add_fields(work / "config.json")
            write_companions(parent, work)
    home = layout.home(parent, carving)
    return {
        "architecture": ARCHITECTURES[home.dialect],
        "expert_width": home.width,
        "zero_channels": round(padding(carving, home), 4),
        "bytes": size,
    }


def _add_fields(path: Path) -> None:
    """Repeat fields under their names before transformers 5, which older readers would silently replace by defaults.

    If transformers' grouped kernel refuses the model's width, also name the kernel that takes it, which
    ``from_pretrained`` reads from the config but transformers' own writing leaves out.
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


def stock_reference(parent: Parent, carving: Carving, *, whole: bool = True) -> Decoder:
    """Build what a folder of :func:`write_stock` must compute: ``moe.decoder``'s model, whole or not, with biases as
    constant channels, sums as averages (:class:`experts.Level`), and without the masks over attention that depend on
    the token."""
    static = [attention.without_gate() for attention in carving.attention]
    model, home = decoder(parent, replace(carving, attention=static), whole=whole), home_of(parent.family, carving)
    if isinstance(model, Layered):
        made = model.layer
        return replace(model, layer=lambda index: _rewritten(StockLayer(parent, carving, index, home), made(index)))
    for index, layer in enumerate(decoder_layers(model)[1]):
        _rewritten(StockLayer(parent, carving, index, home), layer)
    return model


def _rewritten(stock: StockLayer, layer: nn.Module) -> nn.Module:
    """Rebuild a decoder layer with its experts' biases as constant channels, and its gate as that of a stock folder."""
    parent, carving, index = stock.parent, stock.carving, stock.index
    carved, (block,) = stock.layer, moe_blocks(layer)
    block.experts = _channelled(parent, carving, index, block.experts, carved.routed)
    if carved.shared is not None:
        block.shared = _channelled(parent, carving, index, block.shared, [carved.shared])
    if stock.level:
        block.router = Level(block.router, stock.scale, divided=stock.home.divided)
        block.experts.down_proj = _times(stock, block.experts.down_proj)
    return layer


def _times(stock: StockLayer, down_EDF: Tensor) -> nn.Parameter:
    """Multiply experts' ``down_proj`` by what a stock gate divides their sum by, rounded once, as in a folder.

    Three times a number is not exact in bf16, and a router further up chooses other experts for such a difference.
    """
    scaled_EDF = down_EDF.detach().float() * stock.factor
    for expert, found_DF in enumerate(scaled_EDF):
        own_DF = stock.carving.expert_weights(stock.parent, stock.index, expert)[2]
        found_DF[:, : own_DF.shape[1]] = own_DF * stock.factor
    return nn.Parameter(scaled_EDF.to(down_EDF.dtype), requires_grad=False)


def _channelled(parent: Parent, carving: Carving, index: int, old: Any, experts: list[Expert]) -> SlicedExperts:
    biases = [expert.bias_D for expert in experts if expert.bias_D is not None]
    if not biases:
        return old
    gate_D, up_D, columns = constant_channel(parent.ffns[index], carving.layers[index], biases)
    down_ED = torch.stack(columns).to(old.down_proj)
    gate_EFD, up_EFD = old.gate_up_proj.chunk(2, 1)
    rows = [part.to(old.down_proj).expand(len(down_ED), 1, -1) for part in (gate_D, up_D)]
    gate_up_EGD = torch.cat([gate_EFD, rows[0], up_EFD, rows[1]], 1)
    return SlicedExperts(gate_up_EGD, torch.cat([old.down_proj, down_ED[..., None]], 2), old.activation)
