"""The model in training with its loss: the next token, the parent's predictions, the parent's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.parent.head import head_of
from moesmith.parent.hooks import hidden_output, hooked
from moesmith.parent.layerwise import share
from moesmith.parent.load import Parent
from moesmith.parent.structure import decoder_layers
from moesmith.run.settings import TrainSection
from moesmith.training.losses import head_loss


def frozen(parent: Parent) -> PreTrainedModel:
    """Build the parent's architecture around its own weights, frozen, to put other modules into.

    Dropout is off even in training mode: what is learned is learned over the parent as it computes.
    """
    model = share(parent.model).requires_grad_(False)
    for module in model.modules():
        still: Any = module
        if isinstance(module, nn.Dropout):
            still.p = 0.0
        elif hasattr(module, "attention_dropout"):
            still.attention_dropout = 0.0
    return model


class Student(nn.Module):
    """The model in training with its loss, so that data-parallel wrappers see one forward call."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None, spec: TrainSection) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self._teacher = [teacher]  # in a list it is not a submodule, so it is neither trained nor wrapped

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Compute the mean loss over the tokens that have a successor."""
        mix, hidden = (self.spec.mix, self.spec.hidden) if self.spec.loss == "distill" else (0.0, 0.0)
        return token_loss(self.model, ids_BS, self._teacher[0], mix, self.spec.kl_temperature, hidden)


def token_loss(
    model: PreTrainedModel,
    ids_BS: Tensor,
    teacher: PreTrainedModel | None,
    mix: float,
    temperature: float = 1.0,
    hidden: float = 0.0,
) -> Tensor:
    """Compute :func:`moesmith.training.losses.head_loss` over the tokens of ``ids_BS`` that have a successor.

    Args:
        model: the student.
        ids_BS: token ids.
        teacher: the dense parent; needed where ``mix`` or ``hidden`` is above 0.
        mix: share of distillation.
        temperature: temperature of the distillation.
        hidden: weight of :func:`drift`, which is added.
    """
    wanted: list[Tensor] = []
    if teacher is not None and (mix > 0 or hidden > 0):
        with torch.no_grad():
            wanted = _states(teacher, ids_BS, every=hidden > 0)
    states = _states(model, ids_BS, every=hidden > 0)
    head, labels_N = head_of(model), ids_BS[:, 1:].flatten()
    given_ND = states[-1][:, :-1].flatten(0, 1)
    wanted_ND = wanted[-1][:, :-1].flatten(0, 1) if wanted and mix > 0 else None
    matrix: Any = head.module
    loss = head_loss(given_ND, matrix.weight, labels_N, wanted_ND, mix, temperature, matrix.bias, head.shape)
    return loss + hidden * drift(states, wanted) if hidden > 0 and wanted else loss


def drift(states: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Compute ‖h − h*‖² / ‖h*‖² of hidden states (B, S, D), the mean over layers and tokens, fp32."""
    parts = []
    for state_BSD, wanted_BSD in zip(states, wanted, strict=True):
        wanted_BSD = wanted_BSD.float()
        error_BS = (state_BSD.float() - wanted_BSD).square().sum(-1)
        parts.append((error_BS / wanted_BSD.square().sum(-1).clamp_min(1e-20)).mean())
    return torch.stack(parts).mean()


def _states(model: PreTrainedModel, ids_BS: Tensor, *, every: bool) -> list[Tensor]:
    """Return the hidden states behind ``every`` layer, (B, S, D), the last one normalised; or that one alone."""
    states: list[Tensor] = []

    def keep(_layer: nn.Module, _args: Any, out: Any) -> None:
        states.append(hidden_output(out))

    # not by output_hidden_states, which transformers knows of its own classes only: a spread model has another
    with hooked((layer, keep) for layer in decoder_layers(model)[1][:-1] if every):
        last_BSD: Tensor = model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
    return [*states, last_BSD]
