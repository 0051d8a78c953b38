"""moesmith's own format: the parent's architecture with our MoE blocks, for what no stock architecture can hold.

Networks without a gate live here, a compensation bias is exact, and every layer keeps its own expert width. Loading
needs moesmith:

    >>> import moesmith.modeling                                         # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained("folder")                   # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesmith.carving import Carving
from moesmith.export.folder import whole_folder, write_companions, write_shards
from moesmith.gates import GateSpec, Router
from moesmith.moe import MoEBlock, SlicedExperts, build, moe_blocks
from moesmith.parents import Parent

# fields of the parent's config that tools read from any model's
READABLE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class MoesmithConfig(PreTrainedConfig):
    """What rebuilds a carved model; the fields in :data:`READABLE` can be read from it too.

    Attributes:
        parent: the parent's config as a dictionary.
        gate: the gate's semantics (:class:`moesmith.gates.GateSpec`).
        paths: name of each layer's feed-forward network in the parent.
        widths: expert width of each layer (its widest expert; narrower ones are padded with zeros).
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
    activation: str = "silu"
    gated: bool = True
    has_bias: bool = False
    has_gate_bias: bool = False

    def __getattr__(self, name: str) -> Any:
        parent = self.__dict__.get("parent")  # through __dict__: a copy is asked for fields before it has any
        if name in READABLE and parent is not None:
            return parent.get(name)
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")


class MoesmithForCausalLM(PreTrainedModel, GenerationMixin):
    """The parent's causal language model with an :class:`moesmith.moe.MoEBlock` in every layer.

    Attributes:
        inner: a model of the parent's class; it does the work.
    """

    config_class = MoesmithConfig
    base_model_prefix = "inner"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

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
    fields, gate = dict(config.parent or {}), GateSpec(**(config.gate or {}))
    old = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    old.intermediate_size = 1  # the parent's own networks are replaced at once
    inner: Any = AutoModelForCausalLM.from_config(old, attn_implementation=config._attn_implementation)
    inner.config.intermediate_size = fields["intermediate_size"]
    E, D = gate.experts, old.hidden_size
    for path, width in zip(config.paths or (), config.widths or (), strict=True):
        experts = SlicedExperts(
            torch.empty(E, (1 + config.gated) * width, D),
            torch.empty(E, D, width),
            ACT2FN[config.activation],
            torch.empty(E, D) if config.has_bias else None,
            torch.empty(E, width) if config.has_gate_bias else None,
        )
        owner, name = path.rsplit(".", 1)
        setattr(inner.get_submodule(owner), name, MoEBlock(Router(gate, torch.empty(E, D)), experts))
    return inner.requires_grad_(True)


def write_native(parent: Parent, carving: Carving, folder: Path) -> dict[str, Any]:
    """Write ``folder`` in moesmith's own format, in the parent's dtype, whole or not at all.

    ``from_pretrained`` gives back ``moe.build(parent, carving, "sliced")`` to the last bit.

    Returns:
        ``architecture``, ``expert_width`` (channels of the widest expert), ``zero_channels`` (share of channels on disk
        that is padding) and ``bytes``.

    Raises:
        MoesmithError: ``folder`` holds something that is not a model, or the disk is full.
    """
    model = build(parent, carving, "sliced")
    experts, widths_LE = moe_blocks(model)[0].experts, carving.widths()
    widths_L = widths_LE.amax(1)
    config = MoesmithConfig(
        parent=parent.config.to_dict() | {"dtype": None},
        gate=carving.gate.model_dump(),
        paths=[ffn.path for ffn in parent.ffns],
        widths=widths_L.tolist(),
        activation=parent.ffns[0].activation_name,
        gated=experts.gated,
        has_bias=experts.bias_ED is not None,
        has_gate_bias=experts.gate_bias_EF is not None,
        architectures=[MoesmithForCausalLM.__name__],
        dtype=parent.model.dtype,
    )
    # the noise matrix belongs to router training and stays in the carving
    tensors = ((f"inner.{name}", p) for name, p in model.named_parameters() if not name.endswith(".router.noise"))
    with whole_folder(folder) as work:
        size = write_shards(work, tensors)
        config.save_pretrained(work)
        write_companions(parent, work)
    return {
        "architecture": MoesmithForCausalLM.__name__,
        "expert_width": int(widths_L.max()),
        "zero_channels": round(1 - float(widths_LE.double().mean(1).sum()) / int(widths_L.sum()), 4),
        "bytes": size,
    }


AutoConfig.register("moesmith", MoesmithConfig)
AutoModelForCausalLM.register(MoesmithConfig, MoesmithForCausalLM)
