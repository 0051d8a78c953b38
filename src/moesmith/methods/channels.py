"""Experts that are channels of the parent, chosen by domain: what DIVE, static masks and LLaMA-MoE share.

A group of domains is an expert's text. Its channels, FLAP's bias or a refitted ``down_proj``, and the router's start
are computed in one pass over it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesmith.calibration.moments import Moments, merge, pool
from moesmith.calibration.view import LayerView, Stats
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.methods.base import Carver, Needs, RouterSection
from moesmith.methods.refit import compensation_bias, refit_down
from moesmith.methods.router import CONSTANT_TOKENS, constant_direction, lda_router, random_router
from moesmith.methods.scores import kept_channels
from moesmith.methods.steps import (
    Carve,
    ChannelMoments,
    Domains,
    check_gram,
    moments_of,
    windows_of,
)
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.accelerator import closed_form_device
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.shapes import Shapes
from moesmith.run.step import Job, Step
from moesmith.world import crew

Part = tuple[Tensor, Tensor]  # mean and variance of every channel of one layer, (F,) each


class Together(Step):
    """Step *affinity* without clusters of domains: every expert sees all domains."""

    name = "affinity"

    def __init__(self, method: Channels) -> None:
        super().__init__(method.recipe, "moments")
        self.method = method

    def settings(self, job: Job) -> dict[str, Any]:
        """Return the domains, and how many experts see them."""
        return {"needed": False, "experts": self.method.experts, "names": job.names}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """``clusters.json``."""
        clusters = [job.names] * self.method.experts
        write_json(work / "clusters.json", {"clusters": clusters})
        return {"clusters": clusters}


def clusters_of(run: Run) -> list[list[str]]:
    """Read the domains by expert."""
    return read_json(run.path("affinity") / "clusters.json")["clusters"]


class Channels(Carver):
    """A method whose experts keep channels of the parent.

    Attributes:
        ratio: share of channels that a parent's experts lose; ``settings.ratio`` unless another method decides it.
    """

    ratio: Callable[[Parent], float]

    def __init__(self, recipe: Any, settings: Any = None) -> None:
        super().__init__(recipe, settings)
        self.ratio = lambda parent: float(self.settings.ratio)

    def choose(self, view: LayerView, groups: Sequence[Part]) -> list[Tensor]:
        """Choose the kept channels of every expert in one layer, sorted.

        Args:
            view: the layer.
            groups: channel moments of each expert's text; empty if :meth:`moments_tokens` says that none are needed.
        """
        raise NotImplementedError

    @property
    def start(self) -> RouterSection | None:
        """How the router starts; ``None`` for a single expert, which has none."""
        return self.recipe.router if self.experts > 1 else None

    @property
    def refit(self) -> bool:
        """Whether every expert gets a ``down_proj`` of its own."""
        return bool(self.settings.compensation == "refit")

    @property
    def lda(self) -> bool:
        """Whether the router starts from a discriminant analysis."""
        return self.start is not None and self.start.start == "lda"

    def moments_tokens(self) -> int | None:
        """Return how many tokens of each domain channel moments are taken over beforehand; ``None`` for all.

        A refit passes over all text anyway and takes them again: before that only the grouping of domains needs them.
        """
        return 0 if self.refit else None

    @property
    def gradients(self) -> int:
        """How many tokens of each domain gradients are taken on beforehand."""
        return 0

    def grouping(self) -> Step:
        """Return the step that decides which domains an expert is made for."""
        return Together(self)

    def steps(self) -> list[Step]:
        """List the steps: text, statistics, groups and carving."""
        moments = ChannelMoments(self.recipe, self.moments_tokens(), self.gradients)
        return [Domains(self.recipe), moments, self.grouping(), Carve(self.recipe, self, "affinity")]

    def needs(self) -> Needs:
        """Declare what compensation and router ask for."""
        return Needs(inputs=self._needed, gram=self.refit)

    @property
    def _needed(self) -> bool:
        return self.refit or self.lda or self.settings.compensation == "bias"

    def tokens(self, shapes: Shapes) -> int:
        """Count all text for a refit or a discriminant analysis; the constant direction alone needs tokens by D."""
        whole = super().tokens(shapes)
        if self.refit or self.lda:
            return whole
        return min(whole, CONSTANT_TOKENS * shapes.sizes.D) if self._needed else 0

    def key(self, parent: Parent) -> dict[str, Any]:
        """Add the ratio that was decided, and what the router's start reads from other sections."""
        found = super().key(parent)
        found["settings"] |= {"ratio": self.ratio(parent)}
        if self.start is not None:
            found["router"] = self.start.used()
        return found | ({"scale": self.recipe.stage1.gate_temperature} if self.lda else {})

    def width(self, parent: Parent) -> int:
        """Return the channels that the ratio leaves."""
        return kept_channels(parent.F, self.ratio(parent))

    def texts(self, windows: dict[str, Tensor]) -> list[list[Tensor]]:
        """Return every expert's text."""
        return [[windows[name] for name in names] for names in self.clusters]

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Return every expert's text, or a part of it if that is enough; load the moments that are known."""
        self.clusters = clusters_of(job.run)
        texts = self.texts(windows_of(job.run))
        if self.refit and len({tuple(map(id, text)) for text in texts}) == 1:
            texts = texts[:1]  # all experts' text is the same: its statistics are taken and kept once
        self.weights = [float(sum(map(len, text))) for text in texts]
        self.known = self._known(job, texts)
        if not self._needed:
            return []
        check_gram(job.parent, len(texts), gram=self.refit)
        if self.refit or self.lda:
            return texts
        return [[thin(torch.cat(text), CONSTANT_TOKENS * job.parent.D // len(texts))] for text in texts]

    def _known(self, job: Job, texts: Sequence[Sequence[Tensor]]) -> list[Moments]:
        """Load all layers' channel moments by group; empty if the pass takes them, or if they are not needed."""
        if self.moments_tokens() is not None:
            return []
        return [pool([moments_of(job.run, name) for name in names]) for names in self.clusters]

    def carve(self, view: LayerView) -> Layer:
        """Choose channels, compensate for the others, start the router."""
        parent, index = view.parent, view.index
        stats = view.statistics(gram=self.refit, parts=self.refit and not self.known) if self._needed else []
        if self.known:
            groups = [(group.mean_LF[index], group.var_LF[index]) for group in self.known]
        else:
            groups = [_pooled(one) for one in stats] * (self.experts if len(stats) == 1 else 1)
        routed = [Expert(kept) for kept in self.choose(view, groups)]
        layer = Layer(routed, Linear(torch.zeros(len(routed), parent.D)), self.top_k)
        if self.settings.compensation == "bias":
            down_DF = view.ffn.down_DF.to(parent.device)
            for expert, (mean_F, _) in zip(routed, groups, strict=True):
                expert.bias_D = compensation_bias(down_DF, mean_F, expert.channels)
        if stats:
            layer.constant_D, error = constant_direction(merge([one.inputs for one in stats], self.weights))
            self.note(constant_direction_error=error)
        if self.refit:
            refit_experts(parent, index, routed, stats, self.weights, self.settings)
        self._route(view, layer, stats)
        return layer

    def _route(self, view: LayerView, layer: Layer, stats: Sequence[Stats]) -> None:
        start = self.start
        if start is None:
            return
        router = Linear(torch.zeros(0))
        if start.start == "lda":
            inputs = [one.inputs for one in stats]
            router.weight_ED = lda_router(inputs, start.ridge, self.recipe.stage1.gate_temperature)
        else:
            router.weight_ED = random_router(self.experts, view.parent.D, view.generator)
        layer.noise = start.noise
        if start.noise:
            router.noise_ED = random_router(self.experts, view.parent.D, view.generator)
        layer.router = router

    def provenance(self) -> dict[str, Any]:
        """Return the domains of each expert."""
        return {"clusters": self.clusters}

    def metrics(self) -> dict[str, Any]:
        """Measure how constant the constant direction is."""
        name = "constant_direction_error"
        values = self.measured.get(name, [])
        return {f"{name}_mean": statistics.mean(values), f"{name}_max": max(values)} if values else {}


def _pooled(stats: Stats) -> Part:
    """Pool moments like :func:`pool`, for one layer."""
    moments = [Moments(0, mean_F[None], variance_F[None]) for mean_F, variance_F in stats.parts]
    if not moments:
        return torch.zeros(0), torch.zeros(0)
    pooled = pool(moments)
    return pooled.mean_LF[0], pooled.var_LF[0]


def thin(windows: Tensor, tokens: int) -> Tensor:
    """Pick evenly spaced windows that hold about ``tokens`` tokens."""
    wanted = max(1, tokens // windows.shape[1])
    return windows[:: max(1, len(windows) // wanted)]


def refit_experts(
    parent: Parent, index: int, experts: Sequence[Expert], stats: Sequence[Stats], weights: Sequence[float], spec: Any
) -> None:
    """Give every expert a ``down_proj`` (D, F_e) refitted on its Gram matrix, with a share of the pool's mixed in.

    It is in the parent's stored dtype on the CPU, wherever it was computed: carvings are the same everywhere. Several
    processes share the experts: each refits those whose Gram matrices it has.

    Args:
        parent: the dense model.
        index: the layer's index.
        experts: their ``down_DF`` is set.
        stats: of each expert's tokens, with Gram matrices; a single one if all experts have the same.
        weights: of each Gram matrix in the pool's.
        spec: ``ridge`` and ``pool`` (``base.Kept``).
    """
    down_DF = parent.ffns[index].down_DF
    place = closed_form_device(parent.device)
    mine = {number: one.channels.gram_NN.to(place) for number, one in enumerate(stats) if one.channels is not None}
    pooled_FF = torch.zeros(parent.F, parent.F, device=place)
    for number, gram_FF in mine.items():
        pooled_FF += weights[number] / sum(weights) * gram_FF
    crew().add(pooled_FF)
    made = {}
    if len(stats) == 1:
        mine = dict.fromkeys(crew().mine(range(len(experts))), pooled_FF)
    for number, gram_FF in mine.items():
        mixed_FF = gram_FF.lerp_(pooled_FF, spec.pool)  # in place: a layer's matrices take the most memory
        refitted_DF = refit_down(down_DF, mixed_FF, experts[number].channels, spec.ridge)
        made[number] = refitted_DF.to("cpu", parent.stored)
    for number, refitted_DF in crew().merged(made).items():
        experts[number].down_DF = refitted_DF
