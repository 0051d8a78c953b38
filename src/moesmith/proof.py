"""Which architecture holds a decoder, proved by numbers.

A parent with gated feed-forward networks qualifies when it computes what the stock Mixture-of-Experts architectures
compute, its networks apart: RMS-normalised pre-norm residual layers and rotary attention scaled by head_dim^-1/2. No
stock architecture has experts without a gate, so a parent of plain networks goes to moesmith's own format; it qualifies
when its layers are parallel, x + attention(n(x)) + network(n(x)), with a layer norm n and the same attention, which may
have biases everywhere and rotate only a part of each head. Each claim is held against the model's own activations, so
a model that differs in a detail is refused by that detail at the start, not after hours of training.

Shapes: B batch, S positions, D model width, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.structure import (
    FFN,
    KINDS,
    STREAM,
    attention_of,
    attention_weights,
    attention_window,
    close,
    decoder_layers,
    head_dim,
)

NATIVE = "native"  # the family of a parent that only moesmith's own format can hold (native/)

OTHER_LOGITS = "The parent's logits are not its output matrix times the last hidden state"

# Config fields that change the function, and the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}
# Config fields that attention is computed from.
NEEDED = {"rope_parameters": "positions", "num_key_value_heads": "attention"}


def find_family(model: PreTrainedModel, ffns: list[FFN]) -> str:
    """What holds this decoder: ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``, or :data:`NATIVE`, our own format.

    Networks without a gate → our own format. Otherwise q/k norms per head → Qwen3-MoE; q/k/v biases → Qwen2-MoE;
    neither → Mixtral. The decoder's function is then proved on a short random text (:func:`prove_stock`,
    :func:`prove_parallel`).

    Raises:
        MoesmithError: a property that none of them has; it is named.
    """
    _, layers = decoder_layers(model)
    plain, config = any(ffn.up_FD is None for ffn in ffns), model.config
    if plain:
        refuse_config(config, NEUTRAL, NEEDED)
    else:
        refuse_config(config, NEUTRAL | {"partial_rotary_factor": (1.0,)}, {"rms_norm_eps": "norms"} | NEEDED)
    names = set(attention_weights(layers[0], config))
    known = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    extra = names - known - ({"q_norm.weight", "k_norm.weight"} if not plain else set())
    biases = {n[0] for n in names if n.endswith("_proj.bias")}
    norms = {n for n in names if "norm" in n}
    misfit = "o" in biases or (biases and biases != set("qkv")) or (norms and biases)
    if extra or (misfit and not plain):
        odd = sorted(extra) or sorted(n for n in names if n.endswith("bias")) + sorted(norms)
        raise MoesmithError(f"The parent's attention has {', '.join(odd)}", KINDS)
    if model.device.type != "meta":  # shapes alone: nothing can be proved
        (prove_parallel if plain else prove_stock)(model, ffns)
    if plain:
        return NATIVE
    return "qwen3_moe" if norms else "qwen2_moe" if biases else "mixtral"


def refuse_config(config: Any, neutral: dict[str, tuple[Any, ...]], needed: dict[str, str]) -> None:
    """Refuse fields that change the function, fields that are missing, and layers that differ."""
    for field, values in neutral.items():
        value = getattr(config, field, None)
        if field == "partial_rotary_factor":
            value = (getattr(config, "rope_parameters", None) or {}).get(field, value)
        if value is not None and value not in values:
            raise MoesmithError(f"The parent has {field} = {value}", KINDS)
    for field, what in needed.items():
        if getattr(config, field, None) is None:
            raise MoesmithError(f"The parent's config has no {field}: it has {what} of another kind", KINDS)
    if len(set(getattr(config, "layer_types", None) or [None])) > 1:
        raise MoesmithError("The parent's attention differs between layers (layer_types)", KINDS)


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


class Witness:
    """A decoder's activations on a short random text, and what they are held against.

    Attributes:
        layers: the decoder layers.
        stream: the embedding of the text, (B, S, D): what the first layer must get.
        hidden: the last hidden state, (B, S, D).
        seen: ``in name`` and ``out name`` for every ``layer i``, ``attention i``, ``ffn i``, ``final norm``, and the
            norms of the layers.
    """

    def __init__(
        self, model: PreTrainedModel, ffns: list[FFN], norms: list[dict[str, nn.Module]], final: nn.Module, like: str
    ) -> None:
        """Run the text; ``norms`` are each layer's by name, ``like`` says what differs in a refusal.

        Raises:
            MoesmithError: the logits are not head(last hidden state), which training and evaluation rely on.
        """
        self.config, self.layers, self.like = model.config, decoder_layers(model)[1], like
        modules: dict[str, nn.Module] = {"final norm": final}
        for i, (layer, ffn) in enumerate(zip(self.layers, ffns, strict=True)):
            modules |= {f"layer {i}": layer, f"attention {i}": attention_of(layer), f"ffn {i}": ffn.module}
            modules |= {f"{name} {i}": norm for name, norm in norms[i].items()}
        ids = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
        ids = ids.to(model.device)
        with _recorded(modules) as self.seen:
            logits = model(input_ids=ids, use_cache=False).logits
        self.hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        if head is None or not close(F.linear(self.hidden, head.weight, head.bias), logits):
            raise MoesmithError(OTHER_LOGITS, KINDS)
        self.stream = F.embedding(ids, embedding.weight)

    def demand(self, what: str, theirs: Tensor | None, ours: Tensor) -> None:
        """Refuse the parent unless two activations agree."""
        if theirs is None or not close(theirs, ours):
            raise MoesmithError(f"The parent's {what} differs from {self.like}", KINDS)

    def rope(self, i: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines that layer ``i``'s attention was given."""
        rope: tuple[Tensor, Tensor] | None = self.seen[f"rope attention {i}"]
        if rope is None:
            raise MoesmithError("The parent's attention has no rotary position embedding", KINDS)
        return rope

    def demand_attention(self, i: int) -> None:
        """Refuse the parent unless layer ``i``'s attention is causal rotary attention on its input."""
        x_BSD = self.seen[f"in attention {i}"]
        ours = _attention(self.layers[i], self.config, x_BSD, self.rope(i))
        self.demand(f"attention of layer {i}", self.seen[f"out attention {i}"], ours)


@torch.no_grad()
def prove_stock(model: PreTrainedModel, ffns: list[FFN]) -> None:
    """Hold the decoder's activations against the stock architectures' formulas.

    Embedding, RMS norms, rotary attention, the two residual sums, the final norm, and the logits.

    Raises:
        MoesmithError: one of them differs; it is named.
    """
    _, layers = decoder_layers(model)
    config, width = model.config, head_dim(model.config)
    final = getattr(model.base_model, "norm", None)
    if final is None or any(not hasattr(layer, n) for layer in layers for n in STREAM):
        raise MoesmithError("The parent's layers have other norms than the stock architectures", KINDS)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise MoesmithError(OTHER_LOGITS, KINDS)
    norms = [{name: getattr(layer, name) for name in STREAM} for layer in layers]
    witness = Witness(model, ffns, norms, final, "the stock architectures'")
    demand, seen, stream = witness.demand, witness.seen, witness.stream
    for i in range(len(layers)):
        attention, ffn_out = seen[f"out attention {i}"], seen[f"out ffn {i}"]
        demand(f"input to layer {i}", seen[f"in layer {i}"], stream)
        for name, residual in zip(STREAM, (stream, stream + attention), strict=True):
            demand(f"{name} of layer {i}", seen[f"out {name} {i}"], _rms(residual, norms[i][name], config))
        demand(f"attention input of layer {i}", seen[f"in attention {i}"], seen[f"out {STREAM[0]} {i}"])
        demand(f"feed-forward input of layer {i}", seen[f"in ffn {i}"], seen[f"out {STREAM[1]} {i}"])
        if (rotated := witness.rope(i)[0].shape[-1]) != width:
            raise MoesmithError(f"The parent rotates {rotated} of {width} dimensions of a head", KINDS)
        witness.demand_attention(i)
        demand(f"residual sum of layer {i}", seen[f"out layer {i}"], stream + attention + ffn_out)
        stream = seen[f"out layer {i}"]
    demand("final norm", seen["out final norm"], _rms(stream, final, config))
    demand("last hidden state", witness.hidden, seen["out final norm"])


@torch.no_grad()
def prove_parallel(model: PreTrainedModel, ffns: list[FFN]) -> None:
    """Hold the decoder's activations against x + attention(n(x)) + network(n(x)) with one layer norm n per layer.

    Embedding, layer norms, rotary attention, the residual sum, the final layer norm, and the logits.

    Raises:
        MoesmithError: one of them differs; it is named.
    """
    _, layers = decoder_layers(model)
    found = [_layer_norms(module) for module in (*layers, model.base_model)]
    if any(len(norms) != 1 for norms in found):
        counts = ", ".join(sorted({str(len(norms)) for norms in found if len(norms) != 1}))
        what = f"The parent's networks have no gate, and its layers or its end have {counts} layer norms instead of one"
        raise MoesmithError(what, KINDS)
    *norms, final = [norm for (norm,) in found]
    witness = Witness(model, ffns, [{"norm": norm} for norm in norms], final, "a parallel decoder's")
    demand, seen, stream = witness.demand, witness.seen, witness.stream
    for i, norm in enumerate(norms):
        demand(f"input to layer {i}", seen[f"in layer {i}"], stream)
        demand(f"norm of layer {i}", seen[f"out norm {i}"], _layer_norm(stream, norm))
        demand(f"attention input of layer {i}", seen[f"in attention {i}"], seen[f"out norm {i}"])
        demand(f"feed-forward input of layer {i}", seen[f"in ffn {i}"], seen[f"out norm {i}"])
        witness.demand_attention(i)
        ours = stream + seen[f"out attention {i}"] + seen[f"out ffn {i}"]
        demand(f"residual sum of layer {i}", seen[f"out layer {i}"], ours)
        stream = seen[f"out layer {i}"]
    demand("final norm", seen["out final norm"], _layer_norm(stream, final))
    demand("last hidden state", witness.hidden, seen["out final norm"])


def _layer_norms(module: nn.Module) -> list[nn.LayerNorm]:
    return [child for child in module.children() if isinstance(child, nn.LayerNorm)]


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rms(x: Tensor, norm: Any, config: Any) -> Tensor:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    return norm.weight * scaled.to(x.dtype)


def _attention(layer: nn.Module, config: Any, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Causal rotary attention as Mixtral, Qwen2-MoE and Qwen3-MoE compute it.

    Dimensions of a head beyond the rope's are not rotated.
    """
    weights, width = attention_weights(layer, config), head_dim(config)
    module = attention_of(layer)

    def project(name: str) -> Tensor:
        y_BSN = F.linear(x_BSD, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))
        y_BSHW = y_BSN.unflatten(-1, (-1, width))
        if f"{name}_norm.weight" in weights:
            if weights[f"{name}_norm.weight"].numel() != width:
                raise MoesmithError(f"The parent's {name}_norm spans all heads", KINDS)
            y_BSHW = _rms(y_BSHW, getattr(module, f"{name}_norm"), config)
        return y_BSHW.transpose(1, 2)

    def rotate(y_BHSW: Tensor) -> Tensor:
        turned, passed = y_BHSW.tensor_split([rope[0].shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        turned = turned * rope[0][:, None] + torch.cat((-second, first), -1) * rope[1][:, None]
        return torch.cat((turned, passed), -1)

    groups = config.num_attention_heads // config.num_key_value_heads
    q, k, v = rotate(project("q")), rotate(project("k")), project("v")
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    visible = (distance >= 0) & (distance < (attention_window(config) or len(distance)))
    y_BHSW = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.to(q.device), scale=width**-0.5)
    return F.linear(y_BHSW.transpose(1, 2).flatten(2), weights["o_proj.weight"], weights.get("o_proj.bias"))
