"""moesmith's own format: the parent's architecture with our MoE blocks, for what no stock architecture can hold.

Networks without a gate live here, a compensation bias is exact, every layer keeps its own expert width, experts that
are subsets of one network store every channel once, and attention is pruned. This file lies beside the weights:

    >>> AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)      # doctest: +SKIP

Where moesmith is installed, ``import moesmith.native.modeling`` makes the flag needless.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .experts import MoEBlock, SlicedExperts, UnionExperts
from .gate import Router
from .heads import PrunedAttention

# fields of the parent's config that tools read from any model's
READABLE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class MoesmithConfig(PreTrainedConfig):
    """What rebuilds a carved model; the fields in :data:`READABLE` can be read from it too.

    Attributes:
        parent: the parent's config as a dictionary.
        gate: the gate's semantics, the fields of ``moesmith.gates.GateSpec``.
        paths: name of each layer's feed-forward network in the parent.
        widths: expert width of each layer (its widest expert; narrower ones are padded with zeros).
        unions: channels of each layer that any expert keeps, where experts are subsets of one network; else ``None``.
        attention: shape of each layer's pruned attention and its name (``path``), or ``None``.
        activation: name of the activation in ``ACT2FN``.
        gated: whether the networks are gated.
        has_bias: whether experts have a bias of their output: the parent's own, or a compensation's.
        has_gate_bias: whether they have one before the activation.
    """

    model_type = "moesmith"
    parent: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    paths: list[str] | None = None
    widths: list[int] | None = None
    unions: list[int] | None = None
    attention: list[dict[str, Any]] | None = None
    activation: str = "silu"
    gated: bool = True
    has_bias: bool = False
    has_gate_bias: bool = False

    def __getattr__(self, name: str) -> Any:
        parent = self.__dict__.get("parent")  # through __dict__: a copy is asked for fields before it has any
        if name in READABLE and parent is not None:
            if name == "head_dim" and parent.get(name) is None:  # code that rotates asks for it and computes with it
                return parent["hidden_size"] // parent["num_attention_heads"]
            return parent.get(name)
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")


class _Native(PreTrainedModel):
    """What both classes declare."""

    config_class = MoesmithConfig
    base_model_prefix = "inner"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MoesmithModel(_Native):
    """The decoder alone, without the output matrix: what ``AutoModel`` loads and what vLLM wraps."""

    def __init__(self, config: MoesmithConfig) -> None:
        super().__init__(config)
        whole = _empty(config)
        self.decoder = whole.base_model_prefix
        self.add_module(self.decoder, whole.base_model)
        self.post_init()

    def get_decoder(self) -> Any:
        """The parent's decoder, our blocks in it."""
        return self.get_submodule(self.decoder)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.get_decoder().get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's decoder."""
        return self.get_decoder()(*args, **kwargs)


class MoesmithForCausalLM(_Native, GenerationMixin):
    """The parent's causal language model with a :class:`MoEBlock` in every layer, and pruned attention if it has any.

    Attributes:
        inner: a model of the parent's class; it does the work.
    """

    def __init__(self, config: MoesmithConfig) -> None:
        super().__init__(config)
        self.inner = _empty(config)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The decoder without the output matrix."""
        return self.inner.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        return self.inner.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's class."""
        return self.inner(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's class, with this model's generation config."""
        self.inner.generation_config = self.generation_config
        return self.inner.generate(*args, **kwargs)


def _empty(config: MoesmithConfig) -> Any:
    """The architecture, its experts still to be filled in by ``from_pretrained``."""
    fields, gate = dict(config.parent or {}), SimpleNamespace(**(config.gate or {}))
    old = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    old.intermediate_size = 1  # the parent's own networks are replaced at once
    inner: Any = AutoModelForCausalLM.from_config(old, attn_implementation=config._attn_implementation)
    inner.config.intermediate_size = fields["intermediate_size"]
    E, D = gate.experts, old.hidden_size
    unions: list[int | None] = [*config.unions] if config.unions else [None] * len(config.paths or ())
    activation = ACT2FN[config.activation]
    for path, width, union in zip(config.paths or (), config.widths or (), unions, strict=True):
        bias_ED = torch.empty(E, D) if config.has_bias else None
        experts: SlicedExperts
        if union is None:
            rows = torch.empty(E, (1 + config.gated) * width, D)
            gate_bias_EF = torch.empty(E, width) if config.has_gate_bias else None
            experts = SlicedExperts(rows, torch.empty(E, D, width), activation, bias_ED, gate_bias_EF)
        else:
            up_UD = torch.empty(union, D) if config.gated else None
            index_EF = torch.empty(E, width, dtype=torch.int32)
            gate_bias_U = torch.empty(union) if config.has_gate_bias else None
            experts = UnionExperts(
                torch.empty(union, D), up_UD, torch.empty(D, union), index_EF, activation, bias_ED, gate_bias_U
            )
        _replace(inner, path, MoEBlock(Router(gate, torch.empty(E, D)), experts))
    for index, shape in enumerate(config.attention or ()):
        _replace(inner, shape["path"], PrunedAttention(inner.config, index, shape))
    return inner.requires_grad_(True)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, name = path.rsplit(".", 1)
    setattr(model.get_submodule(owner), name, module)


AutoConfig.register("moesmith", MoesmithConfig)
AutoModel.register(MoesmithConfig, MoesmithModel)
AutoModelForCausalLM.register(MoesmithConfig, MoesmithForCausalLM)
