"""What a person could take instead of a mixture, measured beside it: the parent with fewer channels for each token.

Activation sparsity keeps a token's own largest channels. It needs kernels that skip single rows and columns, which no
runtime here has; in quality it is what coarser experts fall short of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from moesmith.comparison.facts import parent_facts
from moesmith.errors import MoesmithError
from moesmith.methods.scores import kept_channels
from moesmith.parent.hooks import hooked
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN, Network
from moesmith.parent.sizes import Sizes
from moesmith.run.settings import Section


class Control(Section):
    """The parent with each token's largest channels.

    ``magnitude``: channels by |a_j|, which needs gate and up in full; ``gate``: by |act(gate x)_j|, which needs the
    gate in full (both: TEAL and CATS without their thresholds; top-k for each token as in arXiv:2602.15521, table 1).
    """

    by: Literal["magnitude", "gate"]
    active: float = Field(gt=0, le=1, description="share of the channels that a token keeps")

    @contextmanager
    def row(self, parent: Parent, _run: Any) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
        """Give the parent's model, so changed inside the ``with``, and the facts of its row.

        Raises:
            MoesmithError: the parent has no gate.
        """
        if self.by == "gate" and parent.ffns[0].up_FD is None:
            raise MoesmithError("the parent's networks have no gate", "Write by: magnitude.")
        kept = self._kept(parent)
        with ExitStack() as stack:
            for ffn in parent.ffns:
                for hooks in self._hooks(ffn, kept):
                    stack.enter_context(hooked([hooks], before=True))
            yield parent.model, self.facts(parent)

    def _kept(self, parent: Parent) -> int:
        return kept_channels(parent.F, round(1 - self.active, 6))

    def _hooks(self, ffn: FFN, kept: int) -> list[tuple[Any, Callable[..., Any]]]:
        seen: list[Tensor] = []
        gate = Network(ffn.gate_FD, None, ffn.down_DF, ffn.activation, ffn.gate_bias_F)

        def look(_module: Any, args: tuple[Any, ...]) -> None:
            seen[:] = [gate.hidden(args[0]).abs()]

        def mask(_module: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
            hidden_F = args[0]
            kept_K = (seen[0] if seen else hidden_F.abs()).topk(kept, -1).indices  # exactly so many, ties or not
            return (torch.zeros_like(hidden_F).scatter(-1, kept_K, hidden_F.gather(-1, kept_K)),)

        return [(ffn.module, look), (ffn.down, mask)] if self.by == "gate" else [(ffn.down, mask)]

    def facts(self, parent: Parent) -> dict[str, Any]:
        """Return the facts of its row: what a token reads, if kernels skip all other rows and columns."""
        kept = self._kept(parent)
        skipped = 1 if self.by == "magnitude" else 2  # matrices of which only the kept channels are read
        fewer = skipped * (parent.F - kept) * parent.D * parent.L
        found = parent_facts(parent)
        return found | {
            "ffn_active": kept / parent.F,
            "active": 1 - fewer / Sizes.of(parent).total,
            "parameters_active": found["parameters_active"] - fewer,
        }
