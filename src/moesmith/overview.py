"""What a run holds: carving, gate and the metrics of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesmith.artefact import read_json
from moesmith.carving import Carving
from moesmith.console import show_table
from moesmith.errors import MoesmithError

STAGES = (
    *("domains", "held-out", "corpus", "moments", "affinity", "baseline", "carve"),
    *("router", "experts", "export", "evaluate"),
)


def describe(folder: Path) -> dict[str, Any]:
    """Everything ``moesmith inspect`` prints, as one JSON-able value.

    Raises:
        MoesmithError: the folder is no run, or not carved yet.
    """
    header = read_json(folder / "run.json")
    found = {name: folder / "stages" / name / "manifest.json" for name in STAGES}
    manifests = {name: read_json(path) for name, path in found.items() if path.is_file()}
    carved = [name for name in ("carve", "router", "experts") if name in manifests]
    if not carved:
        raise MoesmithError(f"{folder} is not carved yet", "Run the same 'moesmith convert' again to continue it.")
    carving = Carving.load(folder / "stages" / carved[-1])
    iou_LEE, widths_LE, union_L = carving.overlap(), carving.widths(), carving.union()
    experts = carving.gate.experts
    pairs = experts * (experts - 1)
    layers = [
        {
            "layer": index,
            "channels": widths_LE[index].tolist(),
            "overlap": float((iou_LEE[index].sum() - experts) / pairs) if pairs else None,
            "union": float(union_L[index]),
        }
        for index in range(len(carving.layers))
    ]
    metrics = {name: {"seconds": m["seconds"], **m["metrics"]} for name, m in manifests.items()}
    return {
        "run": str(folder),
        "recipe": header["recipe"]["name"],
        "inputs": header["inputs"],
        "gate": carving.gate.model_dump(),
        "compensation": carving.compensation,
        "clusters": carving.provenance.get("clusters"),
        "parameters": {k: v for k, v in metrics["carve"].items() if k.startswith(("param", "parent"))},
        "layers": layers,
        "stages": metrics,
    }


def show(found: dict[str, Any], *, brief: bool = False) -> None:
    """Print :func:`describe`'s value as tables; ``brief`` leaves the layers out."""
    gate = found["gate"]
    rows: list[tuple[str, str]] = [
        ("recipe", found["recipe"]),
        ("parent", f"{found['inputs']['model']} ({found['inputs']['model_digest']})"),
        ("gate", f"{gate['experts']} experts, top-{gate['top_k']}, {gate['order']}, renormalise {gate['renormalise']}"),
        ("compensation", found["compensation"]),
    ]
    rows += [(name.replace("_", " "), f"{value:,}") for name, value in found["parameters"].items()]
    if gate["experts"] > 1:
        rows += [(f"expert {i}", ", ".join(group)) for i, group in enumerate(found["clusters"] or ())]
    show_table(found["run"], ["", ""], rows)
    if not brief:
        layers = [
            (x["layer"], f"{min(x['channels'])}-{max(x['channels'])}", x["overlap"], x["union"])
            for x in found["layers"]
        ]
        show_table("layers", ["layer", "channels per expert", "mean overlap (IoU)", "union"], layers)
    stages = [(name, m["seconds"], _headline(name, m)) for name, m in found["stages"].items()]
    show_table("stages", ["stage", "seconds", "result"], stages)


def _headline(name: str, metrics: dict[str, Any]) -> str:
    if name in ("router", "experts"):
        return (
            f"{metrics['trainable']:,} parameters trained on {metrics['tokens']:,} tokens,"
            f" loss {metrics['first_loss']:.3f} -> {metrics['last_loss']:.3f}"
        )
    if name == "evaluate":
        values = {k: v for k, v in metrics.items() if k != "seconds"}
        return "perplexity " + ", ".join(f"{stage} {value:.2f}" for stage, value in values.items())
    if name == "export":
        return f"{metrics['architecture']}, largest logits difference {metrics['logits_difference']:.2g}"
    if name == "carve":
        overlap = metrics.get("overlap")
        return f"union {metrics['union']:.3f}" + (f", overlap {overlap:.3f}" if overlap is not None else "")
    return ""
