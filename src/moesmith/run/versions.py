"""Versions of the packages that compute: what made a step, what has changed since, and how that is said."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

MATTER = ("moesmith", "torch", "transformers")  # versions that may change what comes out
PACKAGES = (*MATTER, "accelerate", "safetensors", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read them once per process: every stage asks, and each package's metadata is a file of some hundred lines."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from its source, without an installation
        return "not installed"


def version_changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What matters and differs, as ``torch 2.12.0, now 2.13.0``; empty if nothing does."""
    changed = [name for name in MATTER if name in then and then[name] != now[name]]
    return "; ".join(f"{name} {then[name]}, now {now[name]}" for name in changed)


def versions_of(manifests: Mapping[str, Any]) -> dict[str, str]:
    """Package → the version that made the run; where stages differ, every version with its stages."""
    made: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in manifests.items():
        for package, version in manifest.get("versions", {}).items():
            made.setdefault(package, {}).setdefault(version, []).append(stage)
    return {
        package: next(iter(found))
        if len(found) == 1
        else ", ".join(f"{version} ({', '.join(stages)})" for version, stages in found.items())
        for package, found in made.items()
    }
