"""What a comparison's table says of a run besides quality: sizes, text, time and memory."""

from __future__ import annotations

from typing import Any

from moesmith.mixture.count import active_share
from moesmith.parent.load import Parent
from moesmith.run.folder import Run

WITHOUT = ("held-out", "baseline", "evaluate")  # steps that measure, and make nothing


def facts(run: Run, parent: Parent) -> dict[str, Any]:
    """Collect a finished run's facts.

    Returns:
        ``architecture``; ``experts`` and ``top_k`` of the layer with the most; ``ffn_active``, the share of the
        feed-forward channels that a token uses; ``active``, the same of all block matrices; ``parameters_active`` and
        ``parameters_total``; ``bytes`` of the weights on disk; ``calibration_tokens``; ``training_tokens``;
        ``seconds`` of all steps that are needed to make the model; ``memory`` and ``device_memory``, the most that one
        of them took, bytes.
    """
    carving, exported = run.carving(), run.metrics("export")
    steps = {name: found for name, found in run.manifests.items() if name not in WITHOUT}
    calibration = run.metrics("domains").get("calibration_tokens", {})
    trained = [found["metrics"]["tokens"] for name, found in steps.items() if (run.path(name) / "log.jsonl").is_file()]
    return {
        "architecture": exported["architecture"],
        "experts": carving.experts,
        "top_k": carving.top_k,
        "ffn_active": sum(layer.active_width for layer in carving.layers) / (carving.d_ff * len(carving.layers)),
        "active": active_share(parent, carving),
        "parameters_active": exported["parameters_active"],
        "parameters_total": exported["parameters_total"],
        "bytes": exported["bytes"],
        "calibration_tokens": sum(calibration.values()),
        "training_tokens": sum(trained),
        "seconds": sum(found["seconds"] for found in steps.values()),
        "memory": max((found.get("memory", 0) for found in steps.values()), default=0),
        "device_memory": max((found.get("device_memory", 0) for found in steps.values()), default=0),
    }


def parent_facts(parent: Parent) -> dict[str, Any]:
    """Return the same of the dense parent."""
    count = sum(p.numel() for p in parent.model.parameters())
    return {
        "architecture": type(parent.model).__name__,
        "experts": 1,
        "top_k": 1,
        "ffn_active": 1.0,
        "active": 1.0,
        "parameters_active": count,
        "parameters_total": count,
        "bytes": count * parent.stored.itemsize,
        "calibration_tokens": 0,
        "training_tokens": 0,
        "seconds": 0.0,
        "memory": 0,
        "device_memory": 0,
    }
