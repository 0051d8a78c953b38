"""Groups of a layer's tokens, one for each expert of a router, and the ``down_proj`` that fits an expert to its own.

What an expert should give is what the hidden state lacks to be the parent's own behind the layer, and an error counts
relative to the hidden state: a text's first token is a hundred times as loud as any other behind some layers, and
would decide everything there.

Shapes: T tokens, N tokens of a group, D model width, F channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesmith.calibration.moments import Sums, fast_products
from moesmith.calibration.view import Tokens, held_out, spread
from moesmith.methods.refit import fit_down, refit_down
from moesmith.methods.scores import most
from moesmith.parent.network import Network

CHUNK = 4096  # tokens whose channels exist at once
# F × F numbers, fp32, that exist at once while an expert is fitted, eliminated from and refitted: moments of all tokens
# and of its own, two to work with, and matrices of D × F that are as large as two more
SQUARES = 6
PULL = 3.0  # towards the parent's columns in a fit to what is lost: that is mostly noise to a layer's channels
LOUD, FEW = 0.5, 0.05  # share of the hidden state that a network makes of a sink; the most tokens that can be sinks


@dataclass(frozen=True)
class Fitting:
    """How least squares are regularised.

    Attributes:
        ridge: pull towards the parent's columns where some channels are left out, relative to a channel's mean energy.
        pool: least share of all tokens in a group's moments.
        prior: tokens that all tokens count for in them.
        most: tokens of a group at most, evenly spread.
        repair: tokens' outputs make up for what earlier layers lost, so ``down_proj`` is fitted to them.
    """

    ridge: float = 0.1
    pool: float = 0.05
    prior: int = 1000
    most: int = 25_000
    repair: bool = True


class Groups:
    """The tokens of a layer, parted among its experts.

    Held-out windows (:func:`held_out`) are in the groups and not in what is fitted: there it shows what came of it.

    Args:
        network: the parent's, where and in what it computes.
        tokens: all of the layer's.
        ids_T: the expert of every token.
        experts: how many there are.
        fitting: how least squares are regularised.
        sinks: every expert's group has all sinks as well (:func:`sinks_of`).
    """

    def __init__(
        self,
        network: Network,
        tokens: Tokens,
        ids_T: Tensor,
        experts: int,
        fitting: Fitting,
        *,
        sinks: bool = True,
    ) -> None:
        self.network, self.tokens, self.fitting = network, tokens, fitting
        loud_T = sinks_of(tokens.share_T) if sinks else torch.zeros(len(ids_T), dtype=torch.bool)
        self.rows = [((ids_T == expert) | loud_T).nonzero().flatten() for expert in range(experts)]
        self.pooled = self._moments(held_out(tokens, torch.arange(len(ids_T)))[0])

    def fit(self, expert: int, among: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Fit a ``down_proj`` to an expert's tokens.

        Args:
            expert: which one.
            among: the number of channels that it may have: those of the most energy; all of them if left out.

        Returns:
            These S channels, sorted, on the CPU; moments of their activations a, E[a aᵀ] (S, S) fp32; their
            ``down_proj`` (D, S): the parent's if they are all and nothing is repaired, else fp32, the one that gives
            what the tokens lack, or what they get from the parent.
        """
        spec, (gram_FF, cross_DF) = self.fitting, self.pooled
        if len(self.rows) > 1:
            read_N, _ = held_out(self.tokens, self.rows[expert])
            share = max(spec.pool, spec.prior / (spec.prior + len(read_N))) if len(read_N) else 1.0
            gram_FF, cross_DF = (
                own.lerp_(all_, share) for own, all_ in zip(self._moments(read_N), self.pooled, strict=True)
            )
        down_DS, channels = self.network.down_DF, torch.arange(len(gram_FF))
        if among is not None and among < len(channels):
            channels = most((gram_FF.diagonal() * down_DS.float().square().sum(0)).cpu(), among)
            here = channels.to(gram_FF.device)
            down_DS = refit_down(down_DS, gram_FF, channels, spec.ridge)
            gram_FF, cross_DF = gram_FF[here[:, None], here], cross_DF[:, here] if spec.repair else cross_DF
        return channels, gram_FF, fit_down(down_DS, gram_FF, cross_DF, PULL) if spec.repair else down_DS

    def _moments(self, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted moments of channels a over some tokens: E[a aᵀ] (F, F), and with ``repair`` E[(y − b) aᵀ] (D, F).

        b is the bias that the network adds, or nothing.
        """
        ffn, rows_N = self.network, spread(rows_N, self.fitting.most)
        device = ffn.gate_FD.device
        sums = Sums(len(ffn.gate_FD), device)
        cross_DF = torch.zeros(ffn.down_DF.shape if self.fitting.repair else (0, 0), device=device)
        with fast_products(self.tokens.x_TD.dtype):
            for rows in rows_N.split(CHUNK):
                x_ND, y_ND, weight_N1 = self.tokens.take(rows, device)
                a_NF = ffn.hidden(x_ND)
                root_N1 = weight_N1.sqrt().to(a_NF.dtype)
                a_NF = a_NF * root_N1
                sums.add(a_NF)
                if self.fitting.repair:
                    y_ND = (y_ND if ffn.down_bias_D is None else y_ND - ffn.down_bias_D) * root_N1
                    cross_DF.addmm_(y_ND.float().T, a_NF.float())
        return sums.result().gram_NN, cross_DF / max(1, len(rows_N))


def gathered(tokens: int, experts: int, most: int) -> int:
    """Count the tokens that go into :class:`Groups`' Gram matrices: the pool's, and those of several experts."""
    return min(tokens, most) + (min(tokens, experts * most) if experts > 1 else 0)


def sent(router_ED: Tensor, x_TD: Tensor, device: torch.device) -> Tensor:
    """The expert to which a linear top-1 router sends every token, (T,) on the CPU.

    In the dtype of the tokens, as the model's own router computes: an expert is made for the tokens that it will get.
    """
    weight_ED = router_ED.to(device, x_TD.dtype)
    return torch.cat([(rows_TD.to(device) @ weight_ED.T).float().argmax(-1).cpu() for rows_TD in x_TD.split(CHUNK)])


def sinks_of(share_T: Tensor) -> Tensor:
    """Which tokens' hidden state is mostly what the network adds, (T,) bool; none where that is nothing special.

    Attention rests on a few tokens of huge activations, a text's first above all (arXiv:2309.17453, arXiv:2402.17762).
    One or two networks make them, and a later one takes them back. Such a token counts no more than any other in an
    error relative to the hidden state, and its kind is spread over all experts: one that never met it loses the sink,
    and with it the attention of all later tokens.
    """
    loud_T = share_T > LOUD
    return loud_T if float(loud_T.float().mean()) <= FEW else torch.zeros_like(loud_T)
