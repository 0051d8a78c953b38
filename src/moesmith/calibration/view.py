"""What a method sees of one layer: its network, statistics of its tokens, or all of its tokens.

Shapes: T tokens, D model width, F channels, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moesmith.calibration.moments import Second
from moesmith.parent.accelerator import free_memory
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN, Network

if TYPE_CHECKING:
    from moesmith.calibration.stream import Stream

Activations = Literal["dense", "carved"]
HELD_OUT = 16  # of so many windows one is neither fitted to nor trained on
Assign = Callable[[Tensor, int], Tensor]  # router inputs (T, D) of a group of text, and its index, to expert ids (T)


def spread(rows: Tensor, most: int) -> Tensor:
    """Take at most so many rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]


@dataclass
class Stats:
    """What one expert's tokens are like in one layer.

    Attributes:
        inputs: count, first and second moments of the router's input x (D).
        channels: the same for the input of ``down_proj`` (F); ``None`` unless asked for, and of several processes in
            all but the expert's owner (``World.owner``).
        parts: channel moments (mean and variance, (F,) fp32) of each text of the group; empty unless asked for.
    """

    inputs: Second
    channels: Second | None = None
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return self.inputs.count


@dataclass(frozen=True)
class Tokens:
    """All tokens of one layer, as its network meets them. On the CPU; ``x_TD`` and ``y_TD`` may be mapped from disk.

    :meth:`near` gives them where an accelerator can take rows itself.

    Attributes:
        x_TD: what the network and a router get, in the dtype that the parent computes in.
        y_TD: what the experts should make of it, in the same dtype: the output of the parent's network, or, with
            ``repair``, that plus what the hidden state has lost in earlier carved layers.
        weight_T: how much an error counts, fp32, mean 1: 1 / ‖h‖² with h the hidden state after the layer, so that
            tokens of huge activations do not decide everything; at most :data:`HEAVIEST` times the mean. With
            ``repair`` h is the parent's or, if that is larger, what the parent's network makes of the carved one's:
            what carved layers made a sink of, and the parent does not, is wrong by a factor of a hundred, and one such
            token would decide over a million others. Where the layer has a norm or a factor behind its network, times
            ‖g(y)‖² / ‖y‖² with g(y) what becomes of y.
        sequence_T: the window that each token belongs to, int32.
        share_T: what the network makes of the hidden state, fp32: ‖y‖² / ‖h‖². A few percent as a rule; about 1 where
            it makes the huge activations of an attention sink, more where it takes them back.
        root_DD: R, fp32, where an error e counts as ‖R e‖² (``methods.sensitivity``); ``None``: as ‖e‖².
    """

    x_TD: Tensor
    y_TD: Tensor
    weight_T: Tensor
    sequence_T: Tensor
    share_T: Tensor
    root_DD: Tensor | None = None

    def felt(self, error_ND: Tensor) -> Tensor:
        """Errors as they count, (…, D): the sum of squares is what it is about."""
        return error_ND if self.root_DD is None else error_ND @ self.root_DD.to(error_ND.device).T

    def near(self, device: torch.device) -> Tokens:
        """The same with ``x_TD``, ``y_TD`` and ``weight_T`` on a device, if a quarter of its free memory holds them."""
        size = sum(part.nbytes for part in (self.x_TD, self.y_TD, self.weight_T))
        if device.type == "cpu" or size > free_memory(device) // 4:
            return self
        return replace(
            self, x_TD=self.x_TD.to(device), y_TD=self.y_TD.to(device), weight_T=self.weight_T.to(device)
        )  # fmt: skip

    def take(self, rows_N: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Some tokens on a device: x (…, D), y (…, D), weight (…, 1) for rows of any shape."""
        rows_N = rows_N.to(self.x_TD.device)
        x_ND, y_ND, weight_N = self.x_TD[rows_N], self.y_TD[rows_N], self.weight_T[rows_N]
        return x_ND.to(device), y_ND.to(device), weight_N[..., None].to(device)


def held_out(tokens: Tokens, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Part an expert's tokens: those that it is made on, and those of every :data:`HELD_OUT`-th window."""
    kept_N = tokens.sequence_T[rows_N] % HELD_OUT == HELD_OUT - 1
    return rows_N[~kept_N], rows_N[kept_N]


class LayerView:
    """One layer, as a method sees it.

    Attributes:
        parent: the dense model.
        index: which layer.
        generator: for methods that draw at random; goes on from layer to layer.
        groups: how many groups of text there are.
    """

    def __init__(self, parent: Parent, index: int, generator: torch.Generator, groups: int, stream: Stream) -> None:
        self.parent, self.index, self.generator, self.groups = parent, index, generator, groups
        self._stream = stream

    @property
    def ffn(self) -> FFN:
        """Its feed-forward network."""
        return self.parent.ffns[self.index]

    @cached_property
    def network(self) -> Network:
        """The same where and in what the parent computes, for methods that run it themselves; a copy if it must be.

        The stream lets the copy go before it makes another form of the layer.
        """
        return self.ffn.to(self.parent.device, self.parent.dtype)

    def sample(self, tokens: int) -> Tensor:
        """Return router inputs of about so many tokens, evenly over all text, (T, D) fp32 on the parent's device."""
        return self._stream.sample(self.index, tokens)

    def statistics(
        self, assign: Assign | None = None, experts: int = 0, *, gram: bool = False, parts: bool = False
    ) -> list[Stats]:
        """Collect statistics of each expert's tokens.

        Args:
            assign: which expert a token belongs to; if left out, the group of its text.
            experts: how many experts ``assign`` chooses among.
            gram: also collect the Gram matrix of the ``down_proj`` input: F² numbers per expert, in its owner.
            parts: also collect channel moments of each text; by group only.
        """
        return self._stream.statistics(self.index, assign, experts or self.groups, gram=gram, parts=parts)

    def tokens(self) -> Tokens:
        """Return all tokens at once, for methods that train: two more buffers as large as the waiting text.

        Ask for them last: the text has then passed the layer's attention. The next layer's tokens take their place.
        """
        return self._stream.hold(self.index)

    def advance(self, share: float) -> None:
        """Report a share of the method's own work on held tokens as done, for the progress bar."""
        self._stream.work(share)
