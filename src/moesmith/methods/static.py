"""One static mask of all domains: FLAP (arXiv:2312.11983) and its siblings, by the score and the compensation."""

from __future__ import annotations

from typing import Literal

from moesmith.methods.base import Kept
from moesmith.methods.dive import ByScore, Scored
from moesmith.methods.registry import register
from moesmith.run.folder import Run


@register
class Static(ByScore):
    """The control that every mixture must beat: as many channels, the same for all tokens."""

    name, title, paper = "static", "one static mask (FLAP)", "arXiv:2312.11983"

    class Settings(Scored, Kept):
        """What is kept."""

        method: Literal["static"] = "static"

    def about(self, run: Run) -> list[str]:
        """In numbers."""
        spec = self.settings
        return [
            f"one expert with {1 - spec.ratio:.0%} of the FFN, the same for every token",
            f"channels: static, score {spec.score}; compensation: {spec.compensation}",
        ]
