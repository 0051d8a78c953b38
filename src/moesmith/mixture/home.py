"""Which stock architecture holds a carving, and the exact rewriting that gets it there: shapes only, no tensors.

A stock expert is y = down(act(gate x) * (up x)). All experts of a model have one width, every layer has the same number
of them, a token visits the same number in every layer, and the weights of the chosen sum to 1. Qwen2-MoE and Qwen3-MoE
have layers with an ordinary network between those with experts; llama.cpp's graphs of them have not, but its ``mimo2``
has. What a carving has beyond that is rewritten:

* *sum*: logits scaled down far enough give each of K chosen experts the weight 1/K, in the same order, and ``down`` is
  multiplied by K. If a runtime does not divide by the sum (Qwen2-MoE in llama.cpp), each weighs 1/E and ``down`` is
  multiplied by E.
* *shared*: Qwen2-MoE's shared expert, whose sigmoid gate is one half with zero weights, so ``down`` is doubled.
  Elsewhere the shared channels are folded into every routed expert: exact, since the weights sum to 1, but larger.
* *widths*: narrower experts are padded with channels of zeros, to the widest and to a multiple of :data:`ALIGN`.
* *bias*: one more channel, fed by the constant direction (``export/stock/constant.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesmith.arguments import ceil_div
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer

ALIGN = 32  # channels of a stock expert; quantisation blocks and grouped matrix kernels need multiples of it
Dialect = Literal["mixtral", "qwen2_moe", "qwen3_moe", "mimo2"]


def aligned(width: int, to: int = ALIGN) -> int:
    """Round ``width`` up to a multiple of ``to``."""
    return ceil_div(width, to) * to


@dataclass(frozen=True)
class Home:
    """How a carving is stored in a stock folder.

    Attributes:
        dialect: the architecture, by its model type.
        experts: routed experts of a layer.
        top_k: how many of them a token visits.
        width: channels of a routed expert on disk.
        shared: channels of the shared expert on disk; 0 where the architecture has none.
        folded: whether the carving's shared expert is part of every routed one.
        divided: whether the runtime divides the weights of the chosen by their sum.
        dense: the layers that have an ordinary network instead of experts.
        dense_width: its channels on disk.
    """

    dialect: Dialect
    experts: int
    top_k: int
    width: int
    shared: int = 0
    folded: bool = False
    divided: bool = True
    dense: tuple[int, ...] = ()
    dense_width: int = 0

    def parameters(self, D: int, layers: int) -> tuple[int, int]:
        """Count the weights that replace the networks, routers included: in total, and active per token."""
        beside = self.experts * D + (3 * self.shared * D + D if self.shared else 0)
        expert, sparse = 3 * self.width * D, layers - len(self.dense)
        common = sparse * beside + len(self.dense) * 3 * self.dense_width * D
        return common + sparse * self.experts * expert, common + sparse * self.top_k * expert


def in_full(layer: Layer) -> bool:
    """Whether each chosen expert counts in full: added up, or a single one."""
    return layer.mix == "sum" or layer.top_k == 1


def home_of(family: str, carving: Carving, *, llamacpp: bool = False) -> Home:
    """Choose how to store a carving that some stock architecture holds (``export.stock.stock_refusal``).

    Args:
        family: the parent's (``Parent.family``).
        carving: the mixture, or an outline of one.
        llamacpp: for llama.cpp, whose graph for Qwen2-MoE does not divide, and whose graph for Mixtral takes biases.
    """
    shared = max((layer.shared.width + (layer.shared.bias_D is not None) for layer in carving.layers
                  if layer.shared is not None), default=0)  # fmt: skip
    dialect: Dialect = family  # type: ignore[assignment]
    beside = bool(shared) and family != "qwen3_moe"
    if llamacpp:
        beside = beside and all(map(in_full, carving.layers)) and not carving.dense
        dialect = "mimo2" if carving.dense else "mixtral" if family == "qwen2_moe" else dialect
    if beside or (carving.dense and dialect == "mixtral"):
        dialect = "qwen2_moe"
    folded = bool(shared) and not beside
    width = max(stock_width(layer, folded) for layer in carving.sparse)
    # the architecture requires a shared expert: exactly zero. At width 0 vLLM leaves it out and refuses its tensors
    room = aligned(max(shared, 1)) if dialect == "qwen2_moe" else 0
    divided, dense = not (llamacpp and beside), carving.dense
    dense_width = max((carving.layers[index].widths[0] for index in dense), default=0)
    return Home(
        dialect, carving.experts, carving.top_k, aligned(width), room, folded, divided, dense, dense_width
    )  # fmt: skip


def stock_width(layer: Layer, folded: bool) -> int:
    """Count the channels of a layer's routed experts in a stock folder before rounding up: the widest expert's, the
    shared expert's if it is folded in, and one for biases."""
    common = layer.shared if folded else None
    experts = [*layer.routed, *([] if common is None else [common])]
    biased = any(expert.bias_D is not None for expert in experts)
    return max(layer.widths) + (0 if common is None else common.width) + biased


def padding(carving: Carving, home: Home) -> float:
    """Compute the share of routed experts' channels on disk that are zeros, up to the widest and up to a multiple."""
    means = [stock_width(x, home.folded) - max(x.widths) + sum(x.widths) / len(x.widths) for x in carving.sparse]
    return 1 - sum(means) / len(means) / home.width
