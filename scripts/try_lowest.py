"""The oldest versions that pyproject.toml allows: install them, and run the core tests on them.

    python scripts/try_lowest.py build/lowest

Of each direct dependency the oldest version that its bound allows and the index has; of theirs whatever pip takes.
What is not taken as old as allowed is in KEPT, and is said.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("report", "eval", "data", "gguf")
TOOLS = ("peft", "pytest", "pytest-xdist", "hypothesis")
KEPT = {"torch": "an older one brings gigabytes of CUDA libraries along, or is not in the index"}
TESTS = (
    "test_recipe",
    "test_artefact",
    "test_formats",
    "test_parents",
    "test_carving",
    "test_moments",
    "test_closed_forms",
    "test_moe",
    "test_cli",
    "test_export",
    "test_report",
    "test_lora",
    "test_gguf",
    "test_scorer",
)


def lowest(requirement: Requirement, versions: Iterable[str]) -> str | None:
    """The oldest version that a requirement allows; ``None`` if there is none.

    >>> lowest(Requirement("numpy>=2.0"), ["2.10", "2.2", "2.0rc1", "1.26"])
    '2.2'
    """
    fitting = requirement.specifier.filter(versions, prereleases=False)
    return min(fitting, key=Version, default=None)


def requirements(text: str, extras: Sequence[str], tools: Sequence[str]) -> list[Requirement]:
    """The direct dependencies of a pyproject.toml with these extras, and these tools of its extra dev; each once."""
    project = tomllib.loads(text)["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    found = {Requirement(line).name: Requirement(line) for line in lines}
    development = (Requirement(line) for line in optional["dev"])
    return [*found.values(), *(each for each in development if each.name in tools)]


def versions(python: Path, name: str) -> list[str]:
    """What the index has of a package for this Python."""
    command = [python, "-m", "pip", "index", "versions", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    return listed[1].split(", ") if listed else []


def main(folder: Path) -> int:
    """Install and test; the status of the tests."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    known = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = []
    for requirement in requirements((ROOT / "pyproject.toml").read_text(), EXTRAS, TOOLS):
        name = requirement.name
        chosen = known[name] if name in KEPT else lowest(requirement, versions(python, name))
        if chosen is None:
            sys.exit(f"no version of {requirement} can be had")
        print(f"  {requirement}: {chosen}" + (f" ({KEPT[name]})" if name in KEPT else ""), flush=True)
        pins.append(f"{name}=={chosen}")
    (folder / "pins.txt").write_text("\n".join(pins) + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", folder / "pins.txt"]
    subprocess.run([*install, "--requirement", folder / "pins.txt", "--editable", ROOT], check=True)
    files = [ROOT / "tests" / f"{name}.py" for name in TESTS]
    words = os.environ | {"REFUSALS": "skip"}  # older libraries, which some refusals quote, say it in other words
    return subprocess.run([python, "-m", "pytest", "-n", "1", *files], cwd=ROOT, env=words, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
