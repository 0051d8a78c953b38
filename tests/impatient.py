"""A method file (``moesmith convert --method-file``) that lets a conversion keep its unfinished work at every step.

Unfinished work is kept once a minute, and a tiny conversion takes seconds: without this file no kill would meet it. It
also leaves out the measurement of this machine's speed before a run. The method that it registers is FLAP's, which
nobody asks for.
"""

from __future__ import annotations

from moesmith.conversion import pace
from moesmith.methods import steps
from moesmith.methods.registry import find, register
from moesmith.training import loop

loop.SAVE_SECONDS = steps.SAVE_SECONDS = -1.0
pace.MEASURE = 0.0


@register
class Impatient(find("static")):  # type: ignore[misc]
    """FLAP's method under another name."""

    name = "impatient"
