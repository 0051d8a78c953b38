"""Make random carvings of tiny parents, for tests."""

from __future__ import annotations

import torch

from moesmith.mixture.carving import Carving
from moesmith.mixture.gates import Mix
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.load import Parent


def random_carving(
    parent: Parent,
    experts: int = 4,
    top_k: int = 1,
    kept: int | None = None,
    compensation: str = "none",
    seed: int = 0,
    ragged: bool = False,
    noise: bool = False,
    mix: Mix = "average",
    shared: int = 0,
    trained: bool = False,
) -> Carving:
    """Draw random channels, routers and (if asked for) biases or refitted ``down`` matrices.

    Args:
        parent: the dense model.
        experts, top_k, mix: the same for every layer.
        kept: channels of an expert; half of the parent's if left out.
        compensation: ``none``, ``bias`` or ``refit``.
        seed: seed of everything drawn.
        ragged: make every expert one channel narrower than the one before.
        noise: give routers a noise matrix.
        shared: channels of an expert that every token uses, the parent's first ones; 0 for none.
        trained: give experts gate and up rows of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = parent.F // 2 if kept is None else kept
    layers = []
    for ffn in parent.ffns:
        widths = [max(1, kept - (e if ragged else 0)) for e in range(experts)]
        channels = [torch.randperm(parent.F, generator=generator)[:w].sort().values for w in widths]
        router = Linear(torch.randn(experts, parent.D, generator=generator))
        if noise:
            router.noise_ED = torch.randn(experts, parent.D, generator=generator)
        routed = [Expert(kept) for kept in channels]
        if compensation == "bias":
            for expert, bias_D in zip(routed, torch.randn(experts, parent.D, generator=generator), strict=True):
                expert.bias_D = bias_D
        if compensation == "refit":
            for expert in routed:
                change = 0.1 * torch.randn(parent.D, expert.width, generator=generator)
                expert.down_DF = ffn.down_DF[:, expert.channels] + change.to(ffn.down_DF)
        common = Expert(torch.arange(shared)) if shared else None
        if common is not None and compensation == "bias":
            common.bias_D = torch.randn(parent.D, generator=generator)
        for expert in routed if trained else ():
            for name, rows_FD in (("gate_FD", ffn.gate_FD), ("up_FD", ffn.up_FD)):
                if rows_FD is not None:
                    change = 0.1 * torch.randn(expert.width, parent.D, generator=generator)
                    setattr(expert, name, rows_FD[expert.channels] + change.to(rows_FD))
        layers.append(Layer(routed, router, top_k, mix, 5e-4 if noise else 0.0, common))
    return Carving(layers, parent.F)
