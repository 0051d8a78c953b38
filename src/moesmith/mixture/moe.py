"""The Mixture-of-Experts block, in two forms of the same function.

*Masked*: the parent's weights times channel masks. All experts share one pass over the parent's gate and up
projections, so a dense mixture over E experts costs about one FFN. *Sliced*: each expert's rows and columns
are cut out and stacked in 3-D tensors, so a token pays only for its K experts. Both follow the Hugging Face
contract ``router(x) -> (logits, weights, ids)``, ``experts(x, ids, weights) -> y``.

Shapes: T tokens, D model width, F the parent's FFN width, E experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.mixture.attention import install
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Analytic, Expert, Layer, Linear
from moesmith.native.experts import MoEBlock, SlicedExperts
from moesmith.native.gate import Router
from moesmith.native.heads import HeadGate
from moesmith.parent.hooks import hooked
from moesmith.parent.layerwise import Decoder, layered, share
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN, hidden
from moesmith.parent.structure import decoder_layers, put

Form = Literal["masked", "sliced"]


class GateUp(nn.Module):
    """The gate and up matrices of a parent's network, shared with it, and a module's own to be moved or spread."""

    gate_FD: Tensor
    up_FD: Tensor | None
    gate_bias_F: Tensor | None
    up_bias_F: Tensor | None

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        for name in ("gate_FD", "up_FD", "gate_bias_F", "up_bias_F"):
            part: Tensor | None = getattr(ffn, name)
            setattr(self, name, None if part is None else nn.Parameter(part.detach(), requires_grad=False))
        self.activation = ffn.activation

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the input of the parent's ``down``, (…, D) to (…, F)."""
        return hidden(x, self.gate_FD, self.up_FD, self.activation, self.gate_bias_F, self.up_bias_F)


class MaskedExperts(GateUp):
    """Experts as masks over the parent's FFN; linear in the gate's weights, for any mix of experts.

    Shared ``down``: y = down(a ⊙ (w M)) + w B with a (T, F) the input of the parent's ``down``, w (T, E) the gate's
    weights, M (E, F) the masks and B (E, D) the experts' biases. With a refitted ``down`` per expert only the last
    product is per expert: its kept channels are picked, weighted and multiplied by its own matrix, all experts at once.
    """

    mask_EF: Tensor
    bias_ED: Tensor | None
    expert_R: Tensor
    channel_R: Tensor

    def __init__(self, ffn: FFN, mask_EF: Tensor, bias_ED: Tensor | None, down: list[Tensor] | None) -> None:
        super().__init__(ffn)
        dtype, device = ffn.gate_FD.dtype, ffn.gate_FD.device
        self.experts = len(mask_EF)
        self.register_buffer("mask_EF", mask_EF.to(device, dtype), persistent=False)
        self.register_buffer("bias_ED", None if bias_ED is None else bias_ED.to(device, dtype), persistent=False)
        self.refitted = down is not None
        if down is None:
            self.down_DF = nn.Parameter(ffn.down_DF.detach(), requires_grad=False)
        else:  # R = the kept channels of all experts, one expert after the other
            expert_R, channel_R = mask_EF.nonzero(as_tuple=True)
            self.even = len({down_DF.shape[1] for down_DF in down}) == 1
            self.register_buffer("expert_R", expert_R.to(device), persistent=False)
            self.register_buffer("channel_R", channel_R.to(device), persistent=False)
            self.down_DR = nn.Parameter(torch.cat([d.to(device, dtype) for d in down], 1), requires_grad=False)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs, (T, D)."""
        a_TF = self.hidden(x_TD)
        w_TE = x_TD.new_zeros(len(x_TD), self.experts).scatter(1, ids_TK, weights_TK.to(x_TD.dtype))
        if self.refitted:
            # transposed, so that picking channels copies whole rows; picking columns is several times slower
            a_RT = a_TF.T.contiguous().index_select(0, self.channel_R)
            w_ET = w_TE.T.contiguous()
            if self.even:  # (E, F_e, T): the gate's gradient is then a plain sum
                mixed_RT = (a_RT.view(self.experts, -1, len(x_TD)) * w_ET.unsqueeze(1)).flatten(0, 1)
            else:
                mixed_RT = a_RT * w_ET.index_select(0, self.expert_R)
            y_TD = (self.down_DR @ mixed_RT).T
        else:
            y_TD = F.linear(a_TF * (w_TE @ self.mask_EF), self.down_DF)
        return y_TD if self.bias_ED is None else y_TD + w_TE @ self.bias_ED


def experts_reference(experts: SlicedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Compute a sparse mixture in the plainest way, token by token; the tests compare both forms with it."""
    y_TD = torch.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for k in range(ids_TK.shape[1]):
            y_TD[t] += weights_TK[t, k].to(x_TD.dtype) * experts.expert(x_TD[t : t + 1], int(ids_TK[t, k]))[0]
    return y_TD


def build(parent: Parent, carving: Carving, form: Form = "sliced") -> PreTrainedModel:
    """Build the runnable model of a carving: the parent's architecture with a :class:`MoEBlock` in every layer.

    Weights that the carving leaves alone are shared with the parent, not copied. All parameters are frozen.

    Args:
        parent: the dense model the carving was made from.
        carving: what to build.
        form: ``"masked"`` for dense router training, ``"sliced"`` for everything else. The masked form ignores
            LoRA, which changes each expert's own gate and up rows, and is refused where a carving changed these.

    Raises:
        MoesmithError: there is no such form, or the carving was made from another parent (:meth:`Carving.check`).
    """
    if not isinstance(parent, Parent) or not isinstance(carving, Carving):
        raise MoesmithError("build takes a Parent and a Carving", "Give load_parent(...) and Carving.load(...).")
    if form not in get_args(Form):
        raise MoesmithError(f"there is no form {form!r}", f"Give {' or '.join(get_args(Form))}.")
    carving.check(parent)
    model = share(parent.model).requires_grad_(False)
    layers = decoder_layers(model)[1]
    for index in range(parent.L):
        layers[index] = carved_layer(parent, carving, index, form)
    _set_norms(model, carving, "")
    return model


def decoder(parent: Parent, carving: Carving, *, whole: bool = True) -> Decoder:
    """Build the sliced model of a carving, layer by layer if the parent is run that way or if it is not to be whole."""
    if whole and not parent.layerwise:
        return build(parent, carving, "sliced")
    carving.check(parent)
    model = layered(parent.model, lambda index: carved_layer(parent, carving, index))
    _set_norms(model.shell, carving, "")
    return parent.turned(model)


def carved_layer(
    parent: Parent, carving: Carving, index: int, form: Form = "sliced", *, inside: bool = True
) -> nn.Module:
    """Build one decoder layer of a carving's model, all frozen; what the carving leaves alone is the parent's.

    With ``inside`` false its network is the parent's as well.
    """
    place, layers = decoder_layers(parent.model)
    layer, prefix = share(layers[index]).requires_grad_(False), f"{place}.{index}."
    if inside:
        put(layer, parent.ffns[index].path.removeprefix(prefix), block(parent, carving, index, form))
    if carving.attention:
        install(layer, parent.config, HeadGate(carving.attention[index].tensors()).to(parent.model.device))
    _set_norms(layer, carving, prefix)
    return layer


def _set_norms(module: nn.Module, carving: Carving, prefix: str) -> None:
    """Set the trained norms that belong to ``module``; their names in the model begin with ``prefix``."""
    known = dict(module.named_parameters())
    for name, value in carving.norms.items():
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and inner in known:
            fresh = value.to(known[inner].device, known[inner].dtype)
            put(module, inner, nn.Parameter(fresh, requires_grad=False))


def block(parent: Parent, carving: Carving, index: int, form: Form = "sliced") -> MoEBlock:
    """Build one layer's MoE block on the parent's compute device and dtype; the parent's weights may be elsewhere."""
    carved, ffn = carving.layers[index], parent.ffns[index]
    routed: list[int | Expert] = [*range(len(carved.routed))]
    experts: nn.Module
    if form == "masked":
        if any(expert.trained for expert in carved.experts):
            raise MoesmithError(f"layer {index} has experts with their own gate and up rows", "Build the sliced form.")
        own = any(expert.down_DF is not None for expert in carved.routed)
        down = [ffn.down_DF[:, e.channels] if e.down_DF is None else e.down_DF for e in carved.routed] if own else None
        bias_ED = _stacked([carving.expert_biases(parent, index, e)[2] for e in routed])
        experts = MaskedExperts(ffn, carving.mask(index), bias_ED, down)
    else:
        experts = _sliced(parent, carving, index, routed)
    beside = besides(parent, carving, index)
    return MoEBlock(beside["router"], experts, beside.get("shared")).train(parent.model.training)


def besides(parent: Parent, carving: Carving, index: int) -> dict[str, Any]:
    """Build what a block has besides its routed experts: ``router``, and ``shared`` if there is one."""
    carved, dtype, device = carving.layers[index], parent.dtype, parent.device
    parts: dict[str, Any] = {"router": _router(carved, parent.ffns[index], dtype, device)}
    if carved.shared is not None:
        parts["shared"] = _sliced(parent, carving, index, [carved.shared])
    return parts


def _sliced(parent: Parent, carving: Carving, index: int, experts: Sequence[int | Expert]) -> SlicedExperts:
    """Cut out and stack experts of one layer."""
    dtype, device = parent.dtype, parent.device
    *inner, biases = zip(*(carving.expert_biases(parent, index, e) for e in experts), strict=True)
    weights = (carving.expert_weights(parent, index, e) for e in experts)
    rounded = ([side if side is None else side.to(device, dtype) for side in expert] for expert in weights)
    gate, up, down = zip(*rounded, strict=True)
    bias_ED = _stacked(biases)
    return SlicedExperts(
        torch.cat([_padded(side) for side in (gate, up) if side[0] is not None], 1),
        _padded([down_DF.T for down_DF in down]).mT.contiguous(),
        parent.ffns[index].activation,
        None if bias_ED is None else bias_ED.to(device, dtype),
        *(None if some[0] is None else _padded(some).to(device, dtype) for some in inner),
    )


def _router(layer: Layer, ffn: FFN, dtype: torch.dtype, device: torch.device) -> Router:
    """Build a layer's router as a module; an analytic one copies the parent's rows of its channels."""
    spec, router = layer.gate(ffn), layer.router
    if isinstance(router, Analytic) and (folded := router.folded(ffn)) is not None:
        router = folded
    if isinstance(router, Linear):
        noise = None if router.noise_ED is None else router.noise_ED.to(device, dtype)
        return Router(spec, router.weight_ED.to(device, dtype, copy=True), noise)
    rows = router.channels.to(ffn.gate_FD.device)
    parts = (None if part is None else part[rows] for part in (ffn.gate_FD, ffn.up_FD, *ffn.biases[:2]))
    gate_ED, up_ED, bias_E, up_bias_E = (None if part is None else part.to(device, dtype, copy=True) for part in parts)
    assert gate_ED is not None
    if router.reads == "hidden":
        return Router(spec, gate_ED, None, up_ED, bias_E, up_bias_E, ffn.activation)
    return Router(spec, gate_ED, None, None, bias_E)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack([part for part in parts if part is not None])


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different length with zeros at their end."""
    return pad_sequence(list(parts), batch_first=True)


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """List the model's MoE blocks, first layer first."""
    return [module for module in model.modules() if isinstance(module, MoEBlock)]


def shuffled(model: nn.Module, seed: int = 0) -> AbstractContextManager[None]:
    """Hand every token another token's experts inside the ``with``: the load stays, the learned routing is lost."""
    generator = torch.Generator().manual_seed(seed)

    def mix(_module: nn.Module, _args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.randperm(len(out[0]), generator=generator).to(out[0].device)
        return out[0][order], out[1][order], out[2][order]

    return hooked((block.router, mix) for block in moe_blocks(model))


@contextmanager
def forced(model: nn.Module, expert: int) -> Iterator[None]:
    """Send every token to one expert inside the ``with``: the oracle a router is compared with."""
    routers = [block.router for block in moe_blocks(model)]
    for router in routers:
        router.forced = expert
    try:
        yield
    finally:
        for router in routers:
            router.forced = None
