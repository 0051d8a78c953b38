"""The model card that lies beside the weights: lineage, recipe, measured numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moesmith.artefact import read_json
from moesmith.native.modeling import MoesmithForCausalLM

if TYPE_CHECKING:
    from moesmith.pipeline import Run


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
    last = list(stages)[-1]
    carve = recipe.carve
    native = export["architecture"] == MoesmithForCausalLM.__name__
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {name} as a Mixture-of-Experts",
        "",
        f"Made from the dense model `{name}` (weights `{run.inputs['model_digest']}`)"
        f" by moesmith {run.manifest('export')['versions']['moesmith']}, recipe `{recipe.name}`.",
        "",
        f"- {carve.experts} experts, {carve.top_k} active per token, {1 - carve.ratio:.0%} of the FFN per expert",
        f"- channels: {carve.method}, score {carve.score}; compensation: {carve.compensation};"
        f" router start: {recipe.router.start}",
        f"- trained: {_trained(run)}",
        f"- parameters: {export['parameters_total']:,} in total, {export['parameters_active']:,} active per token;"
        f" the dense parent has {export['parent_parameters']:,}",
        f"- gate: top-{carve.top_k} of the logits, softmax over the selected (weights sum to 1)",
        *(["- loading needs moesmith: `import moesmith.native.modeling` before `from_pretrained`"] if native else []),
        "",
        f"Perplexity on held-out text ({evaluation['window']}-token windows, {evaluation['tokens']:,} tokens"
        f" of {len(stages['parent']['domains'])} domains):",
        "",
        "| domain | dense parent | this model |",
        "|---|---:|---:|",
    ]
    for domain, value in stages["parent"]["domains"].items():
        lines.append(f"| {domain} | {value:.2f} | {stages[last]['domains'][domain]:.2f} |")
    lines.append(f"| **geometric mean** | **{stages['parent']['geomean']:.2f}** | **{stages[last]['geomean']:.2f}** |")
    lines += ["", "The licence and the limits of the dense parent apply. Recipe:", "", "```yaml"]
    lines += [yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).strip(), "```", ""]
    return "\n".join(lines)


def _trained(run: Run) -> str:
    parts = []
    for name, what in (("router", "routers"), ("experts", "experts (LoRA, merged) and norms")):
        if (run.path(name) / "manifest.json").is_file():
            parts.append(f"{what} on {run.manifest(name)['metrics']['tokens']:,} tokens")
    return "; ".join(parts) or "nothing"
