"""A method of your own in one file: experts made for clusters of tokens instead of domains.

    moesmith convert token-clusters --method-file examples/token_clusters.py --model my-model --data text --out mine

In every layer: k-means of router inputs, the channels with most energy on a cluster's tokens, ``down_proj`` refitted on
them, a linear router that tells the clusters apart. Layers see what the carved layers before them make of the text.
"""

from typing import Literal

import torch
from pydantic import Field

from moesmith.calibration.view import LayerView
from moesmith.methods.base import Carver, Needs, Routed
from moesmith.methods.refit import refit_down
from moesmith.methods.registry import register
from moesmith.methods.router import lda_router
from moesmith.methods.scores import top
from moesmith.mixture.layer import Expert, Layer, Linear


@register
class TokenClusters(Carver):
    name, title, activations = "token-clusters", "experts from clusters of tokens", "carved"

    class Settings(Routed):
        method: Literal["token-clusters"] = "token-clusters"
        ratio: float = Field(0.5, ge=0, lt=1, description="share of FFN channels pruned from each expert")
        sample: int = Field(4096, ge=64, description="tokens that are clustered, per layer")
        rounds: int = Field(10, ge=1, description="of k-means")

    def needs(self) -> Needs:  # the text passes a layer to be looked at, and what became of it to the next one
        return Needs(gram=True, passes=2)

    def carve(self, view: LayerView) -> Layer:
        centres_ED = self.centres(view)
        stats = view.statistics(lambda x_TD, _group: nearest(x_TD, centres_ED), self.experts, gram=True)
        energy_F = view.ffn.down_DF.float().square().sum(0)  # how much a channel's output weighs
        experts = []
        for one in stats:
            kept = top((one.channels.gram_NN.diagonal() * energy_F).cpu(), self.settings.ratio)
            experts.append(Expert(kept, refit_down(view.ffn.down_DF, one.channels.gram_NN, kept).cpu()))
        return Layer(experts, Linear(lda_router([one.inputs for one in stats])), self.top_k)

    def centres(self, view: LayerView) -> torch.Tensor:  # k-means of router inputs
        x_TD = view.sample(self.settings.sample)
        centres_ED = x_TD[torch.randperm(len(x_TD), generator=view.generator)[: self.experts].to(x_TD.device)]
        for _ in range(self.settings.rounds):
            ids_T = nearest(x_TD, centres_ED)
            groups = [x_TD[ids_T == expert] for expert in range(self.experts)]
            pairs = zip(groups, centres_ED, strict=True)
            centres_ED = torch.stack([group.mean(0) if len(group) else old for group, old in pairs])
        return centres_ED


def nearest(x_TD: torch.Tensor, centres_ED: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x_TD.float(), centres_ED).argmin(-1)
