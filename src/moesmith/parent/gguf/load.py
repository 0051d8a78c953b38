"""Load a parent from a GGUF file: every key and tensor is used, known to be harmless, or refused by its name.

The file, not a model's name, says what is computed, and llama.cpp says what the file means. So config and weights are
read here as llama.cpp reads them, and the result is then checked against llama.cpp itself (``parent/gguf/proof.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moesmith.errors import MoesmithError
from moesmith.parent.checkpoint import checked, first_line, quiet
from moesmith.parent.gguf.file import dtype_of, handed_over, open_gguf
from moesmith.parent.gguf.proof import LAYERS, beyond, prove_gguf
from moesmith.parent.gguf.rope import CURE, FACTORS, rope_parameters
from moesmith.parent.stored import DEEPEST

KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
# names of tensors outside and inside the layers, in the file and in transformers
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
GATED = {"ffn_gate.weight": "mlp.gate_proj.weight", "ffn_up.weight": "mlp.up_proj.weight"}
QKV = {f"attn_{p}.weight": f"self_attn.{p}_proj.weight" for p in "qkv"}
BIASES = {f"attn_{p}.bias": f"self_attn.{p}_proj.bias" for p in "qkv"}
NORMS = {f"attn_{p}_norm.weight": f"self_attn.{p}_norm.weight" for p in "qk"}
LAYER = {
    "llama": INSIDE | GATED | QKV,
    "qwen2": INSIDE | GATED | QKV | BIASES,
    "qwen3": INSIDE | GATED | QKV | NORMS,
    "phi3": INSIDE | {"attn_qkv.weight": "self_attn.qkv_proj.weight", "ffn_up.weight": "mlp.gate_up_proj.weight"},
}
# keys that do not change what is computed: who made the file and how, and what its tokenizer is. The tokenizer is
# checked against llama.cpp's by the tokens that it makes.
DESCRIBING = (
    "GGUF.",
    "general.",
    "quantize.",
    "imatrix.",
    "mradermacher.",
    "tokenizer.ggml.",
    "tokenizer.chat_template",
)
# keys of the architecture that do not affect the function, or that repeat what tensors say
UNUSED = ("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon")
# keys that change the function unless they have one of these values
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.sliding_window_pattern": (1,),
    "attention.temperature_scale": (0.0,),
}


def load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file's model, dequantised to ``dtype``, and its tokenizer; check both against llama.cpp if installed.

    Args:
        path: the file.
        dtype: dtype of the weights; the file's own if left out, bf16 where it is quantised.

    Raises:
        MoesmithError: there is no such file or it cannot be read; the package gguf is missing; a key or tensor is not
            understood or is missing; or llama.cpp answers differently.
    """
    reader, keys = open_gguf(path)
    architecture = _known(path, keys)
    depth = f"{architecture}.block_count"
    layers = min(LAYERS, keys.get(depth, 0))
    try:
        first = {t.name: _unpacked(t) for t in reader.tensors if not beyond(t.name, layers)}
    except Exception as error:  # a type that gguf does not unpack
        raise MoesmithError(f"{path} cannot be loaded: {first_line(error)}", CURE) from error
    twin = _model(path, first, keys | {depth: layers}, torch.float32)
    rest = {t.name: t for t in reader.tensors if t.name not in first}
    model = _model(path, first | rest, keys, dtype or dtype_of(reader))
    try:
        with quiet(), handed_over(reader):
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        what = f"The tokenizer of {path} cannot be loaded: {first_line(error)}"
        raise MoesmithError(what, CURE) from error
    tokenizer = _without_invented(tokenizer, len(reader.fields["tokenizer.ggml.tokens"].data))
    prove_gguf(path, reader, first, model, twin, tokenizer)
    return model, tokenizer


def gguf_skeleton(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Build a GGUF file's model on the meta device, as shapes: no weights or tokenizer are read, nothing is proved.

    Raises:
        MoesmithError: as :func:`load_gguf`, except for what is in the tensors.
    """
    reader, keys = open_gguf(path)
    architecture = _known(path, keys)
    tensors = {t.name: t for t in reader.tensors}
    rows = int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0
    config, _ = _described(path, keys, tensors, rows)
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = KINDS[architecture][1]._from_config(config, dtype=dtype or dtype_of(reader))
    return model


def _known(path: Path, keys: dict[str, Any]) -> str:
    architecture = str(keys.get("general.architecture"))
    if architecture not in KINDS:
        known = ", ".join(KINDS)
        what = f"{path.name} has llama.cpp's architecture {architecture!r}, not one of {known}"
        raise MoesmithError(what, "Unpack it with moesmith dequantize, or give the model as a folder in safetensors.")
    layers = keys.get(f"{architecture}.block_count", 1)
    if not isinstance(layers, int) or not 1 <= layers <= DEEPEST:
        raise MoesmithError(f"{path.name} has {architecture}.block_count = {layers!s:.40}", "Fetch the file again.")
    return architecture


def _without_invented(tokenizer: Any, size: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer without what transformers adds to a file's ``size`` tokens (GPT-2's end of text)."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in described["added_tokens"] if token["id"] < size]
    if len(kept) == len(described["added_tokens"]):
        return tokenizer  # type: ignore[no-any-return]
    backend = Tokenizer.from_str(json.dumps(described | {"added_tokens": kept}))
    names = {token["content"] for token in kept}
    special = {kind: token for kind, token in tokenizer.special_tokens_map.items() if token in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)


def _described(path: Path, keys: dict[str, Any], tensors: Mapping[str, Any], rows: int) -> tuple[Any, dict[str, str]]:
    """Return the config that a file describes (``rows`` of embedding), and its tensors' names in transformers."""
    architecture = str(keys["general.architecture"])
    factors = {name: _unpacked(t).double().tolist() for name, t in tensors.items() if name in FACTORS}
    own = [name for name in tensors if name not in FACTORS]
    config = config_of(path.name, architecture, keys, rows, "output.weight" not in tensors, factors)
    return config, tensor_names(path.name, architecture, config, own)


def _model(path: Path, tensors: dict[str, Any], keys: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a file's keys and tensors (unpacked, or as the reader has them) describe."""
    config, names = _described(path, keys, tensors, len(tensors.get("token_embd.weight", ())))
    architecture = str(keys["general.architecture"])
    try:
        with quiet():
            weights = {
                theirs: _weight(name, tensors[name], architecture, config, dtype) for name, theirs in names.items()
            }
            loaded = KINDS[architecture][1].from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # transformers and gguf each have their own error types
        raise MoesmithError(f"{path} cannot be loaded: {first_line(error)}", CURE) from error
    return checked(loaded, str(path)).eval()


class Keys:
    """The keys of one architecture; those that are not taken in the end are not understood."""

    def __init__(self, file: str, architecture: str, keys: dict[str, Any]) -> None:
        """Refuse keys that are neither the architecture's own nor known to be harmless."""
        self.file, self.prefix = file, f"{architecture}."
        if int(keys.get("split.count") or 1) > 1:
            raise MoesmithError(
                f"{file} is one of {keys['split.count']} parts of a model", "Join them with llama-gguf-split --merge."
            )
        if (kind := keys.get("general.type", "model")) != "model":
            raise MoesmithError(f"{file} is a file of the type {kind!r}, not a model", CURE)
        known = (*DESCRIBING, "split.", self.prefix)
        for name, value in keys.items():
            if not name.startswith(known):
                raise self.unknown(name, value)
        self.left = {name.removeprefix(self.prefix): v for name, v in keys.items() if name.startswith(self.prefix)}

    def take(self, name: str, default: Any = None) -> Any:
        """Take a key and return its value.

        Raises:
            MoesmithError: there is one value for each layer, or none and no default.
        """
        value = self.left.pop(name, default)
        if value is None:
            raise MoesmithError(f"{self.file} has no key {self.prefix}{name}", "Fetch or convert the model again.")
        if isinstance(value, list):
            raise MoesmithError(f"{self.file} has layers that differ: {self.prefix}{name} = {value[:8]}", CURE)
        return value

    def finish(self) -> None:
        """Refuse the first key that was not taken."""
        for name, value in self.left.items():
            if name in UNUSED or value in NEUTRAL.get(name, ()):
                continue
            raise self.unknown(self.prefix + name, value)

    def unknown(self, name: str, value: Any) -> MoesmithError:
        """Return the error that refuses one key."""
        return MoesmithError(f"{self.file} has the key {name} = {str(value)[:40]}, which moesmith does not know", CURE)


def config_of(
    file: str, architecture: str, keys: dict[str, Any], rows: int, tied: bool, factors: dict[str, list[float]]
) -> Any:
    """Make the transformers config that computes what llama.cpp computes from these keys.

    Args:
        file: the file's name, for refusals.
        architecture: one of :data:`KINDS`.
        keys: the file's keys, without the vocabulary.
        rows: rows of the embedding.
        tied: whether the embedding is the output matrix too.
        factors: the tensors of :data:`FACTORS` that it has.

    Raises:
        MoesmithError: a key is missing or not understood; it is named.
    """
    own = Keys(file, architecture, keys)
    D, heads = own.take("embedding_length"), own.take("attention.head_count")
    width = own.take("attention.key_length", D // heads)
    for name, value in (("attention.value_length", width), ("rope.dimension_count", width)):
        if (found := own.take(name, value)) != value:
            raise MoesmithError(f"{file} has {own.prefix}{name} = {found} where heads are {value} wide", CURE)
    scale = own.take("attention.scale", 0.0)
    if scale and not math.isclose(scale, width**-0.5, rel_tol=1e-6):
        raise own.unknown(f"{own.prefix}attention.scale", scale)
    context = own.take("context_length")
    if (window := own.take("attention.sliding_window", 0)) and architecture != "phi3":
        raise own.unknown(f"{own.prefix}attention.sliding_window", window)
    fields: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": D,
        "intermediate_size": own.take("feed_forward_length"),
        "num_hidden_layers": own.take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.take("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": context,
        "rms_norm_eps": own.take("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(own, width, context, factors),
        "tie_word_embeddings": tied,
        "sliding_window": window or None,
    }
    for token, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{token}_token_id"] = keys.get(f"tokenizer.ggml.{name}_token_id")
    # transformers' own loader keeps these as well; without them the model's digest would change
    for field, name in (("unk_token_id", "tokenizer.ggml.unknown_token_id"), ("_model_name_or_path", "general.name")):
        fields |= {field: keys[name]} if name in keys else {}
    if architecture != "phi3":
        del fields["sliding_window"]
    else:
        original = fields["rope_parameters"].get("original_max_position_embeddings", context)
        fields["original_max_position_embeddings"] = original
    config = KINDS[architecture][0]
    if not hasattr(config(), "head_dim"):  # the architecture's heads share D
        if width != D // heads:
            raise own.unknown(f"{own.prefix}attention.key_length", width)
        del fields["head_dim"]
    own.finish()
    return config(**fields)


def tensor_names(file: str, architecture: str, config: Any, tensors: Collection[str]) -> dict[str, str]:
    """Map each tensor's name in the file to its name in transformers.

    Raises:
        MoesmithError: a tensor is not understood, or one is missing.
    """
    names = dict(OUTSIDE)
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{own}": f"model.layers.{layer}.{theirs}" for own, theirs in LAYER[architecture].items()}
    if config.tie_word_embeddings:
        del names["output.weight"]
    given = set(tensors)
    for what, odd in (("has the tensor", given - set(names)), ("lacks the tensor", set(names) - given)):
        for name in sorted(odd)[:1]:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise MoesmithError(f"{file}, of the architecture {architecture!r}, {what} {name}{more}", CURE)
    return names


def _unpacked(tensor: Any) -> Tensor:
    """Unpack a reader's tensor to f32; one that is unpacked already stays as it is."""
    import gguf

    if isinstance(tensor, Tensor):
        return tensor
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))


def _weight(name: str, tensor: Any, architecture: str, config: Any, dtype: torch.dtype) -> Tensor:
    """Bring one tensor into transformers' form: a Llama's q and k have their rows in pairs there, in halves here."""
    weight = _unpacked(tensor)
    rows = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    heads = rows.get(name.split(".", 2)[-1])
    if architecture == "llama" and heads is not None:
        weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return weight.to(dtype)
