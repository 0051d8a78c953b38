"""DIVE (arXiv:2506.09351): an expert keeps the channels that matter on its own cluster of domains.

The parent is pruned on every domain, each pruned model's perplexity is measured on every domain, and domains whose
pruned models behave alike share an expert. We add clusters from channel scores, and groups drawn at random as the
control.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.calibration.moments import Moments, pool
from moesmith.calibration.view import LayerView
from moesmith.console import meter, say
from moesmith.data.sampling import evaluation_blocks
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import perplexities
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json, write_text
from moesmith.methods import affinity as mining
from moesmith.methods.affinity import Linkage, Profile
from moesmith.methods.base import ROUTING, Kept, Method, Routed
from moesmith.methods.channels import Channels, Part, Together
from moesmith.methods.refit import compensation_bias
from moesmith.methods.registry import register
from moesmith.methods.scores import AnyScore, Selection, channel_scores, choose, drawn_scores, layer_score, top
from moesmith.methods.steps import moments_of, text_moments
from moesmith.methods.taylor import GRADIENTS, refuse_gradients
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.mixture.moe import decoder
from moesmith.parent.load import Parent
from moesmith.run.folder import Run
from moesmith.run.settings import Section, hold_a_window
from moesmith.run.shapes import LOSS, Pace, Shapes
from moesmith.run.step import Cost, Job, Step
from moesmith.world import alone, crew


class AffinitySection(Section):
    """Which domains share an expert."""

    method: Literal["perplexity", "moments", "scores", "published", "random"] = "perplexity"
    published: str | None = Field(None, description="name of published clusters, for method published")
    profile: Profile = "rows"
    linkage: Linkage = "average"
    tokens: int = Field(32_768, ge=1, description="tokens per domain that domains are grouped by")
    window: int = Field(256, ge=8)

    @model_validator(mode="after")
    def _fits(self) -> AffinitySection:
        if self.method == "perplexity":
            hold_a_window(self.tokens, self.window)
        if (self.method == "published") != (self.published is not None):
            raise ValueError("set affinity.published with affinity.method published, and only then")
        return self


class Scored(Section):
    """Settings of a method that scores channels."""

    score: AnyScore = "wifv"
    selection: Selection = "uniform"


class ByScore(Channels):
    """Every expert keeps the channels that score highest on its own text."""

    def check(self, parent: Parent) -> None:
        """Refuse a parent through which no gradient can go, if the score takes one."""
        if self.gradients:
            refuse_gradients(parent)

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Begin, and choose the channels beforehand if their scores are known: then layers may share one quota."""
        texts = super().begin(job)
        ratio, selection = self.ratio(job.parent), self.settings.selection
        scores = self.scores(job.parent, self.known, self.experts)
        self.chosen = [choose(scores_LF, ratio, selection) for scores_LF in scores]
        return texts

    def scores(self, parent: Parent, groups: Sequence[Moments], count: int) -> list[Tensor]:
        """Score all channels for each group of text, (L, F) each; or draw ``count`` times, which needs no text."""
        if self.settings.score == "random":
            return drawn_scores(parent.L, parent.F, count, self.recipe.seed)
        return [channel_scores(parent, group, self.settings.score) for group in groups]

    @property
    def gradients(self) -> int:
        """How many tokens of each domain gradients are taken on."""
        return GRADIENTS if self.settings.score == "taylor" else 0

    def moments_tokens(self) -> int | None:
        """Take all if layers share one quota: it is known only when all layers have been seen.

        Gradients and draws are known beforehand, and need means for a bias alone.
        """
        spec = self.settings
        if spec.score in ("random", "taylor") and spec.compensation != "bias":
            return self.gradients
        return None if spec.selection == "adaptive" else super().moments_tokens()

    def _known(self, job: Job, texts: Sequence[Sequence[Tensor]]) -> list[Moments]:
        if self.gradients:
            return [pool([moments_of(job.run, name) for name in names]) for names in self.clusters]
        return super()._known(job, texts)

    def choose(self, view: LayerView, groups: Sequence[Part]) -> list[Tensor]:
        """Choose the best-scoring channels of each group."""
        if self.chosen:
            return [layers[view.index] for layers in self.chosen]
        scores = [layer_score(view.ffn, *group, self.settings.score) for group in groups]
        return [top(score_F, self.ratio(view.parent)) for score_F in scores]


@register
class Dive(ByScore):
    """DIVE, and its control with groups drawn at random."""

    name, title = "dive", "experts from clusters of domains (DIVE)"
    paper = "arXiv:2506.09351"
    sections: ClassVar[Mapping[str, type[Section]]] = {"affinity": AffinitySection, **ROUTING}

    class Settings(Routed, Scored, Kept):
        """Experts and what they keep."""

        method: Literal["dive"] = "dive"

    @property
    def affinity(self) -> AffinitySection:
        """How domains are grouped."""
        return self.recipe.affinity

    def moments_tokens(self) -> int | None:
        """Take all if models are pruned on them, else what the groups are made from."""
        found = super().moments_tokens()
        if found is None or self.affinity.method == "perplexity":
            return None
        return 0 if self.affinity.method == "random" else min(self.affinity.tokens, self.recipe.domains.tokens)

    def check_domains(self, names: Sequence[str], source: str) -> None:
        """Refuse fewer domains than experts, which differ by their domains."""
        experts = self.experts
        if self.affinity.method == "random" or experts == 1:
            return
        if len(names) < 2:
            raise MoesmithError(f"{source} holds one domain, but experts differ by their domains", "Add domains.")
        if len(names) < experts:
            raise MoesmithError(
                f"{experts} experts need at least as many domains, but {source} holds {len(names)}",
                f"Add domains or set carve.experts to {len(names)} or less.",
            )
        if self.affinity.published is not None:
            mining.published(self.affinity.published, names, experts)

    def grouping(self) -> Step:
        """Return the clustering step; groups drawn at random do not tell domains apart."""
        return Together(self) if self.affinity.method == "random" else Affinity(self)

    def key(self, parent: Parent) -> dict[str, Any]:
        """Add whether groups are drawn at random, which is not a stage of its own."""
        return super().key(parent) | {"random_groups": self.affinity.method == "random"}

    def texts(self, windows: dict[str, Tensor]) -> list[list[Tensor]]:
        """Return each cluster's text; the control draws windows from the pool for each expert."""
        if self.affinity.method != "random":
            return super().texts(windows)
        return [[ids] for ids in pool_draws(windows, self.experts, self.recipe.seed)]

    def _known(self, job: Job, texts: Sequence[Sequence[Tensor]]) -> list[Moments]:
        whole = self.moments_tokens() is None
        if self.affinity.method == "random" and (whole or self.gradients):
            tokens = None if whole else self.gradients
            return [pool([text_moments(job.parent, ids, tokens, self.gradients) for ids in text]) for text in texts]
        return super()._known(job, texts)

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        return [*about_experts(self), about_channels(self)]


def about_experts(method: Method) -> list[str]:
    """Say how many experts there are, and how wide."""
    spec = method.settings
    return [f"{spec.experts} experts, {spec.top_k} active per token, {1 - spec.ratio:.0%} of the FFN per expert"]


def about_channels(method: Any) -> str:
    """Say how channels were chosen."""
    spec, start = method.settings, method.start
    found = f"channels: {spec.method}, score {spec.score}; compensation: {spec.compensation}"
    return found + ("" if start is None else f"; router start: {start.start}")


def pool_draws(windows: dict[str, Tensor], experts: int, seed: int) -> list[Tensor]:
    """Draw the control without affinity mining: each expert's own draw from all domains' windows."""
    everything = torch.cat(list(windows.values()))
    size = max(1, len(everything) // experts)
    draws = []
    for expert in range(experts):
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed + expert))
        draws.append(everything[order[:size]])
    return draws


class Affinity(Step):
    """Step *affinity*: cluster the domains; saves similarity, perplexity matrix, tree and clusters."""

    name, parallel = "affinity", True

    def __init__(self, method: Dive) -> None:
        super().__init__(method.recipe, "moments")
        self.method, self.spec = method, method.affinity

    @property
    def mined(self) -> bool:
        """Whether domains are compared by the perplexities of pruned models."""
        return self.spec.method == "perplexity"

    def settings(self, job: Job) -> dict[str, Any]:
        """Return how domains are compared; with pruned models, also how these are pruned."""
        carve = self.method.settings
        found: dict[str, Any] = {"needed": True, "experts": self.method.experts, "names": job.names}
        found |= {"affinity": self.spec.used(), "score": carve.score}
        if self.mined or self.spec.method == "moments":
            found |= {"ratio": self.method.ratio(job.parent), "selection": carve.selection}
        return found

    def windows(self) -> dict[str, int]:
        """Return the window of the text that pruned models are measured on."""
        return {"affinity.window": self.spec.window} if self.mined else {}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write ``clusters.json``, ``affinity.csv``, ``linkage.csv``, ``matrix.csv``."""
        if not (self.mined or crew().first):
            return {}
        spec, names, experts = self.spec, job.names, self.method.experts
        scores = self.method.scores(job.parent, [moments_of(job.run, name) for name in names], len(names))
        matrix = None
        if self.mined:
            matrix = self._perplexities(job, scores, work)
            if not crew().first:
                return {}
            similarity = mining.perplexity_similarity(matrix, spec.profile)
        elif spec.method == "moments":
            similarity = mining.perplexity_similarity(np.exp(self._predicted(job, scores)), spec.profile)
        else:
            similarity = mining.score_similarity(scores)
        if spec.method == "published":
            assert spec.published is not None
            clusters = mining.published(spec.published, names, experts)
        else:
            tree, groups = mining.cluster(similarity, experts, spec.linkage)
            clusters = [[names[index] for index in group] for group in groups]
            _write_rows(work / "linkage.csv", [[repr(float(x)) for x in row] for row in tree])
        _write_matrix(work / "affinity.csv", names, similarity)
        if matrix is not None:
            _write_matrix(work / "matrix.csv", names, matrix)
        write_json(work / "clusters.json", {"clusters": clusters})
        for expert, members in enumerate(clusters):
            say(f"  expert {expert}: {', '.join(members)}")
        return {"clusters": clusters}

    def _perplexities(self, job: Job, scores: Sequence[Tensor], work: Path) -> np.ndarray:
        """Measure the n × n perplexities of pruned models with bias compensation; finished rows survive a kill."""
        spec, carve, parent = self.spec, self.method.settings, job.parent
        blocks = [evaluation_blocks(d, parent.tokenizer, spec.tokens, spec.window).blocks for d in job.domains]
        mine = set(crew().mine(job.names))
        with meter("affinity", len(job.domains) * sum(block.numel() for block in blocks)) as bar:
            for domain, score in zip(job.domains, scores, strict=True):
                path = work / f"row-{domain.name}.json"
                if domain.name in mine and not path.is_file():
                    kept = choose(score, self.method.ratio(parent), carve.selection)
                    pruned = self._pruned(parent, kept, moments_of(job.run, domain.name))
                    texts = {str(index): block for index, block in enumerate(blocks)}
                    with alone():
                        found = perplexities(decoder(parent, pruned), texts, bar=bar)
                    write_json(path, list(found.values()))
        crew().exchange(None)  # all rows are written
        return np.array([read_json(work / f"row-{name}.json") for name in job.names])

    def _predicted(self, job: Job, scores: Sequence[Tensor]) -> np.ndarray:
        """Predict the logarithms of these perplexities from the moments alone."""
        ratio, selection = self.method.ratio(job.parent), self.method.settings.selection
        variances = [channel_scores(job.parent, moments_of(job.run, name), "wifv") for name in job.names]
        return mining.predicted_losses(variances, [choose(score, ratio, selection) for score in scores])

    @staticmethod
    def _pruned(parent: Parent, kept: Sequence[Tensor], moments: Moments) -> Carving:
        layers = []
        for index, kept_F in enumerate(kept):
            down_DF = parent.ffns[index].down_DF.to(parent.device)
            expert = Expert(kept_F, bias_D=compensation_bias(down_DF, moments.mean_LF[index], kept_F))
            layers.append(Layer([expert], Linear(torch.zeros(1, parent.D))))
        return Carving(layers, parent.F)

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count a run of every pruned model on every domain."""
        tokens = shapes.domains**2 * self.spec.tokens if self.mined else 0
        seconds = tokens * (shapes.active / pace.blocks + LOSS / pace.head) if pace else 0.0
        return Cost("affinity", tokens, seconds)


def _write_matrix(path: Path, names: Sequence[str], matrix: np.ndarray) -> None:
    _write_rows(path, [["", *names], *([n, *(repr(float(x)) for x in r)] for n, r in zip(names, matrix, strict=True))])


def _write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())
