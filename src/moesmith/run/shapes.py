"""The sizes that every prediction is computed from, and this machine's speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesmith.calibration.moments import gram_bytes
from moesmith.mixture.count import parameters
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.sizes import Sizes

if TYPE_CHECKING:
    from moesmith.run.recipe import Recipe

# measured costs on top of counted ones, see docs/lab.md
SPARSE = 1.15  # of sorting tokens and of many small products
BACKWARD = 1.35  # backward pass through frozen matrices, with its low-rank ones, over the forward pass
LOSS = 1.2  # softmax over the vocabulary on top of the products with the output matrix


@dataclass(frozen=True)
class Pace:
    """What this machine's device does in a second.

    Attributes:
        blocks, head: tokens through all blocks and through the head, in the parent's dtype.
        solves: floating-point operations of least squares, in fp32.
    """

    blocks: float
    head: float
    solves: float


class Shapes:
    """Shapes of a parent and of the mixture that a recipe makes of it; no weights are needed.

    Attributes:
        sizes: the parent's widths.
        domains: how many domains of text.
        kept: channels of an expert.
        used: channels that a token uses, those of a shared expert included, mean over layers.
        E, K: experts of a layer, and of a token.
        refit: whether experts have a ``down_proj`` of their own.
        trained: whether a stage trains the experts, so that they are no subsets of the parent's channels.
        native: whether the model is in our own format.
        itemsize, stored: bytes of a number that models compute with, and of one in the files.
        counts: parameters of the parent, in total and active.
        dense, total, stock_total: parameters of the parent, of the model, and of its stock twin.
        experts: parameters of all experts, sliced.
        layer, shell: parameters of the mixture's largest layer, and of embedding and head.
        own: bytes of the matrices that experts have to themselves, refitted or trained, in a carving.
        share, active: the share of the parent's blocks that a token uses, and the share of time that this takes.
    """

    def __init__(self, recipe: Recipe, parent: Parent, domains: int, *, trained: bool = False) -> None:
        method = recipe.method
        self.parent, self.sizes, self.domains = parent, Sizes.of(parent), domains
        L, D, F = parent.L, parent.D, parent.F
        self.E, self.K, self.kept = method.experts, method.top_k, method.width(parent)
        self.refit = getattr(method.settings, "compensation", "none") == "refit"
        self.itemsize, self.stored = parent.dtype.itemsize, parent.stored.itemsize
        self.matrices = self.sizes.matrices
        carving = method.outline(parent)
        if trained:
            carving.lora = {"to come": carving.layers[0].routed[0].channels}
        self.native_attention = method.prunes_attention
        self.native = carving.is_native(parent) or self.native_attention
        self.counts = parameters(parent, carving, self.native)
        self.stock_total = 0 if parent.family == NATIVE else parameters(parent, carving, False)["parameters_total"]
        self.dense, self.total = self.counts["parent_parameters"], self.counts["parameters_total"]
        self.used = round(sum(layer.active_width for layer in carving.layers) / L)
        layers = [self.matrices * D * sum(expert.width for expert in layer.experts) for layer in carving.layers]
        self.experts = sum(layers)
        self.layer = self.sizes.attention(self.sizes.h, self.sizes.h) + max(layers)
        self.shell = max(0, self.dense - self.sizes.total)
        self.own = D * self.stored * sum(e.width * e.changed for layer in carving.layers for e in layer.experts)
        self.share = 1 - L * self.sizes.ffn(F - self.used) / self.sizes.total
        self.active = SPARSE * self.share

    def gram(self, groups: int, *, channels: bool) -> int:
        """Count the bytes of one layer's second moments in ``groups`` groups."""
        return gram_bytes(self.sizes.D, self.sizes.F, groups, gram=channels)

    def parted(self, own: int) -> tuple[int, int]:
        """Count the bytes of a frozen parent and its teacher, the parent again, held in parts (``Cost.spread``).

        Args:
            own: what each process needs besides two layers and the ends of both.
        """
        layers, ends = 2 * self.sizes.total // self.sizes.L, 2 * self.shell
        return 2 * self.sizes.total * self.itemsize, (layers + ends) * self.itemsize + own
