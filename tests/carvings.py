"""Random carvings of tiny parents, for tests."""

from __future__ import annotations

import torch

from moesmith.carving import CarvedLayer, Carving
from moesmith.gates import GateSpec
from moesmith.parents import Parent


def random_carving(
    parent: Parent,
    experts: int = 4,
    top_k: int = 1,
    kept: int | None = None,
    compensation: str = "none",
    seed: int = 0,
    ragged: bool = False,
    noise: bool = False,
) -> Carving:
    """Random channels, routers and (if asked for) biases or refitted ``down`` matrices."""
    generator = torch.Generator().manual_seed(seed)
    kept = parent.F // 2 if kept is None else kept
    layers = []
    for ffn in parent.ffns:
        widths = [max(1, kept - (e if ragged else 0)) for e in range(experts)]
        channels = [torch.randperm(parent.F, generator=generator)[:w].sort().values for w in widths]
        layer = CarvedLayer(channels, torch.randn(experts, parent.D, generator=generator))
        if noise:
            layer.noise_ED = torch.randn(experts, parent.D, generator=generator)
        if compensation == "bias":
            layer.bias_ED = torch.randn(experts, parent.D, generator=generator)
        if compensation == "refit":
            layer.down = [
                ffn.down_DF[:, c] + 0.1 * torch.randn(parent.D, len(c), generator=generator).to(ffn.down_DF)
                for c in channels
            ]
        layers.append(layer)
    gate = GateSpec(experts=experts, top_k=top_k, noise=5e-4 if noise else 0.0)
    return Carving(layers, gate, parent.F, compensation)  # type: ignore[arg-type]
