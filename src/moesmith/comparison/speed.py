"""How fast rows are in llama.cpp, one sequence at a time, each beside the parent in the same type of weights."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from moesmith.bench.measure import bench
from moesmith.run.folder import Run
from moesmith.run.settings import Section

PHASES = ("prefill", "decode")
SPEED = "speed"  # of what is timed of a row
KEPT = ("dense", "moe", "ratio", "ratio_min", "ratio_max")


class Speed(Section):
    """What is timed of rows that ask for it."""

    prompt: int = Field(512, ge=1, description="tokens of the prompt")
    new: int = Field(64, ge=1, description="new tokens")
    rounds: int = Field(3, ge=1, description="how often each model is timed; the two take turns")


def timed(measured: Mapping[str, Any], spec: Speed, quants: Collection[str]) -> bool:
    """Whether a row was timed in all these types of weights, as ``spec`` says."""
    found = measured.get(SPEED, {})
    return all(found.get(quant, {}).get("as") == spec.model_dump() for quant in quants)


def measure_speed(run: Run, spec: Speed, quants: Sequence[str], out: Path) -> dict[str, Any]:
    """Time a finished run beside its parent (``moesmith bench``).

    Args:
        run: the run; a benchmark of its own stays as it is.
        spec: what is timed.
        quants: types of the weights.
        out: the JSON file of the benchmark.

    Returns:
        by type of the weights: ``prefill`` and ``decode``, each with tokens per second of ``dense`` and ``moe`` and
        their ``ratio``, ``bytes`` of both files, and ``spec`` under ``as``.

    Raises:
        MoesmithError: as ``bench``.
    """
    shape = {"batches": [1], **spec.model_dump()}
    out.parent.mkdir(parents=True, exist_ok=True)
    found = bench(run.folder, ["llama.cpp"], quants=quants, out=out, overwrite=True, **shape)
    return {
        result["weights"]: {phase: {name: result[phase][name] for name in KEPT} for phase in PHASES}
        | {"bytes": result["file_bytes"], "as": spec.model_dump()}
        for result in found["results"]
    }


def speeds(timed: Mapping[str, Mapping[str, Any]], quantised: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Say of every row, and under an empty name of the parent, how fast it is.

    Args:
        timed: what :func:`measure_speed` returned, by row.
        quantised: rows that are another one in fewer bits: that row's name (empty for the parent), type of the weights.

    Returns:
        by row: ``weights``, ``prefill`` and ``decode`` in tokens per second, ``bytes``, and of mixtures
        ``prefill_ratio`` and ``decode_ratio``, over the parent with weights of the same type. A row of its own is given
        in its first type. The parent's numbers are medians over the rows beside which it was timed.
    """
    dense: dict[str, list[Any]] = {}
    for found in timed.values():
        for quant, each in found.items():
            dense.setdefault(quant, []).append(each)
    known = {(name, quant): _mixture(quant, each) for name, found in timed.items() for quant, each in found.items()}
    known |= {("", quant): _parent(quant, some) for quant, some in dense.items()}
    rows = {name: known[name, next(iter(found))] for name, found in timed.items()}
    if dense:
        rows[""] = known["", next(iter(dense))]
    return rows | {name: known[which] for name, which in quantised.items() if which in known}


def _mixture(quant: str, found: Mapping[str, Any]) -> dict[str, Any]:
    speed: dict[str, Any] = {"weights": quant, "bytes": found["bytes"]["moe"]}
    for phase in PHASES:
        speed |= {phase: found[phase]["moe"], f"{phase}_ratio": found[phase]["ratio"]}
    return speed


def _parent(quant: str, some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speed: dict[str, Any] = {"weights": quant, "bytes": some[0]["bytes"]["dense"]}
    return speed | {phase: statistics.median(found[phase]["dense"] for found in some) for phase in PHASES}
