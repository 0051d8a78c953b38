"""The model card that is stored next to the weights: lineage, recipe, measured numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moesmith.console import code, inline
from moesmith.data.overlap import found_in, warnings
from moesmith.mixture.carving import Header
from moesmith.native.modeling import MoesmithForCausalLM
from moesmith.run.folder import STOCK, finished_of

if TYPE_CHECKING:
    from moesmith.run.pipeline import Pipeline as Run

_LOADING = (
    "- loading: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; the code is next to the"
    " weights and needs only torch and transformers. If moesmith is installed, `import moesmith.native.modeling`"
    " replaces the flag",
)


def model_card(run: Run) -> str:
    """Write Markdown with a metadata header from the run's manifests."""
    recipe, evaluation, carved = run.recipe, run.evaluation, run.carving_header()
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
        *(f"- {line}" for line in recipe.method.about(run)),
        f"- trained: {_trained(run)}",
        f"- parameters: {export['parameters_total']:,} in total, {export['parameters_active']:,} active per token;"
        f" the dense parent has {export['parent_parameters']:,}",
        f"- gate: top-{carved.top_k} of the logits, {_mix(carved)}",
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


def _mix(carved: Header) -> str:
    if all(gate.mix == "sum" for gate in carved.gates):
        return "each selected expert counts in full"
    return "softmax over the selected (weights sum to 1)"


def _twin(architecture: str, own: float, stock: float) -> str:
    """Say what ``RUN/stock`` is, and what it costs."""
    change = f"{abs(stock / own - 1):.1%} {'higher' if stock > own else 'lower'} than this model's"
    return (
        f"The same experts in a stock architecture (`{architecture}`, the folder `stock` of the run) load without our"
        " code. No stock architecture masks attention by token: those masks are dropped there, and what all tokens"
        f" drop is zero. Geometric mean of its perplexity: {stock:.2f}, {change}."
    )


def _trained(run: Run) -> str:
    found = {m["title"]: m["metrics"]["tokens"] for m in run.manifests.values() if "trainable" in m["metrics"]}
    return "; ".join(f"{title} on {tokens:,} tokens" for title, tokens in found.items()) or "nothing"
