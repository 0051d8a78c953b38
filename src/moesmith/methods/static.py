"""One static mask for all domains: FLAP (arXiv:2312.11983) and its variants, by the score and the compensation."""

from __future__ import annotations

from typing import Literal

from moesmith.methods.base import Kept
from moesmith.methods.dive import ByScore, Scored
from moesmith.methods.registry import register
from moesmith.run.folder import Run


@register
class Static(ByScore):
    """The control that every mixture must beat: the same number of channels, the same ones for all tokens."""

    name, title, paper = "static", "one static mask (FLAP)", "arXiv:2312.11983"

    class Settings(Scored, Kept):
        """What is kept."""

        method: Literal["static"] = "static"

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        spec = self.settings
        return [
            f"one expert with {1 - spec.ratio:.0%} of the FFN, the same for every token",
            f"channels: static, score {spec.score}; compensation: {spec.compensation}",
        ]
