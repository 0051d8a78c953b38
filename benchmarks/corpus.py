"""Memory and speed of packing training text that is larger than memory.

    python benchmarks/corpus.py --out runs/corpus --tokens 1000000000

Makes a file of JSON lines with about so many tokens of made words, reads and checks it as a conversion does, and packs
all of it into sequences, in a process of its own. Prints tokens per second, and the most memory that the process held:
what the corpus adds to it must not grow with the corpus. A billion tokens take ten gigabytes of disk and about half an
hour. Writes ``corpus.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from moesmith.files.artefact import read_json
from moesmith.files.write import mapped_tensors, settle, write_json

WORDS = 400  # of a record
WINDOW = 1024


def write_text(path: Path, tokens: int) -> None:
    """Write records of made words, about ``tokens`` tokens of a trained vocabulary."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(20_000)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(max(1, tokens // WORDS // 3)):  # about three tokens a word
            file.write(json.dumps({"text": " ".join(generator.choices(words, k=WORDS))}) + "\n")


def measure(out: Path, model: str, tokens: int) -> None:
    """Pack the text, and write what it took."""
    import psutil

    from moesmith.data.text import check_splits, load_domains, training_blocks
    from moesmith.parent.load import load_parent
    from moesmith.run.memory import peak_memory

    tokenizer = load_parent(model).tokenizer  # the weights are let go
    begun, before = time.monotonic(), psutil.Process().memory_info().rss
    with peak_memory() as peak:
        domains = load_domains(out / "text")
        check_splits(domains)
        read = time.monotonic() - begun
        count = tokens // WINDOW
        blocks = mapped_tensors(out / "training.safetensors", {"stage2": (count, WINDOW)})["stage2"]
        packed = training_blocks(domains, tokenizer, count * WINDOW, WINDOW, 42, out=blocks)
        settle(out / "training.safetensors")
    seconds = time.monotonic() - begun
    found = {"tokens": count * WINDOW, "epochs": packed.epochs, "seconds_reading": round(read, 1)}
    found |= {"seconds": round(seconds, 1), "tokens_per_second": round(count * WINDOW / (seconds - read))}
    found |= {"memory_before": before, "memory": peak.host, "file": (out / "training.safetensors").stat().st_size}
    write_json(out / "corpus.json", found)


def main() -> None:
    """Make the text, pack it in another process, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=1_000_000_000)
    options.add_argument("--pack", action="store_true", help="pack what is there (the other process)")
    given = options.parse_args()
    if given.pack:
        measure(given.out, given.model, given.tokens)
        return
    text = given.out / "text"
    text.mkdir(parents=True, exist_ok=True)
    write_text(text / "made.train.jsonl", given.tokens)
    (text / "made.test.jsonl").write_text(json.dumps({"text": "held out " * 2000}) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--pack"], check=True)
    found = read_json(given.out / "corpus.json")
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"memory that the corpus added: {(found['memory'] - found['memory_before']) / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
