"""A start from a carving: the first masks are the carving's, its routers too, and the budget holds at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesmith.errors import MoesmithError
from moesmith.methods.channels import Channels
from moesmith.methods.scores import kept_channels
from moesmith.methods.tomoe.harvest import harvest
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.method import Tomoe
from moesmith.methods.tomoe.objective import MaskObjective
from moesmith.methods.tomoe.student import masked_model
from moesmith.methods.tomoe.warm import DROPPED, KEPT, expert_ratio, start_from
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import active_share
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.run.recipe import load_recipe
from moesmith.testing.carvings import random_carving
from moesmith.testing.masks import IDS, SEEN, WIDE, spec_of
from moesmith.testing.parents import FAMILIES, tiny_parent


def warm(parent: Parent, budget: float, experts: int = 8, **settings: Any) -> tuple[Masks, Carving]:
    """Masks started from a random carving of the width that the budget leaves."""
    kept = kept_channels(parent.F, expert_ratio(Sizes.of(parent), budget))
    carving = random_carving(parent, experts=experts, kept=kept)
    masks = Masks(Sizes.of(parent), experts, spec_of(budget=budget, **settings), seed=0)
    start_from(masks, carving)
    masks.draw()
    return masks, carving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["none", "hybrid", "dynamic"])
def test_the_first_harvest_is_the_carving(family: str, attention: str) -> None:
    parent = tiny_parent(family)
    masks, carving = warm(parent, 0.7, 4, attention=attention)
    given = active_share(parent, carving)
    masks.spec = spec_of(budget=given + 1e-9, attention=attention)
    found, facts = harvest(masks, parent, SEEN, {})
    assert active_share(parent, found) == pytest.approx(given)
    for index in range(parent.L):
        assert torch.equal(found.mask(index), carving.mask(index))
        assert torch.equal(found.layers[index].router.weight_ED, carving.layers[index].router.weight_ED)
    assert all((a.width_qk, a.width_vo) == (len(a.qk_h), len(a.qk_h)) for a in found.attention)
    assert facts["threshold"] == pytest.approx((KEPT + DROPPED) / 2 - 3.0, abs=1e-3)  # far from both


def test_logits_are_the_targets() -> None:
    parent = tiny_parent("llama")
    masks, carving = warm(parent, 0.7)
    for index, ffn in enumerate(masks.ffn):
        wanted_NF = torch.where(carving.mask(index), KEPT, DROPPED) - 3.0
        torch.testing.assert_close(ffn.logits(), wanted_NF, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_the_budget_holds_from_the_first_step(family: str, budget: float) -> None:
    parent = tiny_parent(family, **WIDE)
    masks, _ = warm(parent, budget)
    objective = MaskObjective(masked_model(parent, masks), parent.model, masks, masks.spec)
    objective(IDS)
    assert objective.measured["active"] == pytest.approx(budget, rel=0.02)
    open_masks = Masks(Sizes.of(parent), 8, spec_of(budget=budget), seed=0)
    objective = MaskObjective(masked_model(parent, open_masks), parent.model, open_masks, open_masks.spec)
    objective(IDS)
    assert objective.measured["active"] > 0.999  # as published


def test_expert_ratio_is_what_the_budget_leaves() -> None:
    sizes = Sizes(2, 32, 64, 4, 2, 8, 8)  # attention is a third
    assert expert_ratio(sizes, 1.0) == pytest.approx(0)
    assert expert_ratio(sizes, 2 / 3) == pytest.approx(0.5)
    assert expert_ratio(sizes, 1 / 3 + 2 / 3 / 64 + 1e-9) == pytest.approx(63 / 64)
    for budget in (1 / 3, 0.2):
        with pytest.raises(MoesmithError, match=r"attention alone is 33% .* Raise masks\.budget, or leave carve"):
            expert_ratio(sizes, budget)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_carving_of_that_ratio_meets_the_budget(family: str) -> None:
    parent = tiny_parent(family, **WIDE)
    _, carving = warm(parent, 0.6)
    assert active_share(parent, carving) == pytest.approx(0.6, abs=0.001)


def test_a_carvings_own_ratio_counts_only_without_masks() -> None:
    parent = tiny_parent("llama")
    plain = load_recipe("dive-1of8", None, ["carve.ratio=0.25"]).method
    assert isinstance(plain, Channels)
    assert (plain.ratio(parent), plain.width(parent)) == (0.25, 48)
    for start in ("dive", "llama-moe", "static"):
        settings = ["masks.budget=0.6666", f"carve.start={{method: {start}}}"]
        method = load_recipe("tomoe-50", None, settings).method
        assert isinstance(method, Tomoe)
        assert method.start is not None
        assert method.start.ratio(parent) == pytest.approx(0.5, abs=1e-3)
        assert method.width(parent) == method.start.width(parent) == kept_channels(64, method.start.ratio(parent))
        assert method.start.experts == (1 if start == "static" else method.experts)
        for decided in ("ratio=0.25", "experts=4", "compensation=bias"):
            with pytest.raises(MoesmithError, match=r"carve\.start: start\.\w+ follows from the settings of tomoe"):
                load_recipe("tomoe-50", None, [*settings, f"carve.start.{decided}"])
