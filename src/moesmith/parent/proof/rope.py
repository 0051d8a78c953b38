"""Compute cosines and sines of positions as the architecture that will hold a parent does from its config.

A parent's own tables prove nothing: an error in them would be on both sides of a comparison. So the tables here come
from the stock architecture's code and a config that takes from the parent only what a stock folder carries.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from moesmith.mixture.attention import rotary_width

# fields that transformers and tuning tools write in addition to the declared ones; they do not change the function
INERT = frozenset(
    "_name_or_path architectures auto_map dtype torch_dtype model_type transformers_version rope_scaling rope_theta "
    "partial_rotary_factor unsloth_version unsloth_fixed output_attentions output_hidden_states return_dict id2label "
    "label2id problem_type is_encoder_decoder chunk_size_feed_forward use_cache finetuning_task max_length "
    "task_specific_params transformers.js_config pretraining_tp quantization_config unk_token_id sep_token_id "
    "cls_token_id mask_token_id tokenizer_class".split()
)
# the keys of ``rope_parameters`` that the stock architectures' code reads
KEYS = frozenset(
    "rope_type type rope_theta factor partial_rotary_factor original_max_position_embeddings attention_factor "
    "beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor short_factor "
    "long_factor".split()
)
STOCK: dict[str, tuple[Any, Any]] = {
    "mixtral": (MixtralConfig, MixtralRotaryEmbedding),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeRotaryEmbedding),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeRotaryEmbedding),
}


def carried(config: Any) -> dict[str, Any]:
    """Return the parent's ``rope_parameters`` as a stock config takes them: there, whole heads rotate."""
    found: dict[str, Any] = copy.deepcopy(config.rope_parameters)
    found.pop("partial_rotary_factor", None)
    return found


def stock_rope(family: str, config: Any) -> nn.Module:
    """Make the stock rotary embedding for a parent's config: (x, position_ids) to cos, sin (B, S, rotary).

    A parent of moesmith's own format may rotate only a part of each head; its table is that of a head of this width.
    """
    config_class, module_class = STOCK.get(family, STOCK["mixtral"])
    made = config_class(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=rotary_width(config),
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=carried(config),
    )
    return module_class(made)


def unread(config: Any) -> list[str]:
    """List a config's fields that its class does not declare, and ``rope_parameters.*`` that no known code reads."""
    declared = {name for kind in type(config).__mro__ for name in getattr(kind, "__annotations__", ())}
    given = config.to_dict()
    found = [name for name in given if name not in declared | INERT and not name.startswith("_")]
    rope, kinds = given.get("rope_parameters") or {}, given.get("layer_types") or ()
    tables = {f"{kind}.": rope[kind] for kind in sorted({*kinds} & rope.keys())}  # of each kind of layer
    tables[""] = {name: value for name, value in rope.items() if f"{name}." not in tables}
    return found + [f"rope_parameters.{kind}{name}" for kind, own in tables.items() for name in own if name not in KEYS]
