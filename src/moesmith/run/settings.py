"""The base of a recipe's sections, and those that every recipe can have. A method adds its own (``methods/``)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Gradient = Literal["none", "straight-through"]
Tracker = Literal["none", "trackio", "tensorboard", "wandb"]


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def without_effect(self) -> dict[str, str]:
        """Map settings that do nothing with the others' values to the reason; only their defaults are accepted."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _was(cls, values: Any, info: ValidationInfo) -> Any:
        """Fill in what a stored recipe does not say with what was done before there was such a setting."""
        if not (info.context or {}).get("stored") or not isinstance(values, dict):
            return values
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        neutral = {
            name: extra["neutral"] for name, extra in extras.items() if isinstance(extra, dict) and "neutral" in extra
        }
        return neutral | values

    @model_validator(mode="after")
    def _matters(self, info: ValidationInfo) -> Any:
        if not (info.context or {}).get("stored"):  # a recipe that a run has stored is taken as it is
            for name, reason in self.without_effect().items():
                if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"{name} has no effect: {reason}")
        return self

    def used(self) -> dict[str, Any]:
        """Return the settings that results depend on, for a step's key.

        A setting that was added later is left out while it has the value that changes nothing:
        ``Field(…, json_schema_extra={"neutral": value})``.
        """
        found = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and "neutral" in extra and found[name] == extra["neutral"]:
                del found[name]
        return found


def hold_a_window(tokens: int, window: int) -> None:
    """Refuse fewer tokens than one window."""
    if tokens < window:
        raise ValueError(f"{tokens} tokens are fewer than one window of {window}; raise tokens or lower window")


class DomainsSection(Section):
    """Calibration text."""

    names: list[str] | None = Field(None, description="domains to use, in this order; all of the source if null")
    tokens: int = Field(262_144, ge=1, description="calibration tokens per domain")
    window: int = Field(256, ge=8, description="tokens per calibration window")
    reading: Literal["random", "once"] = Field(
        "random",
        description="random: windows as DIVE draws them; once: whole records, none twice, at most what a domain has",
        json_schema_extra={"neutral": "random"},
    )

    @model_validator(mode="after")
    def _fits(self) -> DomainsSection:
        hold_a_window(self.tokens, self.window)
        return self


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
            hold_a_window(self.tokens, self.window)
        return self


class TrainSection(LoopSection):
    """A training stage of routers, experts and norms."""

    loss: Literal["next-token", "distill"] = "next-token"
    mix: float = Field(1.0, ge=0, le=1, description="distill: share of the KL term")
    kl_temperature: float = Field(1.0, gt=0)
    hidden: float = Field(
        0.0,
        ge=0,
        description="distill: weight of the hidden states' relative error, its mean over layers",
        json_schema_extra={"neutral": 0.0},
    )
    gate: Literal["dense", "sparse"] = "sparse"
    gate_temperature: float = Field(1.0, gt=0, description="dense gate's softmax temperature")
    router_gradient: Gradient = "none"
    train_router: bool = True
    lora_rank: int = Field(0, ge=0, description="experts by low-rank changes; 0 for none")
    lora_alpha: float = 16.0
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    whole: bool = Field(
        False, description="experts' matrices themselves are trained", json_schema_extra={"neutral": False}
    )
    norms: bool = False

    @model_validator(mode="after")
    def _fits(self) -> TrainSection:
        if self.whole and self.lora_rank:
            raise ValueError("experts are trained whole or by low-rank changes; set lora_rank: 0 or whole: false")
        if self.gate == "dense" and (self.lora_rank or self.whole or self.norms):
            raise ValueError("the dense gate trains routers only; use gate: sparse for experts and norms")
        return self


class RouterTrainSection(TrainSection):
    """Stage 1: like any training stage, but with the dense gate by default."""

    gate: Literal["dense", "sparse"] = "dense"


class EvaluateSection(Section):
    """Held-out perplexity after every stage."""

    tokens: int = Field(16_384, ge=1, description="evaluation tokens per domain")
    window: int = Field(512, ge=8)

    @model_validator(mode="after")
    def _fits(self) -> EvaluateSection:
        hold_a_window(self.tokens, self.window)
        return self
