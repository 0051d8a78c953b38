"""The training loop: schedule, data order, what it may change, and that stopping and going on changes nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_parallel import story
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moesmith.conversion.steps.training import constants, harvest, prepare
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_metadata, read_tensors
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import build, moe_blocks
from moesmith.parent.hooks import hooked
from moesmith.parent.load import Parent
from moesmith.run.recipe import load_recipe
from moesmith.run.settings import TrainSection
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.training import loop
from moesmith.training.loop import Masters, batch_rows, learning_rate, steps_of, train
from moesmith.training.student import Student, token_loss
from moesmith.world import World

WINDOW, BATCH = 16, 8
STAGE1 = TrainSection(window=WINDOW, batch=BATCH, micro_batch=BATCH, lr=3e-3, gate="dense", gate_temperature=0.5)
STAGE2 = TrainSection(window=WINDOW, batch=BATCH, micro_batch=BATCH, lr=3e-3, lora_rank=2, norms=True)


def section(base: TrainSection, steps: int = 6, **changes: Any) -> TrainSection:
    """A stage of so many steps."""
    return base.model_copy(update={"tokens": steps * WINDOW * changes.get("batch", BATCH)} | changes)


def some_blocks(count: int = 40) -> Tensor:
    return torch.randint(0, 300, (count, WINDOW), generator=torch.Generator().manual_seed(0))


def model_for(spec: TrainSection, parent: Parent, **options: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """A MoE ready for a stage, and what the stage trains."""
    options = {"compensation": "bias", "noise": True} | options
    model = build(parent, random_carving(parent, **options), "masked" if spec.gate == "dense" else "sliced")
    return model, prepare(model, spec, seed=1)


def values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def trained(spec: TrainSection, folder: Path, blocks: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """The parameters after training a fresh model."""
    parent = tiny_parent("llama")
    model, parameters = model_for(spec, parent, **options)
    teacher: Any = parent.model if spec.loss == "distill" else None
    blocks = some_blocks().int() if blocks is None else blocks  # int32, as the corpus holds them
    train(Student(model, teacher, spec), parameters, blocks, spec, folder, seed=1)
    return values(parameters)


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# Schedule and data order --------------------------------------------------------------------------------------------


def test_the_published_schedule() -> None:
    """As published: 9,535 steps, 287 of warm-up, cosine from 1e-4 to a tenth; stage 1 constant without warm-up."""
    recipe = load_recipe("dive-1of8")
    steps = steps_of(recipe.stage2)
    rates = [learning_rate(step, steps, recipe.stage2) for step in range(steps)]
    assert steps == 9535
    assert sum(a < b for a, b in itertools.pairwise(rates)) == 286  # up to the 287th, and never again
    assert rates[0] == pytest.approx(1e-4 / 287)
    assert rates[286] == rates[287] == max(rates) == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[287:]))
    assert rates[-1] == pytest.approx(1e-5)
    middle = (287 + 9534) // 2
    assert (rates[middle] + rates[middle + 1]) / 2 == pytest.approx(5.5e-5)
    assert {learning_rate(step, 1905, recipe.stage1) for step in range(1905)} == {1e-4}


@given(st.integers(1, 300), st.floats(0, 0.99), st.sampled_from(["constant", "cosine"]), st.floats(0, 1))
def test_any_schedule_stays_between_nothing_and_its_peak(steps: int, warmup: float, schedule: Any, low: float) -> None:
    spec = TrainSection(lr=2.0, warmup=warmup, schedule=schedule, min_ratio=low)
    rates = [learning_rate(step, steps, spec) for step in range(steps)]
    assert all(0 <= rate <= 2.0000001 for rate in rates)
    warm = math.ceil(warmup * steps)
    assert warm == 0 or rates[warm - 1] == pytest.approx(2)
    assert all(rate >= 2 * low - 1e-9 for rate in rates[warm:])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 4), st.integers(0, 5))
def test_every_pass_sees_every_block_once(blocks: int, batch: int, passes: int, seed: int) -> None:
    steps = -(-blocks * passes // batch)
    rows = torch.cat([batch_rows(blocks, step, batch, seed) for step in range(steps)]).tolist()
    assert len(rows) == steps * batch
    for start in range(0, blocks * passes, blocks):
        assert sorted(rows[start : start + blocks]) == list(range(blocks))
    if blocks > 20 and passes > 1:
        assert rows[:blocks] != rows[blocks : 2 * blocks]
        assert not torch.equal(batch_rows(blocks, 0, blocks, seed), batch_rows(blocks, 0, blocks, seed + 1))


# What a step computes -----------------------------------------------------------------------------------------------


def test_small_batches_add_up_to_the_big_one(tmp_path: Path) -> None:
    plain = section(STAGE2, lora_dropout=0.0)
    whole = trained(plain, tmp_path / "8", noise=False)
    for micro in (1, 3, 5):  # 3 and 5 leave a smaller rest
        parts = trained(plain.model_copy(update={"micro_batch": micro}), tmp_path / f"{micro}", noise=False)
        assert largest(whole, parts) < 1e-5
    assert largest(whole, trained(section(STAGE2, lora_dropout=0.5), tmp_path / "d", noise=False)) > 1e-3


@pytest.mark.parametrize("compensation", ["none", "bias", "refit"])
def test_a_masked_step_is_a_sliced_step(tmp_path: Path, compensation: str) -> None:
    results = []
    for form in ("masked", "sliced"):
        parent = tiny_parent("llama")
        model = build(parent, random_carving(parent, compensation=compensation), form)  # type: ignore[arg-type]
        parameters = prepare(model, STAGE1, seed=1)
        train(
            Student(model, None, section(STAGE1)), parameters, some_blocks(), section(STAGE1), tmp_path / form, seed=1
        )
        results.append(values(parameters))
    assert largest(*results) < 1e-5
    start = prepare(build(tiny_parent("llama"), random_carving(tiny_parent("llama")), "masked"), STAGE1, seed=1)
    assert largest(results[0], values(start)) > 1e-3


@pytest.mark.parametrize("spec", [STAGE1, STAGE2], ids=["stage1", "stage2"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointing_gives_the_same_gradients(spec: TrainSection, family: str) -> None:
    parent = tiny_parent(family)
    model, parameters = model_for(spec, parent, top_k=2)
    model.requires_grad_(False)
    gradients = []
    for checkpointing in (False, True):
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = None
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(3)  # of noise and dropout
        Student(model, None, spec)(some_blocks(4)).backward()
        gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
    assert gradients[0].keys() == parameters.keys()
    assert largest(*gradients) == 0
    assert any(float(g.abs().max()) > 0 for g in gradients[0].values())


def test_masters_remember_what_bf16_rounds_away() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"p": parameter}, STAGE2)
    for step in range(12):
        parameter.grad = torch.ones(4, dtype=torch.bfloat16)
        assert masters.step(5e-4, clip=100) == pytest.approx(2)
        assert parameter.grad is None
        if step == 0:
            assert (parameter == 1).all()  # 0.9995 is not a bf16 number
    assert masters.fp32["p"].tolist() == pytest.approx([1 - 12 * 5e-4] * 4, abs=1e-5)
    assert (parameter < 1).all()


def test_clipping_scales_the_gradient_and_reports_it_unscaled() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    masters = Masters({"p": parameter}, STAGE2)
    parameter.grad = torch.full((4,), 5.0)
    assert masters.step(1e-3, clip=1) == pytest.approx(10)
    assert masters.optimizer.state[masters.fp32["p"]]["exp_avg"].tolist() == pytest.approx([0.05] * 4)


# What training changes ----------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[TrainSection, int, Callable[[str], bool]]] = {
    "stage 1": (STAGE1, 1, lambda name: ".router." in name),
    "stage 2, top-1": (STAGE2, 1, lambda name: ".lora." in name or "norm" in name),
    "stage 2, top-2": (STAGE2, 2, lambda name: ".lora." in name or "norm" in name or ".router." in name),
    "stage 2, straight-through": (
        STAGE2.model_copy(update={"router_gradient": "straight-through"}),
        1,
        lambda name: ".lora." in name or "norm" in name or ".router." in name,
    ),
    "routers left alone": (
        STAGE2.model_copy(update={"train_router": False}),
        2,
        lambda name: ".lora." in name or "norm" in name,
    ),
    "norms alone": (STAGE2.model_copy(update={"lora_rank": 0}), 1, lambda name: "norm" in name),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_meant_to_changes(tmp_path: Path, kind: str) -> None:
    base, top_k, meant = KINDS[kind]
    parent = tiny_parent("qwen3")
    dense = {name: p.detach().clone() for name, p in parent.model.named_parameters()}
    model, parameters = model_for(base, parent, top_k=top_k)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome = train(
        Student(model, None, section(base, 12)), parameters, some_blocks(), section(base, 12), tmp_path, seed=1
    )
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if meant(name)}
    assert outcome.trainable == sum(before[name].numel() for name in changed)
    assert all(torch.equal(p, dense[name]) for name, p in parent.model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_trainable_count_by_formula() -> None:
    """E experts of width W, rank r, L layers: LoRA 3 L E r (D + W), norms (2 L + 1) D, routers with noise 2 L E D."""
    _, parameters = model_for(section(STAGE2, lora_rank=5), tiny_parent("llama"), experts=4, top_k=2, kept=20)
    lora, norms, routers = 3 * 2 * 4 * 5 * (32 + 20), 5 * 32, 2 * 2 * 4 * 32
    assert sum(p.numel() for p in parameters.values()) == lora + norms + routers
    first = model_for(STAGE1, tiny_parent("llama"), experts=4)[1]
    assert sum(p.numel() for p in first.values()) == routers


@pytest.mark.parametrize("gradient", ["none", "straight-through"])
def test_a_top_1_router_moves_only_straight_through(tmp_path: Path, gradient: str) -> None:
    """The weight of a single renormalised expert is 1 and gives no gradient."""
    spec = section(STAGE2, router_gradient=gradient)
    model, parameters = model_for(spec, tiny_parent("llama"))
    routers = {f"router.{i}": block.router.weight for i, block in enumerate(moe_blocks(model))}
    assert (routers.keys() <= parameters.keys()) == (gradient != "none")
    before = values(routers)
    train(Student(model, None, spec), parameters | routers, some_blocks(), spec, tmp_path, seed=1)
    assert (largest(values(routers), before) > 1e-3) == (gradient != "none")


def test_hidden_states_are_compared_with_the_parents(tmp_path: Path) -> None:
    """The added loss is ‖h − h*‖² / ‖h*‖² over what transformers calls hidden states, and training lowers it."""
    parent, blocks = tiny_parent("llama"), some_blocks()
    spec = section(STAGE2, 30, loss="distill", lora_dropout=0.0, hidden=0.5, mix=0.5)
    model, parameters = model_for(spec, parent, kept=48)

    def added() -> float:
        with torch.no_grad():
            model.eval()
            losses = [token_loss(model, blocks, parent.model, 0.5, hidden=weight) for weight in (2.0, 0.0)]
            mine, theirs = (m(blocks, output_hidden_states=True).hidden_states[1:] for m in (model, parent.model))
            errors = [
                ((h - w).norm(dim=-1) / w.norm(dim=-1)).square().mean() for h, w in zip(mine, theirs, strict=True)
            ]
        assert float(losses[0] - losses[1]) == pytest.approx(2 * float(sum(errors)) / len(errors), rel=1e-4)
        return float(sum(errors))

    before = added()
    train(Student(model, parent.model, spec), parameters, blocks, spec, tmp_path, seed=1)
    assert added() < 0.9 * before


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_experts_trained_whole(tmp_path: Path, family: str) -> None:
    """What is harvested computes what was trained, narrower experts and pairs of an earlier stage included."""
    parent, blocks = tiny_parent(family), some_blocks()
    spec = section(STAGE2, lora_rank=0, whole=True)
    carving = random_carving(parent, compensation="bias", experts=3, ragged=True, shared=8)
    earlier = section(STAGE2, lora_dropout=0.0)
    model = build(parent, carving, "sliced")
    parameters = prepare(model, earlier, seed=1)
    train(Student(model, None, earlier), parameters, blocks, earlier, tmp_path / "lora", seed=1)
    paired = harvest(model, carving, parameters)
    intact = {name: p.clone() for name, p in parent.model.named_parameters()}
    model = build(parent, paired, "sliced")
    parameters = prepare(model, spec, seed=1)
    assert {name.split(".")[0] for name in parameters} == {"experts", "shared", "norm"}
    train(Student(model, None, spec), parameters, blocks, spec, tmp_path / "whole", seed=1)
    found = harvest(model, paired, parameters)
    assert not found.lora
    assert [len(expert.channels) for expert in found.layers[0].routed] == [
        len(expert.channels) for expert in carving.layers[0].routed
    ]
    found.save(tmp_path / "found")
    with torch.no_grad():
        wanted = model(blocks).logits
        assert float((build(parent, paired)(blocks).logits - wanted).abs().max()) > 1e-3
        torch.testing.assert_close(build(parent, Carving.load(tmp_path / "found"))(blocks).logits, wanted)
    assert all(torch.equal(p, intact[name]) for name, p in parent.model.named_parameters())


def test_distillation_comes_closer_to_the_parent(tmp_path: Path) -> None:
    parent, blocks = tiny_parent("llama"), some_blocks()
    spec = section(STAGE2, 30, loss="distill", lora_dropout=0.0)
    model, parameters = model_for(spec, parent, kept=48)

    def divergence() -> float:
        with torch.no_grad():
            return float(token_loss(model.eval(), blocks, parent.model, mix=1.0))

    before = divergence()
    outcome = train(Student(model, parent.model, spec), parameters, blocks, spec, tmp_path, seed=1)
    assert divergence() < 0.8 * before
    assert outcome.last_loss < outcome.first_loss


def test_pairs_of_two_stages_add_up(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent, ragged=True)
    ids = some_blocks(2)
    for stage in ("one", "two"):
        model = build(parent, carving, "sliced")
        parameters = prepare(model, STAGE2, seed=1)
        train(
            Student(model, None, section(STAGE2)), parameters, some_blocks(), section(STAGE2), tmp_path / stage, seed=1
        )
        carving = harvest(model, carving, parameters)
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids).logits for m in (model, build(parent, carving, "sliced")))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert carving.lora["0.down.A"].shape == (4, 4, 32)


# Stopping and going on ----------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@pytest.mark.parametrize("spec", [STAGE1, STAGE2], ids=["stage1", "stage2"])
def test_going_on_is_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: TrainSection
) -> None:
    """Killed after step 5 with a checkpoint of step 3, then after 7 with one of 6."""
    spec = section(spec, 9, schedule="cosine", warmup=0.2, batch=8)
    whole = trained(spec, tmp_path / "whole")

    def keep_until(step: int, stop: int) -> Callable[[int], None]:
        monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)

        def on_step(done: int) -> None:
            if done == step:
                monkeypatch.setattr(loop, "SAVE_SECONDS", math.inf)
            if done == stop:
                raise KilledError

        return on_step

    for step, stop in ((3, 5), (6, 7)):
        model, parameters = model_for(spec, tiny_parent("llama"))
        with pytest.raises(KilledError):
            train(
                Student(model, None, spec),
                parameters,
                some_blocks(),
                spec,
                tmp_path / "cut",
                seed=1,
                on_step=keep_until(step, stop),
            )
        assert json.loads(read_metadata(tmp_path / "cut" / "checkpoint.safetensors")["state"])["step"] == step
    (tmp_path / "cut" / "log.jsonl").open("a").write('{"step": 8, "lo')  # a line that was cut short
    assert largest(trained(spec, tmp_path / "cut"), whole) == 0
    stories = []
    for folder in ("whole", "cut"):
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 10))
        stories.append([(line["loss"], line["lr"], line["grad_norm"], line["tokens"]) for line in lines])
    assert stories[0] == stories[1]


def test_a_finished_stage_trains_no_further(tmp_path: Path) -> None:
    spec = section(STAGE2)
    first = trained(spec, tmp_path)
    model, parameters = model_for(spec, tiny_parent("llama"))
    called: list[int] = []
    outcome = train(
        Student(model, None, spec), parameters, some_blocks(), spec, tmp_path, seed=1, on_step=called.append
    )
    assert called == []
    assert largest(values(parameters), first) == 0
    assert outcome.steps == 6
    assert math.isfinite(outcome.first_loss + outcome.last_loss)


def test_the_outcome_and_the_log_say_what_happened(tmp_path: Path) -> None:
    model, parameters = model_for(STAGE2, tiny_parent("llama"))
    outcome = train(Student(model, None, section(STAGE2)), parameters, some_blocks(), section(STAGE2), tmp_path, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (outcome.steps, outcome.tokens) == (6, 6 * BATCH * WINDOW)
    assert [line["tokens"] for line in lines] == [n * BATCH * WINDOW for n in range(1, 7)]
    assert lines[0]["loss"] == pytest.approx(outcome.first_loss, abs=1e-4)
    assert lines[-1]["loss"] == pytest.approx(outcome.last_loss, abs=1e-4)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and line["lr"] == 3e-3 for line in lines)
    assert outcome.metrics()["trainable"] == sum(p.numel() for p in parameters.values())


def explosive(self: Student, ids: Tensor) -> Tensor:
    """A loss that is finite and whose gradient is not, where a batch holds token 250."""
    loss = PLAIN_FORWARD(self, ids)
    factor = 1e300 if (ids == 250).any() else 1.0
    return loss.detach() + (loss - loss.detach()) * factor


PLAIN_FORWARD = Student.forward


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_its_data_and_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    blocks = some_blocks() % 200
    blocks[7, 5] = 250  # only this block holds the token
    step = next(s for s in range(9) if 7 in batch_rows(len(blocks), s, BATCH, 1))
    assert step > 0
    says = rf"the loss is not finite at step {step}; its data is in \S+\. Lower"
    for _ in range(2):  # and again, when the same command is given once more
        parent = tiny_parent("llama3")
        model, parameters = model_for(STAGE2, parent)
        if where == "loss":
            parent.model.get_input_embeddings().weight.data[250] = math.nan
        else:
            monkeypatch.setattr(Student, "forward", explosive)
        kept = {0: values(parameters)}

        def remember(done: int, kept: Any = kept, now: Any = parameters) -> None:
            kept[done] = values(now)

        with pytest.raises(MoesmithError, match=says):
            train(
                Student(model, None, section(STAGE2, 20)),
                parameters,
                blocks,
                section(STAGE2, 20),
                tmp_path,
                seed=1,
                on_step=remember,
            )
        assert list(kept) == list(range(step + 1))
        assert largest(values(parameters), kept[step]) == 0
        saved = read_tensors(tmp_path / f"nonfinite-step-{step}.safetensors")["ids"]
        assert torch.equal(saved, blocks[batch_rows(len(blocks), step, BATCH, 1)])
        assert (saved == 250).any()


def in_processes(folder: Path, *jobs: str) -> None:
    """Do the jobs of ``data_parallel.py``."""
    program = [sys.executable, str(Path(__file__).parent / "data_parallel.py"), str(folder), *jobs]
    done = subprocess.run(
        program, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr


def check_same(folder: Path, one: str, more: str, processes: int) -> None:
    """One process's weights and losses are those of several, of which each has the same."""
    alone = read_tensors(folder / f"{one}-0.safetensors")
    for rank in range(processes):
        assert largest(alone, read_tensors(folder / f"{more}-{rank}.safetensors")) < 1e-5
    assert story(folder, one) == [pytest.approx(line, abs=2e-4) for line in story(folder, more)]
    assert len(story(folder, one)) == 6


def test_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    in_processes(tmp_path, "one:1:whole:", "two:2:whole:", "parts:2:spread:")
    check_same(tmp_path, "one", "two", 2)
    check_same(tmp_path, "one", "parts", 2)
    held = [json.loads((tmp_path / f"parts-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(each["held"] for each in held) == held[0]["all"]  # every number once
    assert max(each["held"] for each in held) < 0.52 * held[0]["all"]


def test_two_processes_write_the_shards_that_one_writes(tmp_path: Path) -> None:
    in_processes(tmp_path, "export-one:1:whole:", "export-two:2:whole:")
    names = ("export-one-0", "export-two-0", "export-two-1")
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert min(map(len, two)) >= 3
    assert sorted(two[0] + two[1]) == sorted(one)  # each shard once
    alone, together = tmp_path / "export-one", tmp_path / "export-two"
    files = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
    assert all((alone / name).read_bytes() == (together / name).read_bytes() for name in files)


@pytest.mark.slow
def test_spread_training_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """With whole experts, drift of hidden states and recomputed activations; killed after the third step."""
    jobs = ("one-experts:1:whole:", "cut-experts:2:spread:", "four-experts:4:spread:cut-experts")
    in_processes(tmp_path, *jobs, "alone-experts:1:whole:cut-experts", "cut-one-experts:1:whole:")
    in_processes(tmp_path, "parts-experts:2:spread:cut-one-experts")
    assert len(list((tmp_path / "cut-experts" / "checkpoint").iterdir())) == 1
    assert not list((tmp_path / "cut-experts").glob("**/*.metadata"))  # pickled
    for name, processes in (("four-experts", 4), ("alone-experts", 1), ("parts-experts", 2)):
        check_same(tmp_path, "one-experts", name, processes)


@pytest.mark.slow
def test_a_damaged_part_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    in_processes(tmp_path, "cut:2:spread:")
    (found,) = (tmp_path / "cut" / "checkpoint").glob("*/shard-00002*")
    whole = found.read_bytes()
    for damaged in (whole[:-8], whole[:-8] + bytes(255 - byte for byte in whole[-8:])):
        found.write_bytes(damaged)
        model, parameters = model_for(STAGE2, tiny_parent("llama"))
        with pytest.raises(MoesmithError, match=r"shard-00002\S+ is missing or damaged\. Delete"):
            train(Student(model, None, section(STAGE2)), parameters, some_blocks(), section(STAGE2), tmp_path / "cut")


def test_processes_that_cannot_share_a_batch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        process_index, num_processes, is_main_process = 0, 3, True

    monkeypatch.setattr(loop, "Accelerator", lambda **_: Three())
    monkeypatch.setattr(loop, "crew", lambda: World(0, 3))
    model, parameters = model_for(STAGE2, tiny_parent("llama"))
    with pytest.raises(MoesmithError, match=r"a batch of 8 sequences cannot be shared by 3 processes\. Give"):
        train(Student(model, None, section(STAGE2)), parameters, some_blocks(), section(STAGE2), tmp_path)


def test_the_constant_direction_is_the_trained_models_own() -> None:
    """Norms that training changed move what routers get: v·x of before is far from 1, and v found again is not."""
    model, parameters = model_for(STAGE2, tiny_parent("llama"))
    blocks, others = some_blocks(80), some_blocks(20).flip(0)
    before = constants(model, blocks, rows=8)
    with torch.no_grad():
        for name, weight in parameters.items():
            if "post_attention_layernorm" in name:
                weight *= torch.linspace(0.3, 3, len(weight))
    after = constants(model, blocks, rows=8)
    for (v_D, _), (again_D, _) in zip(after, constants(model, blocks, rows=8, most=1), strict=True):
        torch.testing.assert_close(again_D, v_D)
    inputs: list[Tensor] = []
    hooks = [(block, lambda _m, args: inputs.append(args[0].flatten(0, -2))) for block in moe_blocks(model)]
    with hooked(hooks, before=True), torch.no_grad():
        model.base_model(input_ids=others)
    for x_TD, (old_D, _), (v_D, error) in zip(inputs, before, after, strict=True):
        mine, theirs = (float((x_TD @ one - 1).square().mean()) for one in (v_D, old_D))
        assert mine == pytest.approx(error, rel=0.5)
        assert mine < 0.8 * theirs
