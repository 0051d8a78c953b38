"""The command line: each command reads its arguments, makes one call and prints a table or JSON. No logic is here."""

from __future__ import annotations

import logging
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from moesmith.arguments import first_process, refuse_many_processes, words
from moesmith.console import duration, say, show_json, show_table, volume
from moesmith.errors import MoesmithError
from moesmith.options import (
    Active,
    Budget,
    Data,
    Device,
    Dtype,
    Json,
    MethodFile,
    Model,
    Overwrite,
    RecipeName,
    RunFolder,
    Settings,
    Time,
    app,
)

WAIT = 3.0  # seconds until the first process has said why it stops
TOGETHER = ("convert",)  # commands that several processes of a launcher do together


@app.callback()
def common(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only errors and results")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="also print what libraries log and warn about")] = False,
) -> None:
    """Turn a dense language model into a Mixture-of-Experts, and prove what it did."""
    if context.invoked_subcommand not in TOGETHER:
        refuse_many_processes()
    mute = not first_process()
    context.with_resource(volume(quiet=quiet or mute, verbose=verbose and not mute))


@app.command()
def presets(as_json: Json = False) -> None:
    """List the recipes that come with moesmith."""
    from moesmith.run.recipe import presets as known

    result = known()
    if as_json:
        show_json(result)
    else:
        show_table("presets", ["name", "what it does"], list(result.items()))


@app.command()
def dequantize(
    model: Annotated[str, typer.Argument(help="a quantised folder, hub id or .gguf file")],
    out_folder: Annotated[Path, typer.Option("--out", help="a new folder for the plain model")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Unpack a quantised model with transformers: a folder in bf16 that is a parent like any other."""
    from moesmith.parent.dense import dequantize as write

    _made(out_folder, write(model, out_folder, overwrite=overwrite), as_json)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="a folder that PEFT wrote")],
    out_folder: Annotated[Path, typer.Option("--out", help="a new folder for the merged model")],
    base: Annotated[
        str | None, typer.Option(help="folder or hub id; the one that the adapter names if left out")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge a PEFT adapter into its base: a folder that is a parent like any other."""
    from moesmith.parent.dense import merge as write

    _made(out_folder, write(adapter, out_folder, base=base, overwrite=overwrite), as_json)


def _made(folder: Path, facts: dict[str, Any], as_json: bool) -> None:
    """Show what a new folder holds."""
    if as_json:
        show_json({"out": str(folder)} | facts)
    else:
        show_table(f"{folder}", ["", ""], list(facts.items()))


@app.command()
def plan(
    recipe: RecipeName,
    model: Model,
    data: Data = "builtin",
    settings: Settings = [],  # noqa: B006
    budget: Budget = None,
    active: Active = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    time: Time = None,
    ranks: Annotated[int, typer.Option(help="how many processes would share the work")] = 1,
    rate: Annotated[str | None, typer.Option(help="of each one's device: h100, h200, a100, l40s, or TFLOP/s")] = None,
    method_file: MethodFile = None,
    as_json: Json = False,
) -> None:
    """Predict parameters, memory, disk, tokens and wall time before any work."""
    from moesmith.conversion.convert import predict

    _register(method_file)
    options: dict[str, Any] = {"settings": settings, "budget": budget, "active": active, "time": time}
    options |= {"ranks": ranks, "rate": rate}
    result = predict(recipe, model, data, dtype=dtype, device=device, **options)
    if as_json:
        show_json(result)
        return
    rows: list[tuple[str, str]] = [
        ("parameters of the parent", f"{result['parent_parameters']:,}"),
        ("parameters in total", f"{result['parameters_total']:,}"),
        ("parameters active per token", f"{result['parameters_active']:,}"),
        ("architecture", result["architecture"]),
        ("channels per expert", f"{result['expert_width']:,}"),
        ("peak memory" if ranks == 1 else "peak memory of a process", f"{result['memory'] / 2**30:.1f} GiB"),
        ("peak memory, layer by layer", _gigabytes(result["memory_layerwise"])),
        ("disk", f"{result['disk'] / 2**30:.2f} GiB, and {result['disk_passing'] / 2**30:.2f} GiB while it works"),
        ("domains", f"{result['domains']}"),
        ("computes in", result["computes"]),
    ]
    for name, seconds in result["seconds"].items():
        tokens = f"{result[f'{name}_tokens']:,} tokens, " if f"{name}_tokens" in result else ""
        rows.append((name, f"{tokens}about {duration(seconds)}"))
    where = "on this machine" if rate is None else f"with {ranks} × {rate}" if ranks > 1 else f"with {rate}"
    rows.append((f"wall time {where}", f"about {duration(result['seconds_total'])}"))
    show_table(f"plan of {result['recipe']}", ["", ""], rows)
    for line in result["warnings"]:
        say(line, logging.WARNING)
    for setting in result["fitted"]:
        say(f"--set {setting}")


def _register(method_file: Path | None) -> None:
    if method_file is not None:
        from moesmith.methods.registry import load_file

        load_file(method_file)


def _gigabytes(size: int | None) -> str:
    return "no: training needs the whole model" if size is None else f"{size / 2**30:.1f} GiB"


@app.command()
def convert(
    recipe: RecipeName,
    model: Model,
    out_folder: Annotated[Path, typer.Option("--out", help="the run's folder; repeat the command to continue it")],
    data: Data = "builtin",
    settings: Settings = [],  # noqa: B006
    budget: Budget = None,
    active: Active = None,
    reuse: Annotated[list[Path], typer.Option(help="a run whose matching stages are reused; repeatable")] = [],  # noqa: B006
    memory: Annotated[
        str | None, typer.Option(help="memory to use at most, e.g. 4GB; what is free if left out")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    time: Time = None,
    max_loss: Annotated[
        str | None, typer.Option(help="find the share of channels for this loss of perplexity, e.g. 10%")
    ] = None,
    method_file: MethodFile = None,
) -> None:
    """Turn a dense model into a Mixture-of-Experts; the same command continues a run that was stopped."""
    _register(method_file)
    from moesmith.conversion.convert import convert as run_conversion
    from moesmith.report.overview import describe, show

    options: dict[str, Any] = {"settings": settings, "budget": budget, "memory": memory, "dtype": dtype}
    options |= {"device": device}
    if max_loss is not None:
        from moesmith.conversion.dial import active_for

        if active is not None:
            raise MoesmithError("--active and --max-loss decide the same", "Give one of them.")
        active = active_for(max_loss, recipe, model, data, out_folder, **options)
    run_conversion(recipe, model, data, out_folder, active=active, reuse=reuse, time=time, **options)
    if first_process():
        show(describe(out_folder), brief=True)


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    data: Annotated[str | None, typer.Option(help="data source; the run's own if left out")] = None,
    tasks: Annotated[str, typer.Option(help="comma-separated: domains, wikitext2, lambada, arc_easy, ...")] = "domains",
    limit: Annotated[int | None, typer.Option(min=1, help="items per task")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens per domain and for wikitext2")] = 16_384,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="allow tasks that run what the models write: humaneval, mbpp")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the results to this file")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Evaluate the finished model and its dense parent."""
    from moesmith.evaluation.compare import compare
    from moesmith.files.outputs import check_result, new_file

    if json_file is not None:
        check_result(json_file, run, data, overwrite=overwrite)
    names = words(tasks)
    table = compare(run, data, names, limit, tokens, dtype, device, run_code)
    rows = [(row["task"], row["metric"], row["parent"], row["moe"]) for row in table["results"]]
    show_table(f"{run}", ["task", "metric", "dense parent", "MoE"], rows)
    if json_file is not None:
        from moesmith.files.write import write_json

        with new_file(json_file, overwrite=overwrite) as work:
            write_json(work, table)


@app.command()
def compare(
    spec: Annotated[Path, typer.Argument(help="a YAML file: rows, text, what is measured")],
    out_folder: Annotated[Path, typer.Option("--out", help="the comparison's folder; repeat the command to continue")],
    model: Annotated[str | None, typer.Option(help="the parent, in place of the file's")] = None,
    data: Annotated[str | None, typer.Option(help="data source, in place of the file's")] = None,
    only: Annotated[list[str], typer.Option(help="rows to convert now, with commas between them; repeatable")] = [],  # noqa: B006
    reuse: Annotated[list[Path], typer.Option(help="a run whose matching stages are reused; repeatable")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="rows made at the same time, each by a process of its own")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Convert a parent in many ways on one footing, and show them in one table."""
    from moesmith.comparison.compare import compare as run_comparison
    from moesmith.comparison.table import show

    options: dict[str, Any] = {"only": only, "reuse": reuse, "jobs": jobs, "dtype": dtype, "device": device}
    result = run_comparison(spec, out_folder, model=model, data=data, **options)
    if as_json:
        show_json(result)
    else:
        show(result)


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="a study; the list of them if left out")] = None,
    model: Model = "",
    data: Data = "",
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="the study's folder; repeat the command to continue")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="demo, small, evening or paper, of every conversion")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="section.key=value or study.key=value; repeatable")] = [],  # noqa: B006
    reuse: Annotated[list[Path], typer.Option(help="a run whose matching stages are reused; repeatable")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="conversions made at once, each by a process of its own")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer one of the papers' questions on a parent: conversions, tables, figures and a page."""
    if name is None:
        from moesmith.studies.study import studies

        known = [{"name": key, "title": kind.title, "question": kind.question} for key, kind in studies().items()]
        if as_json:
            show_json(known)
        else:
            show_table("studies", ["name", "what is asked"], [(row["name"], row["title"]) for row in known])
        return
    from moesmith.studies.run import show
    from moesmith.studies.run import study as run_study

    if not (model and data and out_folder):
        raise MoesmithError("a study needs --model, --data and --out", "Give all three.")
    options: dict[str, Any] = {"settings": set_, "budget": budget, "reuse": reuse, "jobs": jobs}
    options |= {"dtype": dtype, "device": device}
    result = run_study(name, model, data, out_folder, **options)
    if as_json:
        show_json(result)
    else:
        show(result)


@app.command()
def inspect(run: RunFolder, as_json: Json = False) -> None:
    """Show a run's carving, gate and stages."""
    from moesmith.report.overview import describe, show

    result = describe(run)
    if as_json:
        show_json(result)
    else:
        show(result)


@app.command()
def report(
    run: RunFolder,
    output: Annotated[Path | None, typer.Option(help="where to write; RUN/report.html if left out")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    from moesmith.report.page import write_report

    say(f"written: {write_report(run, output, overwrite=overwrite)}")


import moesmith.handover  # noqa: E402, F401  # the commands about a finished model, behind those that make it


def refuse_empty(given: list[str]) -> None:
    """Refuse an option with an empty value: usually a script's unset variable; as a path it means the current folder.

    Raises:
        MoesmithError: there is one.
    """
    for before, word in pairwise(["", *given]):
        name = before if before.startswith("--") and not word.strip() else word.removesuffix("=")
        if name != word and name.startswith("--"):
            raise MoesmithError(f"{name} is empty", f"Give {name} a value, or leave it out.")


def main() -> None:
    """Entry point: a MoesmithError is one line and exit status 2."""
    try:
        refuse_empty(sys.argv[1:])
        app(prog_name="moesmith")
    except MoesmithError as error:
        if first_process():
            say(f"moesmith: {error}", logging.ERROR)
        else:
            leave_last(error)
        sys.exit(2)


def leave_last(error: MoesmithError) -> None:
    """End behind the first of several processes, whose line says why; say it where only this one knows.

    A launcher stops all processes as soon as one has ended.
    """
    if getattr(error, "untold", False):
        say(f"moesmith: {error}", logging.ERROR)
    time.sleep(WAIT)


if __name__ == "__main__":
    main()
