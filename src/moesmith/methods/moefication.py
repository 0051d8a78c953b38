"""MoEfication (arXiv:2110.01786): the channels of a network divided among experts that are active together.

As published, for networks with ReLU: parts of equal size by balanced k-means of the normalised rows of the first
matrix (parameter clustering), or by cutting the graph in which two neurons are connected by how much they are active
together (co-activation graph), with METIS; chosen experts count in full; a token's experts are those of the highest
cosine similarity to the mean of their rows, or those that a network of two layers finds, trained to predict the sum of
each expert's positive activations.

What differs: in a gated network the first matrix is ``gate_proj``, and a channel, which may be negative, is as active
as its absolute value. The graph is cut by our own method (``balanced.balanced_graph``). A stock gate is linear, so in
place of the network of two layers the router is the linear one that predicts the norm of each expert's channels best,
in closed form; the similarity is linear as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from moesmith.calibration.view import LayerView
from moesmith.methods.parts import (
    EqualParts,
    Parts,
    rows_normalised,
    similarity_router,
    split_channels,
)
from moesmith.methods.registry import register
from moesmith.methods.router import fitted_router


@register
class Moefication(EqualParts):
    """Equal parts of the channels that are like each other or active together, and a router that predicts them."""

    name, title, paper = "moefication", "parts of channels active together (MoEfication)", "arXiv:2110.01786"

    class Settings(Parts):
        """How channels are divided, and how experts are chosen."""

        method: Literal["moefication"] = "moefication"
        split: Literal["cluster", "co-activation", "random"] = "cluster"
        selector: Literal["norm", "similarity"] = "norm"

        def without_effect(self) -> dict[str, str]:
            """The setting of a router that is not fitted."""
            return {} if self.selector == "norm" else {"ridge": "carve.selector is not norm"}

    def parts(self, view: LayerView, rest: Tensor, x_TD: Tensor) -> Tensor:
        """Divide the channels."""
        return split_channels(self.settings.split, view.ffn.gate_FD, rest, self.experts, view, x_TD)

    def route(self, view: LayerView, routed: Sequence[Tensor], x_TD: Tensor, norms_TE: Tensor) -> Tensor:
        """Fit the router, or take the experts' mean rows."""
        if self.settings.selector == "similarity":
            return similarity_router(rows_normalised(view.ffn.gate_FD), routed)
        return fitted_router(x_TD, norms_TE, self.settings.ridge)
