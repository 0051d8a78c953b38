"""The command line: each command reads its arguments, makes one call and prints a table or JSON. No logic is here."""

from __future__ import annotations

import logging
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from moesmith.arguments import first_process, refuse_many_processes
from moesmith.console import duration, say, show_json, show_table, show_text, volume
from moesmith.errors import MoesmithError

WAIT = 3.0  # seconds until the first process has said why it stops
TOGETHER = ("convert",)  # commands that several processes of a launcher do together
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="folder, hub id, .gguf file, or smollm2-135m")]
Data = Annotated[str, typer.Option(help="folder of JSONL files, YAML of Hugging Face data sets, or builtin")]
Settings = Annotated[list[str], typer.Option("--set", help="section.key=value on top of the recipe; repeatable")]
Budget = Annotated[str | None, typer.Option(help="demo, small or paper")]
Active = Annotated[float | None, typer.Option(help="share of the FFN's channels that a token uses, e.g. 0.75")]
RunFolder = Annotated[Path, typer.Argument(help="a folder made by 'moesmith convert'")]
Dtype = Annotated[str, typer.Option(help="what models compute in: auto (the fastest sound one here), bf16, fp16, fp32")]
Device = Annotated[
    str, typer.Option(help="where models compute: auto (the accelerator with most free memory), cpu, cuda, mps, xpu")
]
Time = Annotated[str | None, typer.Option(help="scale calibration and training text to what fits in e.g. 15m or 2h")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what moesmith wrote there, if unchanged since")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
RecipeName = Annotated[str, typer.Argument(help="a preset, a method's name, or a YAML file")]
MethodFile = Annotated[Path | None, typer.Option(help="a Python file with a method of your own; it is run")]


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
        ("disk", f"{result['disk'] / 2**30:.2f} GiB"),
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
    table = compare(run, data, [task for task in tasks.split(",") if task], limit, tokens, dtype, device)
    rows = [(row["task"], row["metric"], row["parent"], row["moe"]) for row in table["results"]]
    show_table(f"{run}", ["task", "metric", "dense parent", "MoE"], rows)
    if json_file is not None:
        from moesmith.files.artefact import write_json

        with new_file(json_file, overwrite=overwrite) as work:
            write_json(work, table)


@app.command()
def compare(
    spec: Annotated[Path, typer.Argument(help="a YAML file: rows, text, what is measured")],
    out_folder: Annotated[Path, typer.Option("--out", help="the comparison's folder; repeat the command to continue")],
    model: Annotated[str | None, typer.Option(help="the parent, in place of the file's")] = None,
    data: Annotated[str | None, typer.Option(help="data source, in place of the file's")] = None,
    only: Annotated[list[str], typer.Option(help="a row to convert now; repeatable")] = [],  # noqa: B006
    reuse: Annotated[list[Path], typer.Option(help="a run whose matching stages are reused; repeatable")] = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Convert a parent in many ways on one footing, and show them in one table."""
    from moesmith.comparison.compare import compare as run_comparison
    from moesmith.comparison.table import show

    options: dict[str, Any] = {"only": only, "reuse": reuse, "dtype": dtype, "device": device}
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
    budget: Annotated[str | None, typer.Option(help="demo, small or paper, of every conversion")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="section.key=value or study.key=value; repeatable")] = [],  # noqa: B006
    reuse: Annotated[list[Path], typer.Option(help="a run whose matching stages are reused; repeatable")] = [],  # noqa: B006
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
    options: dict[str, Any] = {"settings": set_, "budget": budget, "reuse": reuse, "dtype": dtype, "device": device}
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
def generate(
    run: RunFolder,
    prompt: str,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens")] = 60,
    chat: Annotated[bool, typer.Option(help="apply the chat template to the prompt")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt with the dense parent and the MoE, side by side."""
    from moesmith.evaluation.compare import continuations

    for name, text in continuations(run, prompt, tokens, chat, dtype, device).items():
        show_text(f"--- {name} ---\n{text}\n")


@app.command()
def export(
    run: RunFolder,
    to: Annotated[str | None, typer.Option(help="hf, sglang, gguf, native or delta")] = None,
    out_path: Annotated[Path | None, typer.Option("--out", help="the folder or file to write")] = None,
    quant: Annotated[str | None, typer.Option(help="of gguf: f32, bf16 (default), q8_0 or q4_k_m")] = None,
    untie: Annotated[bool, typer.Option("--untie", help="write the output head as a tensor of its own")] = False,
    shard_size: Annotated[str | None, typer.Option(help="the most one file holds, such as 5GB")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="say which targets can hold this model; write nothing")
    ] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the finished model for another runtime and compare it there."""
    from moesmith.export.target import Options
    from moesmith.export.targets import explain_run, export_run, rows_of

    if explain:
        result: Any = explain_run(run, device)
    else:
        parsed = Options.parse(quant, untie, shard_size)
        result = export_run(run, to, out_path, parsed, device, overwrite=overwrite)
    if as_json:
        show_json(result)
    elif explain:
        show_table(f"targets of {run}", ["target", "fits", "why not, or what is lost"], rows_of(result))
    else:
        show_table(f"{out_path}", ["", ""], [(name.replace("_", " "), value) for name, value in result.items()])


@app.command()
def bench(
    run: RunFolder,
    runtime: Annotated[
        str | None, typer.Option(help="comma-separated: transformers, llama.cpp, vllm; those installed if left out")
    ] = None,
    batch: Annotated[str, typer.Option(help="comma-separated: sequences at once")] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 512,
    new: Annotated[int, typer.Option(min=1, help="new tokens per sequence")] = 64,
    quant: Annotated[str, typer.Option(help="comma-separated: weight types for llama.cpp")] = "bf16,q8_0",
    rounds: Annotated[int, typer.Option(min=1, help="how often each model is measured")] = 3,
    vllm_python: Annotated[str | None, typer.Option(help="Python of the environment that has vLLM")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="JSON file; RUN/bench.json if left out")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure speed, memory and size of the finished model and its dense parent, in turn."""
    from moesmith.bench.measure import bench as measure
    from moesmith.bench.measure import numbers, words
    from moesmith.bench.table import show

    runtimes = None if runtime is None else words(runtime)
    batches, quants = numbers("--batch", batch), words(quant)
    result = measure(
        run, runtimes, batches, prompt, new, quants, rounds, vllm_python, out_file, dtype, device, overwrite=overwrite
    )
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


@app.command()
def push(
    run: RunFolder,
    to: Annotated[str, typer.Option(help="the hub's repository, user/name; made if it is not there")],
    out_folder: Annotated[Path | None, typer.Option("--out", help="a new folder for what is uploaded")] = None,
    base_model: Annotated[str | None, typer.Option(help="the parent's hub id, for the card")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="such as apache-2.0")] = None,
    file: Annotated[list[Path], typer.Option(help="a further file, such as a GGUF file; repeatable")] = [],  # noqa: B006
    private: Annotated[bool, typer.Option("--private", help="of a repository that is made")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write --out and upload nothing")] = False,
    as_json: Json = False,
) -> None:
    """Upload the finished model to the Hugging Face hub, with a card that the hub reads."""
    from moesmith.export.push import push as upload

    options: dict[str, Any] = {"base_model": base_model, "licence": licence, "files": file, "out": out_folder}
    result = upload(run, to, **options, private=private, dry_run=dry_run)
    if as_json:
        show_json(result)
        return
    show_table(result["url"] or f"{out_folder}", ["file", "bytes"], list(result["files"].items()))


@app.command()
def pack(
    run: RunFolder,
    out_folder: Annotated[Path, typer.Option("--out", help="a new folder for the delta")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pack what a run changed in its parent: the finished model without the parent's weights."""
    from moesmith.export.delta import pack as write

    result = write(run, out_folder, overwrite=overwrite)
    if as_json:
        show_json(result)
        return
    rows = [(name, size, size / result["parent_bytes"]) for name, size in result["parts"].items()]
    rows += [("delta", result["bytes"], result["share"]), ("parent", result["parent_bytes"], 1.0)]
    rows.append(("finished model", result["model_bytes"], result["model_bytes"] / result["parent_bytes"]))
    show_table(f"{out_folder}", ["", "bytes", "of the parent"], rows)


@app.command()
def unpack(
    delta: Annotated[Path, typer.Argument(help="a folder made by 'moesmith pack'")],
    model: Annotated[str, typer.Option(help="the parent: folder, hub id, .gguf file, or smollm2-135m")],
    out_folder: Annotated[Path, typer.Option("--out", help="a new folder for the finished model")],
    as_json: Json = False,
) -> None:
    """Rebuild the finished model from a packed delta and its parent."""
    from moesmith.export.delta import unpack as write

    result = write(delta, model, out_folder)
    if as_json:
        show_json(result)
    else:
        rows = [(f"{out_folder / name}", kind) for name, kind in result["folders"].items()]
        show_table(f"{delta}", ["folder", "format"], rows)


def refuse_empty(words: list[str]) -> None:
    """Refuse an option with an empty value: usually a script's unset variable; as a path it means the current folder.

    Raises:
        MoesmithError: there is one.
    """
    for before, word in pairwise(["", *words]):
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
