"""The channel that takes the place of a bias in an expert that has no field for one.

It is fed by the constant direction v of the router input (v·x ≈ 1): gate row K·v, up row v, down column b / act(K).

Shapes: D model width.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from moesmith.mixture.layer import Layer
from moesmith.parent.network import FFN


@cache
def constant_gain(activation_name: str) -> float:
    """Find the K with which the constant channel s·act(K·s) / act(K), s = v·x ≈ 1, strays least from 1.

    v·x is 1 up to a standard deviation of about 0.05. With a positive K the channel is nearly s², so its error is
    twice that of s. s·act(K·s) has a stationary point at a negative K (−2.22 for SiLU): there the error is of second
    order, 0.3 % if s is off by 5 %, and large s are damped. Root mean square error on held-out text in layers 0, 5, 15
    and 29 of SmolLM2-135M: 0.009, 0.002, 0.056, 0.002 against 0.100, 0.054, 0.120, 0.043 with K = 4. Found on a grid,
    for any activation.
    """
    activation = ACT2FN[activation_name]
    s_N = torch.linspace(0.85, 1.15, 61, dtype=torch.float64)
    weight_N = torch.exp(-0.5 * ((s_N - 1) / 0.05) ** 2)
    gains = [
        k / 100 for k in range(-600, 601) if abs(float(activation(torch.tensor(k / 100, dtype=torch.float64)))) > 0.02
    ]

    def error(gain: float) -> float:
        channel_N = s_N * activation(gain * s_N) / activation(torch.tensor(gain, dtype=torch.float64))
        return float((weight_N * (channel_N - 1) ** 2).sum())

    return min(gains, key=error)


def constant_channel(ffn: FFN, layer: Layer, biases: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Make the channel that replaces biases: gate row (D,), up row (D,), and for each bias a down column (D,)."""
    assert layer.constant_D is not None, "stock_refusal knows it"
    gain, v_D = constant_gain(ffn.activation_name), layer.constant_D.float()
    level = ffn.activation(torch.tensor(gain, dtype=torch.float64)).float()  # the same on every machine
    return gain * v_D, v_D, [bias_D.float() / level for bias_D in biases]
