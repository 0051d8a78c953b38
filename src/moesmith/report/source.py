"""A run's folder as the report reads it, and where its pictures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moesmith.errors import MoesmithError
from moesmith.evaluation.routing import Routing
from moesmith.files.artefact import read_json
from moesmith.mixture.carving import Carving, Header
from moesmith.report import style
from moesmith.run.folder import Run


class AbsentError(Exception):
    """The source of a section does not exist."""


def present(path: Path) -> Path:
    """Return the path if a file is there.

    Raises:
        AbsentError: there is none.
    """
    if not path.is_file():
        raise AbsentError
    return path


@dataclass
class Source:
    """What several sections read from a run's folder.

    Attributes:
        run: the run.
        pictures: where every figure is left as a PNG.
    """

    run: Run
    pictures: Path

    def picture(self, figure: Any, name: str, description: str) -> Any:
        """Make a figure for the page, and write the same figure as a PNG."""
        from markupsafe import Markup

        style.save_png(figure, self.pictures / f"{name}.png")
        return Markup(style.to_svg(figure, name, description))

    @cached_property
    def titles(self) -> dict[str, str]:
        """The title of each step that made a model."""
        return {name: found["title"] for name, found in self.run.manifests.items() if found["title"]}

    @cached_property
    def experts(self) -> int:
        """E, the number of experts; the number of groups of domains if the carving does not say."""
        return self.carved.experts if self.carved else len(self.clusters)

    @cached_property
    def carved(self) -> Header | None:
        """The last carving's header; ``None`` if there is none or it is damaged, which its section says."""
        try:
            return self.run.carving_header() if self.run.carved else None
        except MoesmithError:
            return None

    @cached_property
    def clusters(self) -> list[list[str]]:
        """Domains per expert; empty unless every domain belongs to exactly one expert."""
        path = self.run.path("affinity") / "clusters.json"
        if not path.is_file():
            return []
        clusters: list[list[str]] = read_json(path).get("clusters", [])
        names = [name for cluster in clusters for name in cluster]
        return clusters if len(clusters) > 1 and len(set(names)) == len(names) else []

    @cached_property
    def home(self) -> dict[str, int]:
        """The expert made for each domain, or started from it if masks were learned on top."""
        return {name: expert for expert, cluster in enumerate(self.clusters) for name in cluster}

    @cached_property
    def learned(self) -> str:
        """The step that learned masks; empty if none were learned."""
        manifests = self.run.manifests.items()
        return next((name for name, found in manifests if "threshold" in found.get("metrics", {})), "")

    @cached_property
    def masks(self) -> dict[str, Any]:
        """What that step measured, its settings, and what it started from; empty if no masks were learned."""
        if not self.learned:
            return {}
        manifest = self.run.manifests[self.learned]
        start = "random" if self.run.carved[0] == self.learned else "carving"
        return manifest.get("settings", {}) | {"start": start} | manifest["metrics"]

    @cached_property
    def carving(self) -> Carving:
        """The channels that the experts ended with: training afterwards moves weights, not channels."""
        if not self.run.carved:
            raise AbsentError
        return self.run.carving(self.learned or self.run.carved[0])

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """``evaluation.json``."""
        return read_json(present(self.run.path("evaluate") / "evaluation.json"))

    @cached_property
    def routing(self) -> Routing:
        """What the recorder saw."""
        return Routing.load(present(self.run.path("evaluate") / "routing.npz"))

    def in_order(self, names: Sequence[str]) -> list[str]:
        """Sort domains so that those of one expert are together, experts in order."""
        return sorted(names, key=lambda name: self.home.get(name, len(self.clusters)))
