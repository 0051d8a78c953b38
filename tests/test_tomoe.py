"""ToMoE over frozen weights: open masks, what training touches, the objective, the harvest, the warm start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.methods.tomoe import hypernetwork
from moesmith.methods.tomoe.harvest import _Curve, check_budget, floor_of, harvest
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.objective import MaskObjective, active_share, log_ratio
from moesmith.methods.tomoe.student import MaskedFFN, masked_model
from moesmith.mixture.attention import zeroed
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import active_share as share_of
from moesmith.mixture.moe import build
from moesmith.parent.digests import model_digest
from moesmith.parent.load import Parent
from moesmith.parent.sizes import Sizes
from moesmith.parent.structure import attention_weights, decoder_layers
from moesmith.testing.masks import ATTENTION, IDS, SEEN, WIDE, harvested, spec_of, tiny_masks
from moesmith.testing.parents import FAMILIES, tiny_parent
from moesmith.training.loop import Masters, train


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def objective_for(parent: Parent, **settings: Any) -> MaskObjective:
    masks = tiny_masks(parent, **settings)
    return MaskObjective(masked_model(parent, masks), parent.model, masks, masks.spec)


# --- the student ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_open_masks_are_the_parent(family: str, attention: str) -> None:
    parent = tiny_parent(family)
    dense = logits_of(parent.model)
    open_, masked = (logits_of(masked_model(parent, tiny_masks(parent, bias=b, attention=attention))) for b in (60, 1))
    torch.testing.assert_close(open_, dense, rtol=1e-4, atol=1e-4)
    assert (masked - dense).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_student_computes_what_its_harvest_computes(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise that turns sampling into a threshold, and masks so wide that none is empty, which a harvest mends."""
    parent = tiny_parent(family)
    masks = tiny_masks(parent, attention=attention, noise="expert", budget=0.95 if attention == "dynamic" else 0.8)
    carving, facts = harvest(masks, parent, SEEN, {})
    for carved in carving.attention:  # as a student: what was seen on the training text is no bound
        carved.vo_h, carved.top_k = torch.ones_like(carved.vo_h), torch.tensor(len(carved.vo_h))
        if carved.dynamic_WR is not None:
            carved.top_k_qk = torch.tensor(len(carved.dynamic_WR))
    level = math.exp(facts["threshold"] - 1e-5 + masks.spec.bias)
    monkeypatch.setattr(hypernetwork, "exponential", lambda *shape, like: torch.full(shape, level))
    masks.draw()
    student = logits_of(masked_model(parent, masks))
    finished = logits_of(build(parent, carving))
    assert (student - logits_of(parent.model)).abs().max() > 0.1
    torch.testing.assert_close(student, finished, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("settings", [{}, {"noise": "expert", "masking": "single", "attention": "dynamic"}])
def test_training_touches_masks_alone(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    parent = tiny_parent(family)
    spec = spec_of(**settings, tokens=3 * 2 * 16, window=16, batch=2, micro_batch=1, lr=0.01, clip=None)
    masks = Masks(Sizes.of(parent), 4, spec, seed=0)
    before = {name: value.clone() for name, value in masks.state_dict().items()}
    digest, dense = model_digest(parent.model), logits_of(parent.model)
    objective = MaskObjective(masked_model(parent, masks), parent.model, masks, spec)
    parameters = {f"masks.{name}": p for name, p in masks.named_parameters()}
    outcome = train(objective, parameters, SEEN[:, :16], spec, tmp_path, seed=1)
    assert (outcome.steps, outcome.trainable) == (3, Sizes.of(parent).trained(4))
    assert model_digest(parent.model) == digest
    assert all(p.grad is None for p in parent.model.parameters())
    assert torch.equal(logits_of(parent.model), dense)
    moved = {name for name, value in masks.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == before.keys() - {"hyper.z_MNI"}


def test_every_parameter_learns_from_every_part() -> None:
    parent = tiny_parent("llama")
    objective = objective_for(parent, bias=1.0)
    objective(IDS).backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.masks.parameters())
    assert all(p.grad is None for p in parent.model.parameters())


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        objective = objective_for(tiny_parent("llama"), bias=1.0)
        objective.model.train()
        if recompute:
            objective.model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        objective(IDS).backward()
        grads.append(torch.cat([p.grad.flatten() for p in objective.masks.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_in_training_mode() -> None:
    parent = tiny_parent("phi", resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1)
    model = masked_model(parent, tiny_masks(parent, bias=60.0)).train()
    torch.testing.assert_close(logits_of(model), logits_of(parent.model), rtol=1e-4, atol=1e-4)
    assert (
        logits_of(parent.model.train()) - logits_of(model)
    ).abs().max() > 0.01  # the parent itself keeps its dropout


@pytest.mark.parametrize(("clip", "left"), [(None, 100.0), (1.0, 1.0)])
def test_a_gradient_is_clipped_only_if_asked(clip: float | None, left: float) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    masters = Masters({"p": p}, spec_of(clip=clip))
    p.grad = torch.full((4,), 50.0)
    assert masters.step(0.1, clip) == pytest.approx(100)
    grad = masters.fp32["p"].grad
    assert grad is not None
    assert float(grad.norm()) == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "masking", "twice"), [("llama", "double", True), ("llama", "single", False), ("phi", "double", False)]
)
def test_a_network_without_a_gate_is_masked_once(family: str, masking: str, twice: bool) -> None:
    parent = tiny_parent(family)
    model = masked_model(parent, tiny_masks(parent, masking=masking))
    assert [m.twice for m in model.modules() if isinstance(m, MaskedFFN)] == [twice] * 2


# --- the objective --------------------------------------------------------------------------------------------


def test_log_ratio_is_two_sided() -> None:
    assert 16 * float(log_ratio(torch.tensor(1.0), 0.5)) == pytest.approx(11.07, abs=5e-3)
    assert 16 * float(log_ratio(torch.tensor(1.0), 0.4)) == pytest.approx(14.64, abs=5e-3)
    assert float(log_ratio(torch.tensor(0.25), 0.5)) == pytest.approx(math.log(0.501 / 0.251), rel=1e-5)
    assert float(log_ratio(torch.tensor(0.5), 0.5)) == pytest.approx(0, abs=1e-6)
    for share, sign in ((0.7, 1.0), (0.3, -1.0)):
        x = torch.tensor(share, requires_grad=True)
        log_ratio(x, 0.5).backward()
        assert x.grad is not None
        assert x.grad.sign() == sign


@pytest.mark.parametrize(("budget", "start"), [(0.5, 11.07), (0.4, 14.64)])
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_budgets_penalty_starts_where_it_should(budget: float, start: float, attention: str) -> None:
    settings = {"budget": budget, "attention": attention, "bias": 60.0}
    objective = objective_for(tiny_parent("llama"), balance_weight=0, **settings)
    objective(IDS)
    penalty, measured = objective.penalties()
    assert measured["active"] == measured["union"] == 1.0
    assert penalty.item() == pytest.approx(start, abs=0.01)  # nothing from a full union


def test_the_loss_is_the_sum_of_its_parts() -> None:
    parent = tiny_parent("llama")
    objective = objective_for(parent, bias=1.0, kl_weight=3.0)
    torch.manual_seed(9)
    loss = objective(IDS)
    torch.manual_seed(9)
    objective.masks.draw()
    ours, theirs = (logits_of(m)[:, :-1].flatten(0, 1).log_softmax(-1) for m in (objective.model, parent.model))
    kl = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    penalty, measured = objective.penalties()
    assert objective.measured["kl"] == pytest.approx(float(kl), abs=1e-4)
    logged = {key: objective.measured[key] for key in measured}
    assert logged == pytest.approx({key: float(value) for key, value in measured.items()}, abs=1e-5)
    torch.testing.assert_close(loss, 3 * kl + penalty)


def weighed(objective: MaskObjective, monkeypatch: pytest.MonkeyPatch, mask_NF: Tensor, one_hot_TN: Tensor) -> Any:
    """The penalties for given masks and routing of every layer."""
    for ffn in objective.masks.ffn:
        monkeypatch.setattr(ffn, "sample", lambda: mask_NF)
        ffn.one_hot_TN = one_hot_TN
    return objective.penalties()


def test_balance_lies_between_uniform_and_collapsed_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_for(tiny_parent("llama"), attention="none", budget_weight=0, union_weight=0)
    full, N = torch.ones(4, 64), 4
    for ids, load, entropy in (
        (torch.arange(40) % N, 1 / N, math.log(N)),
        (torch.zeros(40, dtype=torch.long), 1.0, 0.0),
        (torch.arange(40) % 2, 0.5, math.log(2)),
    ):
        penalty, measured = weighed(objective, monkeypatch, full, F.one_hot(ids, N).float())
        assert float(penalty) == pytest.approx(load)
        assert (measured["load"], measured["entropy"]) == pytest.approx((load, entropy), abs=1e-4)


def test_balance_pulls_with_the_load_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_for(tiny_parent("llama"), attention="none", budget_weight=0, union_weight=0)
    one_hot_TN = F.one_hot(torch.tensor([0, 0, 0, 1, 2]), 4).float().requires_grad_()
    weighed(objective, monkeypatch, torch.ones(4, 64), one_hot_TN)[0].backward()
    torch.testing.assert_close(one_hot_TN.grad, torch.tensor([0.6, 0.2, 0.2, 0.0]).expand(5, 4) / 5)


def test_half_of_the_unions_weight_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_for(tiny_parent("llama"), attention="none", budget_weight=0, balance_weight=0)
    routed, mask_NF = F.one_hot(torch.arange(8) % 4, 4).float(), torch.zeros(4, 64)
    for expert in range(4):
        mask_NF[expert, 16 * expert : 16 * expert + 8] = 1
    penalty, measured = weighed(objective, monkeypatch, mask_NF, routed)
    assert measured["union"] == 0.5
    assert float(penalty) == pytest.approx(1.5 * math.log(1.001 / 0.501), rel=1e-5)
    penalty, measured = weighed(objective, monkeypatch, torch.ones(4, 64), routed)
    assert measured["union"] == 1.0
    assert float(penalty) == pytest.approx(0.0, abs=1e-6)


def test_the_budget_pulls_at_the_widest_expert_alone() -> None:
    masks = tiny_masks(tiny_parent("llama"), attention="none", spread=10.0)
    logits_NF = masks.ffn[0].logits().detach().requires_grad_()
    mask_NF = hypernetwork.gumbel_sigmoid(logits_NF, torch.ones(4, 64), 0.4, 3.0)
    widest = int(mask_NF.sum(-1).argmax())
    active_share(masks, [mask_NF.sum(-1).amax(), torch.tensor(64.0)]).backward()
    assert logits_NF.grad is not None
    assert logits_NF.grad.any(-1).tolist() == [n == widest for n in range(4)]


# --- the harvest ----------------------------------------------------------------------------------------------


def filled(tensor: Tensor) -> int:
    """Entries of a matrix in rows and columns that are not zero."""
    return int(tensor.any(1).sum()) * int(tensor.any(0).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_active_share_is_what_the_tensors_hold(family: str) -> None:
    parent = tiny_parent(family)
    carving = harvested(parent, budget=0.5)
    active, total = 0, 0
    for index, layer in enumerate(decoder_layers(parent.model)[1]):
        ffn, carved = parent.ffns[index], carving.attention[index]
        dense = [w for w in (ffn.gate_FD, ffn.up_FD, ffn.down_DF.T) if w is not None]
        widest = max(carving.mask(index), key=lambda mask_F: int(mask_F.sum()))
        active += sum(filled(w * widest[:, None]) for w in dense)
        total += sum(w.numel() for w in dense)
        carved.vo_h = torch.arange(len(carved.vo_h)) < carved.top_k  # as many as the hungriest token keeps
        for name, tensor in attention_weights(layer, parent.config).items():
            if name.endswith("_proj.weight"):
                active += filled(zeroed(name, tensor, carved))
                total += tensor.numel()
    assert share_of(parent, carving) == pytest.approx(active / total, abs=1e-12)
    assert 0.4 < active / total <= 0.5


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
def test_the_harvest_meets_its_budget(family: str, attention: str, budget: float) -> None:
    parent = tiny_parent(family, **WIDE)
    masks = tiny_masks(parent, attention=attention, budget=budget)
    carving, facts = harvest(masks, parent, SEEN, {"method": "tomoe"})
    assert budget - 0.001 <= share_of(parent, carving) <= budget
    assert facts["active_share"] == share_of(parent, carving)
    assert facts["union"] == pytest.approx(float(carving.union().mean()))
    assert facts["width_ffn"] == carving.widths().amax(1).double().mean()
    assert len(carving.attention) == (0 if attention == "none" else 4)
    assert all(width >= 1 for layer in carving.layers for width in layer.widths)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0.36, 0.6, 0.9])
def test_a_small_parents_harvest_never_exceeds_its_budget(family: str, budget: float) -> None:
    parent = tiny_parent(family)
    for attention in ATTENTION:
        if floor_of(Sizes.of(parent), attention) < budget:
            assert share_of(parent, harvested(parent, budget, attention=attention)) <= budget


def test_one_threshold_decides_everything() -> None:
    parent = tiny_parent("llama", **WIDE)
    masks = tiny_masks(parent, budget=0.5)
    carving, facts = harvest(masks, parent, SEEN, {})
    threshold = facts["threshold"]
    for index, (ffn, gate) in enumerate(masks.layers()):
        assert torch.equal(carving.mask(index), ffn.logits() >= threshold)
        assert torch.equal(carving.layers[index].router.weight_ED, ffn.router_ND)
        free = gate.static_logits() >= threshold
        assert torch.equal(carving.attention[index].qk_h, torch.cat([free, free]))
        assert carving.attention[index].threshold == pytest.approx(threshold)


def test_units_of_equal_logit_come_together_or_not_at_all() -> None:
    curve = _Curve()
    curve.add(torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0]), 1.0)  # the first always stays
    for budget, kept in ((1, 1), (2, 2), (3, 2), (3.9, 2), (4, 4), (5, 5), (9, 5)):
        threshold = curve.threshold(budget)
        assert 1 + int((torch.tensor([2.0, 1.0, 1.0, 0.0]) >= threshold).sum()) == kept
    assert curve.threshold(2) == 1.5  # halfway: no logit is near
    assert curve.threshold(0.5) > 2


def test_equal_widths_fill_up_for_free() -> None:
    parent = tiny_parent("llama", **WIDE)
    ragged, equal = (harvested(parent, widths=widths) for widths in ("threshold", "equal"))
    assert (ragged.widths() != ragged.widths()[:, :1]).any()
    assert torch.equal(equal.widths(), ragged.widths().amax(1, keepdim=True).expand(-1, 4))
    assert share_of(parent, equal) == share_of(parent, ragged)
    assert all((equal.mask(i) >= ragged.mask(i)).all() for i in range(parent.L))


def test_a_golden_harvest() -> None:
    carving = harvested(tiny_parent("llama"), budget=0.5)
    assert carving.widths().tolist() == WIDTHS
    assert [(a.width_qk, a.width_vo) for a in carving.attention] == HEADS


WIDTHS = [[24, 25, 27, 22], [35, 29, 35, 29]]
HEADS = [(2, 5), (4, 6)]  # of 8 dimensions, Q/K and V/O


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_harvest_survives_the_disk(attention: str, tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = harvested(parent, attention=attention)
    carving.save(tmp_path)
    again = Carving.load(tmp_path)
    assert torch.equal(again.widths(), carving.widths())
    assert share_of(parent, again) == share_of(parent, carving)
    assert len(again.attention) == len(carving.attention)
    for one, other in zip(again.attention, carving.attention, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        for name, tensor in other.tensors().items():
            assert one.tensors()[name].dtype == tensor.dtype
            assert torch.equal(one.tensors()[name], tensor)
    assert torch.equal(logits_of(build(parent, again)), logits_of(build(parent, carving)))


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_budget_below_the_floor_is_refused(attention: str) -> None:
    sizes = Sizes.of(tiny_parent("llama"))
    floor = floor_of(sizes, attention)
    check_budget(sizes, floor, attention)
    with pytest.raises(MoesmithError, match=r"cannot be reached: 0\.\d+ of the parameters always stay"):
        check_budget(sizes, floor - 1e-4, attention)
    assert (floor > 1 / 3) is (attention == "none")  # attention is a third of this parent
