"""Find a decoder's layers, feed-forward networks and attention by their structure.

A feed-forward network is gated, y = down(act(gate x) * (up x)), or not, y = down(act(gate x + b)) + c. Nothing here
uses a model's name; numbers settle which reading of the matrices is right. What the rest of the decoder computes is
checked against the model's own activations in ``parent/proof/family.py``.

Shapes: S positions, D model width, F feed-forward width, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from moesmith.errors import MoesmithError
from moesmith.parent.accelerator import closed_form_device

Activation = Callable[[Tensor], Tensor]
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")
KINDS = "moesmith converts decoders whose layers run one by one and whose logits are head(hidden state)."
# the norms of a stock decoder layer: before attention, and before the feed-forward network
STREAM = ("input_layernorm", "post_attention_layernorm")
OUTPUTS = ("o_proj", "dense")  # names of an attention's output projection


def hidden(
    x: Tensor, gate_FD: Tensor, up_FD: Tensor | None, activation: Activation, gate_bias_F: Tensor | None = None
) -> Tensor:
    """Compute the input of ``down``, (…, D) to (…, F): act(gate x) * (up x), or act(gate x + b) without a gate."""
    a = activation(F.linear(x, gate_FD, gate_bias_F))
    return a if up_FD is None else a * F.linear(x, up_FD)


@dataclass
class Network:
    """A feed-forward network, y = down(hidden(x)): gated, or with two matrices and perhaps biases.

    Attributes:
        gate_FD: (F, D), the matrix before the activation.
        up_FD: (F, D), or ``None`` when the network is not gated.
        down_DF: (D, F).
        activation: act, elementwise.
        gate_bias_F: added before the activation, (F,), or ``None``.
        down_bias_D: added to the output, (D,), or ``None``.
    """

    gate_FD: Tensor
    up_FD: Tensor | None
    down_DF: Tensor
    activation: Activation
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Its matrices: gate, up where it is gated, down."""
        return [part for part in (self.gate_FD, self.up_FD, self.down_DF) if part is not None]

    @property
    def matrices(self) -> int:
        """How many matrices the network has: 3 when it is gated, otherwise 2."""
        return len(self.weights)

    def hidden(self, x: Tensor) -> Tensor:
        """The input of ``down``, (…, D) to (…, F)."""
        return hidden(x, self.gate_FD, self.up_FD, self.activation, self.gate_bias_F)

    def output(self, x: Tensor) -> Tensor:
        """What it computes, (…, D) to (…, D)."""
        return F.linear(self.hidden(x), self.down_DF, self.down_bias_D)

    def to(self, *place: Any) -> Network:
        """Move it to a device, a dtype or both, as ``Tensor.to`` does."""
        parts = (self.gate_FD, self.up_FD, self.down_DF, self.gate_bias_F, self.down_bias_D)
        gate_FD, up_FD, down_DF, *biases = (None if part is None else part.to(*place) for part in parts)
        assert gate_FD is not None
        assert down_DF is not None
        return Network(gate_FD, up_FD, down_DF, self.activation, *biases)

    def replaced(self, weights: Sequence[Tensor]) -> Network:
        """The same with other matrices, in the order of :attr:`weights`."""
        gate_FD, *up, down_DF = weights
        return Network(gate_FD, up[0] if up else None, down_DF, self.activation, self.gate_bias_F, self.down_bias_D)

    def narrowed(self, kept: Tensor, down_DF: Tensor) -> Network:
        """Keep some channels, with columns of ``down`` of their own."""
        kept = kept.to(self.gate_FD.device)
        up_FD, bias_F = (None if part is None else part[kept] for part in (self.up_FD, self.gate_bias_F))
        return Network(self.gate_FD[kept], up_FD, down_DF, self.activation, bias_F, self.down_bias_D)


@dataclass(kw_only=True)
class FFN(Network):
    """A parent's feed-forward network; its tensors are views into the model's weights.

    Attributes:
        path: the module's name in the model, e.g. ``model.layers.3.mlp``.
        down: the module whose input is :meth:`hidden`; a forward pre-hook on it sees (…, F).
        module: the whole network; a forward pre-hook on it sees the router's input (…, D).
        activation_name: the activation's name in ``transformers.activations.ACT2FN``.
    """

    path: str
    down: nn.Module
    module: nn.Module
    activation_name: str


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


def put(model: nn.Module, path: str, part: nn.Module | nn.Parameter) -> None:
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
    names = [name for field in ACTIVATION_FIELDS if (name := getattr(model.config, field, None))]
    if not names or names[0] not in ACT2FN:
        raise MoesmithError(
            f"The activation {names or None} of {type(model).__name__} is not known to transformers",
            f"Name one in config.json: {', '.join(ACTIVATION_FIELDS)}.",
        )
    return [_find_ffn(f"{prefix}.{index}", layer, names[0]) for index, layer in enumerate(layers)]


def refuse_moe(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Refuse a model that already has experts."""
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    stacked = any(p.dim() == 3 for layer in layers for n, p in layer.named_parameters() if "expert" in n)
    if stacked or any((getattr(model.config, field, None) or 0) > 1 for field in fields):
        raise MoesmithError(
            f"{type(model).__name__} is already a Mixture-of-Experts", "moesmith starts from a dense model."
        )


def _find_ffn(path: str, layer: nn.Module, activation_name: str) -> FFN:
    activation, seen = ACT2FN[activation_name], []
    for name, module in layer.named_modules():
        linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        for gate, up, down in _readings(list(linears.values())):
            if not _computes(module, activation, gate, up, down):
                continue
            biased = [n for n, m in linears.items() if m.bias is not None]
            if biased and up is not None:
                what = f"{path}.{name} has biases ({', '.join(biased)})"
                raise MoesmithError(what, "No stock Mixture-of-Experts architecture has a place for them.")
            return FFN(
                path=f"{path}.{name}",
                gate_FD=gate[0],
                up_FD=None if up is None else up[0],
                down_DF=down.weight.detach(),
                down=down,
                module=module,
                activation=activation,
                activation_name=activation_name,
                gate_bias_F=gate[1] if len(gate) > 1 else None,
                down_bias_D=None if down.bias is None else down.bias.detach(),
            )
        if "attn" not in name and "attention" not in name:
            shapes = {n: getattr(m, "weight", None) for n, m in module.named_children()}
            seen += [f"{n} {tuple(w.shape)}" for n, w in shapes.items() if w is not None and w.dim() == 2]
    raise MoesmithError(
        f"{path} holds no gated feed-forward network down({activation_name}(gate x) * (up x)), and no module of two "
        f"linear layers that is one without a gate; its matrices outside attention: {', '.join(seen) or 'none'}",
        "moesmith converts SwiGLU-like networks of three matrices (two when gate and up are fused), and plain ones.",
    )


Part = tuple[Tensor, ...]  # a weight, and its bias where there is one


def _readings(linears: list[nn.Linear]) -> Iterator[tuple[Part, Part | None, nn.Linear]]:
    """Yield every reading of a module's matrices as gate, up (``None``: not gated) and down that their shapes allow."""
    if len(linears) not in (2, 3):
        return
    for *inner, down in itertools.permutations(linears):
        width, model_width = down.weight.shape[::-1]
        parts = [tuple(p.detach() for p in linear.parameters()) for linear in inner]
        if len(parts) == 2 and parts[0][0].shape == parts[1][0].shape == (width, model_width):
            yield parts[0], parts[1], down
        if len(parts) == 1 and parts[0][0].shape == (2 * width, model_width):
            first, second = (tuple(half) for half in zip(*(p.chunk(2) for p in parts[0]), strict=True))
            yield first, second, down
            yield second, first, down
        if len(parts) == 1 and parts[0][0].shape == (width, model_width):
            yield parts[0], None, down


@torch.no_grad()
def _computes(module: nn.Module, activation: Activation, gate: Part, up: Part | None, down: nn.Linear) -> bool:
    """Whether the module's output on random input is that of this reading."""
    x_TD = torch.randn(1, 8, gate[0].shape[1], generator=torch.Generator().manual_seed(0)).to(gate[0])
    try:
        theirs = module(x_TD)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # an attention module needs more than x
    a_TF = activation(F.linear(x_TD, *gate))
    ours = down(a_TF if up is None else a_TF * F.linear(x_TD, *up))
    return isinstance(theirs, Tensor) and close(theirs, ours)


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


def attention_window(config: Any) -> int | None:
    """Return how many positions a token attends to (itself included), or ``None`` for all before it.

    A ``sliding_window`` in the config counts only where the architecture declares the field and its layers use it.
    """
    declared = hasattr(type(config), "sliding_window") and "sliding_attention" in (
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
