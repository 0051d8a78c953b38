"""Torture: kill, move, fill, damage and crowd conversions of tiny parents, and count what they survive.

    python tests/torture.py                                   # everything: 100 kills, 1,000 damaged files; hours
    python tests/torture.py --only kills --kills 25 --seed 3  # a part of it
    python tests/torture.py --only damage --trials 200

Every random choice follows from ``--seed``, moments of wall time apart. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ordeals
from damage import damage
from disturbed import METHODS, Known
from ordeals import Options
from tally import Tally, table

ORDEALS: dict[str, Callable[[Options], Iterator[Tally]]] = {
    "kills": ordeals.kills,
    "room": ordeals.room,
    "read-only": ordeals.read_only,
    "clock": ordeals.clock,
    "moved": ordeals.moved,
    "company": ordeals.company,
    "readers": ordeals.readers,
    "damage": damage,
}


def main() -> None:
    """Torture, and print what was survived."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default=",".join(ORDEALS), help="comma-separated: %(default)s")
    options.add_argument("--methods", default=",".join(METHODS), help="comma-separated presets: %(default)s")
    options.add_argument("--processes", default="1,2", help="comma-separated, for kills: %(default)s")
    options.add_argument("--kills", type=int, default=100, help="how many processes are killed")
    options.add_argument("--trials", type=int, default=1000, help="how many files are damaged")
    options.add_argument("--times", type=int, default=6, help="how often everything else is tried")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path, help="also write the tallies to this file")
    options.add_argument("--work", type=Path, help="a folder to work in; a temporary one if left out")
    given = options.parse_args()
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(ORDEALS):
        options.error(f"there is no {sorted(unknown)[0]}; there are {', '.join(ORDEALS)}")
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        work = given.work or Path(scratch)
        for name in chosen:
            asked = Options(
                work=work / name,
                known=Known(work / "undisturbed"),
                seed=given.seed,
                kills=given.kills,
                trials=given.trials,
                times=given.times,
                methods=tuple(given.methods.split(",")),
                processes=tuple(map(int, given.processes.split(","))),
            )
            asked.work.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            for tally in ORDEALS[name](asked):
                tallies.append(tally)
                print(f"{time.monotonic() - started:6.0f} s  {tally.kind}: {tally.tried}, wrong {len(tally.wrong)}",
                      file=sys.stderr, flush=True)  # fmt: skip
    print(table(tallies))
    if given.json:
        given.json.write_text(json.dumps([tally.as_dict() for tally in tallies], indent=1) + "\n", encoding="utf-8")
    sys.exit(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    main()
