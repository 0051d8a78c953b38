"""The real 135M parent: FLAP parity and identities where weights and activations are not random."""

from __future__ import annotations

import pytest
import torch
from flap import published_fluctuation

from moesmith.calibration.moments import channel_moments
from moesmith.data.builtin import builtin_domains
from moesmith.data.text import sample_windows
from moesmith.methods.scores import channel_scores, choose
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent, load_parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parent() -> Parent:
    torch.set_num_threads(2)
    return load_parent("smollm2-135m")


@pytest.fixture(scope="module")
def windows(parent: Parent) -> torch.Tensor:
    domain = next(d for d in builtin_domains() if d.name == "encyclopaedia")
    return sample_windows(domain, parent.tokenizer, 96 * 128, 128, 0)


def test_flap_parity(parent: Parent, windows: torch.Tensor) -> None:
    """Masks from our moments against the published estimator on the same tokens: IoU >= 0.985 (mean over layers)."""
    kept: list[list[torch.Tensor]] = [[] for _ in parent.ffns]
    handles = [
        ffn.down.register_forward_pre_hook(lambda _m, args, rows=rows: rows.append(args[0].float()))
        for ffn, rows in zip(parent.ffns, kept, strict=True)
    ]
    with torch.no_grad():
        for ids in windows.split(8):
            parent.model.base_model(input_ids=ids)
    for handle in handles:
        handle.remove()
    ours = choose(channel_scores(parent, channel_moments(parent, windows)), 0.5)
    found = []
    for ffn, rows, mine in zip(parent.ffns, kept, ours, strict=True):
        _, fluctuation = published_fluctuation(torch.cat(rows))
        score = fluctuation * ffn.down_DF.float().square().sum(0)
        theirs = set(score.argsort(descending=True)[: len(mine)].tolist())
        both = len(theirs & set(mine.tolist()))
        found.append(both / (2 * len(mine) - both))
    print(f"IoU mean {sum(found) / len(found):.4f}, lowest {min(found):.4f}")
    assert sum(found) / len(found) >= 0.985


def test_one_whole_expert_is_the_parent(parent: Parent, windows: torch.Tensor) -> None:
    from moesmith.testing.carvings import random_carving

    whole = random_carving(parent, experts=1, kept=parent.F)
    ids = windows[:2]
    with torch.no_grad():
        expected = parent.model(input_ids=ids).logits.float()
        for form in ("masked", "sliced"):
            found = build(parent, whole, form)(input_ids=ids).logits.float()  # type: ignore[arg-type]
            assert (found - expected).abs().mean() < 0.02 * expected.std()
