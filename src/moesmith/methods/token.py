"""Ours: experts for groups of a layer's tokens, each reconstructed locally.

Most of what tells one token from the next within a layer is not its domain. In every layer, behind the layers carved
before it: k-means of the router's inputs by their angles, whose nearest centre a linear router finds; for the tokens
that this router sends to an expert, the channels whose loss a refitted ``down_proj`` makes up for least; then gate, up
and down are trained together. What they should give is what the hidden state lacks to be the parent's own behind the
layer: the output of the parent's network, and what earlier layers lost, in the measure of how far predictions move
(:mod:`moesmith.methods.sensitivity`). Nearest prior work: Sparse Expansion
(arXiv:2405.15756), which clusters a layer's inputs as well and prunes every cluster's copy without structure.

With one expert it is the honest control: a static mask with the same text, refit and training.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.calibration.moments import Sums
from moesmith.calibration.view import LayerView, Tokens, spread
from moesmith.methods.allocation import Allocation, allocated
from moesmith.methods.base import Carver, Needs
from moesmith.methods.clusters import centre_router, kmeans, root
from moesmith.methods.groups import SQUARES, Fitting, Groups, gathered, sent
from moesmith.methods.refit import eliminate, eliminate_work, fit_work, refit_down, refit_work
from moesmith.methods.registry import register
from moesmith.methods.router import constant_direction
from moesmith.methods.scores import most
from moesmith.methods.sensitivity import Sensitivity, information_of, measure
from moesmith.methods.steps import Carve, Domains, check_gram
from moesmith.methods.taylor import refuse_gradients
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.accelerator import closed_form_device
from moesmith.parent.load import Parent
from moesmith.parent.network import Network
from moesmith.run.folder import Run
from moesmith.run.shapes import Shapes
from moesmith.run.step import Job, Step
from moesmith.training.local import LocalSection, Outcome, at_once, order_of, reconstruct
from moesmith.world import crew

TRAINING = 0.6  # of the time of an expert, for the progress bar
LIGHT = 0.2  # weight of a token's error, where the mean is 1, below which it is not clustered


@register
class Token(Carver):
    """Token carving: k-means of router inputs, elimination, refit, local reconstruction."""

    name, title, version = "token", "experts for groups of tokens, reconstructed locally", 4
    paper, activations = "docs/methods.md", "carved"

    class Settings(LocalSection):
        """Experts, what they keep, and how they are fitted."""

        method: Literal["token"] = "token"
        experts: int = Field(8, ge=1, le=1024)
        ratio: float = Field(0.5, ge=0, lt=1, description="share of FFN channels pruned from each expert")
        clusters: Literal["angle", "distance"] = Field(
            "angle", description="whether groups are near by angle or by distance"
        )
        select: Literal["elimination", "energy"] = "elimination"
        among: float = Field(
            1.0,
            gt=0,
            le=1,
            description="elimination: the share of the channels that it begins with, those of the most energy",
            json_schema_extra={"neutral": 1.0},
        )
        sinks: bool = Field(
            True,
            description="every expert learns the few tokens whose hidden state one network makes",
            json_schema_extra={"neutral": False},
        )
        repair: bool = Field(True, description="experts make up for what earlier carved layers lost")
        ridge: float = Field(0.1, gt=0, description="refit: pull towards the parent's columns")
        pool: float = Field(0.05, ge=0, le=1, description="least share of all tokens in an expert's Gram matrix")
        prior: int = Field(1000, ge=0, description="tokens that all tokens count for in it")
        sample: int = Field(2500, ge=16, description="tokens per expert that are clustered")
        gram: int = Field(25_000, ge=64, description="most tokens per expert in a Gram matrix")
        sensitivity: int = Field(
            32_768,
            ge=0,
            description="tokens whose gradients say how far predictions feel an error; 0: all directions alike",
            json_schema_extra={"neutral": 0},
        )
        allocation: Literal["even", "dense", "sensitivity"] = Field(
            "even",
            description="channels: as many in all layers; some layers dense; or more where predictions feel their loss",
            json_schema_extra={"neutral": "even"},
        )

        @model_validator(mode="after")
        def _measured(self) -> Token.Settings:
            if self.allocation != "even" and not self.sensitivity:
                raise ValueError(f"allocation {self.allocation} needs sensitivity above 0")
            return self

        def without_effect(self) -> dict[str, str]:
            """Of clusters, where there is one; of training, where there is none."""
            grouped = ("clusters", "sample", "pool", "prior", "sinks") if self.experts == 1 else ()
            found = dict.fromkeys(grouped, "carve.experts is 1")
            found |= {"among": "carve.select is energy"} if self.select == "energy" else {}
            return found | (dict.fromkeys(("batch", "lr"), "carve.passes is 0") if not self.passes else {})

    def needs(self) -> Needs:
        """Count passes over all text: to hold the tokens, to train on them, and through what was carved."""
        spec = self.settings
        passes = 1.7 + 0.6 * spec.repair + 1.2 * spec.passes
        return Needs(gram=True, groups=SQUARES - 2, passes=passes, held=True, repair=spec.repair)

    def closed_forms(self, shapes: Shapes) -> tuple[float, float]:
        """All tokens' Gram matrix, and those of groups; every expert is fitted, eliminated from and refitted."""
        spec, D, F, K = self.settings, shapes.sizes.D, shapes.sizes.F, shapes.kept
        S = max(K, round(spec.among * F))
        each = fit_work(D, S) * spec.repair + refit_work(D, S, K) + (refit_work(D, F, S) if S < F else 0)
        each += eliminate_work(S, K) if spec.select == "elimination" else 0
        return gathered(self.tokens(shapes), spec.experts, spec.gram), spec.experts * each

    def check(self, parent: Parent) -> None:
        """Refuse a parent through which no gradient can go, if one is taken."""
        super().check(parent)
        if self.settings.sensitivity:
            refuse_gradients(parent, "carve.sensitivity", "set carve.sensitivity to 0")

    @property
    def uneven(self) -> bool:
        """Whether layers have experts of different widths."""
        return bool(self.settings.allocation != "even")

    def steps(self) -> list[Step]:
        """List calibration text, what predictions feel of errors, the layers' widths, and carving."""
        before: list[Step] = [Domains(self.recipe)]
        if self.settings.sensitivity:
            before.append(Sensitivity(self.recipe, self.settings.sensitivity))
        if self.uneven:
            spec = self.settings
            dense = spec.allocation == "dense"
            before.append(Allocation(self.recipe, spec.sensitivity, spec.ratio, spec.ridge, dense=dense))
        return [*before, Carve(self.recipe, self, *(step.name for step in before))]

    def begin(self, job: Job) -> list[list[Tensor]]:
        """All calibration text."""
        check_gram(job.parent, SQUARES, gram=True)
        self.information = information_of(job.run) if self.settings.sensitivity else []
        self.widths = allocated(job.run) if self.uneven else [self.width(job.parent)] * job.parent.L
        full = {index for index, width in enumerate(self.widths) if width == job.parent.F}
        self.dense = full if self.settings.allocation == "dense" else set()
        return super().begin(job)

    def outline(self, parent: Parent) -> Carving:
        """Experts with matrices of their own."""
        found = super().outline(parent)
        own = torch.zeros(0)
        if self.uneven:  # as a rule the first and the last layer are the widest
            ends = {0, parent.L - 1} if parent.L > 2 else {0}
            rest = (parent.L * self.width(parent) - len(ends) * parent.F) // max(1, parent.L - len(ends))
            for index, layer in enumerate(found.layers):
                kept_F = torch.arange(parent.F if index in ends else max(1, rest))
                count = 1 if index in ends and self.settings.allocation == "dense" else self.experts
                routed = [Expert(kept_F) for _ in range(count)]
                found.layers[index] = replace(layer, routed=routed, router=Linear(torch.zeros(count, 0)))
        for layer in found.layers:
            for expert in layer.routed:
                expert.down_DF = own
                if self.settings.passes:
                    expert.gate_FD, expert.up_FD = own, None if parent.ffns[0].up_FD is None else own
        return found

    def carve(self, view: LayerView) -> Layer:
        """Group the tokens, choose channels, refit, train."""
        spec, ffn = self.settings, view.network
        tokens = view.tokens().near(view.parent.device)
        if spec.sensitivity:
            given_DD = self.information[view.index].to(closed_form_device(view.parent.device))
            tokens = replace(tokens, root_DD=measure(given_DD).to(view.parent.device))
        experts = 1 if view.index in self.dense else int(spec.experts)
        router_ED, ids_T = self.route(view, tokens, experts)
        fitting = Fitting(spec.ridge, spec.pool, spec.prior, spec.gram, spec.repair)
        groups = Groups(ffn, tokens, ids_T, experts, fitting, sinks=spec.sinks)
        rows = groups.rows
        orders = [order_of(tokens, rows_N, spec, view.generator) for rows_N in rows]  # those of all processes
        made: dict[int, tuple[Expert, Outcome]] = {}
        mine = crew().mine(range(experts))
        some = at_once(ffn, len(mine))
        for first in range(0, len(mine), some):
            now = mine[first : first + some]
            parts = [self.start(groups, expert, self.widths[view.index]) for expert in now]
            starts = [start for _, start in parts]
            part, texts = len(now) / len(mine), ([rows[e] for e in now], [orders[e] for e in now])
            training = TRAINING * part if spec.passes else 0.0

            def advance(share: float, most: float = training) -> None:
                view.advance(most * share)

            trained = reconstruct(starts, tokens, *texts, spec, advance)
            for expert, (kept, start), (found, outcome) in zip(now, parts, trained, strict=True):
                made[expert] = as_expert(view.parent, kept, found, trained=found is not start), outcome
            view.advance(part - training)
        made = crew().merged(made)
        self.report(ids_T, [made[expert][1] for expert in range(experts)])
        return Layer([made[expert][0] for expert in range(experts)], Linear(router_ED))

    def start(self, groups: Groups, expert: int, keep: int) -> tuple[Tensor, Network]:
        """So many channels of an expert, and itself refitted on its tokens, fp32."""
        spec, F = self.settings, groups.network.down_DF.shape[1]
        among_S, gram_SS, down_DS = groups.fit(expert, max(keep, round(spec.among * F)))
        chosen = self.choose(groups.tokens.felt(down_DS.float().T).T, gram_SS, keep)
        refitted_DF = refit_down(down_DS, gram_SS, chosen, spec.ridge)
        return among_S[chosen], groups.network.narrowed(among_S[chosen], refitted_DF).to(torch.float32)

    def route(self, view: LayerView, tokens: Tokens, experts: int) -> tuple[Tensor, Tensor]:
        """A router (E, D), and the expert to which it sends every token (T,)."""
        device, x_TD = view.parent.device, tokens.x_TD
        if experts == 1:
            return torch.zeros(1, view.parent.D), torch.zeros(len(x_TD), dtype=torch.int64)
        # tokens of huge activations, such as a text's first, would be a group of their own that hardly counts
        heard_N = (tokens.weight_T > LIGHT).nonzero().flatten()
        sample_ND = x_TD[spread(heard_N, experts * self.settings.sample)].to(device)
        if self.settings.clusters == "angle":
            root_DD = root(view.network)
            centres_ED = kmeans(sample_ND.float() @ root_DD, experts, view.generator, angles=True)
            router_ED = (centres_ED @ root_DD).cpu()
        else:
            sums = Sums(view.parent.D, device)
            sums.add(sample_ND)
            constant_D, _ = constant_direction(sums.result())
            router_ED = centre_router(kmeans(sample_ND, experts, view.generator), constant_D)
        return router_ED, sent(router_ED, x_TD, device)

    def choose(self, down_DS: Tensor, gram_SS: Tensor, keep: int) -> Tensor:
        """The places of the kept channels among those to choose from, sorted."""
        if self.settings.select == "elimination":
            return eliminate(down_DS, gram_SS, keep, self.settings.ridge)
        return most((gram_SS.diagonal() * down_DS.float().square().sum(0)).cpu(), keep)

    def report(self, ids_T: Tensor, outcomes: Sequence[Outcome]) -> None:
        """Keep what the manifest says of a layer."""
        total = sum(one.energy for one in outcomes) or 1.0
        load = float(torch.bincount(ids_T, minlength=len(outcomes)).min()) * len(outcomes) / len(ids_T)
        before, after = (sum(getattr(one, name) for one in outcomes) / total for name in ("before", "after"))
        self.note(refitted=round(before, 5), trained=round(after, 5), least_load=round(load, 4))

    def metrics(self) -> dict[str, Any]:
        """Errors of the networks on windows that were not trained on; the least load of an expert, 1 if balanced."""
        refitted, trained, load = (self.measured[name] for name in ("refitted", "trained", "least_load"))
        curves = {"refitted": refitted} | ({"trained": trained} if self.settings.passes else {})
        found: dict[str, Any] = {"error_refitted": round(statistics.mean(refitted), 4)}
        found |= {"error": round(statistics.mean(trained), 4), "least_load": min(load)}
        return found | {"layers": {"error of the network's output": curves}}

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how well networks are reproduced."""
        return f"error of networks {metrics['error_refitted']:.3f} refitted, {metrics['error']:.3f} trained"

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        spec = self.settings
        return [
            f"{spec.experts} experts for groups of tokens, 1 active per token, {1 - spec.ratio:.0%} of the FFN each",
            f"channels by {spec.select}, down_proj refitted, then {spec.passes:g} passes of local training",
        ]


def as_expert(parent: Parent, kept: Tensor, found: Network, *, trained: bool) -> Expert:
    """The expert of these matrices, in the dtype that the parent is stored in; the parent's rows where untrained."""
    down_DF = found.down_DF.to("cpu", parent.stored)
    if not trained:
        return Expert(kept, down_DF)
    up_FD = None if found.up_FD is None else found.up_FD.to("cpu", parent.stored)
    return Expert(kept, down_DF, found.gate_FD.to("cpu", parent.stored), up_FD)
