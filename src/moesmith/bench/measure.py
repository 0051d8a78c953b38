"""Measure parent and MoE (``moesmith bench``): both run side by side in one runtime, asked in turn, round by round.

The machine's speed drifts; so both sides of a ratio are measured within one round, and they take turns at going first.
Medians over the rounds are reported, and the ratio with its smallest and largest round.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import psutil
import torch

from moesmith.arguments import takes_paths, words
from moesmith.bench.bounds import Weights, bounds, of_folder, of_gguf
from moesmith.bench.files import Files, size
from moesmith.bench.process import RUNTIMES, Worker, cores, interpreter, threads
from moesmith.bench.table import verdict
from moesmith.console import Meter, meter, say
from moesmith.errors import MoesmithError
from moesmith.export.gguf.target import Gguf
from moesmith.export.target import Quant, Source
from moesmith.export.targets import source_of
from moesmith.files.outputs import check_result, new_file
from moesmith.files.write import write_json
from moesmith.parent.checkpoint import read_config
from moesmith.parent.compute import AUTO, Choice, Device, DType, long_name
from moesmith.parent.load import choose_compute
from moesmith.run.folder import Run, open_run
from moesmith.run.versions import versions

SIDES = ("dense", "moe")
NAMES = {"dense": "the dense parent", "moe": "the MoE"}
BUSY = 0.05  # processor time per second of an idle worker from which on it is reported


@takes_paths("folder", "out")
def bench(
    folder: Path,
    runtimes: Sequence[str] | None,
    batches: Sequence[int],
    prompt: int,
    new: int,
    quants: Sequence[str],
    rounds: int,
    vllm_python: str | None = None,
    out: Path | None = None,
    dtype: DType = AUTO,
    device: Device = AUTO,
    *,
    repack: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the speed of a finished run and its parent; write the result as JSON, and a figure in ``figures``.

    Args:
        folder: a finished run.
        runtimes: names of ``process.RUNTIMES``; ``None`` for those that are installed and take the model.
        batches: sequences at once.
        prompt: tokens of each prompt, taken from the run's held-out text.
        new: new tokens per sequence.
        quants: weight types for llama.cpp.
        rounds: how often each model is measured.
        vllm_python: the interpreter of vLLM's environment.
        out: the JSON file; ``RUN/bench.json`` when ``None``. The figure has its name and is in ``figures`` next to it.
        dtype: what transformers computes in; the fastest here for ``auto``.
        device: where transformers computes.
        repack: let llama.cpp rearrange weights for its kernels, where it has such for their types and widths.
        overwrite: replace what moesmith wrote there.

    Returns:
        The contents of the file (docs/speed.md).

    Raises:
        MoesmithError: the run is not finished, ``out`` may not be written; a chosen runtime is unknown, not installed,
            cannot hold the model, or fails (what was measured before is written). Without a choice these are left out,
            and it is an error if none is left.
    """
    run = open_run(folder)
    run.check_finished()
    if not Path("/proc/self/stat").is_file():
        raise MoesmithError("bench reads time and memory from /proc, and this system has none", "Run it on Linux.")
    out = out or folder / "bench.json"
    figure = f"figures/{out.stem}.png"
    check_result(out, folder, overwrite=overwrite, beside=[figure])
    _check(runtimes, batches, quants, min(prompt, new, rounds))
    pythons = _installed(runtimes, vllm_python)
    source = source_of(folder, "cpu")
    choice = choose_compute(source.parent.model, dtype, device)
    longest = source.parent.config.max_position_embeddings
    if (context := prompt + new + 1) > longest:
        raise MoesmithError(
            f"{context} tokens are more than the model's {longest}", "Give a smaller --prompt or --new."
        )
    pythons = {runtime: python for runtime, python in pythons.items() if _takes(runtime, source, runtimes is not None)}
    if not pythons:
        raise MoesmithError("no runtime is left", f"Name one in --runtime, of {','.join(RUNTIMES)}.")
    files, cells = Files(source), [(runtime, q) for runtime in pythons for q in _types(runtime, source, choice, quants)]
    pairs = _pairs(files, cells, chosen=runtimes is not None)
    types = {"transformers": choice.dtype, "vllm": source.parent.stored}
    weights = {
        (runtime, q): (_weights(dense, source, types.get(runtime)), _weights(moe, source, types.get(runtime)))
        for (runtime, q), (dense, moe) in pairs.items()
    }
    rows = prompts(run, max(batches), prompt)
    cache = max(w.cache for pair in weights.values() for w in pair)
    loading = {
        "device": str(choice.device),
        "threads": threads(),
        "context": context,
        "batch": max(batches),
        "repack": repack,
        "cache_bytes": cache * context * max(batches),
    }
    names = {runtime: long_name(kind) for runtime, kind in types.items()}
    del source, files  # frees the parent's memory: the workers hold their own
    found: dict[str, Any] = {"run": str(folder), "prompt": prompt, "new": new, "rounds": rounds, "threads": threads()}
    found |= {"repack": repack}
    found |= {"machine": machine(), "versions": versions(), "runtimes": {}, "results": []}
    total = len(pairs) * sum(batches) * (prompt + new) * (rounds + 1) * 2

    def write() -> None:
        with new_file(out, overwrite=overwrite) as work:
            write_json(work, found)
            drawn = _picture(found, work.parent / figure)
        if drawn:
            say(f"figure: {out.parent / figure}")

    def measure(runtime: str, quant: str) -> None:
        sizes = {side: size(path) for side, path in zip(SIDES, pairs[runtime, quant], strict=True)}
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(runtime, pythons[runtime], NAMES[side])) for side in SIDES]
            for w, path in zip(workers, pairs[runtime, quant], strict=True):
                w.tell("load", path=str(path.resolve()), own_code=_own(path), dtype=names.get(runtime), **loading)
            facts = [w.hear() for w in workers]
            found["runtimes"].setdefault(runtime, facts[0])
            for batch in sorted(batches):
                result = {"runtime": runtime, "weights": quant, "batch": batch, "file_bytes": sizes}
                measured = _rounds(workers, rows[:batch], new, rounds, bar, f"{runtime} {quant} batch {batch}")
                limit = bounds(*weights[runtime, quant], batch, prompt, new)
                found["results"].append(result | summary(measured, batch, prompt, new, limit))

    try:
        with meter("bench", total) as bar:
            for cell in pairs:
                _attempt(measure, cell, chosen=runtimes is not None)
    except MoesmithError:
        if found["results"]:
            write()
            say(f"what was measured before is in {out}")
        raise
    if not found["results"]:
        raise MoesmithError("no runtime measured anything", f"Name one in --runtime, of {','.join(RUNTIMES)}.")
    write()
    return found


def _attempt(work: Callable[[str, str], None], cell: tuple[str, str], *, chosen: bool) -> None:
    """Do something for a runtime and a type of weights; where none was chosen, those that fail are left out."""
    try:
        work(*cell)
    except MoesmithError as error:
        if chosen:
            raise
        say(f"without {' '.join(cell)}: {error}")


def numbers(option: str, text: str) -> list[int]:
    """Split a comma-separated list into its numbers.

    Raises:
        MoesmithError: a word is not a number.
    """
    if odd := [word for word in words(text) if not word.isdigit()]:
        raise MoesmithError(f"{option} {odd[0]} is not a number", "Give a list such as 1,8,32.")
    return [int(word) for word in words(text)]


def _check(runtimes: Sequence[str] | None, batches: Sequence[int], quants: Sequence[str], smallest: int) -> None:
    """Refuse lists and numbers that cannot be measured."""
    if odd := [quant for quant in quants if quant not in get_args(Quant)]:
        raise MoesmithError(f"--quant {odd[0]} is not known", f"Give some of {','.join(get_args(Quant))}.")
    for name, values in (("--batch", batches), ("--quant", quants), ("--runtime", runtimes)):
        if values is not None and (not values or len(set(values)) < len(values)):
            raise MoesmithError(f"{name} names nothing, or something twice", "Name one or several, each once.")
    if min(*batches, smallest) < 1:
        raise MoesmithError("a number below 1 cannot be measured", "Give --batch, --prompt, --new, --rounds from 1 on.")


def _installed(runtimes: Sequence[str] | None, vllm_python: str | None) -> dict[str, str]:
    """Return the interpreter of each runtime; without a choice, of those that are installed."""
    found = {}
    for runtime in RUNTIMES if runtimes is None else runtimes:
        try:
            found[runtime] = interpreter(runtime, vllm_python)
        except MoesmithError as error:
            if runtimes is not None:
                raise
            say(f"without {runtime}: {error}")
    return found


def _takes(runtime: str, source: Source, wanted: bool) -> bool:
    """Whether a runtime can hold the run's model; if it was ``wanted`` and cannot, that is an error."""
    reason = Gguf().explain(source) if runtime == "llama.cpp" else None
    if reason is None:
        return True
    if wanted:
        raise MoesmithError(f"{runtime} cannot hold this model: {reason}", "Leave it out of --runtime.")
    say(f"without {runtime}: {reason}")
    return False


def _types(runtime: str, source: Source, choice: Choice, quants: Sequence[str]) -> Sequence[str]:
    if runtime == "llama.cpp":
        return quants
    return [long_name(choice.dtype if runtime == "transformers" else source.parent.stored)]


def _pairs(files: Files, cells: Sequence[tuple[str, str]], *, chosen: bool) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Make what each cell's runtime loads."""
    pairs = {}

    def prepare(runtime: str, quant: str) -> None:
        pairs[runtime, quant] = _pair(files, runtime, quant)

    for cell in cells:
        _attempt(prepare, cell, chosen=chosen)
    if not pairs:
        raise MoesmithError("no runtime is left", f"Name one in --runtime, of {','.join(RUNTIMES)}.")
    return pairs


def _pair(files: Files, runtime: str, quant: str) -> tuple[Path, Path]:
    if runtime == "llama.cpp":
        return files.ggufs(quant)
    return files.stock() if runtime == "vllm" else files.folders()


def _weights(path: Path, source: Source, dtype: torch.dtype | None) -> Weights:
    config = source.parent.config
    return of_folder(path, config, dtype or source.parent.stored) if path.is_dir() else of_gguf(path, config)


def _own(path: Path) -> bool:
    """Whether a folder brings code of its own."""
    return path.is_dir() and read_config(str(path)).get("model_type") == "moesmith"


def prompts(run: Run, batch: int, length: int) -> list[list[int]]:
    """Cut ``batch`` stretches from the run's held-out text, ``length`` token ids each, its domains in turn.

    A mixture's speed depends on which experts the tokens of a batch choose, so the text is real. A domain whose text is
    used up begins again.
    """
    domains = [blocks.flatten().tolist() for _, blocks in sorted(run.held_out.items())]
    rows = []
    for row in range(batch):
        ids = domains[row % len(domains)]
        start = row // len(domains) * length
        rows.append([ids[(start + place) % len(ids)] for place in range(length)])
    return rows


def _rounds(
    workers: Sequence[Worker], rows: list[list[int]], new: int, rounds: int, bar: Meter, label: str
) -> dict[str, Any]:
    """Prepare both workers for the batch, run one warm-up each, then the rounds."""
    units, idle = sum(map(len, rows)) + len(rows) * new, [0.0]
    seconds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        for index in order:
            side, other = SIDES[index], workers[1 - index]
            if number == 0:
                workers[index].ask("resize", batch=len(rows))
            before, started = other.cpu_seconds(), time.monotonic()
            seconds[side].append(workers[index].ask("measure", rows=rows, new=new))
            idle.append((other.cpu_seconds() - before) / (time.monotonic() - started) if number else 0.0)
            bar.advance(units, f"{label}, {NAMES[side]}")
    facts = {side: w.ask("facts") for side, w in zip(SIDES, workers, strict=True)}
    if max(idle) > BUSY:
        say(f"  {label}: the waiting model used {max(idle):.0%} of a core while the other was measured")
    kept = {side: found[1:] for side, found in seconds.items()}
    return {"seconds": kept, "idle_cores": max(idle), "facts": facts}


def summary(measured: dict[str, Any], batch: int, prompt: int, new: int, limit: dict[str, Any]) -> dict[str, Any]:
    """Sum up the rounds as medians and ratios.

    Returns:
        ``prefill`` and ``decode``: tokens per second of ``dense`` and ``moe`` (medians), their ``ratio`` (median of the
        rounds', with ``ratio_min`` and ``ratio_max``), ``verdict``, and what :func:`bounds` returns; ``first_token`` in
        seconds and ``memory`` in bytes for both; the rounds themselves.
    """
    seconds, found = measured["seconds"], {}
    for phase, tokens in (("prefill", batch * prompt), ("decode", batch * new)):
        taken = [[each[f"{phase}_seconds"] for each in seconds[side]] for side in SIDES]
        ratios = sorted(dense / moe for dense, moe in zip(*taken, strict=True))
        found[phase] = {side: tokens / statistics.median(times) for side, times in zip(SIDES, taken, strict=True)}
        found[phase] |= {"ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1]}
        found[phase] |= {"verdict": verdict(ratios[0], ratios[-1])} | limit[phase]
    facts = measured["facts"]["moe"]
    return found | {
        "first_token": {side: statistics.median(each["prefill_seconds"] for each in seconds[side]) for side in SIDES},
        "memory": {side: max(each["memory"] for each in seconds[side]) for side in SIDES},
        "experts": facts.get("experts") or None,
        "experts_tried": facts.get("experts_tried") or None,
        "idle_cores": measured["idle_cores"],
        "seconds": seconds,
    }


def machine() -> dict[str, Any]:
    """Report processor, cores, memory and the load before, as far as the system says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.isfile("/proc/cpuinfo") else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "load_before": round(psutil.getloadavg()[0], 2),
    }


def _picture(found: dict[str, Any], path: Path) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        say("without a figure: it needs matplotlib (pip install 'moesmith[report]')")
        return False
    from moesmith.bench.figure import bench_figure
    from moesmith.report.style import save_png

    save_png(bench_figure(found), path)
    return True
