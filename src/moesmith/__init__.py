"""moesmith turns a dense language model into a Mixture-of-Experts, and proves what it did."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesmith.carving import Carving
    from moesmith.conversion import convert
    from moesmith.errors import MoesmithError
    from moesmith.gates import GateSpec
    from moesmith.moe import build
    from moesmith.parents import Parent, load_parent
    from moesmith.recipe import Recipe, load_recipe

_HOMES = {
    "Carving": "carving",
    "convert": "conversion",
    "MoesmithError": "errors",
    "GateSpec": "gates",
    "build": "moe",
    "Parent": "parents",
    "load_parent": "parents",
    "Recipe": "recipe",
    "load_recipe": "recipe",
}

__all__ = [
    "Carving",
    "GateSpec",
    "MoesmithError",
    "Parent",
    "Recipe",
    "build",
    "convert",
    "load_parent",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    # imported on first use: 'moesmith presets' must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"moesmith.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moesmith' has no attribute '{name}'")
