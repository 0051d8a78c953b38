"""What the commands share: the application they belong to, and options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="folder, hub id, .gguf file, or smollm2-135m")]
Data = Annotated[str, typer.Option(help="folder of JSONL files, YAML of Hugging Face data sets, or builtin")]
Settings = Annotated[list[str], typer.Option("--set", help="section.key=value on top of the recipe; repeatable")]
Budget = Annotated[str | None, typer.Option(help="demo, small, evening or paper")]
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
