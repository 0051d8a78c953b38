"""How far predictions move when a hidden state is wrong: the measure in which experts are fitted.

Where a token's hidden state behind a layer is wrong by a small e, the predictions of that token and of all later ones
move by ½ eᵀ F e nats together (KL divergence). F = E[g gᵀ] is the Fisher information: g is the gradient of the
log-probability of tokens that are drawn from the predictions themselves. Some directions of a hidden state hardly
matter for what follows, others a hundred times as much. Fits for quantisation are guided in this way
(arXiv:2505.07004); there it is a weight for each group of outputs, here one matrix for the whole hidden state.

Errors count relative to a token's hidden state h everywhere (``Tokens.weight_T``), so gradients are taken times ‖h‖.

Shapes: B sequences, S positions, T tokens, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.console import meter
from moesmith.files.artefact import read_tensors
from moesmith.files.write import write_tensors
from moesmith.methods.steps import as_fits, evenly, evenly_tokens
from moesmith.methods.taylor import refuse_gradients
from moesmith.parent.accelerator import has_double
from moesmith.parent.head import Head, head_of
from moesmith.parent.hooks import hidden_output, hooked
from moesmith.parent.load import Parent
from moesmith.parent.structure import decoder_layers
from moesmith.run.folder import Run
from moesmith.run.shapes import LOSS, Pace, Shapes
from moesmith.run.step import Cost, Job, Step
from moesmith.training.loop import ordinary_mode, refuse_inference
from moesmith.training.losses import head_loss
from moesmith.training.student import frozen
from moesmith.world import crew

BATCH = 2  # windows per backward pass
FLOOR = 0.05  # of a mean direction's measure: the least that any direction has
SINK = 4.0  # times the median ‖h‖, above which a token's gradient is not read
LOUDEST = 3.0  # times the median ‖g‖ ‖h‖: longer ones are shortened, or a few tokens would decide
CHUNK = 256  # tokens whose predictions exist at once
FILE = "sensitivity.safetensors"


class Sensitivity(Step):
    """What predictions feel of errors of every hidden state, by the parent's gradients on calibration text.

    Attributes:
        tokens: of all domains together.
    """

    name, parallel = "sensitivity", True

    def __init__(self, recipe: Any, tokens: int) -> None:
        super().__init__(recipe, "domains")
        self.tokens = tokens

    def settings(self, job: Job) -> dict[str, Any]:
        """Return how many tokens."""
        return {"tokens": self.tokens}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write one (D, D) fp32 matrix for every layer, by its number."""
        ids_NS = evenly(job.run, job.names, self.tokens)
        found_LDD = information(job.parent, ids_NS, self.recipe.seed)
        if crew().first:
            write_tensors(work / FILE, {f"{index}": part_DD for index, part_DD in enumerate(found_LDD)})
        return {"tokens": ids_NS.numel()}

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count a forward and a backward pass, what draws tokens, and the matrices."""
        spec, sizes = self.recipe.domains, shapes.sizes
        tokens = evenly_tokens(spec, shapes.domains, self.tokens)
        matrices = 4 * sizes.L * sizes.D**2
        seconds = tokens * (3 / pace.blocks + 3 * LOSS / pace.head) if pace else 0.0
        memory = shapes.itemsize * BATCH * spec.window * sizes.L * (10 * sizes.D + 6 * sizes.F) + matrices
        return Cost(tokens=tokens, seconds=seconds, memory=memory, layerwise=None, disk=matrices)


def information_of(run: Run) -> list[Tensor]:
    """Read what :func:`information` found, (D, D) fp32 for every layer, on the CPU."""
    found = read_tensors(run.path("sensitivity") / FILE)
    return [found[f"{index}"] for index in range(len(found))]


def measure(information_DD: Tensor) -> Tensor:
    """R with RᵀR = (1 − :data:`FLOOR`) · F / mean diag F + FLOOR · I, (D, D) fp32; in fp64 where it is given.

    An error e counts as ‖R e‖², in the mean direction as ‖e‖².
    """
    scale = information_DD.diagonal().double().mean().clamp_min(torch.finfo(torch.float32).tiny)
    even_DD = torch.eye(len(information_DD), dtype=torch.float64, device=information_DD.device)
    mixed_DD = (1 - FLOOR) * information_DD.double() / scale + FLOOR * even_DD
    return torch.linalg.cholesky(mixed_DD).T.float().contiguous()


@ordinary_mode()
def information(parent: Parent, ids_NS: Tensor, seed: int = 0) -> Tensor:
    """Compute E[q qᵀ] with q = g ‖h‖ for the hidden state h behind every layer, (L, D, D) fp32 where it computes.

    Several processes share the windows, and all get the whole.

    Args:
        parent: the dense model.
        ids_NS: windows of text.
        seed: of the tokens that are drawn.

    Raises:
        MoesmithError: no gradient can be taken.
    """
    refuse_gradients(parent, "carve.sensitivity", "set carve.sensitivity to 0")
    refuse_inference(parent.model)
    team = crew()

    def run(batch: int) -> tuple[Tensor, Tensor]:
        model, head = frozen(parent).eval(), head_of(parent.model)
        layers = decoder_layers(model)[1]
        sum_LDD = torch.zeros(parent.L, parent.D, parent.D, device=parent.device)
        count_L = torch.zeros(parent.L, device=parent.device)
        states: list[Tensor] = []

        def keep(_layer: nn.Module, _args: Any, out: Any) -> None:
            state_BSD = hidden_output(out)
            states.append(state_BSD if state_BSD.requires_grad else state_BSD.requires_grad_(True))

        with meter("sensitivity", ids_NS.numel()) as bar, hooked((e, keep) for e in layers):
            for number, ids_BS in team.mine(list(enumerate(ids_NS.split(batch)))):
                states.clear()
                last_TD = model.base_model(ids_BS.to(parent.device), use_cache=False).last_hidden_state.flatten(0, 1)
                labels_T = drawn(head, last_TD.detach(), torch.Generator().manual_seed(seed * 1_000_003 + number))
                matrix: Any = head.module
                loss = head_loss(last_TD, matrix.weight, labels_T, head_V=matrix.bias, shape=head.shape)
                for index, slope_BSD in enumerate(torch.autograd.grad(loss * len(labels_T), states)):
                    q_TD = relative(states[index].detach().flatten(0, 1).float(), slope_BSD.flatten(0, 1).float())
                    sum_LDD[index].addmm_(q_TD.T, q_TD)
                    count_L[index] += len(q_TD)
                bar.advance(ids_BS.numel())
        return sum_LDD, count_L

    sum_LDD, count_L = as_fits("sensitivity", parent, BATCH, run)
    team.add(sum_LDD, count_L)
    return sum_LDD / count_L.clamp_min(1)[:, None, None]


def relative(h_TD: Tensor, slope_TD: Tensor) -> Tensor:
    """g ‖h‖ of the tokens that are no sinks, the longest shortened, (N, D)."""
    size_T1 = h_TD.norm(dim=-1, keepdim=True)
    q_TD = (slope_TD * size_T1)[(size_T1 <= SINK * size_T1.median()).flatten()]
    length_T1 = q_TD.norm(dim=-1, keepdim=True)
    return q_TD * (LOUDEST * length_T1.median() / length_T1.clamp_min(1e-30)).clamp_max(1)


def drawn(head: Head, last_TD: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from every prediction, (T,); the same on every device."""
    found = []
    with torch.no_grad():
        for rows_CD in last_TD.split(CHUNK):
            kind = torch.float64 if has_double(rows_CD.device) else torch.float32
            summed_CV = head(rows_CD).softmax(-1).to(kind).cumsum(-1)
            at_C1 = torch.rand(len(rows_CD), 1, generator=generator, dtype=torch.float64).to(summed_CV.device, kind)
            found.append(torch.searchsorted(summed_CV, at_C1 * summed_CV[:, -1:]).clamp_max(summed_CV.shape[1] - 1))
    return torch.cat(found).flatten()
