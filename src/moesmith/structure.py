"""What a decoder is made of, found by structure and proved by numbers.

A parent qualifies when it computes what the stock Mixture-of-Experts architectures compute, its feed-forward
network apart: RMS-normalised pre-norm residual layers, rotary attention scaled by head_dim^-1/2, and a gated
feed-forward network y = down(act(gate x) * (up x)). Nothing here asks for a model's name. Each claim is held
against the model's own activations, so a model that differs in a detail is refused by that detail at the
start, not after hours of training.

Shapes: S positions, D model width, F feed-forward width, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from moesmith.errors import MoesmithError

Activation = Callable[[Tensor], Tensor]
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")
NATIVE_ONLY = "moesmith converts decoders whose attention a stock Mixtral, Qwen2-MoE or Qwen3-MoE can hold."

# Config fields that change the function, and the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "partial_rotary_factor": (1.0,),
}
# Config fields that the stock architectures are built from.
NEEDED = {"rms_norm_eps": "norms", "rope_parameters": "positions", "num_key_value_heads": "attention"}


@dataclass
class FFN:
    """One gated feed-forward network: y = down(act(gate x) * (up x)).

    Attributes:
        path: the module's name in the model, e.g. ``model.layers.3.mlp``.
        gate_FD: (F, D), a view into the model's weights, as are ``up_FD`` and ``down_DF``.
        up_FD: (F, D).
        down_DF: (D, F).
        down: the module whose input is act(gate x) * (up x); a forward pre-hook on it sees (…, F).
        module: the whole network; a forward pre-hook on it sees the router's input (…, D).
        activation: act, elementwise.
        activation_name: act's name in ``transformers.activations.ACT2FN``.
    """

    path: str
    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    down: nn.Module
    module: nn.Module
    activation: Activation
    activation_name: str


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one function agree within the rounding of their dtype (relative Frobenius norm)."""
    if a.shape != b.shape:
        return False
    tolerance = 1e-4 if a.dtype == torch.float32 else 4e-2
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).norm() <= tolerance * b.norm())


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: the first ``ModuleList`` as long as the config says the model is deep.

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


def find_ffns(model: PreTrainedModel) -> list[FFN]:
    """Find each decoder layer's gated feed-forward network by the shapes of its matrices.

    Three matrices {D→F, D→F, F→D} or two {D→2F, F→D} (gate and up fused). Which is the gate, and the order
    inside a fused matrix, are settled by comparing the module's own output with the candidate's.

    Raises:
        MoesmithError: a layer holds no such network; the line says what it holds instead.
    """
    prefix, layers = decoder_layers(model)
    refuse_moe(model, layers)
    names = [name for field in ACTIVATION_FIELDS if (name := getattr(model.config, field, None))]
    if not names or names[0] not in ACT2FN:
        raise MoesmithError(f"The activation {names or None} of {type(model).__name__} is not known to transformers")
    return [_find_ffn(f"{prefix}.{index}", layer, names[0]) for index, layer in enumerate(layers)]


def refuse_moe(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Refuse a model that already has experts."""
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    stacked = any(p.dim() == 3 for layer in layers for n, p in layer.named_parameters() if "expert" in n)
    if stacked or any((getattr(model.config, field, None) or 0) > 1 for field in fields):
        raise MoesmithError(
            f"{type(model).__name__} is a Mixture-of-Experts already", "moesmith starts from a dense model."
        )


def _find_ffn(path: str, layer: nn.Module, activation_name: str) -> FFN:
    activation, seen = ACT2FN[activation_name], []
    for name, module in layer.named_modules():
        linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        for (gate_FD, *gate_bias), (up_FD, *up_bias), down in _readings(list(linears.values())):
            if not _computes(module, activation, (gate_FD, *gate_bias), (up_FD, *up_bias), down):
                continue
            if biased := [n for n, m in linears.items() if m.bias is not None]:
                what = f"{path}.{name} has biases ({', '.join(biased)})"
                raise MoesmithError(what, "No stock Mixture-of-Experts architecture has a place for them.")
            down_DF = down.weight.detach()
            return FFN(f"{path}.{name}", gate_FD, up_FD, down_DF, down, module, activation, activation_name)
        if "attn" not in name and "attention" not in name:
            shapes = {n: getattr(m, "weight", None) for n, m in module.named_children()}
            seen += [f"{n} {tuple(w.shape)}" for n, w in shapes.items() if w is not None and w.dim() == 2]
    raise MoesmithError(
        f"{path} holds no gated feed-forward network down({activation_name}(gate x) * (up x)); "
        f"its matrices outside attention: {', '.join(seen) or 'none'}",
        "moesmith converts SwiGLU-like networks of three matrices (two when gate and up are fused).",
    )


Part = tuple[Tensor, ...]  # a weight, and its bias where there is one


def _readings(linears: list[nn.Linear]) -> Iterator[tuple[Part, Part, nn.Linear]]:
    """Every reading of a module's matrices as gate, up and down that their shapes allow."""
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


@torch.no_grad()
def _computes(module: nn.Module, activation: Activation, gate: Part, up: Part, down: nn.Linear) -> bool:
    """Whether the module's output on random input is that of this reading."""
    x_TD = torch.randn(1, 8, gate[0].shape[1], generator=torch.Generator().manual_seed(0)).to(gate[0])
    try:
        theirs = module(x_TD)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # an attention module wants more than x
    ours = down(activation(F.linear(x_TD, *gate)) * F.linear(x_TD, *up))
    return isinstance(theirs, Tensor) and close(theirs, ours)


def attention_of(layer: nn.Module) -> nn.Module:
    """The layer's attention: the module with an output projection and split or fused q/k/v projections.

    Raises:
        MoesmithError: there is none.
    """
    for module in layer.modules():
        names = {n for n, _ in module.named_children()}
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= names or {"qkv_proj", "o_proj"} <= names:
            return module
    raise MoesmithError("The decoder layers hold no attention with q/k/v/o projections", NATIVE_ONLY)


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_window(config: Any) -> int | None:
    """Positions a token attends to (itself included), or ``None`` for all before it.

    A ``sliding_window`` in the config counts only where the architecture knows the field and its layers use it.
    """
    declared = hasattr(type(config), "sliding_window") and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )
    return getattr(config, "sliding_window", None) or None if declared else None


def attention_weights(layer: nn.Module, config: Any) -> dict[str, Tensor]:
    """One layer's attention under the names the stock architectures use.

    ``q_proj.weight`` (H·head_dim, D), ``k_proj.weight``, ``v_proj.weight``, ``o_proj.weight`` and, where the
    parent has them, ``*_proj.bias`` and ``q_norm.weight``, ``k_norm.weight`` (head_dim). A fused
    ``qkv_proj`` is split.
    """
    weights = {n: p.detach() for n, p in attention_of(layer).named_parameters()}
    kv = config.num_key_value_heads * head_dim(config)
    sizes = [config.num_attention_heads * head_dim(config), kv, kv]
    for kind in ("weight", "bias"):
        if (fused := weights.pop(f"qkv_proj.{kind}", None)) is not None:
            weights |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", fused.split(sizes), strict=True)}
    return weights


def find_family(model: PreTrainedModel, ffns: list[FFN]) -> str:
    """The stock architecture that holds this decoder's attention: ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``.

    q/k norms per head → Qwen3-MoE; q/k/v biases → Qwen2-MoE; neither → Mixtral. The decoder's function is then
    proved on a short random text (:func:`prove`).

    Raises:
        MoesmithError: a property that no stock architecture has; it is named.
    """
    _, layers = decoder_layers(model)
    config = model.config
    for field, neutral in NEUTRAL.items():
        value = getattr(config, field, None)
        if field == "partial_rotary_factor":
            value = (getattr(config, "rope_parameters", None) or {}).get(field, value)
        if value is not None and value not in neutral:
            raise MoesmithError(f"The parent has {field} = {value}", NATIVE_ONLY)
    for field, what in NEEDED.items():
        if getattr(config, field, None) is None:
            raise MoesmithError(f"The parent's config has no {field}: it has {what} of another kind", NATIVE_ONLY)
    if len(set(getattr(config, "layer_types", None) or [None])) > 1:
        raise MoesmithError("The parent's attention differs between layers (layer_types)", NATIVE_ONLY)
    names = set(attention_weights(layers[0], config))
    known = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    extra = names - known - {"q_norm.weight", "k_norm.weight"}
    biases = {n[0] for n in names if n.endswith("_proj.bias")}
    norms = {n for n in names if "norm" in n}
    if extra or "o" in biases or (biases and biases != set("qkv")) or (norms and biases):
        odd = sorted(extra) or sorted(n for n in names if n.endswith("bias")) + sorted(norms)
        raise MoesmithError(f"The parent's attention has {', '.join(odd)}", NATIVE_ONLY)
    prove(model, ffns)
    return "qwen3_moe" if norms else "qwen2_moe" if biases else "mixtral"


STREAM = ("input_layernorm", "post_attention_layernorm")


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Record, while inside, each module's hidden-state input (``in name``), output (``out name``) and rope."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[f"in {name}"] = args[0] if args else kwargs.get("hidden_states")
            seen[f"out {name}"] = output[0] if isinstance(output, tuple) else output
            seen[f"rope {name}"] = kwargs.get("position_embeddings")

        return record

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prove(model: PreTrainedModel, ffns: list[FFN]) -> None:
    """Hold the decoder's activations on a short random text against the stock architectures' formulas.

    Embedding, RMS norms, rotary attention, the two residual sums, the final norm, and logits = head(final hidden),
    which training and evaluation rely on.

    Raises:
        MoesmithError: one of them differs; it is named.
    """
    _, layers = decoder_layers(model)
    config, head = model.config, model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    final = getattr(model.base_model, "norm", None)
    if final is None or any(not hasattr(layer, n) for layer in layers for n in STREAM):
        raise MoesmithError("The parent's layers have other norms than the stock architectures", NATIVE_ONLY)
    modules: dict[str, nn.Module] = {"final norm": final}
    for i, (layer, ffn) in enumerate(zip(layers, ffns, strict=True)):
        modules |= {f"layer {i}": layer, f"attention {i}": attention_of(layer), f"ffn {i}": ffn.module}
        modules |= {f"{n} {i}": getattr(layer, n) for n in STREAM}
    ids = torch.randint(config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    with _recorded(modules) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if head is None or getattr(head, "bias", None) is not None or not close(head(hidden), logits):
        raise MoesmithError("The parent's logits are not its output matrix times the last hidden state", NATIVE_ONLY)

    def demand(what: str, theirs: Tensor | None, ours: Tensor) -> None:
        if theirs is None or not close(theirs, ours):
            raise MoesmithError(f"The parent's {what} differs from the stock architectures'", NATIVE_ONLY)

    stream = F.embedding(ids, embedding.weight)
    for i, layer in enumerate(layers):
        attention, ffn_out = seen[f"out attention {i}"], seen[f"out ffn {i}"]
        demand(f"input to layer {i}", seen[f"in layer {i}"], stream)
        for name, residual in zip(STREAM, (stream, stream + attention), strict=True):
            demand(f"{name} of layer {i}", seen[f"out {name} {i}"], _rms(residual, getattr(layer, name), config))
        demand(f"attention input of layer {i}", seen[f"in attention {i}"], seen[f"out {STREAM[0]} {i}"])
        demand(f"feed-forward input of layer {i}", seen[f"in ffn {i}"], seen[f"out {STREAM[1]} {i}"])
        rope = seen[f"rope attention {i}"]
        if rope is None:
            raise MoesmithError("The parent's attention has no rotary position embedding", NATIVE_ONLY)
        demand(f"attention of layer {i}", attention, _attention(layer, config, seen[f"in attention {i}"], rope))
        demand(f"residual sum of layer {i}", seen[f"out layer {i}"], stream + attention + ffn_out)
        stream = seen[f"out layer {i}"]
    demand("final norm", seen["out final norm"], _rms(stream, final, config))
    demand("last hidden state", hidden, seen["out final norm"])


def _rms(x: Tensor, norm: Any, config: Any) -> Tensor:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    return norm.weight * scaled.to(x.dtype)


def _attention(layer: nn.Module, config: Any, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Causal rotary attention as Mixtral, Qwen2-MoE and Qwen3-MoE compute it."""
    weights, width = attention_weights(layer, config), head_dim(config)
    module = attention_of(layer)

    def project(name: str) -> Tensor:
        y_BSN = F.linear(x_BSD, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))
        y_BSHW = y_BSN.unflatten(-1, (-1, width))
        if f"{name}_norm.weight" in weights:
            if weights[f"{name}_norm.weight"].numel() != width:
                raise MoesmithError(f"The parent's {name}_norm spans all heads", NATIVE_ONLY)
            y_BSHW = _rms(y_BSHW, getattr(module, f"{name}_norm"), config)
        return y_BSHW.transpose(1, 2)

    def rotate(y_BHSW: Tensor) -> Tensor:
        first, second = y_BHSW.chunk(2, -1)
        return y_BHSW * rope[0][:, None] + torch.cat((-second, first), -1) * rope[1][:, None]

    if rope[0].shape[-1] != width:
        raise MoesmithError(f"The parent rotates {rope[0].shape[-1]} of {width} dimensions of a head", NATIVE_ONLY)
    groups = config.num_attention_heads // config.num_key_value_heads
    q, k, v = rotate(project("q")), rotate(project("k")), project("v")
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    visible = (distance >= 0) & (distance < (attention_window(config) or len(distance)))
    y_BHSW = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.to(q.device), scale=width**-0.5)
    return F.linear(y_BHSW.transpose(1, 2).flatten(2), weights["o_proj.weight"])
