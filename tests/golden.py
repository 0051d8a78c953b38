"""Golden numbers of seeded conversions: what version 0.1 made of three tiny parents with every method.

    python tests/golden.py tests/assets/golden.json              # write them (done by what still made 0.1's numbers)
    python tests/golden.py --compare tests/assets/golden.json    # what this version makes beside them

Channels must be the same on every machine, logits and perplexities to many digits; the bits of weights on the same kind
of processor (``machine`` says which). Some numbers are younger: perplexities of DIVE's trained stock files, whose bias
has been fed by the trained model's own constant direction since 0.2, and what the refit of tomoe-plus gives, which has
read the carved model's activations since 0.2. Only the public Python API is used, so that any
version can run this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moesmith

ASSETS = Path(__file__).parent / "assets"
FAMILIES = ("llama", "qwen3", "phi")
METHODS = ("dive-1of8", "dive-2of8", "dive-plus", "flap-static-refit", "llama-moe-1of8", "tomoe-50", "tomoe-plus")
# a step is one micro-batch: since 0.2 later ones draw other dropout and noise than in 0.1
LOOP = ("tokens=1024", "window=32", "batch=8", "micro_batch=8", "lr=0.01")
BASE = ["evaluate.tokens=512", "evaluate.window=64"]
CARVED = ["domains.tokens=512", "domains.window=32"]
MINED = ["affinity.tokens=256", "affinity.window=32"]
MASKS = [f"masks.{x}" for x in ("tokens=512", "window=32", "batch=2", "micro_batch=2", "lr=0.01", "budget=0.75")]


def settings_of(method: str) -> list[str]:
    """What makes a preset tiny."""
    if method == "tomoe-50":
        return [*BASE, *MASKS, "carve.experts=4", "stage1.tokens=0", "stage2.tokens=0"]
    if method == "tomoe-plus":
        return [*BASE, *MASKS, *CARVED, *MINED, "carve.experts=4", "stage1.tokens=0", "stage2.tokens=0"]
    found = [*BASE, *CARVED, *(f"stage2.{x}" for x in LOOP), "stage2.checkpointing=false"]
    if "static" in method:
        return found
    found += ["carve.experts=4", *(f"stage1.{x}" for x in LOOP)]
    return found + (MINED if method.startswith("dive") else [])


def settings_of_old(method: str) -> list[str]:
    """The settings of what version 0.1 left (``assets/old``)."""
    stages = ("masks",) if method.startswith("tomoe") else ("stage1", "stage2")
    return [*settings_of(method), *(f"{stage}.micro_batch={1 if stage == 'masks' else 4}" for stage in stages)]


def machine() -> str:
    """The instruction set that decides the bits."""
    return torch.backends.cpu.get_cpu_capability()


def numbers(run: Path, parent: moesmith.Parent) -> dict[str, Any]:
    """What a run is known by: digests of channels and of the model's weights, logits of both forms, perplexities."""
    stages = [name for name in ("carve", "masks", "refit", "router", "experts") if (run / "stages" / name).is_dir()]
    channels, logits = {}, {}
    ids = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    for stage in stages:
        carving = moesmith.Carving.load(run / "stages" / stage)
        experts = [getattr(x, "channels", None) or [e.channels for e in x.routed] for x in carving.layers]  # 0.1, since
        kept = json.dumps([[c.tolist() for c in layer] for layer in experts])
        channels[stage] = hashlib.sha256(kept.encode()).hexdigest()[:16]
        for form in ("masked", "sliced"):
            with torch.no_grad():
                out = moesmith.build(parent, carving, form)(input_ids=ids).logits[0, -1, :8]
            logits[f"{stage} {form}"] = [round(x, 6) for x in out.tolist()]
    weights = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "model" / "model.safetensors").items()):
        weights.update(name.encode())
        weights.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found = json.loads((run / "stages" / "evaluate" / "evaluation.json").read_text())["stages"]
    perplexity = {name: round(stage["geomean"], 6) for name, stage in found.items()}
    return {"channels": channels, "weights": weights.hexdigest()[:16], "logits": logits, "perplexity": perplexity}


def convert(method: str, family: str, out: Path) -> Path:
    """One seeded conversion in fp32."""
    given: dict[str, Any] = {"settings": settings_of(method), "dtype": "fp32", "device": "cpu"}
    moesmith.convert(method, str(ASSETS / "parents" / family), str(ASSETS / "text"), out, **given)
    return out


def every(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method on every family: name and numbers."""
    for family in FAMILIES:
        parent = moesmith.load_parent(ASSETS / "parents" / family, "fp32", device="cpu")
        for method in METHODS:
            name = f"{family} {method}"
            yield name, numbers(convert(method, family, work / name.replace(" ", "-")), parent)


def main() -> None:
    """Write golden numbers, or compare with them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", type=Path)
    options.add_argument("--compare", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = dict(every(Path(scratch)))
    if not given.compare:
        given.file.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
        return
    known = json.loads(given.file.read_text())
    print(f"golden on {known['machine']}, here {machine()}")
    for name, numbers_now in found.items():
        same = {part: known["runs"][name][part] == value for part, value in numbers_now.items()}
        print(f"{name:30} " + ", ".join(f"{part} {'equal' if ok else 'DIFFER'}" for part, ok in same.items()))


if __name__ == "__main__":
    main()
