"""A conversion from start to finish: the stages in their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from moesmith.affinity import published
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.parents import Parent, load_parent, load_skeleton, tokenizer_digest
from moesmith.pipeline import Run, check_folder
from moesmith.plan import check_room, make_plan, parse_bytes
from moesmith.recipe import Recipe, load_recipe
from moesmith.stages.carve import affinity_stage, carve_stage
from moesmith.stages.data import (
    check_text,
    check_windows,
    corpus_stage,
    domains_stage,
    held_out_stage,
    moments_stage,
    stages_to_train,
)
from moesmith.stages.finish import baseline_stage, evaluate_stage, export_stage
from moesmith.stages.masks import masks_stage, refit_stage
from moesmith.stages.training import experts_stage, router_stage
from moesmith.text import Domain, check_splits, load_domains, source_digest


def convert(
    recipe: str | Recipe,
    model: str | Parent,
    data: str,
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    budget: str | None = None,
    reuse: Sequence[str | Path] = (),
    dtype: torch.dtype = torch.bfloat16,
    memory: str | int | None = None,
) -> Run:
    """Turn a dense model into a Mixture-of-Experts.

    Args:
        recipe: a preset's name, a YAML file, or a :class:`Recipe`.
        model: what :func:`moesmith.load_parent` takes, or a loaded parent.
        data: a folder of JSONL files, a YAML of Hugging Face data sets, or ``builtin``.
        out: the run's folder; the same call on it continues a run that was killed.
        settings: ``section.key=value`` on top of the recipe.
        budget: ``demo``, ``small`` or ``paper``.
        reuse: other runs whose finished stages are taken over where nothing that they depend on differs.
        dtype: the parent's dtype.
        memory: bytes to keep to, such as ``"4GB"``; what is free if left out. A conversion without training that needs
            more is done layer by layer, with the same result.

    Returns:
        The finished run; ``run.folder / "model"`` is a Hugging Face folder, of a stock architecture wherever one fits.

    Raises:
        MoesmithError: anything the user can mend, before work starts where that is possible.

    Example:
        >>> import moesmith
        >>> run = moesmith.convert("dive-plus", "smollm2-135m", "builtin", "runs/demo", budget="demo")  # doctest: +SKIP
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, budget, settings)
    out = Path(out)
    domains = choose_domains(data, chosen)
    inputs = {"data": data, "data_digest": source_digest(data, [domain.name for domain in domains])}
    check_folder(out, chosen, inputs)  # once more below, with the parent's fingerprint
    room = parse_bytes(memory)
    parent = model if isinstance(model, Parent) else _open(model, dtype, chosen, len(domains), room)
    check_windows(chosen, parent)
    check_text(chosen, parent, domains)
    inputs |= {"model": parent.source, "model_digest": parent.digest}
    inputs |= {"tokenizer_digest": tokenizer_digest(parent.tokenizer)}
    inputs |= {"dtype": str(parent.model.dtype).removeprefix("torch.")}
    run = Run(out, chosen, inputs, [Path(path) for path in reuse])
    check_room(make_plan(chosen, parent, len(domains)), out, parent, room)
    with run.lock():
        held_out_stage(run, parent, domains)
        corpus_stage(run, parent, domains)
        baseline_stage(run, parent)
        made: list[str] = []
        if chosen.carved:
            domains_stage(run, parent, domains)
            moments_stage(run, parent, [domain.name for domain in domains])
            affinity_stage(run, parent, domains)
            carve_stage(run, parent)
            made.append("carve")
        if chosen.learned:
            masks_stage(run, parent, made)
            made.append("masks")
            if chosen.carve.compensation == "refit":
                refit_stage(run, parent)
                made.append("refit")
        training = stages_to_train(chosen)
        if "stage1" in training:
            router_stage(run, parent, made[-1])
            made.append("router")
        if "stage2" in training:
            experts_stage(run, parent, made[-1])
            made.append("experts")
        export_stage(run, parent, made[-1])
        evaluate_stage(run, parent, made)
    say(f"finished: {out / 'model'}")
    return run


def _open(source: str, dtype: torch.dtype, recipe: Recipe, domains: int, room: int | None) -> Parent:
    """The parent, whole or layer by layer: as its config's plan and the memory there is demand."""
    try:
        plan = make_plan(recipe, load_skeleton(source, dtype), domains)
    except MoesmithError:  # a GGUF file has no config, and what is wrong otherwise the weights say better
        return load_parent(source, dtype)
    free = psutil.virtual_memory().available if room is None else room
    if plan.memory <= free or plan.memory_layerwise is None or plan.memory_layerwise >= plan.memory:
        return load_parent(source, dtype)
    need = f"whole, it needs about {plan.memory / 1e9:.1f} GB of memory"
    say(f"layer by layer: {need}, and {free / 1e9:.1f} GB may be used")
    return load_parent(source, dtype, free)


def choose_domains(data: str, recipe: Recipe) -> list[Domain]:
    """The recipe's domains of a data source.

    Raises:
        MoesmithError: a single domain where experts need several, more experts than domains, published clusters
            that do not fit them, or evaluation text that is calibration text.
    """
    domains = load_domains(data, recipe.domains.names)
    if recipe.clustered and recipe.carve.experts > 1:
        if len(domains) < 2:
            raise MoesmithError(f"{data} holds one domain, and experts need domains to differ by", "Add more domains.")
        if len(domains) < recipe.carve.experts:
            raise MoesmithError(
                f"{recipe.carve.experts} experts need at least as many domains, and {data} holds {len(domains)}",
                f"Add domains or set carve.experts to {len(domains)} or less.",
            )
        if recipe.affinity.published is not None:
            published(recipe.affinity.published, [domain.name for domain in domains], recipe.carve.experts)
    check_splits(domains)
    return domains
