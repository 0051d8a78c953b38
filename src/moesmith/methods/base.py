"""What a method is: one file declares its name, paper, settings and needs, and makes layers; the rest follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.calibration.stream import NOT_ADDED
from moesmith.calibration.view import Activations, LayerView
from moesmith.errors import MoesmithError
from moesmith.methods.refit import refit_work
from moesmith.methods.scores import kept_channels
from moesmith.methods.steps import Carve, Domains, windows_of
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.settings import RouterTrainSection, Section
from moesmith.run.step import Job, Step

if TYPE_CHECKING:
    from moesmith.run.recipe import Recipe
    from moesmith.run.shapes import Shapes

Compensation = Literal["none", "bias", "refit"]


class Routed(Section):
    """Settings of a method with several experts."""

    experts: int = Field(8, ge=1, le=1024)
    top_k: int = Field(1, ge=1, description="experts active per token")

    @model_validator(mode="after")
    def _chosen(self) -> Routed:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is above experts {self.experts}")
        return self


class Kept(Section):
    """Settings of a method whose experts keep a share of the parent's channels."""

    ratio: float = Field(0.5, description="share of FFN channels pruned from each expert, in [0, 1)")
    compensation: Compensation = "bias"
    ridge: float = Field(0.01, gt=0, description="refit: pull towards the parent's columns")
    pool: float = Field(0.2, ge=0, le=1, description="refit: share of the pool in the mixed Gram matrix")

    @model_validator(mode="after")
    def _leaves(self) -> Kept:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio {self.ratio} leaves no channel; give a value in [0, 1)")
        return self

    def without_effect(self) -> dict[str, str]:
        """Settings of a refit, if there is none."""
        return refit_alone(self.compensation)


def refit_alone(compensation: str) -> dict[str, str]:
    """Say why settings of a refit do nothing; empty if there is a refit."""
    return {} if compensation == "refit" else dict.fromkeys(("ridge", "pool"), "carve.compensation is not refit")


class RouterSection(Section):
    """How routers start."""

    start: Literal["random", "lda"] = "random"
    ridge: float = Field(0.01, gt=0, description="lda: shrinkage of the pooled covariance")
    noise: float = Field(5e-4, ge=0, description="factor of DIVE's training noise")

    def without_effect(self) -> dict[str, str]:
        """Settings of the discriminant analysis, if there is none."""
        return {} if self.start == "lda" else {"ridge": "router.start is not lda"}


ROUTING: Mapping[str, type[Section]] = {"router": RouterSection, "stage1": RouterTrainSection}


class Method:
    """A way to make a mixture from a dense model.

    Attributes:
        name: the name by which a recipe asks for it (``carve.method``).
        title: one line for tables and cards.
        paper: where it comes from.
        Settings: the type of its settings, the recipe's section ``carve``, without any that it ignores.
        sections: further sections of a recipe that it reads, by name.
        recipe: the recipe that asks for it.
        settings: its own, of type ``Settings``.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    Settings: ClassVar[type[Section]]
    sections: ClassVar[Mapping[str, type[Section]]] = {}

    def __init__(self, recipe: Recipe, settings: Section | None = None) -> None:
        self.recipe = recipe
        self.settings: Any = recipe.carve if settings is None else settings

    @classmethod
    def sections_of(cls, carve: Mapping[str, Any]) -> Mapping[str, type[Section]]:
        """Return the further sections that go with these settings."""
        return cls.sections

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return int(getattr(self.settings, "experts", 1))

    @property
    def top_k(self) -> int:
        """How many of them a token visits."""
        return int(getattr(self.settings, "top_k", 1))

    def at_least(self, active: float) -> float:
        """Return the smallest share of channels, not below ``active``, that a token can use with these settings."""
        return active

    def check_domains(self, names: Sequence[str], source: str) -> None:
        """Refuse text that it cannot use.

        Raises:
            MoesmithError: there are too few domains, or unknown ones.
        """

    @classmethod
    def ratio_of(cls, active: float, top_k: int) -> float:
        """Return the ``carve.ratio`` with which a token uses a share ``active`` of the channels (``--active``)."""
        return 1 - active / top_k

    @property
    def active(self) -> float:
        """Share of the channels that a token uses, where ``carve.ratio`` decides it."""
        return (1 - float(self.settings.ratio)) * self.top_k

    @property
    def prunes_attention(self) -> bool:
        """Whether attention is narrowed as well, which no stock architecture supports."""
        return False

    def check(self, parent: Parent) -> None:
        """Refuse a parent that it cannot use.

        Raises:
            MoesmithError: a budget that cannot be met.
        """

    def steps(self) -> list[Step]:
        """List the steps to do, in order; a step that ends in a carving has a title."""
        raise NotImplementedError

    def width(self, parent: Parent) -> int:
        """Return the channels of a routed expert, as far as they are known beforehand."""
        raise NotImplementedError

    def outline(self, parent: Parent) -> Carving:
        """Make a carving with the shapes to expect, to count before there are weights.

        Experts have as few channels in common as their widths allow.
        """
        kept, F = self.width(parent), parent.F
        compensation = getattr(self.settings, "compensation", "none")
        refit, bias = (torch.zeros(0) if compensation == kind else None for kind in ("refit", "bias"))
        channels = [(torch.arange(kept) + e * kept).remainder(F).sort().values for e in range(self.experts)]
        routed = [Expert(kept_F, refit, bias_D=bias) for kept_F in channels]
        return Carving([Layer(routed, Linear(torch.zeros(self.experts, 0)), self.top_k)] * parent.L, F)

    def about(self, run: Run) -> list[str]:
        """Say what it did in a run, as lines of a model card."""
        return [self.title]


@dataclass(frozen=True)
class Needs:
    """What a method computes from calibration text in every layer.

    Attributes:
        inputs: second moments of the router's input, by expert.
        gram: the Gram matrix of the ``down_proj`` input as well.
        groups: how many of these matrices exist at once, two to work with apart; ``None`` for one per expert.
        passes: how often all tokens go through the layer, including the pass to the next layer if it is a separate one.
        held: whether it asks for all tokens of a layer at once (:meth:`LayerView.tokens`); with carved activations it
            must then change nothing of a layer but its network.
        repair: whether these tokens' outputs make up for what earlier carved layers lost.
    """

    inputs: bool = True
    gram: bool = False
    groups: int | None = None
    passes: float = 1.0
    held: bool = False
    repair: bool = False


class Carver(Method):
    """A method that carves one layer after the other from calibration text; most define only :meth:`carve`.

    Attributes:
        version: of its mathematics: a new version makes the carving of an older run again.
        activations: what a layer sees: the parent's activations (``dense``), or those after the layers already carved
            (``carved``).
        measured: numbers of every layer carved so far, by name; :meth:`carve` appends to them.
    """

    version: ClassVar[int] = 1
    activations: ClassVar[Activations] = "dense"

    def __init__(self, recipe: Recipe, settings: Section | None = None) -> None:
        super().__init__(recipe, settings)
        self.measured: dict[str, list[float]] = {}

    def check(self, parent: Parent) -> None:
        """Refuse a parent whose networks' outputs are not added as they are, where experts make up for sums."""
        if self.needs().repair and not parent.additive:
            raise MoesmithError(NOT_ADDED, "Set carve.repair to false, or choose another method.")

    def note(self, **numbers: float) -> None:
        """Keep numbers of the layer that is being carved."""
        for name, value in numbers.items():
            self.measured.setdefault(name, []).append(value)

    def carve(self, view: LayerView) -> Layer:
        """Make one layer's experts and router."""
        raise NotImplementedError

    def needs(self) -> Needs:
        """Declare what :meth:`carve` will ask for, for the plan."""
        return Needs(passes=1.0 if self.activations == "dense" else 2.0)

    def base(self, job: Job) -> Carving:
        """Return what layers are put into, such as attention that is carved already; by default nothing."""
        return Carving([], job.parent.F)

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Return the text that layers see, by group: (N, window) token ids. By default every domain is a group."""
        windows = windows_of(job.run)
        return [[windows[name]] for name in job.names]

    def tokens(self, shapes: Shapes) -> int:
        """Return how many tokens :meth:`begin` gives."""
        return shapes.domains * int(self.recipe.domains.tokens)

    def closed_forms(self, shapes: Shapes) -> tuple[float, float]:
        """Count, of a layer, the tokens in Gram matrices of channels, and the operations of least squares, fp32.

        By default every token once, and a refit of every expert where there are such.
        """
        D, F, grams = shapes.sizes.D, shapes.sizes.F, self.tokens(shapes) if self.needs().gram else 0
        return grams, shapes.E * refit_work(D, F, shapes.kept) if shapes.refit else 0.0

    def key(self, parent: Parent) -> dict[str, Any]:
        """Return what the carving depends on; JSON-able."""
        return {"method": self.name, "version": self.version, "settings": self.settings.used()}

    def steps(self) -> list[Step]:
        """List two steps: calibration text and carving."""
        return [Domains(self.recipe), Carve(self.recipe, self, "domains")]

    def width(self, parent: Parent) -> int:
        """Return the channels that ``ratio`` leaves; override this for other settings."""
        return kept_channels(parent.F, self.settings.ratio)

    def provenance(self) -> dict[str, Any]:
        """Return what the carving records of how it was made, such as ``clusters``: domains by expert."""
        return {}

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say in a few words what :meth:`metrics` tell, for tables; empty for nothing."""
        return ""

    def metrics(self) -> dict[str, Any]:
        """Return numbers for the step's manifest, after :meth:`carve` has seen all layers; by default what it noted."""
        return dict(self.measured)
