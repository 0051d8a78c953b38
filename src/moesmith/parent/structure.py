"""Find a decoder's layers, feed-forward networks and attention by their structure.

Nothing here uses a model's name; numbers settle which reading of the matrices is right. What the rest of the decoder
computes is checked against the model's own activations in ``parent/proof/family.py``.

Shapes: S positions, D model width, F feed-forward width, H heads.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from moesmith.errors import MoesmithError
from moesmith.parent.accelerator import closed_form_device
from moesmith.parent.network import FFN, Activation, hidden

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu", "relu2")  # one of these where a config names none
KINDS = "moesmith converts decoders whose layers run one by one and whose logits are head(hidden state)."
# the norms of a stock decoder layer: before attention, and before the feed-forward network
STREAM = ("input_layernorm", "post_attention_layernorm")
OUTPUTS = ("o_proj", "dense")  # names of an attention's output projection


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one function agree within the rounding of their dtype (relative Frobenius norm).

    On the meta device, where a model has shapes and no numbers, equal shapes are all that can be checked.
    """
    if a.shape != b.shape:
        return False
    if a.is_meta:
        return True
    tolerance = 1e-4 if a.dtype == torch.float32 else 4e-2
    place = closed_form_device(a.device)  # some devices have no fp64
    a, b = a.detach().to(place).double(), b.detach().to(place).double()
    return bool((a - b).norm() <= tolerance * b.norm())


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers and its name: the first ``ModuleList`` as long as the config's number of layers.

    Raises:
        MoesmithError: there is none.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise MoesmithError(
        f"{type(model).__name__} has no list of decoder layers", "moesmith converts decoder-only models."
    )


def put(model: nn.Module, path: str, part: nn.Module | Tensor) -> None:
    """Put ``part`` at a dotted path of a model."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, part)


def find_ffns(model: PreTrainedModel) -> list[FFN]:
    """Find each decoder layer's feed-forward network by the shapes of its matrices.

    Three matrices {D→F, D→F, F→D}, or two: {D→2F, F→D} (gate and up fused) or {D→F, F→D} (not gated). Which is the
    gate, and the order inside a fused matrix, are settled by comparing the module's own output with the candidate's.

    Raises:
        MoesmithError: a layer holds no such network; the line says what it holds instead.
    """
    prefix, layers = decoder_layers(model)
    refuse_moe(model, layers)
    named = [name for field in ACTIVATION_FIELDS if (name := getattr(model.config, field, None))]
    if named and named[0] not in ACT2FN:
        raise MoesmithError(
            f"The activation {named[0]} of {type(model).__name__} is not known to transformers",
            f"Name one in config.json: {', '.join(ACTIVATION_FIELDS)}.",
        )
    activation = named[0] if named else _activation_of(layers[0])
    return [_find_ffn(f"{prefix}.{index}", layer, activation) for index, layer in enumerate(layers)]


def refuse_moe(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Refuse a model that already has experts."""
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    stacked = any(p.dim() == 3 for layer in layers for n, p in layer.named_parameters() if "expert" in n)
    if stacked or any((getattr(model.config, field, None) or 0) > 1 for field in fields):
        raise MoesmithError(
            f"{type(model).__name__} is already a Mixture-of-Experts", "moesmith starts from a dense model."
        )


def _find_ffn(path: str, layer: nn.Module, activation_name: str) -> FFN:
    activation = ACT2FN[activation_name]
    for one in _candidates(layer):
        if (both := one.outputs(activation)) is None or not close(*both):
            continue
        (gate_FD, gate_bias_F), (up_FD, up_bias_F), (down_DF, down_bias_D) = one.gate, one.up, one.down
        if up_FD is not None and (gate_bias_F is None) != (up_bias_F is None):
            which = "up" if gate_bias_F is None else "gate"
            raise MoesmithError(f"{path}.{one.name} has a bias in {which} alone", "Give the other zeros.")
        return FFN(
            path=f"{path}.{one.name}",
            gate_FD=gate_FD,
            up_FD=up_FD,
            down_DF=down_DF,
            down=one.last,
            module=one.module,
            activation=activation,
            activation_name=activation_name,
            gate_bias_F=gate_bias_F,
            up_bias_F=up_bias_F,
            down_bias_D=down_bias_D,
        )
    seen = [
        f"{child} {tuple(weight.shape)}"
        for name, module in layer.named_modules()
        if "attn" not in name and "attention" not in name
        for child, part in module.named_children()
        if (weight := getattr(part, "weight", None)) is not None and weight.dim() == 2
    ]
    raise MoesmithError(
        f"{path} holds no gated feed-forward network down({activation_name}(gate x) * (up x)), and no module of two "
        f"linear layers that is one without a gate; its matrices outside attention: {', '.join(seen) or 'none'}",
        "moesmith converts SwiGLU-like networks of three matrices (two when gate and up are fused), and plain ones.",
    )


def _activation_of(layer: nn.Module) -> str:
    """Name the activation of a layer's network, of :data:`ACTIVATIONS`: by numbers, and in fp32, as two are much alike.

    The first of them where nothing can be computed.
    """
    errors = dict.fromkeys(ACTIVATIONS, math.inf)
    for one in (found.in_fp32() for found in _candidates(layer) if not found.gate[0].is_meta):
        for name in ACTIVATIONS:
            both = one.outputs(ACT2FN[name])
            if both is not None and both[0].shape == both[1].shape:
                errors[name] = min(errors[name], float((both[0] - both[1]).norm() / both[1].norm()))
    return min(ACTIVATIONS, key=errors.__getitem__)


Part = tuple[Tensor, Tensor | None]  # a matrix (out, in) and its bias
NONE: tuple[None, None] = (None, None)


@dataclass
class _Candidate:
    """One reading of a module as a feed-forward network: which of its matrices is what.

    Attributes:
        name: the module's, in its layer.
        module: the module.
        last: the part of it that ``down`` is.
        gate, up, down: matrices and biases; no up where it is not gated.
    """

    name: str
    module: nn.Module
    last: nn.Module
    gate: Part
    up: Part | tuple[None, None]
    down: Part

    @torch.no_grad()
    def outputs(self, activation: Activation) -> tuple[Tensor, Tensor] | None:
        """What the module makes of random input, and what this reading does; ``None`` if it needs more than that."""
        (gate_FD, gate_bias_F), (up_FD, up_bias_F) = self.gate, self.up
        x_TD = torch.randn(1, 8, gate_FD.shape[1], generator=torch.Generator().manual_seed(0)).to(gate_FD)
        try:
            theirs = self.module(x_TD)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return None  # an attention module needs more than x
        ours = F.linear(hidden(x_TD, gate_FD, up_FD, activation, gate_bias_F, up_bias_F), *self.down)
        return (theirs, ours) if isinstance(theirs, Tensor) else None

    def in_fp32(self) -> _Candidate:
        """The same in fp32, in a module of its own."""
        parts = [tuple(None if t is None else t.float() for t in part) for part in (self.gate, self.up, self.down)]
        return _Candidate(self.name, copy.deepcopy(self.module).float(), self.last, *parts)  # type: ignore[arg-type]


def _candidates(layer: nn.Module) -> Iterator[_Candidate]:
    """Yield every reading of a layer's modules as gate, up and down that the shapes of their matrices allow."""
    for name, module in layer.named_modules():
        parts = [(child, part) for child in module.children() if (part := _part(child)) is not None]
        if len(parts) not in (2, 3):
            continue
        for *inner, (last, down) in itertools.permutations(parts):
            D, width = down[0].shape
            matrices = [part for _, part in inner]
            shapes = [tuple(weight.shape) for weight, _ in matrices]
            if shapes == [(width, D)] * 2:
                yield _Candidate(name, module, last, matrices[0], matrices[1], down)
            if shapes == [(2 * width, D)]:
                (weight, bias), *_ = matrices
                biases = (None, None) if bias is None else bias.chunk(2)
                halves = list(zip(weight.chunk(2), biases, strict=True))
                yield _Candidate(name, module, last, halves[0], halves[1], down)
                yield _Candidate(name, module, last, halves[1], halves[0], down)
            if shapes == [(width, D)]:
                yield _Candidate(name, module, last, matrices[0], NONE, down)


def _part(module: nn.Module) -> Part | None:
    """A linear module's matrix (out, in) and bias; a ``Conv1D`` holds its matrix the other way round."""
    if not isinstance(module, nn.Linear | Conv1D):
        return None
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight, None if module.bias is None else module.bias.detach()


def attention_of(layer: nn.Module) -> nn.Module:
    """Find the layer's attention: the module with an output projection (:data:`OUTPUTS`) and split or fused q/k/v.

    Raises:
        MoesmithError: there is none.
    """
    for module in layer.modules():
        names = {n for n, _ in module.named_children()}
        if names & set(OUTPUTS) and ({"q_proj", "k_proj", "v_proj"} <= names or "qkv_proj" in names):
            return module
    raise MoesmithError("The decoder layers hold no attention with q/k/v/o projections", KINDS)


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def declares(config: Any, field: str) -> bool:
    """Whether a config's class knows a field: others may stand in a config.json, and nothing reads them."""
    parent = getattr(config, "parent", None)  # our own format's config holds the parent's
    kind = CONFIG_MAPPING[parent["model_type"]] if isinstance(parent, dict) else type(config)
    return hasattr(kind, field)


def rope_of(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotation by position, as the config has them; empty without one."""
    return getattr(config, "rope_parameters", None) or {}


def attention_window(config: Any) -> int | None:
    """Return how many positions a token attends to (itself included), or ``None`` for all before it.

    A ``sliding_window`` in the config counts only where the architecture declares the field and its layers use it.
    """
    declared = declares(config, "sliding_window") and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )
    return getattr(config, "sliding_window", None) or None if declared else None


def attention_weights(layer: nn.Module, config: Any) -> dict[str, Tensor]:
    """Return one layer's attention weights under the names the stock architectures use.

    ``q_proj.weight`` (H·head_dim, D), ``k_proj.weight``, ``v_proj.weight``, ``o_proj.weight`` and, where the
    parent has them, ``*_proj.bias`` and ``q_norm.weight``, ``k_norm.weight`` (head_dim). A fused
    ``qkv_proj`` is split; anything else keeps its own name.
    """
    weights = {n: p.detach() for n, p in attention_of(layer).named_parameters()}
    for kind in ("weight", "bias"):
        if (output := weights.pop(f"dense.{kind}", None)) is not None:
            weights[f"o_proj.{kind}"] = output
    kv = config.num_key_value_heads * head_dim(config)
    sizes = [config.num_attention_heads * head_dim(config), kv, kv]
    for kind in ("weight", "bias"):
        if (fused := weights.pop(f"qkv_proj.{kind}", None)) is not None:
            weights |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", fused.split(sizes), strict=True)}
    return weights
