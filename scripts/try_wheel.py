"""The package as users get it: built, its files counted, installed alone, all of it imported, a tiny model converted.

    python scripts/try_wheel.py build/wheel

Needs ``build`` in the running environment; works in the folder that is named, everything in it is made anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARENT = """
from pathlib import Path
from moesmith.testing.parents import save_tiny
from moesmith.testing.text import save_data
save_tiny("llama", Path("parent"))
save_data(Path("text"))
"""
TRAINING = ("tokens=512", "window=32", "batch=4", "micro_batch=4")
SETTINGS = [
    *("carve.experts=4", "domains.tokens=512", "domains.window=32", "affinity.tokens=256", "affinity.window=32"),
    *(f"{stage}.{setting}" for stage in ("stage1", "stage2") for setting in TRAINING),
    *("evaluate.tokens=256", "evaluate.window=64"),
]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(*words: str | Path, cwd: Path = ROOT, status: int = 0) -> str:
    """Run a program to its end; its output, both of it."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != status:
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}, not {status}:\n{done.stdout}")
    return done.stdout


def check_files(wheel: Path) -> None:
    """The wheel holds every file of the package and no other: code, presets, budgets, tasks, sets, the page's parts."""
    source = ROOT / "src" / "moesmith"
    files = {p.relative_to(source.parent).as_posix() for p in source.rglob("*") if p.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    if wanted != held:
        sys.exit(f"missing in {wheel.name}: {sorted(wanted - held)}; too much: {sorted(held - wanted)}")
    data = sorted({Path(name).suffix for name in held if not name.endswith(".py")} - {""})
    print(f"{wheel.name}: {len(held)} files, as in src; beside code: {', '.join(data)}")


def main(folder: Path) -> None:
    """Everything, in order; the first thing that is wrong ends it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist")  # the wheel from the sdist: nothing stale gets in
    (wheel,) = (folder / "dist").glob("*.whl")
    check_files(wheel)

    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python, moesmith = scripts / "python", scripts / "moesmith"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    names = [line.partition("==")[0] for line in run(python, "-m", "pip", "freeze").splitlines()]
    print(f"installed with its base dependencies: {len(names)} packages")

    outside = folder / "outside"
    outside.mkdir()
    where = run(python, "-c", "import moesmith; print(moesmith.__file__)", cwd=outside)
    if not Path(where.strip()).is_relative_to(folder / "venv"):
        sys.exit(f"imported from elsewhere: {where}")
    print(run(python, ROOT / "scripts" / "import_all.py", cwd=outside).strip())
    presets = [line for line in run(moesmith, "presets", cwd=outside).splitlines()[2:] if line.strip()]
    print(f"moesmith presets: {len(presets)} of {len(list((ROOT / 'src').rglob('presets/*.yaml')))}")

    run(python, "-c", PARENT, cwd=outside)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    words = ["convert", "dive-plus", "--model", "parent", "--data", "text", "--out", "run", *settings]
    print(run(moesmith, "--quiet", *words, cwd=outside).strip())
    if not (outside / "run" / "model" / "config.json").is_file():
        sys.exit("the conversion left no model")
    refused = run(moesmith, "report", "run", cwd=outside, status=2).strip()
    if "moesmith[report]" not in refused or "\n" in refused:
        sys.exit(f"a missing extra is not named in one line:\n{refused}")
    print(f"without an extra: {refused}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
