"""The parent with its activations masked: ToMoE's "pseudo-MoE", the form in which masks are trained."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from moesmith.methods.tomoe.hypernetwork import ExpertMasks, Masks
from moesmith.mixture.attention import install
from moesmith.mixture.moe import GateUp
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN
from moesmith.parent.structure import decoder_layers, put
from moesmith.training.student import frozen


class MaskedFFN(GateUp):
    """A feed-forward network whose channels are masked by each token's expert."""

    def __init__(self, ffn: FFN, masks: ExpertMasks) -> None:
        super().__init__(ffn)
        self.down, self.masks = ffn.down, masks
        self.twice = masks.spec.masking == "double" and ffn.up_FD is not None

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD: Tensor = self.down(self.masks(x_TD, self.hidden(x_TD), self.twice))
        return y_TD.view_as(x)


def masked_model(parent: Parent, masks: Masks) -> PreTrainedModel:
    """Build the parent's architecture with ``masks`` in every layer; all base weights are the parent's own, frozen."""
    model = frozen(parent)
    _, layers = decoder_layers(model)
    for ffn, layer, (experts, attention) in zip(parent.ffns, layers, masks.layers(), strict=True):
        put(model, ffn.path, MaskedFFN(ffn, experts))
        if attention is not None:
            install(layer, model.config, attention)
    return model
