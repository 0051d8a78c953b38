"""Count the parameters of a carving: only here, and equal to what the tensors in the files hold.

A format says how wide its experts are and what is stored next to them; the rest is shape arithmetic, so that a plan can
count before there are weights. Index lists and a gate's bool and scalar values do not count as weights.

Shapes: L layers, D model width, F_e an expert's width, E experts, K active experts.
"""

from __future__ import annotations

from moesmith.mixture.carving import Carving
from moesmith.mixture.home import home_of
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.parent.structure import attention_weights, decoder_layers


def active_share(parent: Parent, carving: Carving) -> float:
    """Divide active parameters by the parent's: block matrices only, each layer's widest experts (ToMoE, eq. 8).

    A ToMoE budget fixes this number; for experts of equal width it is the exact share of every token.
    """
    sizes = Sizes.of(parent)
    active = sum(sizes.ffn(layer.active_width) for layer in carving.layers)
    widths = [(a.width_qk, a.width_vo) for a in carving.attention] or [(sizes.h, sizes.h)] * sizes.L
    return (active + sum(sizes.attention(qk, vo) for qk, vo in widths)) / sizes.total


def parameters(parent: Parent, carving: Carving, native: bool | None = None) -> dict[str, int]:
    """Count parameters: the parent's, and the MoE's in total and active per token.

    The total is the number of weights in the files of ``RUN/model``, embeddings included. Active is the total without
    the experts that a token does not visit.

    Args:
        parent: the dense parent, or its shapes.
        carving: the mixture, or an outline of one.
        native: count for our own format or for a stock folder; if ``None``, as ``Carving.is_native`` says.
    """
    native = carving.is_native(parent) if native is None else native
    ffn, dense = parent.ffns[0], sum(p.numel() for p in parent.model.parameters())
    rest = dense - parent.L * (ffn.matrices * parent.D * parent.F + _biases(parent))
    if native:
        total, active = in_native(parent, carving)
    else:
        home = home_of(parent.family, carving)
        total, active = home.parameters(parent.D, parent.L)
        if home.dialect == "qwen2_moe" != parent.family:  # its queries, keys and values have biases, zeros here
            sizes = Sizes.of(parent)
            rest += parent.L * (sizes.H + 2 * sizes.H_kv) * sizes.h
    return {
        "parent_parameters": dense,
        "parameters_total": rest + total,
        "parameters_active": rest + active,
    }


def _biases(parent: Parent) -> int:
    ffn = parent.ffns[0]
    return sum(0 if bias is None else len(bias) for bias in ffn.biases)


def in_native(parent: Parent, carving: Carving) -> tuple[int, int]:
    """Count what replaces the networks in our own format, routers included, less what attention lost: (total, active).

    Experts that are subsets of one network share their channels, other experts are padded to their layer's widest,
    and attention has the dimensions that some token keeps.
    """
    ffn, D, total, active = parent.ffns[0], parent.D, 0, 0.0
    inner = sum(bias is not None for bias in ffn.biases[:2])
    channel = ffn.matrices * D + inner
    for index, layer in enumerate(carving.layers):
        E, K, spec = len(layer.routed), layer.top_k, layer.gate(ffn)
        output = D if ffn.down_bias_D is not None or layer.routed[0].bias_D is not None else 0
        router = E * D * (ffn.matrices - 1 if spec.logits == "hidden" else 1)
        if spec.logits != "linear":
            router += E * (inner if spec.logits == "hidden" else 1)
        if carving.subsets:
            stored = int(carving.mask(index).any(0).sum())
            used = K * sum(layer.widths) / E  # a token's experts are not known beforehand
        else:
            stored, used = E * max(layer.widths), K * max(layer.widths)
        total += stored * channel + E * output + router
        active += used * channel + K * output + router
        if layer.shared is not None:
            own = layer.shared.width * channel + (D if layer.shared.bias_D is not None else 0)
            total, active = total + own, active + own
    layers = decoder_layers(parent.model)[1]
    for decoder, attention in zip(layers, carving.attention, strict=bool(carving.attention)):
        weights, gate = attention_weights(decoder, parent.config), attention.gate_parameters()
        total += gate - attention.removed(weights, active=False)
        active += gate - attention.removed(weights, active=True)
    return total, round(active)
