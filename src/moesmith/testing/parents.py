"""Make tiny random parents, one per family of decoder, a few tens of thousands of parameters each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.testing.tokenizer import tiny_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# family → config class, its special settings, the stock architecture that holds it (or moesmith's own, "native")
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], str]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}, "mixtral"),
    "llama3": (LlamaConfig, {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}, "mixtral"),
    "mistral": (MistralConfig, {"sliding_window": 8}, "mixtral"),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}, "qwen2_moe"),
    "qwen3": (Qwen3Config, {"head_dim": 16}, "qwen3_moe"),
    "phi3": (Phi3Config, {"pad_token_id": 1}, "mixtral"),
    "phi": (PhiConfig, {"partial_rotary_factor": 0.5}, NATIVE),
    "biased": (LlamaConfig, {"mlp_bias": True, "attention_bias": True}, NATIVE),
}
STOCK = [family for family, (_, _, holds) in FAMILIES.items() if holds != NATIVE]


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Make a random model: 2 layers, D = 32, 4 heads over 2 key/value heads, F = 64.

    Weights are large enough (and norms and biases far enough from 1 and 0) that every part of the model changes
    its logits.
    """
    config_class, special, _ = FAMILIES[family]
    sizes = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = config_class(**{**sizes, **special, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # not .to(dtype): rotary frequencies stay fp32
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and not name.endswith("bias"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise if p.dim() == 1 else 1.5 * noise / p.shape[1] ** 0.5)
        model.get_input_embeddings().weight.mul_(0.5)
    return model.eval()


def tiny_parent(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Parent:
    """Make a tiny random parent in memory; ``overrides`` go to its config."""
    return Parent.from_model(tiny_model(family, seed, dtype, **overrides), tiny_tokenizer(), f"tiny-{family}")


def save_tiny(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a tiny random parent as a Hugging Face folder with tokenizer, chat template and generation config."""
    model = tiny_model(family, seed, dtype, **overrides)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
