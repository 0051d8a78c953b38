"""The command line, continued: what is done with a finished model. As in ``cli.py``, no logic is here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesmith.arguments import words
from moesmith.console import show_json, show_table, show_text
from moesmith.options import Device, Dtype, Json, Overwrite, RunFolder, app


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
def chat(
    model: Annotated[str, typer.Argument(help="a finished run, a .gguf file, or a folder that transformers loads")],
    beside: Annotated[str | None, typer.Option(help="another of these, which answers every prompt first")] = None,
    parent: Annotated[bool, typer.Option("--parent", help="the run's dense parent answers every prompt first")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="of an answer, at most")] = 512,
    temperature: Annotated[float, typer.Option(help="0 for the most likely token")] = 0.0,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Chat with a finished model, in the terminal or line by line from a pipe."""
    from moesmith.chat.chat import chat as talk

    options: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "system": system}
    talk(model, beside, parent=parent, dtype=dtype, device=device, **options)


@app.command()
def answers(
    model: Annotated[str, typer.Option(help="the parent: folder, hub id or .gguf file, with a chat template")],
    data: Annotated[str, typer.Option(help="data source whose records ask something")],
    out_folder: Annotated[Path, typer.Option("--out", help="the new data folder; repeat the command to continue")],
    domains: Annotated[str | None, typer.Option(help="which ones, with commas between them; all if left out")] = None,
    records: Annotated[int, typer.Option(min=1, help="questions of each domain; a quarter as many to evaluate")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="of an answer, at most")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="answers at the same time")] = 16,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the most likely token")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="keep answers that did not end")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let the parent answer a data set's questions: text to calibrate on and to distil from."""
    from moesmith.chat.answers import answers as collect

    options: dict[str, Any] = {"records": records, "tokens": tokens, "batch": batch, "temperature": temperature}
    options |= {"seed": seed, "unfinished": unfinished, "dtype": dtype, "device": device}
    found = collect(model, data, out_folder, words(domains) if domains else None, **options)
    if as_json:
        show_json(found)
    else:
        head = ["domain", "split", "asked", "ended", "kept", "tokens"]
        show_table(f"{out_folder}", head, [[row[key] for key in head] for row in found])


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
    repack: Annotated[bool, typer.Option(help="let llama.cpp rearrange weights for its kernels")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure speed, memory and size of the finished model and its dense parent, in turn."""
    from moesmith.bench.measure import bench as measure
    from moesmith.bench.measure import numbers
    from moesmith.bench.table import show

    runtimes = None if runtime is None else words(runtime)
    batches, quants = numbers("--batch", batch), words(quant)
    places: dict[str, Any] = {"vllm_python": vllm_python, "out": out_file, "dtype": dtype, "device": device}
    places |= {"repack": repack, "overwrite": overwrite}
    result = measure(run, runtimes, batches, prompt, new, quants, rounds, **places)
    if as_json:
        show_json(result)
    else:
        show(result)


@app.command()
def push(
    run: RunFolder,
    to: Annotated[str, typer.Option(help="the hub's repository, user/name; made if it is not there")],
    out_folder: Annotated[Path | None, typer.Option("--out", help="a new folder for what is uploaded")] = None,
    base_model: Annotated[str | None, typer.Option(help="the parent's hub id, for the card")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="such as apache-2.0")] = None,
    file: Annotated[list[Path], typer.Option(help="a further file, such as a GGUF file; repeatable")] = [],  # noqa: B006
    quantized_of: Annotated[str | None, typer.Option(help="the model's own repository: upload only --file")] = None,
    private: Annotated[bool, typer.Option("--private", help="of a repository that is made")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write --out and upload nothing")] = False,
    as_json: Json = False,
) -> None:
    """Upload the finished model to the Hugging Face hub, with a card that the hub reads."""
    from moesmith.export.push import push as upload

    options: dict[str, Any] = {"base_model": base_model, "licence": licence, "files": file, "out": out_folder}
    options |= {"quantized_of": quantized_of}
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
