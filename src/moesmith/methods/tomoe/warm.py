"""Start from a carving: set decoder and router so that the first masks are the carving's (ours, not the paper's).

The published start keeps every channel and spends its first steps on meeting the budget. Here a layer's decoder solves
W_D · h_n = target_n for its N expert inputs h_n = GELU(LN(e_n)): kept channels just above the keep threshold, dropped
ones below, where sampling noise hardly opens them, so the budget holds from the first step.
"""

from __future__ import annotations

import torch

from moesmith.errors import MoesmithError
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.mixture.carving import Carving
from moesmith.parent.sizes import Sizes

KEPT, DROPPED = 2.0, -5.0  # mask logit plus bias: kept with probability 0.9994 and 0.0067


def expert_ratio(sizes: Sizes, budget: float) -> float:
    """Compute the share of channels to prune from each expert so that experts and whole attention meet ``budget``.

    Raises:
        MoesmithError: attention alone is more than the budget.
    """
    attention = sizes.L * sizes.attention(sizes.h, sizes.h)
    kept = (budget * sizes.total - attention) / (sizes.L * sizes.ffn(sizes.F))
    if kept * sizes.F < 1:
        raise MoesmithError(
            f"attention alone is {attention / sizes.total:.0%} of the parameters, but masks.budget is {budget:.0%}: a "
            "carving of the feed-forward networks cannot meet it",
            "Raise masks.budget, or leave carve.start out.",
        )
    return 1 - kept


@torch.no_grad()
def start_from(masks: Masks, carving: Carving) -> None:
    """Set decoders and routers to ``carving``'s channels and routers; attention starts whole, as published."""
    masks.draw()
    for index, (ffn, layer) in enumerate(zip(masks.ffn, carving.layers, strict=True)):
        experts: torch.nn.Module = ffn
        kept_NF = carving.mask(index)
        target_NF = torch.where(kept_NF, KEPT, DROPPED).double() - masks.spec.bias
        # on the CPU: N rows of R numbers are little work, and not every device has fp64
        inner_NR = experts.hidden(experts.embedding_NR).cpu().double()  # type: ignore[operator]
        decoder_RF = torch.linalg.pinv(inner_NR) @ target_NF
        experts.decoder_FR.copy_(decoder_RF.T)  # type: ignore[operator, union-attr]
        experts.router_ND.copy_(layer.router.weight_ED)  # type: ignore[operator, union-attr]
