"""Every stage of a conversion on an accelerator beside the CPU: seconds, tokens per second, memory, one table and JSON.

python benchmarks/gpu.py                                   # dive-plus, token, tomoe-50 of smollm2-135m, both devices
python benchmarks/gpu.py --device cpu --model FOLDER --data FOLDER --set domains.tokens=512 ...
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import moesmith
from moesmith.files.artefact import read_json
from moesmith.parent.accelerator import peak_memory, release
from moesmith.run.versions import versions


def name_of(device: torch.device) -> str:
    """The device's name as its driver says it."""
    module: Any = getattr(torch, device.type, None)
    named = getattr(module, "get_device_name", None)
    return str(named(device)) if device.type != "cpu" and named else f"{device.type} ({platform.machine()})"


def tokens_of(manifest: dict[str, Any]) -> int | None:
    """Tokens that a stage ran, where its manifest says."""
    tokens = manifest.get("metrics", {}).get("tokens")
    return tokens if isinstance(tokens, int) else None


def measure(preset: str, device: torch.device, args: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """One conversion; a row per stage."""
    parent = moesmith.load_parent(args.model, args.dtype, device=device)
    if device.type != "cpu":
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:
            reset()
    run = moesmith.convert(preset, parent, args.data, out, settings=args.set, budget=args.budget)
    peak = peak_memory(device)
    rows = []
    for path in sorted((run.folder / "stages").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        manifest = read_json(path)
        seconds, tokens = manifest["seconds"], tokens_of(manifest)
        rate = round(tokens / seconds, 1) if tokens and seconds else None
        rows.append({"preset": preset, "stage": path.parent.name, "device": str(device), "seconds": seconds,
                     "tokens": tokens, "tokens_per_second": rate, "peak_bytes": peak})  # fmt: skip
    del parent
    release(device)
    return rows


def table(rows: list[dict[str, Any]], devices: list[str]) -> str:
    """Markdown: a row per preset and stage, seconds and tokens per second by device, and how much faster."""
    by = {(r["preset"], r["stage"], r["device"]): r for r in rows}
    head = ["preset", "stage", *(f"s on {d}" for d in devices), *(f"tokens/s on {d}" for d in devices)]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for preset, stage in dict.fromkeys((r["preset"], r["stage"]) for r in rows):
        cells = [by.get((preset, stage, device), {}) for device in devices]
        row = [preset, stage, *(f"{c.get('seconds', float('nan')):.1f}" for c in cells)]
        lines.append(" | ".join([*row, *(str(c.get("tokens_per_second") or "") for c in cells)]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--budget", default="demo")
    parser.add_argument("--dtype", default="auto", help="what models compute in")
    parser.add_argument("--device", help="the accelerator if left out")
    parser.add_argument("--presets", nargs="+", default=["dive-plus", "token", "tomoe-50"])
    parser.add_argument("--no-cpu", action="store_true", help="leave the CPU's side out")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    found = torch.device(args.device) if args.device else torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        print("There is no accelerator here. Give --device cpu to try the program.", file=sys.stderr)
        return 2
    devices = [found] if args.no_cpu or found.type == "cpu" else [found, torch.device("cpu")]
    rows: list[dict[str, Any]] = []
    for preset in args.presets:
        for device in devices:
            folder = Path(tempfile.mkdtemp(prefix="moesmith-gpu-"))
            try:
                rows += measure(preset, device, args, folder / "run")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    names = {str(device): name_of(device) for device in devices}
    print(table(rows, list(names)))
    for device, name in names.items():
        peaks = [row["peak_bytes"] for row in rows if row["device"] == device and row["peak_bytes"]]
        print(f"{device}: {name}" + (f", at most {max(peaks) / 2**30:.2f} GiB of its memory" if peaks else ""))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"devices": names, "versions": versions(), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
