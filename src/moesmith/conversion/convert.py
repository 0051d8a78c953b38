"""A conversion from start to finish: the stages in their order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.arguments import parent_or_source, parse_size, path_of, path_text, several
from moesmith.console import duration, log_to, say
from moesmith.conversion.order import steps_of, trains
from moesmith.conversion.pace import counted, measure, parse_rate, parse_time, tokens_of, with_tokens
from moesmith.conversion.plan import Plan, check_room, fit_time, make_plan
from moesmith.conversion.steps.finish import check_known, write_card
from moesmith.conversion.steps.text import check_batches, check_text, check_windows
from moesmith.data.text import Domain, check_splits, load_domains, source_digest
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json
from moesmith.files.outputs import check_place, existing
from moesmith.parent.accelerator import free_memory
from moesmith.parent.checkpoint import has_weights
from moesmith.parent.compute import AUTO, Choice, Device, DType, keep_dtype, long_name, named, short
from moesmith.parent.digests import tokenizer_digest
from moesmith.parent.load import Parent, choose_compute, load_parent, load_skeleton
from moesmith.run.fingerprints import parent_digests
from moesmith.run.folder import Run
from moesmith.run.legacy import upgraded
from moesmith.run.pipeline import Pipeline, check_folder, check_reuse
from moesmith.run.recipe import Recipe, choose_recipe, parse
from moesmith.run.step import Job
from moesmith.training.loop import ordinary_mode
from moesmith.training.tracking import check_report
from moesmith.world import own_device, refuse_others, world


@ordinary_mode()
def convert(
    recipe: str | Path | Recipe,
    model: str | Path | Parent | PreTrainedModel,
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: str | Sequence[str] | None = (),
    budget: str | None = None,
    active: float | None = None,
    reuse: str | Path | Sequence[str | Path] | None = (),
    dtype: DType = AUTO,
    device: Device = AUTO,
    memory: str | int | None = None,
    time: str | None = None,
) -> Run:
    """Turn a dense model into a Mixture-of-Experts.

    Args:
        recipe: a preset's name, a YAML file, or a :class:`Recipe`.
        model: what :func:`moesmith.load_parent` takes, a loaded parent, or a model of transformers with its
            ``tokenizer``; its parameters are frozen.
        data: a folder of JSONL files, a YAML of Hugging Face data sets, or ``builtin``.
        out: the run's folder; the same call on it continues a run that was killed.
        tokenizer: the tokenizer of a model in memory; only given with one.
        settings: ``section.key=value`` on top of the recipe.
        budget: ``demo``, ``small``, ``evening`` or ``paper``.
        active: share of the feed-forward channels that a token uses, in place of ``carve.ratio``.
        reuse: other runs whose finished stages are taken over if everything that they depend on is the same.
        dtype: what models compute in: ``bf16``, ``fp16``, ``fp32``, or ``auto``, the fastest sound one on this
            machine. A run that is continued keeps the one that it began in. Weights are stored in the parent's dtype.
        device: where: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu``, or ``auto``, the accelerator with the most
            free memory if the plan fits on it.
        memory: most bytes to use, such as ``"4GB"``; what is free if left out. A conversion that needs more is done
            layer by layer, with the same result; a training step of it by several processes, which hold a part each.
        time: how long it may take here, such as ``"15m"``: calibration and training text are scaled to fit. The counts
            are written into the run's recipe.

    Started by ``torchrun`` in several processes, all of them convert together (``moesmith.world``).

    Returns:
        The finished run; ``run.folder / "model"`` is a Hugging Face folder, of a stock architecture wherever one fits.

    Raises:
        MoesmithError: anything the user can fix, before work starts where that is possible.

    Example:
        >>> import moesmith
        >>> run = moesmith.convert("token", "smollm2-135m", "builtin", "runs/demo", budget="demo")  # doctest: +SKIP
    """
    refuse_others()
    team = world()
    options: dict[str, Any] = {"tokenizer": tokenizer, "settings": settings, "budget": budget, "active": active}
    options |= {"dtype": dtype, "device": own_device(device), "memory": memory, "time": time}
    with team.agreed():
        run, job = _prepared(recipe, model, data, out, several("reuse", reuse), **options)
    with ExitStack() as held:
        with team.agreed():
            if team.first:
                held.enter_context(run.lock())
                held.enter_context(log_to(run.folder / "run.log"))
        for step in steps_of(run.recipe):
            with team.agreed(), step.prepared(job) if team.first else nullcontext():
                run.step(step, job)
        with team.agreed():
            if team.first:
                write_card(run)
    say(f"finished: {run.folder / 'model'}")
    return run


def _prepared(
    recipe: str | Path | Recipe,
    model: str | Path | Parent | PreTrainedModel,
    data: str | Path,
    out: str | Path,
    reuse: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: str | Sequence[str] | None,
    budget: str | None,
    active: float | None,
    dtype: DType,
    device: Device,
    memory: str | int | None,
    time: str | None,
) -> tuple[Pipeline, Job]:
    """Check everything before any work, and load the parent; arguments as :func:`convert` takes them."""
    chosen = choose_recipe(recipe, budget, settings, active)
    check_report(chosen.report_to)
    room, limit = parse_size(memory), None if time is None else parse_time(time)
    data, out, model = path_text("data", data), path_of("out", out), parent_or_source(model, tokenizer)
    others = check_reuse(reuse)
    domains = choose_domains(data, chosen)
    overlap = check_splits(domains)
    inputs = {"data": data, "data_digest": source_digest(data, [domain.name for domain in domains])}
    source = model.source if isinstance(model, Parent) else model
    begun = out.parent if (out / "run.json").is_file() else None  # may go on wherever it is stored
    check_place(out, existing(source, data, *map(str, others)), begun, links=False)
    if limit is None:
        check_folder(out, chosen, inputs)  # again below, with the parent's fingerprint
    for name in ("model", "stock"):
        check_known(out / name)
    header = _begun(out)
    stored = before = None
    if header is not None:
        stored = named(header["inputs"]["dtype"])  # 0.1 took every parent in bf16
        before = named(header["inputs"].get("compute", header["inputs"]["dtype"]))
    dtype = keep_dtype(f"{out} holds a run", before, dtype)
    shapes = _skeleton(model, dtype, device, stored)
    if shapes.choice is not None:
        shapes = replace(shapes, choice=_agreed(shapes.choice))
    say(f"computes in {shapes.choice or short(shapes.dtype)}")
    chosen = _timed(chosen, limit, header, shapes, len(domains))
    if limit is not None:
        chosen = with_tokens(chosen, world().share(tokens_of(chosen)))
    computed = shapes.dtype if shapes.choice is None else shapes.choice.dtype
    if computed == torch.float16 and trains(chosen):
        raise MoesmithError("fp16 is too narrow for the gradients of training", "Give --dtype bf16, fp32 or auto.")
    if isinstance(model, Parent):
        parent = _in_memory(model, chosen, len(domains), room)
    elif shapes.tokenizer is not None:  # it had to be read whole
        parent = shapes
    else:
        parent = _open(model, shapes, dtype, device, chosen, len(domains), room)
    steps = steps_of(chosen)
    check_windows(steps, parent.config)
    check_batches(steps, world().size)
    inputs |= {"model": parent.source, "model_digest": parent.digest}
    inputs |= {"tokenizer_digest": tokenizer_digest(parent.tokenizer)} | parent_digests(parent, domains)
    inputs |= {"dtype": long_name(parent.stored), "compute": long_name(parent.dtype)}
    run = Pipeline(out, chosen, inputs, others)
    job = Job(run, parent, domains, overlap)
    check_text(steps, job)
    check_room(make_plan(chosen, parent, len(domains), ranks=world().size), out, parent, room)
    return run, job


def predict(
    recipe: str | Path | Recipe,
    model: str | Path | Parent,
    data: str | Path = "builtin",
    *,
    settings: str | Sequence[str] | None = (),
    budget: str | None = None,
    active: float | None = None,
    dtype: DType = AUTO,
    device: Device = AUTO,
    time: str | None = None,
    ranks: int = 1,
    rate: str | None = None,
) -> dict[str, Any]:
    """Predict what ``moesmith plan`` prints: :class:`moesmith.conversion.plan.Plan`, facts of parent and machine.

    Args:
        recipe, model, data, settings, budget, active, dtype, device, time: as :func:`convert` takes them; of a model
            its ``config.json`` is enough.
        ranks: how many processes would share the work.
        rate: FLOPs per second of the device of each, in place of this machine's measured speed: TFLOP/s, or a name of
            ``conversion.pace.RATES``; it then computes in bf16 unless ``dtype`` says otherwise.

    Raises:
        MoesmithError: as :func:`convert`, before any work.
    """
    chosen, model = choose_recipe(recipe, budget, settings, active), parent_or_source(model)
    texts = choose_domains(path_text("data", data), chosen)
    check_splits(texts)
    domains, weights = len(texts), isinstance(model, str) and has_weights(model)
    if ranks < 1:
        raise MoesmithError(f"ranks is {ranks}", "Give at least 1.")
    if rate is not None:
        parent = _skeleton(model, "bf16" if dtype == AUTO else dtype, "cpu")
        pace = counted(parent, parse_rate(rate))
    else:
        parent = load_parent(str(model), dtype, device=device) if weights else _skeleton(model, dtype, device)
        pace = measure(parent, chosen)
    if time is not None:
        chosen = fit_time(chosen, parent, domains, parse_time(time), pace, ranks)
    fitted = [] if time is None else [f"{key}={tokens}" for key, tokens in tokens_of(chosen).items()]
    found = make_plan(chosen, parent, domains, pace, ranks).as_dict()
    computes = str(parent.choice or short(parent.dtype)) if rate is None else f"{short(parent.dtype)} at {rate}"
    found |= {"ranks": ranks}
    return found | {"recipe": chosen.name, "domains": domains, "computes": computes, "fitted": fitted}


def _begun(out: Path) -> dict[str, Any] | None:
    """Read ``run.json`` of a folder in which a stage is finished or under way."""
    header = out / "run.json"
    return read_json(header) if header.is_file() and any((out / "stages").glob("*")) else None


def _skeleton(model: str | Parent, dtype: DType, device: Device, stored: torch.dtype | None = None) -> Parent:
    """Return the parent itself, or its shapes, device and dtype before its weights are read."""
    if isinstance(model, Parent):
        return model
    try:
        skeleton = load_skeleton(model, stored)
    except MoesmithError:  # reading the weights says better what is wrong
        return load_parent(model, dtype, device=device, stored=stored)
    skeleton.choice = choose_compute(skeleton.model, dtype, device)
    return skeleton


def _timed(recipe: Recipe, limit: float | None, header: dict[str, Any] | None, shapes: Parent, domains: int) -> Recipe:
    """Scale the recipe's text to ``limit`` seconds, or as it was when the run began, and say how long the run takes.

    How much of a continued run is left is not known here, so nothing is said about that.

    Raises:
        MoesmithError: ``limit`` is too short for any text.
    """
    if header is not None:
        if limit is None:
            return recipe
        say("a continued run keeps its text, whatever --time says")
        return with_tokens(recipe, tokens_of(parse(upgraded(header), stored=True)))
    pace = measure(shapes, recipe)
    if limit is not None:
        recipe = fit_time(recipe, shapes, domains, limit, pace, world().size)
        say("text: " + ", ".join(f"{key}={tokens}" for key, tokens in tokens_of(recipe).items()))
    seconds = make_plan(recipe, shapes, domains, pace, world().size).seconds
    say(f"about {duration(sum(seconds.values()))} on this machine, of which {duration(seconds['training'])} training")
    return recipe


def _agreed(choice: Choice) -> Choice:
    """Take the first process's dtype: it is measured, so processes may differ."""
    return replace(choice, dtype=named(world().share(long_name(choice.dtype))))


def _open(
    source: str, shapes: Parent, dtype: DType, device: Device, recipe: Recipe, domains: int, room: int | None
) -> Parent:
    """Load the parent, whole or layer by layer, as the plan for its shapes and the available memory require."""
    choice = shapes.choice
    assert choice is not None
    plan = make_plan(recipe, shapes, domains, ranks=world().size)
    free = min(world().exchange(free_memory(choice.device) if room is None else room))
    whole = _whole(plan, free)
    if whole and plan.memory > free and device == AUTO and choice.device.type != "cpu":
        say(f"{choice.device} has {free / 1e9:.1f} GB free, but about {plan.memory / 1e9:.1f} GB are needed")
        choice = _agreed(choose_compute(shapes.model, dtype, "cpu"))
        say(f"computes in {choice}")
    if not whole and _differ(shapes):
        what = (
            f"whole, the parent needs about {plan.memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB may be used"
        )
        raise MoesmithError(f"{what}; its layers differ, so they cannot be read one at a time", "Give it more memory.")
    if not whole:
        _say_layers(plan, free)
    parent = load_parent(source, choice.dtype, None if whole else free, device=choice.device, stored=shapes.stored)
    return replace(parent, choice=choice)


def _in_memory(parent: Parent, recipe: Recipe, domains: int, room: int | None) -> Parent:
    """Return a parent that is loaded, to be run layer by layer where the plan needs more memory than there is."""
    if parent.layerwise or _differ(parent) or parent.device.type != "cpu":
        return parent
    plan = make_plan(recipe, parent, domains, ranks=world().size)
    free = min(world().exchange(free_memory(parent.device) if room is None else room))
    loaded = 0 if room is not None else plan.parent_parameters * parent.dtype.itemsize
    if _whole(plan, free + loaded):
        return parent
    _say_layers(plan, free + loaded)
    return replace(parent.as_stored(), choice=Choice(parent.device, parent.dtype, {}), memory=free)


def _differ(parent: Parent) -> bool:
    """Whether its layers are of several types, which cannot be read one at a time."""
    return len(set(getattr(parent.config, "layer_types", None) or [None])) > 1


def _whole(plan: Plan, free: int) -> bool:
    """Whether models are held whole: they fit, or one layer at a time would not need less."""
    return plan.memory <= free or plan.memory_layerwise is None or plan.memory_layerwise >= plan.memory


def _say_layers(plan: Plan, free: int) -> None:
    need = f"whole, it needs about {plan.memory / 1e9:.1f} GB of memory"
    say(f"layer by layer: {need}, and {free / 1e9:.1f} GB may be used")


def choose_domains(data: str, recipe: Recipe) -> list[Domain]:
    """Choose the recipe's domains from a data source.

    Raises:
        MoesmithError: there is one domain where experts need several, there are more experts than domains, or
            published clusters do not fit the domains.
    """
    domains = load_domains(data, recipe.domains.names)
    recipe.method.check_domains([domain.name for domain in domains], data)
    return domains
