"""Experts that divide the channels among them: what LLaMA-MoE's partitions and MoEfication share.

The channels of a network are cut into equal parts, none in two of them, so that all parts together add up to the
network. A token uses some of the parts, which count in full; parts may be shared, which every token uses.

Shapes: T tokens, D model width, F channels, E routed experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesmith.calibration.moments import Sums
from moesmith.calibration.view import LayerView
from moesmith.methods.balanced import balanced_graph, balanced_kmeans, equal_size
from moesmith.methods.base import Carver, Method, Needs
from moesmith.methods.steps import Carve
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.load import Parent
from moesmith.parent.network import Network
from moesmith.run.folder import Run
from moesmith.run.settings import Section
from moesmith.run.shapes import Shapes
from moesmith.run.step import Job, Step

CHUNK = 4096  # tokens whose channels exist at once
WHOLE = 0.01  # of a part: so far from a whole number of parts counts as rounding of ``ratio``
HELD = 8  # one token of so many is not fitted to, but measured on


class Divided(Section):
    """Settings of a method whose experts are equal parts of the channels."""

    experts: int = Field(8, ge=2, le=1024, description="equal parts of the channels, shared ones included")
    ratio: float = Field(0.5, ge=0, lt=1, description="share of FFN channels that a token does not use")

    @property
    def used_parts(self) -> int:
        """How many parts a token uses, shared ones included."""
        return round((1 - self.ratio) * self.experts)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        parts = (1 - self.ratio) * self.experts
        if abs(parts - self.used_parts) > WHOLE or self.used_parts < 1:
            around = sorted({max(1, int(parts)), min(self.experts, int(parts) + 1)}, reverse=True)
            near = " or ".join(f"{round(1 - n / self.experts, 6):g}" for n in around)
            raise ValueError(f"ratio {self.ratio:g} leaves {parts:.3g} of {self.experts} parts; give {near}")
        return self


class Parts(Divided):
    """The same, of a method that makes its parts and routers from a sample of tokens."""

    sample: int = Field(8192, ge=16, description="tokens per layer that parts and routers are made from")
    ridge: float = Field(0.01, gt=0, description="selector norm: ridge, relative to a router input's mean energy")


class DividedMethod(Method):
    """A method whose experts are equal parts of the channels that add up."""

    @property
    def shared(self) -> int:
        """How many parts every token uses."""
        return 0

    @property
    def scale(self) -> float:
        """What routed experts' outputs are multiplied by."""
        return 1.0

    @property
    def experts(self) -> int:
        """Parts that are routed to."""
        return int(self.settings.experts) - self.shared

    @property
    def top_k(self) -> int:
        """How many of them a token uses."""
        return int(self.settings.used_parts) - self.shared

    @property
    def active(self) -> float:
        """The share of channels that a token uses: that of all its experts together is 1 - ``ratio``."""
        return 1 - float(self.settings.ratio)

    def at_least(self, active: float) -> float:
        """Round up to whole parts, with at least one that is chosen."""
        parts = max(self.shared + 1, math.ceil(active * self.settings.experts - WHOLE))
        return round(parts / self.settings.experts, 6)

    def check(self, parent: Parent) -> None:
        """Refuse a number of parts that does not divide the channels."""
        equal_size(parent.F, self.settings.experts)

    def width(self, parent: Parent) -> int:
        """Return the channels of a part."""
        return equal_size(parent.F, self.settings.experts)

    def outline(self, parent: Parent) -> Carving:
        """Make parts in the order of the channels."""
        parts = list(torch.arange(parent.F).split(self.width(parent)))
        return Carving([self.layer(parts, torch.zeros(self.experts, 0), None)] * parent.L, parent.F)

    def layer(self, parts: Sequence[Tensor], router_ED: Tensor, down_DF: Tensor | None) -> Layer:
        """Put a layer together.

        Args:
            parts: channels of the shared parts, then of each expert.
            router_ED: the router.
            down_DF: the parent's matrix, in the dtype of the result; ``None`` for an outline.
        """
        routed, common = [Expert(kept) for kept in parts[self.shared :]], parts[: self.shared]
        for expert in routed if self.scale != 1 else ():
            expert.down_DF = torch.zeros(0)
            if down_DF is not None:
                own_DF = down_DF[:, expert.channels.to(down_DF.device)].float() * self.scale
                expert.down_DF = own_DF.to("cpu", down_DF.dtype)
        shared = Expert(torch.cat(list(common)).sort().values) if common else None
        return Layer(routed, Linear(router_ED), self.top_k, "sum", shared=shared)


class EqualParts(DividedMethod, Carver):
    """A method that cuts the channels into equal parts; it says how, and which router chooses among them."""

    def parts(self, view: LayerView, rest: Tensor, x_TD: Tensor) -> Tensor:
        """Return the expert of each of the channels ``rest``, exactly equal numbers: (len(rest),) int64.

        Args:
            view: the layer.
            rest: sorted channels that are not shared.
            x_TD: a sample of router inputs; empty unless :attr:`sampled`.
        """
        raise NotImplementedError

    def route(self, view: LayerView, routed: Sequence[Tensor], x_TD: Tensor, norms_TE: Tensor) -> Tensor:
        """Return the router (E, D) fp32 on the CPU that chooses among experts of these channels.

        Args:
            view: the layer.
            routed: each expert's channels.
            x_TD: router inputs to fit to; empty unless :attr:`sampled`.
            norms_TE: the experts' norms on them (:func:`expert_norms`).
        """
        raise NotImplementedError

    @property
    def sampled(self) -> bool:
        """Whether layers are looked at: whether calibration text matters."""
        return True

    def steps(self) -> list[Step]:
        """List the steps: text, if any is looked at, and carving."""
        return super().steps() if self.sampled else [Carve(self.recipe, self)]

    def needs(self) -> Needs:
        """Count a second pass of a part of the text; cutting a graph takes a few F × F matrices."""
        graph = self.settings.split == "co-activation"
        return Needs(inputs=self.sampled, gram=graph, groups=3 if graph else 1, passes=2.0 if self.sampled else 0.0)

    def tokens(self, shapes: Shapes) -> int:
        """Count all text, or none."""
        return super().tokens(shapes) if self.sampled else 0

    def begin(self, job: Job) -> list[list[Tensor]]:
        """Return all calibration text, or none."""
        return super().begin(job) if self.sampled else []

    def carve(self, view: LayerView) -> Layer:
        """Take the shared channels out, cut the rest into parts, fit the router."""
        parent, F = view.parent, view.parent.F
        size = self.width(parent)
        x_TD = view.sample(self.settings.sample) if self.sampled else torch.zeros(0, parent.D)
        common, rest = torch.zeros(0, dtype=torch.int64), torch.arange(F)
        if self.shared:
            order = channel_energies(view.network, x_TD).argsort(descending=True, stable=True)
            common, rest = order[: self.shared * size].sort().values, order[self.shared * size :].sort().values
        ids = self.parts(view, rest, x_TD)
        routed = [rest[ids == expert] for expert in range(self.experts)]
        norms_TE = expert_norms(view.network, x_TD, routed) if self.sampled else x_TD.new_zeros(0, len(routed))
        measured_T = (torch.arange(len(x_TD)) % HELD == HELD - 1).to(x_TD.device)
        router_ED = self.route(view, routed, x_TD[~measured_T], norms_TE[~measured_T])
        if measured_T.any():
            self.measure(router_ED, x_TD[measured_T].to(parent.dtype), norms_TE[measured_T])
        down_DF = view.ffn.down_DF.to(parent.stored)
        return self.layer([*common.split(size)[: self.shared], *routed], router_ED, down_DF)

    def provenance(self) -> dict[str, Any]:
        """Name what makes up for the experts that are not chosen, if anything does."""
        return {} if self.scale == 1 else {"compensation": "rescaled"}

    def measure(self, router_ED: Tensor, x_TD: Tensor, norms_TE: Tensor) -> None:
        """Note what share of all experts' activation energy the chosen ones hold, and the best choice would."""
        energy_TE = norms_TE.square()
        logits_TE = (x_TD @ router_ED.to(x_TD.device, x_TD.dtype).T).float()
        whole = float(energy_TE.sum()) or 1.0
        chosen = energy_TE.gather(1, logits_TE.topk(self.top_k, dim=-1).indices).sum()
        best = energy_TE.topk(self.top_k, dim=-1).values.sum()
        self.note(chosen=round(float(chosen) / whole, 5), best=round(float(best) / whole, 5))

    def metrics(self) -> dict[str, Any]:
        """Share of activation energy that a token's routed experts hold, mean over layers; empty without text."""
        if not self.measured:
            return {}
        chosen, best = self.measured["chosen"], self.measured["best"]
        found: dict[str, Any] = {"energy": round(statistics.mean(chosen), 4)}
        found |= {"energy_best": round(statistics.mean(best), 4)}
        return found | {"layers": {"activation energy of the chosen experts": {"chosen": chosen, "best choice": best}}}

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how well the router chooses."""
        if "energy" not in metrics:
            return ""
        return f"activation energy of chosen experts {metrics['energy']:.3f}, of the best {metrics['energy_best']:.3f}"

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        spec = self.settings
        beside = f", {self.shared} more used by every token" if self.shared else ""
        share = f"{1 - spec.ratio:.0%} of the FFN per token"
        return [
            f"{self.experts} equal parts of the channels, {self.top_k} active per token{beside}; {share}",
            f"parts: {spec.split}; router: {spec.selector}; outputs are added, times {self.scale:g}",
        ]


def hidden_of(ffn: Network, x_TD: Tensor) -> Iterator[Tensor]:
    """Compute the input of ``down_proj`` for a sample of router inputs, in chunks (N, F) fp32."""
    dtype = ffn.gate_FD.dtype
    for rows_ND in x_TD.split(CHUNK):
        yield ffn.hidden(rows_ND.to(dtype)).float()


def channel_energies(ffn: Network, x_TD: Tensor) -> Tensor:
    """Mean energy that a channel adds to the output, E a_j² · ‖W[:, j]‖², (F,) fp32 on the CPU."""
    energy_F = torch.stack([a_NF.square().sum(0) for a_NF in hidden_of(ffn, x_TD)]).sum(0)
    return (energy_F / len(x_TD) * ffn.down_DF.float().square().sum(0)).cpu()


def coactivation(ffn: Network, x_TD: Tensor) -> Tensor:
    """How much two channels are active together, E |a_i| |a_j|, (F, F) fp32."""
    sums = Sums(len(ffn.gate_FD), x_TD.device)
    for a_NF in hidden_of(ffn, x_TD):
        sums.add(a_NF.abs())
    return sums.result().gram_NN


def expert_norms(ffn: Network, x_TD: Tensor, routed: Sequence[Tensor]) -> Tensor:
    """The norm of each expert's channels for each token, ‖a_S‖, (T, E) fp32 on the device of ``x_TD``."""
    member_FE = torch.zeros(len(ffn.gate_FD), len(routed))
    for expert, kept in enumerate(routed):
        member_FE[kept, expert] = 1
    member_FE = member_FE.to(x_TD.device)
    return torch.cat([(a_NF.square() @ member_FE).sqrt() for a_NF in hidden_of(ffn, x_TD)])


def rows_normalised(weight_FD: Tensor) -> Tensor:
    """Rows of length 1, (F, D) fp32."""
    return torch.nn.functional.normalize(weight_FD.float(), dim=-1)


def similarity_router(rows_FD: Tensor, routed: Sequence[Tensor]) -> Tensor:
    """The router whose logits rank experts by cos(x, c) with c the mean of an expert's rows, (E, D) fp32 on the CPU."""
    centres = [rows_FD[kept.to(rows_FD.device)].float().mean(0) for kept in routed]
    return rows_normalised(torch.stack(centres)).cpu()


def split_channels(split: str, rows_FD: Tensor, rest: Tensor, experts: int, view: LayerView, x_TD: Tensor) -> Tensor:
    """Cut channels into equal parts: the part of each of ``rest``, (len(rest),) int64.

    Args:
        split: ``random``; ``cluster``, balanced k-means of normalised rows; ``co-activation``, a cut of the graph in
            which channels are connected by :func:`coactivation`.
        rows_FD: the matrix whose rows are clustered.
        rest: the channels to cut.
        experts: into how many parts.
        view: the layer; its generator draws.
        x_TD: router inputs, for ``co-activation``.
    """
    if split == "cluster":
        return balanced_kmeans(rows_normalised(rows_FD[rest.to(rows_FD.device)]), experts, view.generator)
    if split == "co-activation":
        weights_FF = coactivation(view.network, x_TD).cpu()
        return balanced_graph(weights_FF[rest][:, rest], experts, view.generator)
    ids = torch.arange(experts).repeat_interleave(len(rest) // experts)
    return ids[torch.randperm(len(rest), generator=view.generator)]
