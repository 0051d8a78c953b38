"""Turn trained masks into a carving, deterministically and at exactly the asked budget (ToMoE, arXiv:2501.15316).

One threshold θ decides everything: a channel, a dimension or a pair is kept iff its logit is at least θ. Maxima count
against the budget: a layer's widest expert, the token that keeps most. The k-th unit of such a maximum appears when θ
falls below the largest k-th-best logit of any expert or token, so all of them together are one sorted list of
(logit, parameters), and θ is where the list is as long as the budget.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.errors import MoesmithError
from moesmith.methods.tomoe.estimators import median_logit
from moesmith.methods.tomoe.hypernetwork import AttentionMasks, Masks
from moesmith.mixture.attention import CarvedAttention
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import active_share
from moesmith.mixture.layer import Layer
from moesmith.mixture.moe import decoder
from moesmith.native.heads import expand_pairs
from moesmith.parent.hooks import hidden_input, hooked
from moesmith.parent.layerwise import Decoder, last_hidden
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.parent.structure import attention_of


def ranks(logits_XW: Tensor) -> Tensor:
    """Take the largest k-th-best logit over rows, descending, (W): some row has width k iff entry k − 1 ≥ θ."""
    return logits_XW.sort(-1, descending=True).values.amax(0)


def floor_of(sizes: Sizes, attention: str) -> float:
    """Compute the smallest budget, a share of block parameters: one channel per expert, one dimension per head."""
    least = sizes.attention(sizes.h, sizes.h) if attention == "none" else sizes.attention(2, 1)
    return sizes.L * (least + sizes.ffn(1)) / sizes.total


def check_budget(sizes: Sizes, budget: float, attention: str) -> None:
    """Refuse a budget that no masks can meet.

    Raises:
        MoesmithError: it is below :func:`floor_of`.
    """
    if budget < (least := floor_of(sizes, attention)):
        cure = "Raise masks.budget" + (
            ", or let attention be pruned (masks.attention)." if attention == "none" else "."
        )
        raise MoesmithError(f"masks.budget {budget} cannot be reached: {least:.3f} of the parameters always stay", cure)


class _Curve:
    """Rank curves of everything that counts against the budget, and their parameters."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.costs: list[Tensor] = []

    def add(self, values_W: Tensor, cost: Tensor | float) -> None:
        values_W = values_W.cpu().double().clone()  # in this order: some devices have no fp64
        values_W[0] = torch.inf  # nothing is ever pruned completely
        self.values.append(values_W)
        self.costs.append(torch.as_tensor(cost, dtype=torch.float64).expand(len(values_W)))

    def threshold(self, parameters: float) -> float:
        """Find the lowest θ whose units cost at most ``parameters``, halfway to the next unit.

        So nothing depends on the last bit of a logit, and experts narrower than the widest keep what costs nothing.
        """
        values, order = torch.cat(self.values).sort(descending=True, stable=True)
        spent = torch.cat(self.costs)[order].cumsum(0)
        within = int((spent <= parameters).sum())
        if within == len(values):
            return float(values[-1])
        after = values[within]
        if torch.isinf(after):  # the budget is less than what always stays
            return float(values[torch.isfinite(values)].max() + 1)
        last = values[values > after][-1]  # units of equal logit come together or not at all
        if torch.isinf(last):
            return float(after + 1)
        middle = ((last + after) / 2).float()  # logits are fp32
        return float(middle if after < middle else last)


@torch.no_grad()
def harvest(masks: Masks, parent: Parent, ids_NS: Tensor, provenance: dict[str, Any]) -> tuple[Carving, dict[str, Any]]:
    """Make the carving of trained masks.

    Args:
        masks: Θ.
        parent: the model they were trained on.
        ids_NS: training text, on which the widths of V/O are measured; never test text.
        provenance: what the carving records of how it was made.

    Returns:
        The carving, and ``threshold``, ``active_share``, ``union``, ``width_qk``, ``width_vo``, ``width_ffn`` (means
        over layers).
    """
    masks.draw()
    spec, sizes = masks.spec, masks.sizes
    start = median_logit(spec.bias)  # where training keeps a unit half of the time
    token_ranks = []
    if len(masks.attention):
        rough = _carving(masks, parent, start, [None] * sizes.L, provenance)
        token_ranks = _token_ranks(masks, decoder(parent, rough), ids_NS)
    curve = _Curve()
    budget = spec.budget * sizes.total
    for index, (ffn, attention) in enumerate(masks.layers()):
        curve.add(ranks(ffn.logits()), sizes.ffn(1))
        if attention is None:
            budget -= sizes.attention(sizes.h, sizes.h)
            continue
        vo_h, qk_W, _ = token_ranks[index]
        curve.add(vo_h, sizes.attention(0, 1))
        pairs = sizes.rotary // 2
        doubled = torch.ones(sizes.static, dtype=torch.float64)
        doubled[:pairs] = 2
        if spec.attention == "dynamic":  # by rank: pairs may come first
            curve.add(qk_W, doubled * sizes.attention(1, 0))
        else:
            free_W, order = attention.static_logits().sort(descending=True)
            curve.add(free_W, doubled[order.cpu()] * sizes.attention(1, 0))
    threshold = curve.threshold(budget)
    carving = _carving(masks, parent, threshold, token_ranks or [None] * sizes.L, provenance)
    facts = {
        "threshold": threshold,
        "active_share": active_share(parent, carving),
        "union": float(carving.union().mean()),
        "width_ffn": float(carving.widths().amax(1).double().mean()),
    }
    if carving.attention:
        facts |= {name: sum(getattr(a, name) for a in carving.attention) / sizes.L for name in ("width_qk", "width_vo")}
    return carving, facts


def _carving(
    masks: Masks, parent: Parent, threshold: float, token_ranks: list[Any], provenance: dict[str, Any]
) -> Carving:
    spec, layers, attentions = masks.spec, [], []
    for (ffn, attention), token in zip(masks.layers(), token_ranks, strict=True):
        logits_NF = ffn.logits().float().cpu()
        order_NF = logits_NF.argsort(dim=-1, descending=True, stable=True)
        widths = (logits_NF >= threshold).sum(-1).clamp_min(1).tolist()
        if spec.widths == "equal":  # only the widest counts: filling up the others is free
            widths = [max(widths)] * len(widths)
        channels = [order_F[:width].sort().values for order_F, width in zip(order_NF, widths, strict=True)]
        layers.append(Layer.of(channels, ffn.router_ND.detach().float().cpu()))
        if attention is not None:
            attentions.append(_attention(attention, threshold, token))
    return Carving(layers, parent.F, provenance=provenance, attention=attentions)


def _attention(masks: AttentionMasks, threshold: float, token: tuple[Tensor, ...] | None) -> CarvedAttention:
    spec, sizes = masks.spec, masks.sizes
    h = sizes.h
    widths = (h, sizes.static, h)
    vo_h, qk_W, best_h = token if token is not None else tuple(torch.full((w,), torch.inf) for w in widths)
    proj_out_WR = masks.proj_out_WR.detach().float().cpu()
    qk_h = torch.ones(h, dtype=torch.bool)
    dynamic: dict[str, Tensor] = {}
    if spec.attention == "dynamic":
        dynamic = {"dynamic_WR": proj_out_WR[h:].clone(), "top_k_qk": (qk_W >= threshold).sum().clamp_min(1)}
    else:
        static_W = masks.static_logits().float().cpu()
        free_W = static_W >= threshold
        free_W[static_W.argmax()] = True
        qk_h = expand_pairs(free_W, h, sizes.rotary)
    return CarvedAttention(
        qk_h=qk_h,
        vo_h=best_h >= min(threshold, float(best_h.max())),
        proj_in_RD=masks.proj_in_RD.detach().float().cpu(),
        norm_weight_R=masks.norm.weight.detach().float().cpu(),
        norm_bias_R=masks.norm.bias.detach().float().cpu(),
        base_R=masks.base().float().cpu(),
        proj_out_hR=proj_out_WR[:h].clone(),
        threshold=torch.tensor(threshold, dtype=torch.float32),
        top_k=(vo_h >= threshold).sum().clamp_min(1),
        output=torch.tensor(spec.output_mask),
        **dynamic,
    )


def _token_ranks(masks: Masks, model: Decoder, ids_NS: Tensor) -> list[tuple[Tensor, ...]]:
    """Return per layer over a text, seen through the deterministic masks: the rank curves of V/O and of Q/K by token,
    and the best logit of each V/O dimension."""
    sizes = masks.sizes
    found: list[Tensor | None] = [None] * sizes.L

    def see(index: int, layer: nn.Module) -> AbstractContextManager[None]:
        return _attention_input(layer, index, masks, found)

    for _ in last_hidden(model, ids_NS.split(1), visit=see):
        pass
    return [curve.cpu().split([sizes.h, sizes.static, sizes.h]) for curve in found if curve is not None]


def _attention_input(
    layer: nn.Module, index: int, masks: Masks, found: list[Tensor | None]
) -> AbstractContextManager[None]:
    h = masks.sizes.h

    def see(_module: nn.Module, args: Any, kwargs: Any) -> None:
        x_BSD = hidden_input(args, kwargs)
        logits_TW = masks.attention[index].token_logits(x_BSD).flatten(0, 1)  # type: ignore[operator]
        vo_Th = logits_TW[:, :h]
        curve, before = torch.cat([ranks(vo_Th), ranks(logits_TW[:, h:]), vo_Th.amax(0)]), found[index]
        found[index] = curve if before is None else torch.maximum(before, curve)

    return hooked([(attention_of(layer), see)], before=True, kwargs=True)
