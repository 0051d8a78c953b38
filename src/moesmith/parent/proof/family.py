"""Find the architecture that can hold a decoder, and prove it by numbers.

A parent with gated feed-forward networks qualifies when, apart from these, it computes what the stock
Mixture-of-Experts architectures compute: RMS-normalised pre-norm residual layers and rotary attention scaled by
head_dim^-1/2. No stock architecture has experts without a gate, so a parent of plain networks goes to moesmith's own
format; it qualifies when its layers are parallel, x + attention(n(x)) + network(n(x)), with a layer norm n and the same
attention, which may have biases everywhere and rotate only a part of each head. Each claim is checked against the
model's own activations, so a model that differs in a detail is refused for it at the start, not after hours of work.

Shapes: B batch, S positions, D model width, H heads, W head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.parent.network import FFN
from moesmith.parent.proof.carvable import prove_carvable
from moesmith.parent.proof.positions import prove_positions
from moesmith.parent.proof.reference import layer_norm, rms_norm
from moesmith.parent.proof.rope import stock_rope
from moesmith.parent.proof.witness import OTHER_LOGITS, Witness
from moesmith.parent.structure import KINDS, STREAM, attention_weights, decoder_layers, head_dim, rope_of

NATIVE = "native"  # the family of a parent that only moesmith's own format can hold (native/)

# Config fields that change the function, and the value with which they do not. A field without one, such as a soft
# cap, always changes it.
NEUTRAL: dict[str, float | None] = {
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
PREPARE = "prepare_inputs_for_generation"
# Config fields that attention is computed from.
NEEDED = {"rope_parameters": "positions", "num_key_value_heads": "attention"}


@dataclass(frozen=True)
class Home:
    """What holds a parent.

    Attributes:
        family: a stock architecture, or :data:`NATIVE`.
        why: why no stock architecture holds it, where it is only known to be carvable (``proof/carvable.py``).
        additive: whether layers add their networks' outputs as they are.
    """

    family: str
    why: str = ""
    additive: bool = True


def find_home(model: PreTrainedModel, ffns: list[FFN]) -> Home:
    """Find what holds a decoder: what :func:`find_family` proves, or our own format if it can be carved at all.

    Raises:
        MoesmithError: it cannot be carved; the line says why it is none of the decoders that are known better.
    """
    try:
        return Home(find_family(model, ffns))
    except MoesmithError as error:
        if KINDS not in str(error):  # it says what to do
            raise
        why = str(error).partition(f". {KINDS}")[0]
        if model.device.type == "meta":  # shapes alone: nothing can be proved
            return Home(NATIVE, why)
        try:
            return Home(NATIVE, why, prove_carvable(model, ffns))
        except MoesmithError as other:
            if OTHER_LOGITS in str(error):
                raise
            raise MoesmithError(f"{why}; {other.args[0].rstrip('.')}", KINDS) from error


def find_family(model: PreTrainedModel, ffns: list[FFN]) -> str:
    """Name what holds this decoder: ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``, or :data:`NATIVE`, our own format.

    Networks without a gate → our own format. Otherwise q/k norms per head → Qwen3-MoE; q/k/v biases → Qwen2-MoE;
    neither → Mixtral. A model that computes its cache again when a text outgrows the original context, as no stock
    architecture does → our own format (:func:`recomputes`). The decoder's function is then proved on a short random
    text (:func:`prove_stock`, :func:`prove_parallel`), its attention far into the context
    (``parent/proof/positions.py``).

    Raises:
        MoesmithError: it has a property that none of them has; it is named.
    """
    _, layers = decoder_layers(model)
    plain, config = any(ffn.up_FD is None for ffn in ffns), model.config
    neutral = neutral_values(config)
    if plain:
        refuse_config(config, neutral, NEEDED)
    else:
        refuse_config(config, neutral | {"partial_rotary_factor": 1.0}, {"rms_norm_eps": "norms"} | NEEDED)
    if not plain and any(bias is not None for ffn in ffns for bias in ffn.biases):
        raise MoesmithError("The parent's networks have a gate and biases", KINDS)
    names = set(attention_weights(layers[0], config))
    known = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    extra = names - known - ({"q_norm.weight", "k_norm.weight"} if not plain else set())
    biases = {n[0] for n in names if n.endswith("_proj.bias")}
    norms = {n for n in names if "norm" in n}
    misfit = "o" in biases or (biases and biases != set("qkv")) or (norms and biases)
    if extra or (misfit and not plain):
        odd = sorted(extra) or sorted(n for n in names if n.endswith("bias")) + sorted(norms)
        raise MoesmithError(f"The parent's attention has {', '.join(odd)}", KINDS)
    family = NATIVE if plain else "qwen3_moe" if norms else "qwen2_moe" if biases else "mixtral"
    if model.device.type != "meta":  # shapes alone: nothing can be proved
        (prove_parallel if plain else prove_stock)(model, ffns, stock_rope(family, config))
    return NATIVE if recomputes(model) else family


def neutral_values(config: Any) -> dict[str, float | None]:
    """Return :data:`NEUTRAL` and the scales of attention's scores, neutral where they follow from the head's width."""
    width = head_dim(config)
    return NEUTRAL | {"attention_multiplier": width**-0.5, "query_pre_attn_scalar": float(width)}


def recomputes(model: PreTrainedModel) -> bool:
    """Whether ``generate`` computes all keys again once a text outgrows the original context, as Phi-3's does.

    Rotations with long factors then hold for the whole text. A stock architecture would keep the old keys.
    """
    rope = rope_of(model.config)
    original = rope.get("original_max_position_embeddings") or math.inf
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    own = getattr(type(model), PREPARE, None) is not getattr(GenerationMixin, PREPARE)
    return own and rope.get("rope_type") == "longrope" and original < longest


def refuse_config(config: Any, neutral: dict[str, float | None], needed: dict[str, str]) -> None:
    """Refuse fields that change the function, fields that are missing, and layers that differ."""
    for field, same in neutral.items():
        value = getattr(config, field, None)
        if field == "partial_rotary_factor":
            value = rope_of(config).get(field, value)
        if value is None or (same is not None and math.isclose(value, same, rel_tol=1e-5)):
            continue
        raise MoesmithError(f"The parent has {field} = {value}", KINDS)
    for field, what in needed.items():
        if getattr(config, field, None) is None:
            raise MoesmithError(f"The parent's config has no {field}: it has {what} of another kind", KINDS)
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    if window and not hasattr(type(config), "sliding_window") and window < (longest or window):
        raise MoesmithError(
            f"The parent's config has sliding_window = {window}, which its code does not read and transformers' "
            "cache does: generation differs from a forward pass",
            "Remove sliding_window from config.json.",
        )
    if len(set(getattr(config, "layer_types", None) or [None])) > 1:
        raise MoesmithError("The parent's attention differs between layers (layer_types)", KINDS)


@torch.no_grad()
def prove_stock(model: PreTrainedModel, ffns: list[FFN], rope: nn.Module) -> None:
    """Check the decoder's activations against the stock architectures' formulas.

    Embedding, RMS norms, rotary attention, the two residual sums, the final norm, and the logits.

    Raises:
        MoesmithError: one of them differs; it is named.
    """
    _, layers = decoder_layers(model)
    config = model.config
    final = getattr(model.base_model, "norm", None)
    if final is None or any(not hasattr(layer, n) for layer in layers for n in STREAM):
        raise MoesmithError("The parent's layers have other norms than the stock architectures", KINDS)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise MoesmithError(OTHER_LOGITS, KINDS)
    norms = [{name: getattr(layer, name) for name in STREAM} for layer in layers]
    _prove(model, ffns, rope, norms, final, lambda x, norm: rms_norm(x, norm, config), "the stock architectures'")


@torch.no_grad()
def prove_parallel(model: PreTrainedModel, ffns: list[FFN], rope: nn.Module) -> None:
    """Check the decoder's activations against x + attention(n(x)) + network(n(x)) with one layer norm n per layer.

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
    _prove(model, ffns, rope, [{"norm": norm} for norm in norms], final, layer_norm, "a parallel decoder's")


def _prove(
    model: PreTrainedModel,
    ffns: list[FFN],
    rope: nn.Module,
    norms: list[dict[str, nn.Module]],
    final: nn.Module,
    formula: Callable[[Tensor, Any], Tensor],
    like: str,
) -> None:
    """Hold a decoder of residual sums against its formulas; ``formula`` is what a norm computes of its input.

    ``norms`` are each layer's by name: the one before attention, then the network's where it has one of its own.
    """
    witness = Witness(model, ffns, norms, final, rope, like)
    demand, seen, stream = witness.demand, witness.seen, witness.stream
    for i, named in enumerate(norms):
        attention, ffn_out, names = seen[f"out attention {i}"], seen[f"out ffn {i}"], [*named]
        demand(f"input to layer {i}", seen[f"in layer {i}"], stream)
        for name, residual in zip(names, (stream, stream + attention), strict=False):
            demand(f"{name} of layer {i}", seen[f"out {name} {i}"], formula(residual, named[name]))
        demand(f"attention input of layer {i}", seen[f"in attention {i}"], seen[f"out {names[0]} {i}"])
        demand(f"feed-forward input of layer {i}", seen[f"in ffn {i}"], seen[f"out {names[-1]} {i}"])
        witness.demand_rope(i)
        witness.demand_attention(i)
        demand(f"residual sum of layer {i}", seen[f"out layer {i}"], stream + attention + ffn_out)
        stream = seen[f"out layer {i}"]
    demand("final norm", seen["out final norm"], formula(stream, final))
    demand("last hidden state", witness.hidden, seen["out final norm"])
    prove_positions(model, ffns, rope, like)


def _layer_norms(module: nn.Module) -> list[nn.LayerNorm]:
    return [child for child in module.children() if isinstance(child, nn.LayerNorm)]
