"""Ours: every expert's ``down_proj`` refitted on the tokens that its learned router sends to it.

One layer after the other, behind the layers refitted before it and in what is left of attention: masks were learned for
what a layer gets there, which is not what the dense parent's layer gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesmith.calibration.view import Activations, LayerView, held_out
from moesmith.methods.base import Carver, Needs
from moesmith.methods.groups import SQUARES, Fitting, Groups, gathered, sent
from moesmith.methods.refit import fit_work, refit_down, refit_work
from moesmith.methods.steps import Carve, check_gram
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.load import Parent
from moesmith.run.shapes import Shapes
from moesmith.run.step import Job
from moesmith.training.local import energy, squared_error
from moesmith.world import crew

TOKENS = 131_072  # training tokens that a refit reads


class Refit(Carve):
    """Step *refit*."""

    name, title = "refit", "down_proj refitted"


class Refitted(Carver):
    """Learned masks as they are, with a ``down_proj`` for every expert.

    A refit that errs no less than the parent's own columns on windows that it did not read is dropped, and so is one
    that no token there speaks for: then the expert stays as it is.
    """

    name, version = "tomoe", 3
    activations: ClassVar[Activations] = "carved"

    def needs(self) -> Needs:
        """Hold all tokens, and make up for what earlier layers lost."""
        return Needs(gram=True, groups=SQUARES - 2, passes=2.1, held=True, repair=True)

    def tokens(self, shapes: Shapes) -> int:
        """Some of the training text."""
        return min(TOKENS, int(self.recipe.masks.tokens))

    def closed_forms(self, shapes: Shapes) -> tuple[float, float]:
        """All tokens' Gram matrix, and those of experts; every expert is fitted and refitted."""
        D, F = shapes.sizes.D, shapes.sizes.F
        grams = gathered(self.tokens(shapes), shapes.E, Fitting().most)
        return grams, shapes.E * (fit_work(D, F) + refit_work(D, F, shapes.kept))

    def key(self, parent: Parent) -> dict[str, Any]:
        """Add nothing but the settings of the least squares: masks have a key of their own."""
        return {"version": self.version, "ridge": self.settings.ridge, "pool": self.settings.pool}

    def base(self, job: Job) -> Carving:
        """The masks' carving."""
        self.learned = job.run.carving("masks")
        return self.learned

    def begin(self, job: Job) -> list[list[Tensor]]:
        """The training text's beginning, as one group."""
        check_gram(job.parent, SQUARES, gram=True)
        blocks = job.run.training("masks")
        return [[blocks[: max(1, TOKENS // blocks.shape[1])].long()]]

    def carve(self, view: LayerView) -> Layer:
        """Refit the layer's experts."""
        layer, device = self.learned.layers[view.index], view.parent.device
        assert isinstance(layer.router, Linear)
        tokens, experts = view.tokens().near(device), len(layer.routed)
        ids_T = sent(layer.router.weight_ED, tokens.x_TD, device)
        _, unread_N = held_out(tokens, torch.arange(len(ids_T)))
        groups = Groups(view.network, tokens, ids_T, experts, Fitting(self.settings.ridge, self.settings.pool))
        made = {}
        mine = crew().mine(range(experts))
        for expert in mine:
            rows_N = unread_N[ids_T[unread_N] == expert]
            made[expert] = self._refit(groups, expert, layer.routed[expert], rows_N, view.parent.stored)
            view.advance(1 / len(mine))
        found = crew().merged(made)
        before, after, nothing = (sum(found[expert][1][part] for expert in range(experts)) for part in range(3))
        self.note(learned=round(before / (nothing or 1), 5), refitted=round(after / (nothing or 1), 5))
        self.measured.setdefault("sent", []).extend((torch.bincount(ids_T, minlength=experts) / len(ids_T)).tolist())
        return replace(layer, routed=[found[expert][0] for expert in range(experts)])

    def _refit(
        self, groups: Groups, number: int, expert: Expert, rows_N: Tensor, dtype: torch.dtype
    ) -> tuple[Expert, tuple[float, float, float]]:
        """The expert, refitted if that is better; on unread tokens, squared errors before, after, and of nothing."""
        _, gram_FF, down_DF = groups.fit(number)
        network, kept, tokens = groups.network, expert.channels, groups.tokens
        own_DF = network.down_DF[:, kept.to(network.down_DF.device)]
        refitted_DF = refit_down(down_DF, gram_FF, kept, self.settings.ridge)
        before, after = (
            squared_error(network.narrowed(kept, part_DF).to(torch.float32), tokens, rows_N)
            for part_DF in (own_DF, refitted_DF)
        )
        nothing = energy(tokens, rows_N)
        if not after < before:
            return expert, (before, before, nothing)
        return replace(expert, down_DF=refitted_DF.to("cpu", dtype)), (before, after, nothing)

    def metrics(self) -> dict[str, Any]:
        """Errors of the networks on windows that no refit read, and each expert's share of the tokens."""
        found: dict[str, Any] = {"share_by_expert": self._shares()}
        for name in ("learned", "refitted"):
            values = self.measured[name]
            found[f"error_{name}"] = round(sum(values) / len(values), 4)
        curves = {name: self.measured[name] for name in ("learned", "refitted")}
        return found | {"layers": {"error of the network's output": curves}}

    def _shares(self) -> list[float]:
        shares_LE = torch.tensor(self.measured["sent"]).view(len(self.measured["learned"]), -1)
        return [round(share, 4) for share in shares_LE.mean(0).tolist()]

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how well networks are reproduced."""
        return f"error of networks {metrics['error_learned']:.3f} learned, {metrics['error_refitted']:.3f} refitted"
