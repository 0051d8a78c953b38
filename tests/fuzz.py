"""Feed readers with changed files until a time is up: the readers of tests/readers.py, one process for each.

    pip install atheris
    python tests/fuzz.py --seconds 60                 # every reader, a minute each
    python tests/fuzz.py --seconds 600 GGUF config    # these

atheris (libFuzzer) keeps the contents that reach new code and changes those further. What breaks a reader is left in
``build/fuzz/<reader>/``, and ``--once FILE READER`` gives it that file again. The status is 1 if something broke.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 4096  # megabytes of a process, with torch


def folder_of(name: str) -> Path:
    """Where a reader's contents lie, and those that broke it."""
    return ROOT / "build" / "fuzz" / re.sub(r"\W+", "-", name)


def one(name: str, seconds: int) -> None:
    """Fuzz one reader in this process; it does not return."""
    import atheris

    with atheris.instrument_imports(include=["moesmith"]):
        from readers import READERS, altered
    reader, home = READERS[name], folder_of(name)
    corpus = home / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(reader.starts()):
        (corpus / f"seed-{number}").write_bytes(content)
    place = reader.place(Path(tempfile.mkdtemp()))

    def give(content: bytes) -> None:
        reader.give(content, place)

    def change(content: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        found = altered(content, reader.file, draw) if draw.random() < 0.5 else atheris.Mutate(content, most)
        return found if len(found) <= most else atheris.Mutate(content, most)

    most = 4 * max(len(content) for content in reader.starts()) + 4096
    options = [f"-max_total_time={seconds}", f"-max_len={most}", f"-rss_limit_mb={MEMORY}", "-timeout=30"]
    options += [f"-artifact_prefix={home}/", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], give, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the readers that are named, print how many inputs each was given; 1 if one broke."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("readers", nargs="*", help="names of READERS in tests/readers.py; all if left out")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--once", type=Path, help="give the one reader this file, and end")
    asked = parser.parse_args()
    if asked.alone:
        one(asked.readers[0], asked.seconds)
    from readers import READERS

    if asked.once:
        reader = READERS[asked.readers[0]]
        print(reader.give(asked.once.read_bytes(), reader.place(Path(tempfile.mkdtemp()))) or "read")
        return 0
    if find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install atheris")
    broke, total = [], 0
    for name in asked.readers or READERS:
        words = [sys.executable, __file__, "--alone", "--seconds", str(asked.seconds), name]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        inputs = int(found[1]) if found else 0
        total += inputs
        print(f"{name:24}{inputs:>10,} inputs  {'broke' if done.returncode else 'read or refused each'}", flush=True)
        if done.returncode:
            broke.append(name)
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", flush=True)
    print(f"{len(asked.readers or READERS)} readers, {total:,} inputs, {len(broke)} broke")
    return int(bool(broke))


if __name__ == "__main__":
    sys.exit(main())
