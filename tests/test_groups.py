"""What an expert's least squares take of memory is what the plan and the refusal count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, profiler

from moesmith.calibration.moments import gram_bytes
from moesmith.calibration.view import Tokens
from moesmith.methods.groups import SQUARES, Fitting, Groups
from moesmith.methods.refit import eliminate, refit_down
from moesmith.parent.network import Network

D, F, T = 64, 256, 16


def peak(work: Callable[[], None]) -> int:
    """The most bytes that exist at once of what a function allocates, inside of operators too."""
    with torch.no_grad(), profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("keep", [F // 2, F - 1])
def test_an_experts_least_squares_take_what_is_counted(keep: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    network = Network(drawn(F, D), drawn(F, D), drawn(D, F), torch.nn.functional.silu)
    windows_T = torch.arange(T, dtype=torch.int32) // 4
    tokens = Tokens(drawn(T, D), drawn(T, D), torch.ones(T), windows_T, torch.zeros(T))

    def work() -> None:
        groups = Groups(network, tokens, torch.arange(T) % 2, 2, Fitting())
        for expert in range(2):
            _, gram_FF, down_DF = groups.fit(expert)
            refit_down(down_DF, gram_FF, eliminate(down_DF, gram_FF, keep, rounds=4))

    counted = gram_bytes(D, F, SQUARES, gram=True)
    assert 0.8 * counted < peak(work) <= counted
