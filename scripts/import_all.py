"""Import every module of the installed moesmith: what a base install cannot import is listed here, with what it lacks.

python scripts/import_all.py
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import moesmith

# programs of their own, started by the interpreter that has these packages
LACKING = {"moesmith.bench.llamacpp_worker": "xllamacpp", "moesmith.bench.vllm_worker": "vllm"}


def main() -> str | None:
    """What is wrong, or nothing."""
    names = [found.name for found in pkgutil.walk_packages(moesmith.__path__, "moesmith.")]
    if gone := LACKING.keys() - set(names):
        return f"LACKING names what is not there: {', '.join(sorted(gone))}"
    lacking = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name != LACKING.get(name):
                return f"{name} cannot be imported: {error}"
            lacking.append(f"{name} without {error.name}")
    print(f"{len(names) - len(lacking)} modules imported; not: {', '.join(lacking) or 'none'}")
    return None


if __name__ == "__main__":
    sys.exit(main())
