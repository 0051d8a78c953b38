"""Hold one model in one runtime and answer jobs, as a process of its own: JSON lines in, JSON lines out.

It is run as a script, ``python worker.py transformers``, by the interpreter that has the runtime: it imports only
the standard library, nothing of moesmith. The runtime is the file ``<runtime>_worker.py`` next to it, with a class:

    Model(job)              load ``path`` in ``dtype``, with ``threads``, for ``batch`` sequences of ``context`` tokens
    .facts()                what to report about it: versions, kernels
    .resize(batch)          get ready for this many sequences at once
    .measure(rows, new)     lists of token ids, ``new`` tokens more for each: ``prefill_seconds``, ``decode_seconds``

An answer is ``{"ok": ...}`` or ``{"error": "one line"}``. The worker ends when its standard input does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def tree(root: int) -> list[int]:
    """List a process and all its descendants, by their numbers."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended in the meantime
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """Return the processor time that a process and its descendants have used until now, in user and kernel."""
    ticks = 0
    for pid in tree(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def forget_peak() -> None:
    """Restart the count of peak memory, for this process and its descendants."""
    for pid in tree(os.getpid()):
        try:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        except OSError:  # not ours to clear: the peak is then that since its start
            continue


def peak_memory() -> int:
    """Return the bytes of peak memory (VmHWM), the descendants' added."""
    total = 0
    for pid in tree(os.getpid()):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    return total


def answer(runtime: Any, model: Any, job: dict[str, Any]) -> tuple[Any, Any]:
    """Do one job; return the model and the answer."""
    if job["do"] == "load":
        model = runtime.Model(job)
        return model, model.facts()
    if job["do"] == "facts":
        return model, model.facts()
    if job["do"] == "resize":
        model.resize(job["batch"])
        return model, None
    forget_peak()
    found = model.measure(job["rows"], job["new"])
    return model, found | {"memory": peak_memory()}


def main(name: str) -> None:
    """Serve jobs for one runtime until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that nothing a library prints is read as an answer
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]  # our names hide no package's
    runtime = model = None
    for line in sys.stdin:
        try:
            if runtime is None:
                spec = importlib.util.spec_from_file_location(f"{name}_worker", here / f"{name}_worker.py")
                assert spec is not None
                assert spec.loader is not None
                runtime = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(runtime)
            model, value = answer(runtime, model, json.loads(line))
            said = {"ok": value}
        except Exception as error:  # whatever a runtime raises is reported to the asker
            text = f"{type(error).__name__}: {error}".strip()
            said = {"error": text.splitlines()[0][:300]}
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
