"""A model larger than the memory that its conversion may use: peak memory over the bytes of the finished model.

A random parent of a config's shape is made on disk, shard by shard. A second process converts it to 8 experts without
training, layer by layer; the peak is its VmHWM, mapped weights included. Where this process may make a memory cgroup
(version 1) the kernel holds the other one to a share of the model's bytes and kills it beyond. The folders are deleted
afterwards.

python benchmarks/larger.py --out benchmarks/results/larger.json      # 12 GB of disk
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moesmith.conversion.convert import convert
from moesmith.conversion.plan import make_plan
from moesmith.export.folder import write_shards
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.parent.load import load_skeleton
from moesmith.run.recipe import applicable, load_recipe
from moesmith.run.versions import versions

CGROUPS = Path("/sys/fs/cgroup/memory")
SHARE = 0.6  # of the finished model's bytes: what the conversion may use
CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "tinyllama-1.1b.json"
WORDS = "one two three cat dog bird north south hill def return print sum plus equals red green blue".split()


def make_parent(config: Path, folder: Path) -> int:
    """Write a random bf16 parent; its bytes."""
    folder.mkdir()
    model, generator = load_skeleton(str(config)).model, torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, p in model.named_parameters():
            tensor = torch.ones(p.shape, dtype=torch.bfloat16)
            yield name, tensor if p.dim() == 1 else tensor.normal_(0, p.shape[1] ** -0.5, generator=generator)

    size = write_shards(folder, tensors())
    model.config.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return size


def make_text(folder: Path, domains: int, tokens: int) -> None:
    """Domains of random words, each with its own favourites."""
    folder.mkdir()
    for number in range(domains):
        draw = random.Random(number)
        favourites = draw.sample(WORDS, 5)
        for split in ("train", "test"):
            lines = [
                {"id": f"{split}-{i}", "text": " ".join(draw.choices(favourites, k=80))} for i in range(tokens // 100)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"domain{number}.{split}.jsonl").write_text(text, encoding="utf-8")


def settings(preset: str, tokens: int) -> list[str]:
    """No training, and so many tokens a domain of each kind of text."""
    window = min(64, tokens)
    given = [
        *("stage1.tokens=0", "stage2.tokens=0", "affinity.method=scores", f"evaluate.tokens={tokens}"),
        *(f"domains.tokens={tokens}", f"domains.window={window}", f"evaluate.window={window}"),
    ]
    return applicable(preset, given, given)


def peak() -> dict[str, int]:
    """This process's most memory at once, in bytes: mapped files included, and what it allocated itself now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {"peak_bytes": found["VmHWM"], "anonymous_bytes_at_the_end": found["RssAnon"]}


def run(work: Path, preset: str, tokens: int, limit: int) -> None:
    """The conversion, in a process of its own; its peak goes to ``peak.json``."""
    torch.set_num_threads(1)
    convert(
        preset, str(work / "parent"), str(work / "text"), work / "run", settings=settings(preset, tokens), memory=limit
    )
    write_json(work / "peak.json", peak())


@contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup with this limit, or ``None`` where none can be made."""
    group = CGROUPS / f"larger-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def enter(group: Path) -> None:
    """Put the process that is about to be started into a cgroup."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def measure(config: Path, preset: str, tokens: int, domains: int, share: float, work: Path) -> dict[str, Any]:
    """Make the parent, convert it under the limit, and compare with the plan."""
    parent_bytes = make_parent(config, work / "parent")
    make_text(work / "text", domains, max(4 * tokens, 400))
    recipe = load_recipe(preset, None, settings(preset, tokens))
    shapes = load_skeleton(str(config))
    limit = int(share * make_plan(recipe, shapes, domains).parameters_total * shapes.model.dtype.itemsize)
    shapes.memory = limit
    planned = make_plan(recipe, shapes, domains, measure=True)
    started = time.monotonic()
    words = [sys.executable, __file__, "--run", str(work), "--preset", preset, "--tokens", str(tokens)]
    with cgroup(limit) as group:
        subprocess.run([*words, "--limit", str(limit)], check=True, preexec_fn=partial(enter, group) if group else None)
        charged = int((group / "memory.max_usage_in_bytes").read_text()) if group else None
    seconds = time.monotonic() - started
    model_bytes = sum(path.stat().st_size for path in (work / "run" / "model").glob("*.safetensors"))
    used = sum(path.stat().st_size for path in (work / "run").rglob("*") if path.is_file())
    found = read_json(work / "peak.json")
    stages = {path.parent.name: read_json(path) for path in (work / "run" / "stages").glob("*/manifest.json")}
    return {
        "config": config.name,
        "preset": preset,
        "parent_bytes": parent_bytes,
        "model_bytes": model_bytes,
        "limit_bytes": limit,
        "limit_enforced": charged is not None,
        "cgroup_peak_bytes": charged,
        **found,
        "peak_over_model": round(found["peak_bytes"] / model_bytes, 3),
        "disk_bytes": used,
        "seconds": round(seconds, 1),
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "verified": {n: stages["export"]["metrics"][n] for n in ("verified", "logits_difference", "argmax_agreement")},
        "planned_memory_bytes": planned.memory_layerwise,
        "planned_memory_whole_bytes": planned.memory,
        "planned_disk_bytes": planned.disk,
        "planned_seconds": round(sum(planned.seconds.values()), 1),
        "tokens_of_each_kind_per_domain": tokens,
        "domains": domains,
        "versions": versions(),
    }


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--preset", default="dive-1of8")
    parser.add_argument("--tokens", type=int, default=128, help="of calibration and of evaluation, per domain")
    parser.add_argument("--domains", type=int, default=8)
    parser.add_argument("--share", type=float, default=SHARE, help="of the finished model's bytes: what may be used")
    parser.add_argument("--work", type=Path, help="a folder for the big files; a temporary one if left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run(given.run, given.preset, given.tokens, given.limit)
        return
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        found = measure(given.config, given.preset, given.tokens, given.domains, given.share, Path(work))
    print(json.dumps(found, indent=2))
    if given.out is not None:
        write_json(given.out, found)


if __name__ == "__main__":
    main()
