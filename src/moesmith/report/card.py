"""The model card that lies beside the weights: lineage, recipe, measured numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moesmith.console import plain
from moesmith.data.overlap import found_in, warnings
from moesmith.files.artefact import read_json
from moesmith.mixture.carving import Carving
from moesmith.native.modeling import MoesmithForCausalLM
from moesmith.report.overview import STOCK, finished_of

if TYPE_CHECKING:
    from moesmith.run.pipeline import Run

_LOADING = (
    "- loading: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; the code lies beside the"
    " weights and needs torch and transformers only. Where moesmith is installed, `import moesmith.native.modeling`"
    " does instead of the flag",
)


_MARKS = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])")


def inline(text: str) -> str:
    """A user's text for a line or table cell of Markdown: shown as it is, whatever marks it holds."""
    return _MARKS.sub(r"\\\g<0>", plain(" ".join(text.split())))


def code(text: str) -> str:
    """A user's text as code in a line of Markdown: fenced by more backticks than it holds."""
    text = plain(" ".join(text.split()))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def model_card(run: Run) -> str:
    """Markdown with a metadata header, from what the run's manifests say."""
    recipe, evaluation = run.recipe, read_json(run.path("evaluate") / "evaluation.json")
    export = run.manifest("export")["metrics"]
    name = run.inputs["model"].rstrip("/").split("/")[-1]
    header: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moesmith"],
    }
    if "/" in run.inputs["model"] and not Path(run.inputs["model"]).exists():  # a hub id
        header["base_model"] = run.inputs["model"]
    stages = evaluation["stages"]
    last = finished_of(stages)
    carve = recipe.carve
    native = export["architecture"] == MoesmithForCausalLM.__name__
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {inline(name)} as a Mixture-of-Experts",
        "",
        f"Made from the dense model {code(name)} (weights `{run.inputs['model_digest']}`)"
        f" by moesmith {run.manifest('export')['versions']['moesmith']}, recipe {code(recipe.name)}.",
        "",
        *(_learned(run) if recipe.learned else _carved(run)),
        f"- trained: {_trained(run)}",
        f"- parameters: {export['parameters_total']:,} in total, {export['parameters_active']:,} active per token;"
        f" the dense parent has {export['parent_parameters']:,}",
        f"- gate: top-{carve.top_k} of the logits, softmax over the selected (weights sum to 1)",
        *(_LOADING if native else ()),
        "",
        f"Perplexity on held-out text ({evaluation['window']}-token windows, {evaluation['tokens']:,} tokens"
        f" of {len(stages['parent']['domains'])} domains):",
        "",
        "| domain | dense parent | this model |",
        "|---|---:|---:|",
    ]
    for domain, value in stages["parent"]["domains"].items():
        lines.append(f"| {inline(domain)} | {value:.2f} | {stages[last]['domains'][domain]:.2f} |")
    lines.append(f"| **geometric mean** | **{stages['parent']['geomean']:.2f}** | **{stages[last]['geomean']:.2f}** |")
    for line in warnings(found_in(run.manifest("held-out")["metrics"])):
        lines += ["", f"{inline(line[:1].upper() + line[1:])}."]
    if STOCK in stages:
        lines += ["", _twin(export[STOCK]["architecture"], stages[last]["geomean"], stages[STOCK]["geomean"])]
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).strip()
    fence = "`" * max(3, 1 + max((len(marks) for marks in re.findall("`+", text)), default=0))
    lines += ["", "The licence and the limits of the dense parent apply. Recipe:", "", f"{fence}yaml", text, fence, ""]
    return "\n".join(lines)


def _carved(run: Run) -> list[str]:
    carve = run.recipe.carve
    return [
        f"- {carve.experts} experts, {carve.top_k} active per token, {1 - carve.ratio:.0%} of the FFN per expert",
        f"- channels: {carve.method}, score {carve.score}; compensation: {carve.compensation};"
        f" router start: {run.recipe.router.start}",
    ]


def _learned(run: Run) -> list[str]:
    """What ToMoE learned, in numbers of the run."""
    spec, carve, found = run.recipe.masks, run.recipe.carve, run.manifest("masks")["metrics"]
    carving = Carving.load(run.path("masks"))
    start = "all channels" if spec.start == "random" else f"a carving ({carve.method}, score {carve.score})"
    lines = [
        f"- {carve.experts} experts, one active per token: masks over the parent's FFN channels, learned by a"
        f" hypernetwork over frozen weights (ToMoE, arXiv:2501.15316), started from {start}",
        f"- budget: {spec.budget:.1%} of the block parameters active per token; {found['active_share']:.1%} are, each"
        f" layer's widest expert counted; {found['union']:.1%} of the channels are kept by some expert",
        f"- the widest expert has {found['width_ffn']:,.1f} of {carving.d_ff:,} channels, mean over layers;"
        f" compensation: {carve.compensation}",
    ]
    if not carving.attention:
        return [*lines, "- attention: the parent's, whole"]
    h = len(carving.attention[0].qk_h)
    qk = "the same for all tokens" if spec.attention == "hybrid" else "chosen by token"
    return [
        *lines,
        f"- attention: {found['width_qk']:.1f} of {h} dimensions of a Q/K head, {qk}, and at most"
        f" {found['width_vo']:.1f} of a V/O head, chosen by token (means over layers)",
    ]


def _twin(architecture: str, own: float, stock: float) -> str:
    """What ``RUN/stock`` is, and what it costs."""
    change = f"{abs(stock / own - 1):.1%} {'higher' if stock > own else 'lower'} than this model's"
    return (
        f"The same experts in a stock architecture (`{architecture}`, the folder `stock` of the run) load without code"
        " of ours. No stock architecture masks attention by token: those masks are dropped there, and what all tokens"
        f" drop is zero. Geometric mean of its perplexity: {stock:.2f}, {change}."
    )


def _trained(run: Run) -> str:
    parts = []
    for name, what in (
        ("masks", "masks and routers"),
        ("router", "routers"),
        ("experts", "experts (LoRA, merged) and norms"),
    ):
        if (run.path(name) / "manifest.json").is_file():
            parts.append(f"{what} on {run.manifest(name)['metrics']['tokens']:,} tokens")
    return "; ".join(parts) or "nothing"
