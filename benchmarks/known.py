"""Settings that several presets get: each takes those that its method has."""

from __future__ import annotations

from collections.abc import Sequence

from moesmith.run.recipe import keys, kind_of, load_recipe

DECIDING = ("carve.method=", "carve.start=")  # which sections a recipe has


def known(preset: str, settings: Sequence[str]) -> list[str]:
    """Of ``settings`` those that a preset has, in their order.

    Args:
        preset: the recipe's name.
        settings: ``section.key=value``; one that decides the method decides what is known.
    """
    deciding = [setting for setting in settings if setting.startswith(DECIDING)]
    mine = set(keys(kind_of(load_recipe(preset, None, deciding).model_dump())))
    return [setting for setting in settings if setting.partition("=")[0] in mine]
