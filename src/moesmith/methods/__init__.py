"""Ways to choose each expert's channels. A new method is one new file and one line in ``METHODS``."""

from __future__ import annotations

from moesmith.methods.dive import by_score
from moesmith.methods.llama_moe import independent_random
from moesmith.methods.method import Method

METHODS: dict[str, Method] = {
    "dive": by_score,
    "static": by_score,  # one group that holds every domain
    "llama-moe": independent_random,
}

__all__ = ["METHODS", "Method"]
