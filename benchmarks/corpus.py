"""Memory and speed of packing training text that is larger than memory.

    python benchmarks/corpus.py --out runs/corpus --tokens 1000000000

Makes a file of JSON lines with about so many tokens of made words, reads and checks it as a conversion does, and packs
all of it into sequences, in a process of its own. Prints tokens per second, and the most memory that the process held:
what the corpus adds to its own must not grow with the corpus. Pages of the mapped file come on top; the system takes
them back when it needs them. A billion tokens take ten gigabytes of disk and about half an hour. Writes ``corpus.json``
into ``--out``.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesmith.files.artefact import read_json
from moesmith.files.write import mapped_tensors, settle, write_json

WORDS, PARAGRAPHS = 50, 8  # of a paragraph, of a record
WINDOW = 1024


def write_text(path: Path, tokens: int) -> None:
    """Write records of made words, about ``tokens`` tokens of a trained vocabulary."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(20_000)]
    paragraphs = [" ".join(generator.choices(words, k=WORDS)) for _ in range(50_000)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(max(1, tokens // (WORDS * PARAGRAPHS) // 2)):  # a word has more than two tokens
            file.write(json.dumps({"text": "\n".join(generator.choices(paragraphs, k=PARAGRAPHS))}) + "\n")


def own_memory() -> int:
    """Return the bytes of this process that no file holds (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Look at :func:`own_memory` ten times a second inside the ``with``."""
    done, found = threading.Event(), [own_memory()]

    def look() -> None:
        while not done.wait(0.1):
            found[0] = max(found[0], own_memory())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measure(out: Path, model: str, tokens: int) -> None:
    """Pack the text, and write what it took."""
    from moesmith.data.text import check_splits, load_domains, training_blocks
    from moesmith.parent.load import load_parent
    from moesmith.run.memory import peak_memory

    tokenizer = load_parent(model).tokenizer  # the weights are let go
    gc.collect()
    begun, before = time.monotonic(), own_memory()
    with peak_memory() as peak, sampled() as most:
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
    found |= {"own_memory_before": before, "own_memory": max(most), "memory_with_mapped_pages": peak.host}
    found |= {"file": (out / "training.safetensors").stat().st_size}
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
    added = found["own_memory"] - found["own_memory_before"]
    print(f"memory that the corpus added, without mapped pages: {added / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
