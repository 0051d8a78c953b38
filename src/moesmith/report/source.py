"""A run's folder as the report reads it, and where its pictures go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moesmith.evaluation.routing import Routing
from moesmith.files.artefact import MANIFEST, read_json, write_atomic
from moesmith.mixture.carving import Carving
from moesmith.report import style
from moesmith.report.overview import STAGES


class AbsentError(Exception):
    """A section's source is not there."""


def present(path: Path) -> Path:
    """The path, if a file lies there.

    Raises:
        AbsentError: it does not.
    """
    if not path.is_file():
        raise AbsentError
    return path


@dataclass
class Source:
    """A run's folder: what several sections read.

    Attributes:
        folder: the run.
        pictures: where every figure is left as a PNG.
        header: ``run.json``.
    """

    folder: Path
    pictures: Path
    header: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.header = read_json(self.folder / "run.json")

    def picture(self, figure: Any, name: str, description: str) -> Any:
        """A figure for the page; the same lies beside it as a PNG."""
        from markupsafe import Markup

        write_atomic(
            self.pictures / f"{name}.png",
            lambda path: style.save(figure, path, format="png", dpi=130, facecolor="white", bbox_inches="tight"),
        )
        return Markup(style.to_svg(figure, name, description))

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.folder / "stages" / name

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """Of every finished stage, in order."""
        return {s: read_json(self.stage(s) / MANIFEST) for s in STAGES if (self.stage(s) / MANIFEST).is_file()}

    @cached_property
    def experts(self) -> int:
        """E."""
        return int(self.header.get("recipe", {}).get("carve", {}).get("experts") or 0)

    @cached_property
    def clusters(self) -> list[list[str]]:
        """Domains per expert; empty unless every domain belongs to exactly one expert."""
        path = self.stage("affinity") / "clusters.json"
        if not path.is_file():
            return []
        clusters: list[list[str]] = read_json(path).get("clusters", [])
        names = [name for cluster in clusters for name in cluster]
        return clusters if len(clusters) > 1 and len(set(names)) == len(names) else []

    @cached_property
    def home(self) -> dict[str, int]:
        """The expert made for each domain, or begun from it where masks were learned on top."""
        return {name: expert for expert, cluster in enumerate(self.clusters) for name in cluster}

    @cached_property
    def masks(self) -> dict[str, Any]:
        """What stage *masks* measured; empty where no masks were learned."""
        found: dict[str, Any] = self.manifests.get("masks", {}).get("metrics", {})
        return found

    @cached_property
    def carving(self) -> Carving:
        """The channels that the experts ended with: training afterwards moves weights, not channels."""
        stage = self.stage("masks" if self.masks else "carve")
        present(stage / "carving.json")
        return Carving.load(stage)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """``evaluation.json``."""
        found: dict[str, Any] = read_json(present(self.stage("evaluate") / "evaluation.json"))
        return found

    @cached_property
    def routing(self) -> Routing:
        """What the recorder saw."""
        return Routing.load(present(self.stage("evaluate") / "routing.npz"))

    def in_order(self, names: Sequence[str]) -> list[str]:
        """Domains of one expert side by side, experts in order."""
        return sorted(names, key=lambda name: self.home.get(name, len(self.clusters)))
