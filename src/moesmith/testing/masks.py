"""Make masks of tiny parents with well spread logits, and carvings harvested from them, for tests."""

from __future__ import annotations

from typing import Any

import torch

from moesmith.methods.tomoe.harvest import harvest
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.settings import MasksSection
from moesmith.mixture.carving import Carving
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes

IDS = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(1))  # not what a harvest sees
SEEN = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(2))
ATTENTION = ("hybrid", "dynamic", "none")
WIDE = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4}  # a unit is under 0.1 % of a parent


def spec_of(**settings: Any) -> MasksSection:
    """Make settings of masks, checked as a recipe's are."""
    return MasksSection.model_validate({"tokens": 1024, "weight_decay": 0.05, **settings})


def tiny_masks(parent: Parent, experts: int = 4, spread: float = 4.0, seed: int = 0, **settings: Any) -> Masks:
    """Make masks as if they had been trained: logits ``spread`` times as wide as at the start, embeddings drawn."""
    masks = Masks(Sizes.of(parent), experts, spec_of(**settings), seed)
    with torch.no_grad():
        for name, p in masks.named_parameters():
            if "decoder" in name or "proj" in name or "router" in name:
                p.mul_(spread)
    masks.draw()
    return masks


def harvested(parent: Parent, budget: float = 0.6, **settings: Any) -> Carving:
    """Harvest the carving of :func:`tiny_masks`."""
    return harvest(tiny_masks(parent, budget=budget, **settings), parent, SEEN, {"method": "tomoe"})[0]
