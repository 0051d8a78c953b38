"""Print the measurements as tables, and say in words where the mixture loses."""

from __future__ import annotations

from typing import Any

from moesmith.console import show_table, show_text

MIB = 2**20


def verdict(low: float, high: float) -> str:
    """Say which model is faster, from the ratio MoE : dense in the worst and the best round."""
    if low > 1:
        return "MoE wins"
    return "MoE loses" if high < 1 else "no clear winner"


def speed_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Make the rows of the table of tokens per second: one per runtime, type of the weights, batch and phase."""
    return [
        (
            *(result[name] for name in ("runtime", "weights", "batch")),
            phase,
            round(result[phase]["dense"], 1),
            round(result[phase]["moe"], 1),
            f"{result[phase]['ratio']:.2f} ({result[phase]['ratio_min']:.2f}..{result[phase]['ratio_max']:.2f})",
            f"{result[phase]['bound']:.2f}",
            result[phase]["verdict"],
        )
        for result in found["results"]
        for phase in ("prefill", "decode")
    ]


def size_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Make the rows of the table of time to first token, memory and files, dense and MoE."""
    return [
        (
            *(result[name] for name in ("runtime", "weights", "batch")),
            *(f"{result['first_token'][side] * 1000:,.0f} ms" for side in ("dense", "moe")),
            *(f"{result['memory'][side] / MIB:,.0f} MiB" for side in ("dense", "moe")),
            *(f"{result['file_bytes'][side] / MIB:,.0f} MiB" for side in ("dense", "moe")),
        )
        for result in found["results"]
    ]


def sentences(found: dict[str, Any]) -> list[str]:
    """Say what the tables mean: where the MoE loses or the rounds do not decide, and which kernels it used."""
    lines = []
    for result in found["results"]:
        where = f"{result['runtime']} {result['weights']} at batch {result['batch']}"
        for phase in ("prefill", "decode"):
            part = result[phase]
            if part["verdict"] == "MoE wins":
                continue
            says = "MoE loses" if part["verdict"] == "MoE loses" else "MoE is not clearly faster"
            lines.append(
                f"{says}: {phase} in {where} runs at {part['ratio']:.2f} x the parent's speed"
                f" ({part['ratio_min']:.2f}..{part['ratio_max']:.2f}); arithmetic allows {part['bound']:.2f} x."
            )
        if result["experts"]:
            kinds = ", ".join(f"{kind} for {phase}" for phase, kind in result["experts"].items())
            lines.append(f"experts in {where}: {kinds}, the fastest that transformers has.")
        if result["idle_cores"] > 0.05:
            lines.append(f"{where}: the waiting model kept {result['idle_cores']:.0%} of a core busy.")
    return lines


def show(found: dict[str, Any]) -> None:
    """Print tables and sentences."""
    columns = ["runtime", "weights", "batch"]
    say = f"{found['run']}: tokens per second, prompts of {found['prompt']}, {found['new']} new tokens"
    say += f", {found['threads']} threads, {found['rounds']} rounds"
    speed = [*columns, "phase", "dense parent", "MoE", "MoE : dense", "bound", "verdict"]
    show_table(say, speed, speed_rows(found))
    sizes = [f"{what}, {side}" for what in ("first token", "memory", "file") for side in ("dense", "MoE")]
    show_table(
        "time to first token of the whole batch, peak memory, size of the weights", [*columns, *sizes], size_rows(found)
    )
    for line in sentences(found):
        show_text(line)
