"""moesmith turns a dense language model into a Mixture-of-Experts, and proves what it did."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesmith.conversion.convert import convert
    from moesmith.errors import MoesmithError
    from moesmith.mixture.carving import Carving
    from moesmith.mixture.layer import Expert, Layer, Linear
    from moesmith.mixture.moe import build
    from moesmith.parent.load import Parent, load_parent
    from moesmith.run.folder import Run, open_run
    from moesmith.run.recipe import Recipe, load_recipe

_HOMES = {
    "Carving": "mixture.carving",
    "convert": "conversion.convert",
    "MoesmithError": "errors",
    "Expert": "mixture.layer",
    "Layer": "mixture.layer",
    "Linear": "mixture.layer",
    "build": "mixture.moe",
    "Parent": "parent.load",
    "load_parent": "parent.load",
    "Run": "run.folder",
    "open_run": "run.folder",
    "Recipe": "run.recipe",
    "load_recipe": "run.recipe",
}

__all__ = [
    "Carving",
    "Expert",
    "Layer",
    "Linear",
    "MoesmithError",
    "Parent",
    "Recipe",
    "Run",
    "build",
    "convert",
    "load_parent",
    "load_recipe",
    "open_run",
]


def __getattr__(name: str) -> Any:
    # imported on first use: 'moesmith presets' must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"moesmith.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moesmith' has no attribute '{name}'")
