"""Recipes: everything a conversion depends on, typed, with presets, budget overlays and ``--set``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesmith.arguments import path_text, several
from moesmith.errors import MoesmithError

BUDGETS = ("demo", "small", "paper")
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # a date that does not exist, brackets a thousand deep

# what a recipe can choose; the modules that carry a choice out import its type from here
Score = Literal["wifv", "ifv", "wifn", "magnitude"]
Selection = Literal["uniform", "adaptive"]
Compensation = Literal["none", "bias", "refit"]
Profile = Literal["rows", "columns", "both"]
Linkage = Literal["average", "single", "complete"]
Gradient = Literal["none", "straight-through"]


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _hold_a_window(tokens: int, window: int) -> None:
    if tokens < window:
        raise ValueError(f"{tokens} tokens are fewer than one window of {window}; raise tokens or lower window")


class DomainsSection(Section):
    """Calibration text."""

    names: list[str] | None = Field(None, description="domains to use, in this order; all of the source if null")
    tokens: int = Field(262_144, ge=1, description="calibration tokens per domain")
    window: int = Field(256, ge=8, description="tokens per calibration window")

    @model_validator(mode="after")
    def _fits(self) -> DomainsSection:
        _hold_a_window(self.tokens, self.window)
        return self


class CarveSection(Section):
    """Experts and what they keep."""

    method: Literal["dive", "static", "llama-moe"] = Field("dive", description="how channels are chosen")
    experts: int = Field(8, ge=1, le=1024)
    top_k: int = Field(1, ge=1, description="experts active per token")
    ratio: float = Field(0.5, description="share of FFN channels pruned from each expert, in [0, 1)")
    score: Score = "wifv"
    selection: Selection = "uniform"
    compensation: Compensation = "bias"
    ridge: float = Field(0.01, gt=0, description="refit: pull towards the parent's columns")
    pool: float = Field(0.2, ge=0, le=1, description="refit: weight of the pool's Gram matrix beside the cluster's")

    @model_validator(mode="after")
    def _fits(self) -> CarveSection:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is above experts {self.experts}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio {self.ratio} leaves no channel; give a value in [0, 1)")
        if self.method == "static" and self.experts != 1:
            raise ValueError("the static method has one expert; set carve.experts to 1")
        return self


class AffinitySection(Section):
    """Which domains share an expert."""

    method: Literal["perplexity", "scores", "published", "random"] = "perplexity"
    published: str | None = Field(None, description="name of published clusters, for method published")
    profile: Profile = "rows"
    linkage: Linkage = "average"
    tokens: int = Field(32_768, ge=1, description="tokens per domain that domains are grouped by")
    window: int = Field(256, ge=8)

    @model_validator(mode="after")
    def _fits(self) -> AffinitySection:
        if self.method == "perplexity":
            _hold_a_window(self.tokens, self.window)
        if (self.method == "published") != (self.published is not None):
            raise ValueError("affinity.published names clusters exactly when affinity.method is published")
        return self


class RouterSection(Section):
    """How routers start."""

    start: Literal["random", "lda"] = "random"
    ridge: float = Field(0.01, gt=0, description="lda: shrinkage of the pooled covariance")
    noise: float = Field(5e-4, ge=0, description="factor of DIVE's training noise")


class LoopSection(Section):
    """What every training stage has; ``tokens`` 0 skips it."""

    tokens: int = Field(0, ge=0)
    window: int = Field(1024, ge=8, description="tokens per sequence")
    batch: int = Field(256, ge=1, description="sequences per step, over all processes")
    micro_batch: int = Field(16, ge=1, description="sequences per forward pass and process")
    lr: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    min_ratio: float = Field(0.1, ge=0, le=1, description="cosine: last learning rate over the peak")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of steps with rising learning rate")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null leaves it alone")
    weight_decay: float = Field(0.0, ge=0)
    checkpointing: bool = Field(False, description="recompute activations in the backward pass")

    @model_validator(mode="after")
    def _window_fits(self) -> LoopSection:
        if self.tokens:
            _hold_a_window(self.tokens, self.window)
        return self


class TrainSection(LoopSection):
    """A training stage of routers, experts and norms."""

    loss: Literal["next-token", "distill"] = "next-token"
    mix: float = Field(1.0, ge=0, le=1, description="distill: share of the KL term")
    kl_temperature: float = Field(1.0, gt=0)
    gate: Literal["dense", "sparse"] = "sparse"
    gate_temperature: float = Field(1.0, gt=0, description="dense gate's softmax temperature")
    router_gradient: Gradient = "none"
    train_router: bool = True
    lora_rank: int = Field(0, ge=0, description="0 trains no experts")
    lora_alpha: float = 16.0
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    norms: bool = False

    @model_validator(mode="after")
    def _fits(self) -> TrainSection:
        if self.gate == "dense" and (self.lora_rank or self.norms):
            raise ValueError("the dense gate trains routers only; use gate: sparse for experts and norms")
        return self


class RouterTrainSection(TrainSection):
    """Stage 1: as any training stage, but through the dense gate unless said otherwise."""

    gate: Literal["dense", "sparse"] = "dense"


class MasksSection(LoopSection):
    """ToMoE: experts, routers and attention masks learned over frozen weights."""

    budget: float = Field(0.5, gt=0, lt=1, description="share p of the block parameters active per token")
    start: Literal["random", "carving"] = Field("random", description="first masks: all channels, or a carving's")
    attention: Literal["none", "hybrid", "dynamic"] = Field("hybrid", description="which attention masks are learned")
    output_mask: bool = Field(True, description="mask the output projection by the query token as well")
    noise: Literal["token", "expert"] = Field("token", description="whose Gumbel noise a channel mask has")
    routing: Literal["sampled", "argmax"] = Field("sampled", description="whether routing has Gumbel noise in training")
    masking: Literal["double", "single"] = Field("double", description="how often a mask multiplies a gated product")
    widths: Literal["threshold", "equal"] = Field("threshold", description="narrower experts as they are, or filled up")
    temperature: float = Field(0.4, gt=0)
    bias: float = Field(3.0, description="added to every mask logit: masks start open")
    kl_weight: float = Field(2.0, ge=0)
    budget_weight: float = Field(16.0, ge=0)
    union_weight: float = Field(3.0, ge=0, description="spread over attention and FFN positions: half of it acts")
    balance_weight: float = Field(1.0, ge=0)


class EvaluateSection(Section):
    """Held-out perplexity after every stage."""

    tokens: int = Field(16_384, ge=1, description="evaluation tokens per domain")
    window: int = Field(512, ge=8)

    @model_validator(mode="after")
    def _fits(self) -> EvaluateSection:
        _hold_a_window(self.tokens, self.window)
        return self


class Recipe(Section):
    """A whole conversion."""

    name: str
    description: str = ""
    seed: int = 42
    domains: DomainsSection = DomainsSection()
    carve: CarveSection = CarveSection()
    affinity: AffinitySection = AffinitySection()
    router: RouterSection = RouterSection()
    masks: MasksSection = MasksSection()
    stage1: RouterTrainSection = RouterTrainSection()
    stage2: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.learned and self.carve.top_k != 1:
            raise ValueError("learned masks route every token to one expert; set carve.top_k to 1")
        if self.learned and self.carve.compensation == "bias":
            raise ValueError("learned masks take compensation none or refit; set carve.compensation")
        return self

    @property
    def learned(self) -> bool:
        """Whether experts are learned as masks (ToMoE)."""
        return self.masks.tokens > 0

    @property
    def carved(self) -> bool:
        """Whether channels are chosen from statistics: always, unless masks are learned from a random start."""
        return not self.learned or self.masks.start == "carving"

    @property
    def clustered(self) -> bool:
        """Whether domains are grouped, one group an expert."""
        return self.carved and self.carve.method == "dive" and self.affinity.method != "random"

    @property
    def mined(self) -> bool:
        """Whether they are grouped by the perplexities of pruned models."""
        return self.clustered and self.affinity.method == "perplexity"


def presets() -> dict[str, str]:
    """Name to one-line description of the recipes that come with moesmith."""
    found = {}
    for entry in sorted((files("moesmith.run") / "presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = yaml.safe_load(entry.read_text(encoding="utf-8"))["description"]
    return found


def choose_recipe(recipe: str | Path | Recipe, budget: str | None, settings: str | Sequence[str] | None) -> Recipe:
    """A recipe as it is, or :func:`load_recipe`.

    Raises:
        MoesmithError: budget or settings beside a recipe that is made already, or as :func:`load_recipe`.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, budget, settings)
    if budget is not None or several("settings", settings):
        raise MoesmithError("budget and settings change no Recipe", "Give them to load_recipe, or the recipe's name.")
    return recipe


def load_recipe(name: str | Path, budget: str | None = None, settings: str | Sequence[str] | None = ()) -> Recipe:
    """A preset or YAML file, with a budget overlay and ``section.key=value`` settings (or one of them) on top.

    Raises:
        MoesmithError: unknown preset, budget or key (with the nearest right one), or a value that does not fit.
    """
    values, settings = _read(path_text("recipe", name)), several("settings", settings)
    if budget is not None:
        if budget not in BUDGETS:
            raise MoesmithError(f"there is no budget '{budget}'", f"Choose one of {', '.join(BUDGETS)}.")
        overlay = yaml.safe_load((files("moesmith.run") / "budgets" / f"{budget}.yaml").read_text(encoding="utf-8"))
        values = _overlay(values, {name: part for name, part in overlay.items() if _used(values, name)})
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found:
            raise MoesmithError(f"--set {setting} has no '='", "Write --set section.key=value.")
        _check_key(key)
        try:
            parsed = yaml.safe_load(value)
        except NOT_YAML as error:
            raise MoesmithError(f"--set {key}: '{value}' is not a YAML value", "Quote text, as in 'x: y'.") from error
        nested: Any = parsed
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = _overlay(values, nested)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            _check_key(where)
        message = first["msg"].removeprefix("Value error, ")
        raise MoesmithError(f"{where}: {message}", "See 'moesmith presets' and docs/recipes.md.") from error


def _read(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's values with those of its ``base`` beneath; ``above`` are the recipes that led here."""
    if name in above:
        raise MoesmithError(f"{name} is its own base", "Name a preset as the base.")
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise MoesmithError(f"there is no recipe file {path}", "Give a preset's name or an existing YAML file.")
        text = path.read_bytes
    else:
        if name not in (known := presets()):
            near = difflib.get_close_matches(name, known, 1, 0.3)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise MoesmithError(f"there is no preset '{name}'", f"{hint}'moesmith presets' lists them.")
        text = (files("moesmith.run") / "presets" / f"{name}.yaml").read_bytes
    try:
        values = yaml.safe_load(text().decode("utf-8"))
    except (*NOT_YAML, OSError) as error:
        raise MoesmithError(f"{name} is not valid YAML: {error}", "Mend the file.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise MoesmithError(f"{name} is not a recipe", "A recipe is a YAML mapping with a name and sections.")
    values = {"name": Path(name).stem, **values}
    if base := values.pop("base", None):
        values = _overlay(_read(str(base), (*above, name)), values)
    return values


def _used(values: Mapping[str, Any], name: str) -> bool:
    """Whether a budget may change a section: it scales the stages that a recipe trains and adds none."""
    section = values.get(name)
    return name not in ("masks", "stage1", "stage2") or (isinstance(section, Mapping) and bool(section.get("tokens")))


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = _overlay(merged.get(key, {}), value)
        else:
            merged[key] = value
    return merged


def keys() -> list[str]:
    """Every setting as ``section.key``."""
    found = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found += [f"{name}.{key}" for key in section.model_fields]
        else:
            found.append(name)
    return found


def _check_key(key: str) -> None:
    if key not in (known := keys()):
        near = difflib.get_close_matches(key, known, 1, 0.0)
        raise MoesmithError(f"there is no setting '{key}'", f"Did you mean '{near[0]}'?")
