"""DOT-MoE: its transport plan and rounding against plain forms, its gradients, and the way from text to a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import UNTRAINED, convert
from golden import ASSETS
from scipy.optimize import linprog
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.export.target import Options
from moesmith.export.targets import export_run
from moesmith.methods.dot_moe import (
    Assignment,
    AssignObjective,
    AssignSection,
    assigned_model,
    load_balance,
    rounded,
    sinkhorn,
)  # fmt: skip
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.run.recipe import load_recipe
from moesmith.testing.parents import FAMILIES, save_tiny, tiny_parent

LEARN = ["carve.experts=4", "assign.tokens=256", "assign.window=32", "assign.batch=2", "assign.micro_batch=2"]


def greedy(plan_FE: Tensor) -> list[int]:
    """The published rounding, entry by entry."""
    F, E = plan_FE.shape
    found, left = [-1] * F, [F // E] * E
    for place in plan_FE.flatten().argsort(descending=True, stable=True).tolist():
        row, expert = divmod(place, E)
        if found[row] < 0 and left[expert]:
            found[row], left[expert] = expert, left[expert] - 1
    return found


def test_rounding_is_greedy_for_all_layers_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for F, E in ((6, 2), (12, 4), (60, 5), (8, 8)):
        for spread in (0.1, 1.0, 6.0):
            plan_LFE = (spread * torch.randn(5, F, E, generator=generator)).softmax(-1)
            found_LF = rounded(plan_LFE)
            assert found_LF.tolist() == [greedy(plan_FE) for plan_FE in plan_LFE]
            assert all(torch.bincount(ids, minlength=E).tolist() == [F // E] * E for ids in found_LF)


def test_the_plan_has_equal_experts_and_is_nearest_to_the_affinities() -> None:
    logits_LFE = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan_LFE = sinkhorn(logits_LFE, 500)
    assert torch.allclose(plan_LFE.sum(-1), torch.ones(2, 12, dtype=torch.float64))
    assert torch.allclose(plan_LFE.sum(1), torch.full((2, 3), 4.0, dtype=torch.float64), atol=1e-6)
    # the plan nearest to exp(A) is diag(u) exp(A) diag(v): log P - A is a row's number plus a column's
    rest = plan_LFE.log() - logits_LFE
    both = rest - rest.mean(2, keepdim=True) - rest.mean(1, keepdim=True) + rest.mean((1, 2), keepdim=True)
    assert both.abs().max() < 1e-6


def test_a_cold_plan_is_the_best_assignment() -> None:
    """At a low temperature the plan approaches the linear program's optimum (found by scipy)."""
    affinity_FE = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = np.kron(np.eye(8), np.ones((1, 2)))
    columns = np.kron(np.ones((1, 8)), np.eye(2))
    best = linprog(
        -affinity_FE.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=[1] * 8 + [4] * 2, bounds=(0, 1)
    )
    plan_FE = sinkhorn(affinity_FE[None] / 0.02, 3000)[0]
    assert float((plan_FE * affinity_FE).sum()) == pytest.approx(-best.fun, rel=0.02)


def test_load_balance_is_one_where_all_experts_are_alike() -> None:
    logits_TE = torch.eye(4).repeat(5, 1) * 30
    assert float(load_balance(logits_TE, 1)) == pytest.approx(1, abs=1e-5)
    assert float(load_balance(torch.tensor([[30.0, 0, 0, 0]]), 1)) == pytest.approx(4, abs=1e-5)


def objective_for(parent: Parent, top_k: int = 2, **settings: Any) -> AssignObjective:
    spec = AssignSection(rounds=20, **settings)
    learned = Assignment(parent, 4, top_k, "random", 0)
    return AssignObjective(assigned_model(parent, learned), parent.model, learned, spec)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_all_experts_are_the_parent(family: str) -> None:
    parent = tiny_parent(family)
    objective = objective_for(parent, top_k=4)
    objective.learned.draw(20)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(objective.model(ids).logits, parent.model(ids).logits, atol=1e-5)


def test_both_choices_get_gradients_and_the_parent_none() -> None:
    parent = tiny_parent("llama")
    objective = objective_for(parent)
    objective(torch.arange(48).view(2, 24)).backward()
    assert float(objective.learned.affinity_LFE.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(objective.learned.router_LED.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert all(p.grad is None for p in parent.model.parameters())
    assert set(objective.measured) == {"text", "z", "balance"}
    for member_FE in objective.learned.member_LFE:
        assert set(member_FE.unique().tolist()) == {0.0, 1.0}


def test_the_temperature_falls_evenly() -> None:
    objective = objective_for(tiny_parent("llama"), temperature=1.0, last_temperature=0.2)
    seen = []
    for step in range(5):
        objective.begin(step, 5)
        seen.append(objective.learned.temperature)
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_all_the_way(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "m")
    run = convert("dot-moe", tmp_path / "m", ASSETS / "text", tmp_path / "run", [*UNTRAINED[1:], *LEARN])
    carving, metrics = run.carving(), run.metrics("assign")
    assert run.metrics("export")["logits_difference"] < 1e-3
    assert (metrics["steps"], carving.layers[0].top_k, carving.layers[0].mix) == (4, 2, "sum")
    for layer in carving.layers:
        assert torch.equal(torch.cat([e.channels for e in layer.routed]).sort().values, torch.arange(64))
    if run.parent().family == NATIVE:
        with pytest.raises(MoesmithError, match="gate"):
            export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")
    else:
        export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")


def test_the_carving_computes_what_was_trained(tmp_path: Path) -> None:
    """The model of the last step, at its temperature, is the model that is written."""
    from moesmith.files.artefact import read_tensors

    save_tiny("llama", tmp_path / "m")
    run = convert("dot-moe", tmp_path / "m", ASSETS / "text", tmp_path / "run", [*UNTRAINED[1:], *LEARN])
    parent = run.parent()
    learned = Assignment(parent, 4, 2, "random", 0)
    learned.load_state_dict(read_tensors(run.path("assign") / "assign.safetensors"))
    learned.temperature = AssignSection().last_temperature
    ids = torch.arange(30).view(1, 30)
    with torch.no_grad():
        learned.draw(AssignSection().rounds)
        wanted = assigned_model(parent, learned)(ids).logits
        found = build(parent, run.carving())(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)


def test_it_starts_from_clusters(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    learned = Assignment(parent, 4, 2, "cluster", 0)
    with torch.no_grad():
        ids_LF = rounded(learned.plan(50))
    assert torch.equal(ids_LF, learned.affinity_LFE.argmax(-1))  # balanced already
    save_tiny("llama", tmp_path / "m")
    given = [*UNTRAINED[1:], *LEARN, "carve.split=cluster"]
    run = convert("dot-moe", tmp_path / "m", ASSETS / "text", tmp_path / "run", given)
    assert 0 <= run.metrics("assign")["moved"] < 0.5
    assert "started cluster" in run.recipe.method.about(run)[1]


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    given = [
        *UNTRAINED[1:],
        *LEARN,
        "assign.tokens=8192",
        "assign.lr=0.03",
        "assign.balance_weight=0",
        "assign.z_weight=0",
    ]
    run = convert("dot-moe", ASSETS / "parents" / "llama", ASSETS / "text", tmp_path / "run", given)
    metrics = run.metrics("assign")
    assert metrics["last_loss"] < metrics["first_loss"]
    assert math.isfinite(run.evaluation["stages"]["assign"]["geomean"])


def test_refusals() -> None:
    parent = tiny_parent("llama")
    with pytest.raises(MoesmithError, match=r"assign\.tokens is 0"):
        load_recipe("dot-moe", None, ["carve.experts=4", "assign.tokens=0"]).method.check(parent)
    with pytest.raises(MoesmithError, match="cannot be cut into 24 equal parts"):
        load_recipe("dot-moe", None, ["carve.experts=24"]).method.check(parent)
    with pytest.raises(MoesmithError, match=r"ratio 0\.4 leaves"):
        load_recipe("dot-moe", None, ["carve.ratio=0.4"])
