"""What a run holds: carving, gate and the metrics of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesmith.arguments import takes_paths
from moesmith.console import show_table
from moesmith.files.parse import as_written
from moesmith.mixture.carving import Carving
from moesmith.run.folder import Run, open_run
from moesmith.run.versions import MATTER, versions_of


@takes_paths("folder")
def describe(folder: Path) -> dict[str, Any]:
    """Collect everything ``moesmith inspect`` prints, as one JSON-able value.

    Raises:
        MoesmithError: the folder is not a run, or not carved yet.
    """
    with as_written(folder):
        return _described(open_run(folder))


def _described(run: Run) -> dict[str, Any]:
    carving, manifests = run.carving(), run.manifests
    metrics = {name: m["metrics"] | {"seconds": m["seconds"]} for name, m in manifests.items()}
    counted = next(found for found in reversed(metrics.values()) if "parent_parameters" in found)
    learned = next((name for name, found in metrics.items() if "threshold" in found), None)
    return {
        "run": str(run.folder),
        "recipe": run.settings["name"],
        "inputs": run.inputs,
        "gate": _gate(carving),
        "compensation": carving.compensation,
        "clusters": run.clusters or None,
        "masks": None if learned is None else _masks(run, learned, carving),
        "parameters": {name: counted[name] for name in ("parent_parameters", "parameters_total", "parameters_active")},
        "layers": _layers(carving),
        "versions": versions_of(manifests),
        "stages": metrics,
        "headlines": {name: manifest["headline"] for name, manifest in manifests.items()},
    }


def _masks(run: Run, step: str, carving: Carving) -> dict[str, Any]:
    """Return what was learned, and under which budget."""
    manifest, before = run.manifests[step], run.carved[0] != step
    names = ("active_share", "threshold", "union", "width_ffn", "width_qk", "width_vo")
    found = {name: manifest["settings"][name] for name in ("budget", "attention")}
    found |= {"start": "carving" if before else "random"}
    found |= {name: manifest["metrics"][name] for name in names if name in manifest["metrics"]}
    return found | {"head": len(carving.attention[0].qk_h) if carving.attention else None, "channels": carving.d_ff}


def _gate(carving: Carving) -> dict[str, Any]:
    """Return the routing that all layers have in common; a field is ``None`` where they differ."""
    gates = [layer.gate().model_dump() for layer in carving.layers]
    found = {name: value if all(gate[name] == value for gate in gates) else None for name, value in gates[0].items()}
    shared = [0 if layer.shared is None else layer.shared.width for layer in carving.layers]
    return found | {"experts": carving.experts, "top_k": carving.top_k, "shared_channels": max(shared)}


def _gate_line(gate: dict[str, Any]) -> str:
    mix = {"average": "weights that sum to 1", "sum": "each counts in full"}.get(gate["mix"], "mixed by layer")
    parts = [f"{gate['experts']} experts, top-{gate['top_k']}, {mix}"]
    if gate["shared_channels"]:
        parts.append(f"and one of {gate['shared_channels']:,} channels that every token uses")
    if gate["logits"] != "linear":
        parts.append("logits are channels of the parent")
    return ", ".join(parts)


def _layers(carving: Carving) -> list[dict[str, Any]]:
    iou_LEE, union_L = carving.overlap(), carving.union()
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(carving.layers):
        E = len(layer.routed)
        overlap = float((iou_LEE[index, :E, :E].sum() - E) / (E * (E - 1))) if E > 1 else None
        layers.append({"layer": index, "channels": layer.widths, "overlap": overlap, "union": float(union_L[index])})
    for row, attention in zip(layers, carving.attention, strict=bool(carving.attention)):
        row |= {"qk": attention.width_qk, "vo": attention.width_vo}
    return layers


def show(found: dict[str, Any], *, brief: bool = False) -> None:
    """Print :func:`describe`'s value as tables; ``brief`` leaves the layers out."""
    gate, masks = found["gate"], found["masks"]
    rows: list[tuple[str, str]] = [
        ("recipe", found["recipe"]),
        ("parent", f"{found['inputs']['model']} ({found['inputs']['model_digest']})"),
        ("weights", _dtypes(found["inputs"])),
        ("gate", _gate_line(gate)),
        ("compensation", found["compensation"]),
    ]
    if masks:
        rows += _learned(masks)
    rows += [(name.replace("_", " "), f"{value:,}") for name, value in found["parameters"].items()]
    if gate["experts"] > 1:
        began = " began as" if masks else ""
        rows += [(f"expert {i}{began}", ", ".join(group)) for i, group in enumerate(found["clusters"] or ())]
    if not brief:
        made = [f"{name} {found['versions'][name]}" for name in MATTER if name in found["versions"]]
        rows.append(("made by", "; ".join(made)))
    show_table(found["run"], ["", ""], rows)
    if not brief:
        columns = ["layer", "channels per expert", "mean overlap (IoU)", "union"]
        layers = [
            [x["layer"], f"{min(x['channels'])}-{max(x['channels'])}", x["overlap"], x["union"]]
            for x in found["layers"]
        ]
        if masks and masks["head"]:
            columns += [f"{name} of {masks['head']}" for name in ("Q/K", "V/O")]
            layers = [[*row, x["qk"], x["vo"]] for row, x in zip(layers, found["layers"], strict=True)]
        show_table("layers", columns, layers)
    stages = [(name, m["seconds"], found["headlines"][name]) for name, m in found["stages"].items()]
    show_table("stages", ["stage", "seconds", "result"], stages)


def _dtypes(inputs: dict[str, Any]) -> str:
    """Say in which dtypes weights are stored and computed; runs of 0.1 computed in the stored dtype."""
    return f"stored in {inputs['dtype']}, computed in {inputs.get('compute', inputs['dtype'])}"


def _learned(masks: dict[str, Any]) -> list[tuple[str, str]]:
    start = "all channels" if masks["start"] == "random" else "a carving"
    rows = [
        ("learned", f"masks over frozen weights, from {start}"),
        ("budget", f"{masks['budget']:.1%} of the block parameters, {masks['active_share']:.1%} active"),
        ("widest expert", f"{masks['width_ffn']:,.1f} of {masks['channels']:,} channels, mean over layers"),
    ]
    head = masks["head"]
    if not head:
        return [*rows, ("attention", "whole")]
    qk = "the same for all tokens" if masks["attention"] == "hybrid" else "at most, by token"
    rows.append(("Q/K of a head", f"{masks['width_qk']:.1f} of {head} dimensions, mean over layers, {qk}"))
    return [
        *rows,
        ("V/O of a head", f"{masks['width_vo']:.1f} of {head} dimensions, mean over layers, at most, by token"),
    ]
