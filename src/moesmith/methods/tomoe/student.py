"""The parent with its activations masked: ToMoE's "pseudo-MoE", the form in which masks are trained."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.methods.tomoe.hypernetwork import ExpertMasks, Masks
from moesmith.mixture.attention import install
from moesmith.parent.load import Parent
from moesmith.parent.structure import FFN, decoder_layers, put
from moesmith.training.student import frozen


class MaskedFFN(nn.Module):
    """A feed-forward network whose channels are masked by each token's expert."""

    def __init__(self, ffn: FFN, masks: ExpertMasks) -> None:
        super().__init__()
        self.dense, self.masks = ffn.module, masks  # dense: its weights stay among the model's
        self._ffn = [ffn]
        self.twice = masks.spec.masking == "double" and ffn.up_FD is not None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        (ffn,) = self._ffn
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        y_TD: Tensor = ffn.down(self.masks(x_TD, ffn.hidden(x_TD), self.twice))
        return y_TD.view_as(hidden)


def masked_model(parent: Parent, masks: Masks) -> PreTrainedModel:
    """Build the parent's architecture with ``masks`` in every layer; all base weights are the parent's own, frozen."""
    model = frozen(parent)
    _, layers = decoder_layers(model)
    for ffn, layer, (experts, attention) in zip(parent.ffns, layers, masks.layers(), strict=True):
        put(model, ffn.path, MaskedFFN(ffn, experts))
        if attention is not None:
            install(layer, model.config, attention)
    return model
