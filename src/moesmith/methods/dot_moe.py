"""DOT-MoE (arXiv:2606.01666): which expert every channel belongs to, learned together with the router.

As published: an affinity of every channel to every expert becomes a transport plan with equal experts by Sinkhorn's
iterations in the log domain, the plan is rounded greedily, and a token's experts are those with the K largest logits;
both choices pass gradients straight through. The parent's weights are frozen: a token's channel counts in full if its
expert is chosen. The loss is the KL divergence to the parent, the text's own loss, a z-loss and a load balance over the
router. The temperature of the plan falls from 1 to 0.1.

What we could not read there, and chose: the router's soft value is a softmax over the experts; weights of the losses
(1, 1, and those of ST-MoE, arXiv:2202.08906, and Switch, arXiv:2101.03961); affinities begin as normal noise. Ours is
``carve.split: cluster``: affinities and routers begin with the balanced clusters of MoEfication.

Shapes: L layers, T tokens, D model width, F channels, E experts, K active ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F_
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.files.write import write_tensors
from moesmith.methods.balanced import balanced_kmeans
from moesmith.methods.parts import Divided, DividedMethod, rows_normalised, similarity_router
from moesmith.methods.registry import register
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.moe import GateUp
from moesmith.parent.layerwise import Beside
from moesmith.parent.load import Parent
from moesmith.parent.network import FFN
from moesmith.parent.structure import put
from moesmith.run.folder import Run
from moesmith.run.settings import LoopSection, Section
from moesmith.run.shapes import LOSS, Pace, Shapes
from moesmith.run.step import Cost, Job, Step, trained
from moesmith.training.loop import train
from moesmith.training.sharding import student_and_teacher
from moesmith.training.student import frozen, token_loss
from moesmith.training.tracking import Report
from moesmith.world import crew

STARTS_AT = 2.0  # affinity of a channel to its cluster's expert, where all others have 0


class AssignSection(LoopSection):
    """DOT-MoE: assignment and router learned over frozen weights."""

    rounds: int = Field(50, ge=1, description="Sinkhorn's iterations")
    temperature: float = Field(1.0, gt=0, description="of the plan, at the first step")
    last_temperature: float = Field(
        0.1, gt=0, description="of the plan, at the last step; between them it falls evenly"
    )
    kl_weight: float = Field(1.0, ge=0)
    language_weight: float = Field(1.0, ge=0, description="of the text's own loss")
    z_weight: float = Field(1e-3, ge=0, description="of the mean squared log-sum-exp of the logits")
    balance_weight: float = Field(1e-2, ge=0, description="of the load balance")


@register
class DotMoe(DividedMethod):
    """Equal parts of the channels, learned by optimal transport with their router."""

    name, title = "dot-moe", "parts of the channels learned with their router by optimal transport (DOT-MoE)"
    paper = "arXiv:2606.01666"
    sections: ClassVar[Mapping[str, type[Section]]] = {"assign": AssignSection}

    class Settings(Divided):
        """Experts, how many a token uses, and what they begin as."""

        method: Literal["dot-moe"] = "dot-moe"
        experts: int = Field(16, ge=2, le=1024, description="equal parts of the channels")
        split: Literal["random", "cluster"] = "random"

    def check(self, parent: Parent) -> None:
        """Refuse channels that cannot be divided, and a run without training text."""
        super().check(parent)
        if not self.recipe.assign.tokens:
            raise MoesmithError("assign.tokens is 0, but parts are learned from text", "Set assign.tokens.")

    def steps(self) -> list[Step]:
        """List the one step."""
        return [Assign(self)]

    def about(self, run: Run) -> list[str]:
        """Describe the run in numbers."""
        found = run.metrics("assign")
        first = f"{self.experts} equal parts of the channels that add up, {self.top_k} active per token; {self.title}"
        moved = f"{found['moved']:.0%} of the channels have left the expert that they began in"
        return [f"{first}, {self.paper}", f"started {self.settings.split}; {moved}; no weight of the parent is changed"]


class Assign(Step):
    """Step *assign*: learn affinities and routers over the frozen parent, and round them to a carving."""

    name, title, trains, parallel = "assign", "channels assigned", "assign", True

    def __init__(self, method: DotMoe) -> None:
        super().__init__(method.recipe, "corpus")
        self.method = method

    def settings(self, job: Job) -> dict[str, Any]:
        """How they are learned."""
        spec = self.method.settings
        return self.loop.used() | {"experts": spec.experts, "used": spec.used_parts, "split": spec.split}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write a carving, ``assign.safetensors`` (all that was trained) and ``log.jsonl``."""
        parent, spec, method = job.parent, self.loop, self.method
        learned = Assignment(parent, method.experts, method.top_k, method.settings.split, self.recipe.seed)
        learned.temperature = spec.temperature
        with torch.no_grad():
            begun_LF = rounded(learned.plan(spec.rounds))
        model = assigned_model(parent, learned)
        names = {f"assign.{name}": p for name, p in learned.named_parameters()}
        say(f"  {sum(p.numel() for p in names.values()):,} trainable parameters, none of them the parent's")
        objective = AssignObjective(*student_and_teacher(parent, model, learned), learned, spec)
        blocks, report = job.run.training("assign"), Report.of(self, job)
        outcome = train(objective, names, blocks, spec, work, seed=self.recipe.seed, label="assign", report=report)
        if not crew().first:
            return {}
        learned.temperature = spec.last_temperature
        with torch.no_grad():
            expert_LF = rounded(learned.plan(spec.rounds))
        write_tensors(work / "assign.safetensors", learned.state_dict())
        carving = self._carving(parent, expert_LF.cpu(), learned.router_LED.detach().float().cpu(), job)
        carving.save(work)
        moved = float((expert_LF != begun_LF).float().mean())
        return outcome.metrics() | {"moved": moved} | parameters(parent, carving)

    def _carving(self, parent: Parent, expert_LF: Tensor, router_LED: Tensor, job: Job) -> Carving:
        method, layers = self.method, []
        for expert_F, router_ED in zip(expert_LF, router_LED, strict=True):
            parts = [(expert_F == expert).nonzero().flatten() for expert in range(method.experts)]
            layers.append(method.layer(parts, router_ED.clone(), None))
        return Carving(layers, parent.F, provenance={"method": method.name, "parent": job.run.inputs})

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say what was trained."""
        return f"{trained(metrics)}, {metrics['moved']:.0%} of the channels moved"

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the whole parent, the same again for the gradient, the teacher, and the plan of every step."""
        spec, sizes = self.loop, shapes.sizes
        plan = sizes.L * sizes.F * shapes.E
        seconds = spec.tokens * (3.0 / pace.blocks + 3 * LOSS / pace.head) if pace else 0.0
        trained = plan + sizes.L * sizes.D * shapes.E
        memory = 20 * trained + 16 * plan // sizes.L * spec.rounds
        memory += 2 * spec.micro_batch * spec.window * sizes.L * (10 * sizes.D + 8 * sizes.F)
        return Cost("training", spec.tokens, seconds, memory, None, 4 * trained, 24 * trained, shapes.parted(memory))


class Assignment(Beside):
    """Affinities and routers of all layers, everything that is trained.

    Attributes:
        affinity_LFE: of every channel to every expert.
        router_LED: of every layer.
        temperature: of the plan.
        member_LFE: whether a channel is an expert's, straight-through, of the last :meth:`draw`.
        logits: of the router, (T, E) by layer, of the last forward pass.
    """

    def __init__(self, parent: Parent, experts: int, top_k: int, split: str, seed: int) -> None:
        super().__init__()
        self.experts, self.top_k, self.temperature = experts, top_k, 1.0
        generator = torch.Generator().manual_seed(seed)
        affinity_LFE = torch.randn(parent.L, parent.F, experts, generator=generator)
        router_LED = (torch.rand(parent.L, experts, parent.D, generator=generator) * 2 - 1) / math.sqrt(parent.D)
        if split == "cluster":
            for ffn, affinity_FE, router_ED in zip(parent.ffns, affinity_LFE, router_LED, strict=True):
                rows_FD = rows_normalised(ffn.gate_FD)
                ids_F = balanced_kmeans(rows_FD, experts, generator)
                affinity_FE.copy_(STARTS_AT * F_.one_hot(ids_F, experts))
                router_ED.copy_(similarity_router(rows_FD, [(ids_F == e).nonzero().flatten() for e in range(experts)]))
        self.affinity_LFE = nn.Parameter(affinity_LFE.to(parent.device))
        self.router_LED = nn.Parameter(router_LED.to(parent.device))
        self.member_LFE: Sequence[Tensor] = ()
        self.logits: dict[int, Tensor] = {}

    def plan(self, rounds: int) -> Tensor:
        """Compute the transport plans, (L, F, E); the backward pass computes a layer's iterations again."""
        logits = (self.affinity_LFE / self.temperature).split(1)
        return torch.cat([checkpoint(sinkhorn, part_1FE, rounds, use_reentrant=False) for part_1FE in logits])

    def draw(self, rounds: int) -> None:
        """Round the plans for the next forward pass."""
        plan_LFE = self.plan(rounds)
        hard_LFE = F_.one_hot(rounded(plan_LFE.detach()), self.experts).to(plan_LFE.dtype)
        self.member_LFE = (hard_LFE + (plan_LFE - plan_LFE.detach())).unbind(0)  # in this order: exactly 0 or 1

    def forward(self, index: int, x_TD: Tensor, v_TF: Tensor) -> Tensor:
        """Keep the channels of each token's experts: (T, F)."""
        logits_TE = F_.linear(x_TD.float(), self.router_LED[index])
        self.logits[index] = logits_TE
        soft_TE = logits_TE.softmax(-1)
        hard_TE = torch.zeros_like(soft_TE).scatter_(-1, logits_TE.topk(self.top_k, -1).indices, 1.0)
        chosen_TE = hard_TE + (soft_TE - soft_TE.detach())
        return v_TF * (chosen_TE @ self.member_LFE[index].T).to(v_TF.dtype)


class AssignedFFN(GateUp):
    """A network of which a token uses the channels of its experts."""

    def __init__(self, ffn: FFN, learned: Assignment, index: int) -> None:
        super().__init__(ffn)
        self.down, self.index = ffn.down, index
        self._learned = [learned]  # in a list it is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD: Tensor = self.down(self._learned[0](self.index, x_TD, self.hidden(x_TD)))
        return y_TD.view_as(x)


def assigned_model(parent: Parent, learned: Assignment) -> PreTrainedModel:
    """Build the parent's architecture with assigned channels in every layer; all weights are the parent's, frozen."""
    model = frozen(parent)
    for index, ffn in enumerate(parent.ffns):
        put(model, ffn.path, AssignedFFN(ffn, learned, index))
    return model


class AssignObjective(nn.Module):
    """The map from token ids (B, S) to the scalar loss.

    Attributes:
        measured: parts of the last loss, as numbers, for the training log.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, learned: Assignment, spec: AssignSection
    ) -> None:
        super().__init__()
        self.model, self.learned, self.spec = model, learned, spec
        self._teacher = [teacher]
        self._measured: dict[str, Tensor] = {}

    @property
    def measured(self) -> dict[str, float]:
        """Parts of the last loss as numbers."""
        return {name: round(float(value), 5) for name, value in self._measured.items()}

    def loads(self) -> list[Tensor]:
        """Return each layer's share of choices by expert, (E,), in the last forward pass."""
        return [loads_of(self.learned.logits[index], self.learned.top_k) for index in sorted(self.learned.logits)]

    def begin(self, step: int, steps: int) -> None:
        """Set the temperature of a step, from the first to the last."""
        first, last = self.spec.temperature, self.spec.last_temperature
        self.learned.temperature = first + (last - first) * step / max(1, steps - 1)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Run one forward pass of teacher and student."""
        spec, learned = self.spec, self.learned
        learned.draw(spec.rounds)
        whole = spec.kl_weight + spec.language_weight
        loss = token_loss(self.model, ids_BS, self._teacher[0], spec.kl_weight / whole if whole else 0.0)
        logits = [learned.logits[index] for index in sorted(learned.logits)]
        z = torch.stack([logits_TE.logsumexp(-1).square().mean() for logits_TE in logits]).mean()
        balance = torch.stack([load_balance(logits_TE, learned.top_k) for logits_TE in logits]).mean()
        self._measured = {"text": loss.detach(), "z": z.detach(), "balance": balance.detach()}
        return whole * loss + spec.z_weight * z + spec.balance_weight * balance


def load_balance(logits_TE: Tensor, top_k: int) -> Tensor:
    """Compute E Σ_e f_e P_e: share of choices times mean probability; 1 if all experts are chosen equally often."""
    return logits_TE.shape[-1] * (loads_of(logits_TE, top_k) * logits_TE.softmax(-1).mean(0)).sum()


def loads_of(logits_TE: Tensor, top_k: int) -> Tensor:
    """Compute each expert's share of the choices, (E,)."""
    chosen_TK = logits_TE.topk(top_k, -1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[-1]) / chosen_TK.numel()


def sinkhorn(logits_LFE: Tensor, rounds: int) -> Tensor:
    """Compute the plan nearest to exp(logits) whose rows sum to 1 and columns to F / E (Cuturi, arXiv:1306.0895).

    In the log domain; rows are exact, columns as near as ``rounds`` bring them.
    """
    _, F, E = logits_LFE.shape
    log_LFE, column = logits_LFE, math.log(F / E)
    for _ in range(rounds):
        log_LFE = log_LFE - log_LFE.logsumexp(1, keepdim=True) + column
        log_LFE = log_LFE - log_LFE.logsumexp(2, keepdim=True)
    return log_LFE.exp()


def rounded(plan_LFE: Tensor) -> Tensor:
    """Round plans greedily to experts of equal size: the expert of every channel, (L, F) int64.

    Greedy rounding takes the largest entries first, skipping channels that are taken and experts that are full. That is
    the stable matching in which both sides rank each other by the plan, found here for all layers at once: channels
    apply to their best expert, experts keep the best of those that applied, the others apply to their next one.
    """
    L, F, E = plan_LFE.shape
    wish_LFE = plan_LFE.clone()
    expert_E, place_F = (torch.arange(n, device=plan_LFE.device) for n in (E, F))
    while True:
        best_LF, expert_LF = wish_LFE.max(-1)
        # channels by expert, within an expert by wish: those behind the first F / E are turned away
        by_wish_LF = best_LF.sort(dim=-1, descending=True, stable=True).indices
        sorted_LF, by_expert_LF = expert_LF.gather(1, by_wish_LF).sort(dim=-1, stable=True)
        first_LE = torch.searchsorted(sorted_LF, expert_E.repeat(L, 1))
        late_LF = place_F - first_LE.gather(1, sorted_LF) >= F // E
        away_LF = torch.zeros_like(late_LF).scatter(1, by_wish_LF.gather(1, by_expert_LF), late_LF)
        if not away_LF.any():
            return expert_LF
        wish_LFE = wish_LFE.masked_fill(away_LF[..., None] & (expert_E == expert_LF[..., None]), -1.0)
