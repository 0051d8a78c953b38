"""ToMoE (arXiv:2501.15316) as a method: masks learned over frozen weights, from scratch or from a carving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator

from moesmith.calibration.stream import NOT_ADDED
from moesmith.console import say
from moesmith.errors import MoesmithError, first_fault
from moesmith.files.write import write_tensors
from moesmith.methods.base import ROUTING, Method, refit_alone
from moesmith.methods.channels import Channels
from moesmith.methods.registry import find, register
from moesmith.methods.scores import kept_channels
from moesmith.methods.tomoe.harvest import check_budget, harvest
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.objective import MaskObjective
from moesmith.methods.tomoe.refit import Refit, Refitted
from moesmith.methods.tomoe.settings import MasksSection
from moesmith.methods.tomoe.student import masked_model
from moesmith.methods.tomoe.warm import expert_ratio, start_from
from moesmith.mixture.count import parameters
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.run.folder import Run
from moesmith.run.recipe import DEFAULT
from moesmith.run.settings import Section
from moesmith.run.shapes import LOSS, Pace, Shapes
from moesmith.run.step import Cost, Job, Step, trained
from moesmith.training.loop import train
from moesmith.training.sharding import student_and_teacher
from moesmith.training.tracking import Report
from moesmith.world import crew

CALIBRATION = 8192  # training tokens on which the widths of V/O are measured
DECIDED = ("experts", "top_k", "ratio", "compensation", "ridge", "pool")  # of a start: ToMoE's own settings decide them


@register
class Tomoe(Method):
    """Learned masks. A start is another method's carving, at the width that the budget leaves its experts."""

    name, title = "tomoe", "masks over the parent's channels, learned by a hypernetwork over frozen weights (ToMoE)"
    paper = "arXiv:2501.15316"
    sections: ClassVar[Mapping[str, type[Section]]] = {"masks": MasksSection, "stage1": ROUTING["stage1"]}

    class Settings(Section):
        """Experts, what they start from, and how dropped channels are compensated at the end."""

        method: Literal["tomoe"] = "tomoe"
        experts: int = Field(8, ge=1, le=1024)
        start: dict[str, Any] | None = Field(None, description="method and settings of a carving to start from")
        compensation: Literal["none", "refit"] = "none"
        ridge: float = Field(0.01, gt=0, description="refit: pull towards the parent's columns")
        pool: float = Field(0.2, ge=0, le=1, description="refit: least share of all tokens in its moments")

        def without_effect(self) -> dict[str, str]:
            """Settings of a refit, if there is none."""
            return refit_alone(self.compensation)

        @field_validator("start")
        @classmethod
        def _starts(cls, start: dict[str, Any] | None) -> dict[str, Any] | None:
            if start is None:
                return None
            return {k: v for k, v in start_of(start).model_dump(mode="json").items() if k not in DECIDED}

    @classmethod
    def sections_of(cls, carve: Mapping[str, Any]) -> Mapping[str, type[Section]]:
        """Return its own sections and those of what it starts from."""
        start = carve.get("start")
        begun = find(start.get("method", DEFAULT)).sections if isinstance(start, Mapping) else {}
        return {**cls.sections, **begun}

    @property
    def spec(self) -> MasksSection:
        """How masks are learned."""
        return self.recipe.masks

    @cached_property
    def start(self) -> Channels | None:
        """The method whose carving masks start from."""
        if self.settings.start is None:
            return None
        found = start_of(self.settings.start)
        if hasattr(found, "experts"):
            found = found.model_copy(update={"experts": self.settings.experts})
        method = find(found.method)(self.recipe, found)
        assert isinstance(method, Channels)
        method.ratio = lambda parent: expert_ratio(Sizes.of(parent), self.spec.budget)
        return method

    @cached_property
    def refit(self) -> Refitted | None:
        """What refits the learned experts."""
        return Refitted(self.recipe, self.settings) if self.settings.compensation == "refit" else None

    @property
    def prunes_attention(self) -> bool:
        """Whether attention is pruned: yes unless ``masks.attention`` says no."""
        return self.spec.attention != "none"

    def check(self, parent: Parent) -> None:
        """Refuse a budget that leaves nothing, and a run without training text."""
        if not self.spec.tokens:
            raise MoesmithError("masks.tokens is 0, but masks are learned from text", "Set masks.tokens.")
        if self.prunes_attention and parent.why:
            raise MoesmithError(f"attention is pruned where it is proved, and {parent.why[0].lower()}{parent.why[1:]}",
                                "Set masks.attention to none.")  # fmt: skip
        if self.refit is not None and not parent.additive:
            raise MoesmithError(NOT_ADDED, "Set carve.compensation to none.")
        sizes = Sizes.of(parent)
        check_budget(sizes, self.spec.budget, self.spec.attention)
        if self.start is not None:
            expert_ratio(sizes, self.spec.budget)
            self.start.check(parent)
            if self.start.experts != self.experts:
                raise MoesmithError(
                    f"carve.experts is {self.experts}, but a start of method {self.start.name} has one expert",
                    "Set carve.experts to 1, or carve.start.method to one with several experts, such as dive.",
                )

    def check_domains(self, names: Sequence[str], source: str) -> None:
        """Check the domains as the start does."""
        if self.start is not None:
            self.start.check_domains(names, source)

    def steps(self) -> list[Step]:
        """List the steps: the start, the masks, the refit."""
        start = [] if self.start is None else self.start.steps()
        found: list[Step] = [*start, LearnMasks(self, *(step.name for step in start[-1:]))]
        return found + ([Refit(self.recipe, self.refit, "masks", "corpus")] if self.refit is not None else [])

    def width(self, parent: Parent) -> int:
        """Return what the budget leaves; from scratch, as if attention and networks were pruned equally."""
        if self.start is not None:
            return self.start.width(parent)
        return kept_channels(parent.F, 1 - self.spec.budget)

    def about(self, run: Run) -> list[str]:
        """Say what it learned, in the run's numbers."""
        spec, found, carving = self.spec, run.metrics("masks"), run.carving("masks")
        start = "all channels"
        if self.start is not None:
            score = getattr(self.start.settings, "score", "none")
            start = f"a carving ({self.start.name}, score {score})"
        lines = [
            f"{self.experts} experts, one active per token: masks over the parent's FFN channels, learned by a"
            f" hypernetwork over frozen weights (ToMoE, {self.paper}), started from {start}",
            f"budget: {spec.budget:.1%} of the block parameters active per token; {found['active_share']:.1%} are, each"
            f" layer's widest expert counted; {found['union']:.1%} of the channels are kept by some expert",
            f"the widest expert has {found['width_ffn']:,.1f} of {carving.d_ff:,} channels, mean over layers;"
            f" compensation: {self.settings.compensation}",
        ]
        if not carving.attention:
            return [*lines, "attention: the parent's, whole"]
        h = len(carving.attention[0].qk_h)
        qk = "the same for all tokens" if spec.attention == "hybrid" else "chosen by token"
        return [
            *lines,
            f"attention: {found['width_qk']:.1f} of {h} dimensions of a Q/K head, {qk}, and at most"
            f" {found['width_vo']:.1f} of a V/O head, chosen by token (means over layers)",
        ]


def start_of(start: Mapping[str, Any]) -> Any:
    """Return the settings of a start; what ToMoE's own settings decide may not be among them.

    Raises:
        ValueError: a setting that it does not have, or that is already decided.
    """
    method = find(str(start.get("method", DEFAULT)))
    if not issubclass(method, Channels):
        raise ValueError(f"masks cannot start from {method.name}")
    if decided := [name for name in DECIDED if name in start]:
        raise ValueError(f"start.{decided[0]} follows from the settings of tomoe; leave it out")
    try:
        return method.Settings.model_validate({"compensation": "none"} | dict(start))
    except ValidationError as error:
        raise ValueError(f"start.{': '.join(first_fault(error))}") from error


class LearnMasks(Step):
    """Step *masks*: train the hypernetwork over the frozen parent, and make a carving."""

    name, title, trains, parallel = "masks", "masks learned", "masks", True

    def __init__(self, method: Tomoe, *before: str) -> None:
        super().__init__(method.recipe, *before, "corpus")
        self.method, self.before = method, before

    def settings(self, job: Job) -> dict[str, Any]:
        """How masks are learned."""
        return self.method.spec.used() | {"experts": self.method.experts}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write a carving, ``masks.safetensors`` (all that was trained) and ``log.jsonl``."""
        parent, spec, seed = job.parent, self.method.spec, self.recipe.seed
        masks = Masks(Sizes.of(parent), self.method.experts, spec, seed).to(parent.device)
        for name in self.before:
            start_from(masks, job.run.carving(name))
        model = masked_model(parent, masks)
        learned = {f"masks.{name}": p for name, p in masks.named_parameters()}
        say(f"  {sum(p.numel() for p in learned.values()):,} trainable parameters, none of them the parent's")
        blocks = job.run.training("masks")
        objective = MaskObjective(*student_and_teacher(parent, model, masks), masks, spec)
        report = Report.of(self, job)
        outcome = train(objective, learned, blocks, spec, work, seed=seed, label="masks", report=report)
        if not crew().first:
            return {}
        few = blocks[: max(1, CALIBRATION // spec.window)].long()
        carving, facts = harvest(masks, parent, few, {"method": "tomoe", "parent": job.run.inputs})
        write_tensors(work / "masks.safetensors", masks.state_dict())
        carving.save(work)
        return outcome.metrics() | facts | parameters(parent, carving)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say what was trained, and what is active."""
        return f"{trained(metrics)}, {metrics['active_share']:.1%} active, union {metrics['union']:.3f}"

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the whole parent, the same again for sampling and the masks' gradient, and the teacher."""
        spec, sizes = self.method.spec, shapes.sizes
        seconds = spec.tokens * (3.0 / pace.blocks + 3 * LOSS / pace.head) if pace else 0.0
        trained = sizes.trained(shapes.E)
        memory = 20 * trained + 2 * spec.micro_batch * spec.window * sizes.L * (10 * sizes.D + 6 * sizes.F)
        disk = 4 * trained + 4 * sizes.L * shapes.E * (shapes.kept + sizes.D)
        return Cost("training", spec.tokens, seconds, memory, None, disk, 24 * trained, shapes.parted(memory))
