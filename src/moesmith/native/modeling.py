"""Load moesmith's own format: the parent's architecture with our MoE blocks, for what no stock architecture can hold.

It holds networks without a gate and exact compensation biases, every layer keeps its own expert width, experts that are
subsets of one network store every channel once, and attention is pruned. This file is stored next to the weights:

    >>> AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)      # doctest: +SKIP

Where moesmith is installed, the flag is not needed after ``import moesmith.native.modeling``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .experts import MoEBlock, SlicedExperts, UnionExperts
from .gate import Router
from .heads import PrunedAttention

# fields of the parent's config that tools read from any model's config
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
    "logit_scale",
    "logits_scaling",
    "final_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class MoesmithConfig(PreTrainedConfig):
    """All that rebuilds a carved model; the fields in :data:`READABLE` can be read from it too.

    Attributes:
        parent: the parent's config as a dictionary.
        layers: for each layer ``path`` (the feed-forward network's name in the parent), ``gate`` (the fields of
            ``moesmith.mixture.gates.GateSpec``), ``width`` (of its widest expert; narrower ones are padded with zeros),
            ``union`` (channels that any routed expert keeps, where these are subsets of one network, else ``None``),
            ``bias`` (whether routed experts have an output bias), ``shared`` (width of the shared expert, or 0)
            and ``shared_bias``.
        attention: the shape and name (``path``) of each layer's pruned attention, or ``None``.
        activation: name of the activation in ``ACT2FN``.
        gated: whether the networks are gated.
        has_gate_bias: whether experts have a bias before the activation, and one of up's where there is one.
        gate, paths, widths, unions, has_bias: the same as ``layers``, as version 0.1 wrote it.
    """

    model_type = "moesmith"
    parent: dict[str, Any] | None = None
    layers: list[dict[str, Any]] | None = None
    attention: list[dict[str, Any]] | None = None
    activation: str = "silu"
    gated: bool = True
    has_gate_bias: bool = False
    gate: dict[str, Any] | None = None
    paths: list[str] | None = None
    widths: list[int] | None = None
    unions: list[int] | None = None
    has_bias: bool = False

    def described(self) -> list[dict[str, Any]]:
        """Return ``layers``, also for a folder that version 0.1 wrote."""
        if self.layers is not None or not self.paths:
            return self.layers or []
        unions: list[int | None] = [*self.unions] if self.unions else [None] * len(self.paths)
        rest = {"gate": self.gate, "bias": self.has_bias, "shared": 0, "shared_bias": False}
        return [
            {"path": path, "width": width, "union": union} | rest
            for path, width, union in zip(self.paths, self.widths or (), unions, strict=True)
        ]

    def __getattr__(self, name: str) -> Any:
        parent = self.__dict__.get("parent")  # through __dict__: a copy's fields are read before it has any
        if name in READABLE and parent is not None:
            names = CONFIG_MAPPING[parent["model_type"]].attribute_map  # GPT-2 stores hidden_size as n_embd
            if name == "head_dim" and parent.get(name) is None:  # code that rotates reads it and computes with it
                return self.hidden_size // self.num_attention_heads
            return parent.get(names.get(name, name))
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")


class _Native(PreTrainedModel):
    """Declares what both classes share."""

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
        """The parent's decoder, with our blocks in it."""
        return self.get_submodule(self.decoder)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.get_decoder().get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the parent's decoder does."""
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
        """Do what the parent's class does."""
        return self.inner(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the parent's class does, with this model's generation config."""
        self.inner.generation_config = self.generation_config
        return self.inner.generate(*args, **kwargs)


def _empty(config: MoesmithConfig) -> Any:
    """Build the architecture; ``from_pretrained`` fills in its experts."""
    fields = dict(config.parent or {})
    old = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    if "intermediate_size" in fields:
        old.intermediate_size = 1  # the parent's own networks are replaced at once
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(old)]
    attention = config._attn_implementation
    if attention == "sdpa" and not known._supports_sdpa:  # it was chosen for our own class
        attention = "eager"
    inner: Any = AutoModelForCausalLM.from_config(old, attn_implementation=attention)
    if "intermediate_size" in fields:
        inner.config.intermediate_size = fields["intermediate_size"]
    for layer in config.described():
        _replace(inner, layer["path"], _block(config, layer, old.hidden_size))
    for index, shape in enumerate(config.attention or ()):
        _replace(inner, shape["path"], PrunedAttention(inner.config, index, shape))
    return inner.requires_grad_(True)


def _block(config: MoesmithConfig, layer: dict[str, Any], D: int) -> MoEBlock:
    """Build one layer's empty block."""
    gate, width, union = SimpleNamespace(**layer["gate"]), layer["width"], layer["union"]
    E, activation, gated, biased = gate.experts, ACT2FN[config.activation], config.gated, config.has_gate_bias
    inner = biased * (1 + gated)  # biases of gate and up

    def sliced(E: int, width: int, bias: bool) -> SlicedExperts:
        rows, bias_ED = torch.empty(E, (1 + gated) * width, D), torch.empty(E, D) if bias else None
        return SlicedExperts(
            rows, torch.empty(E, D, width), activation, bias_ED, *(torch.empty(E, width) for _ in range(inner))
        )

    experts: SlicedExperts
    if union is None:
        experts = sliced(E, width, layer["bias"])
    else:
        experts = UnionExperts(
            torch.empty(union, D),
            torch.empty(union, D) if gated else None,
            torch.empty(D, union),
            torch.empty(E, width, dtype=torch.int32),
            activation,
            torch.empty(E, D) if layer["bias"] else None,
            *(torch.empty(union) for _ in range(inner)),
        )
    rows: Any = ()  # the parent's, from which the router is made
    if (logits := getattr(gate, "logits", "linear")) != "linear":
        hidden = logits == "hidden"
        biases = [torch.empty(E) if biased else None, torch.empty(E) if inner == 2 and hidden else None]
        rows = (None, torch.empty(E, D) if gated and hidden else None, *biases, activation if hidden else None)
    shared = sliced(1, layer["shared"], layer["shared_bias"]) if layer["shared"] else None
    return MoEBlock(Router(gate, torch.empty(E, D), *rows), experts, shared)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, name = path.rsplit(".", 1)
    setattr(model.get_submodule(owner), name, module)


AutoConfig.register("moesmith", MoesmithConfig)
AutoModel.register(MoesmithConfig, MoesmithModel)
AutoModelForCausalLM.register(MoesmithConfig, MoesmithForCausalLM)
