"""Bad input of learned masks: exit status 2, one line that names the cure, nothing half-written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import Answer, moesmith
from conversions import arguments, snapshot, weights
from refusals import World, convert_is_refused, midway, not_loaded, refused

from moesmith.training import loop as train
from moesmith.training.loop import Masters

RECIPES: dict[str, tuple[list[str], str]] = {
    "budget of nothing": (["masks.budget=0"], r"masks\.budget: Input should be greater than 0"),
    "budget of everything": (["masks.budget=1"], r"masks\.budget: Input should be less than 1"),
    "budget above everything": (["masks.budget=1.5"], r"masks\.budget: Input should be less than 1"),
    "budget that is no number": (["masks.budget=.nan"], r"masks\.budget: Input should be"),
    "budget in words": (["masks.budget=half"], r"masks\.budget: Input should be a valid number"),
    "two active experts": (["carve.top_k=2"], r"no setting 'carve\.top_k' with method tomoe\. Did you mean 'carve\."),
    "a bias as compensation": (["carve.compensation=bias"], r"carve\.compensation: Input should be 'none' or 'refit'"),
    "a ratio": (["carve.ratio=0.5"], r"no setting 'carve\.ratio' with method tomoe\. Did you mean '"),
    "a refit's setting without a refit": (["carve.pool=0.5"], r"carve: pool has no effect: carve\.compensation is not"),
    "unknown key": (
        ["masks.buget=0.5"],
        r"no setting 'masks\.buget' with method tomoe\. Did you mean 'masks\.budget'\?",
    ),
    "key of another stage": (
        ["masks.lora_rank=8"],
        r"no setting 'masks\.lora_rank' with method tomoe\. Did you mean '",
    ),
    "section alone": (["masks=0.5"], r"no setting 'masks' with method tomoe\. Did you mean 'masks\."),
    "text for no start": (
        ["affinity.tokens=256"],
        r"no setting 'affinity\.tokens' with method tomoe\.",
    ),
    "unknown attention": (["masks.attention=some"], r"masks\.attention: Input should be 'none', 'hybrid' or 'dynamic'"),
    "a start as 0.1 had it": (["masks.start=carving"], r"no setting 'masks\.start' .* Write carve\.start\.method \("),
    "unknown start": (["carve.start={method: warm}"], r"no method 'warm'\."),
    "a start from masks": (["carve.start={method: tomoe}"], r"carve\.start: masks cannot start from tomoe\."),
    "a start that is a word": (["carve.start=dive"], r"carve\.start: Input should be a valid dictionary"),
    "unknown key of a start": (["carve.start={scor: wifv}"], r"carve\.start: start\.scor: Extra inputs"),
    "unknown score of a start": (["carve.start={score: best}"], r"carve\.start: start\.score: Input should be 'wifv'"),
    "a start with a width": (["carve.start={ratio: 0.5}"], r"carve\.start: start\.ratio follows from the settings of"),
    "unknown noise": (["masks.noise=none"], r"masks\.noise: Input should be 'token' or 'expert'"),
    "no temperature": (["masks.temperature=0"], r"masks\.temperature: Input should be greater than 0"),
    "negative weight": (["masks.union_weight=-1"], r"masks\.union_weight: Input should be greater than or equal to 0"),
    "clipping to nothing": (["masks.clip=0"], r"masks\.clip: Input should be greater than 0"),
    "fewer tokens than a window": (["masks.tokens=31"], "masks: 31 tokens are fewer than one window of 32"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe(world: World, case: str) -> None:
    settings, says = RECIPES[case]
    not_loaded(world)
    convert_is_refused(world, says, settings, "tomoe-50")


SIZES: dict[str, tuple[list[str], str]] = {
    "attention whole": (
        ["masks.attention=none", "masks.budget=0.3"],
        r"masks\.budget 0\.3 cannot be reached: 0\.344 of the parameters always stay\. Raise masks\.budget, or let",
    ),
    "next to nothing": (
        ["masks.budget=0.05"],
        r"masks\.budget 0\.05 cannot be reached: 0\.073 of the parameters always stay\. Raise masks\.budget\.",
    ),
    "a carving that attention leaves no room": (
        ["carve.start={method: dive}", "masks.budget=0.3"],
        r"attention alone is 33% of the parameters, but masks\.budget is 30%: .* Raise masks\.budget, or leave carve",
    ),
    "a start with a single expert": (
        ["carve.start={method: static}"],
        r"carve\.experts is 4, but a start of method static has one expert\. Set carve\.experts to 1, or",
    ),
    "no text": (["masks.tokens=0"], r"masks\.tokens is 0, but masks are learned from text\. Set masks\.tokens"),
    "window longer than the model": (
        ["masks.window=1024", "masks.tokens=2048"],
        r"masks\.window is 1024, but the model reads 512 tokens\. Lower masks\.window",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_what_this_parent_cannot_do(world: World, case: str) -> None:
    settings, says = SIZES[case]
    convert_is_refused(world, says, settings, "tomoe-50")


def converted(world: World, *settings: str) -> Answer:
    return moesmith(*arguments("tomoe-50", world.model, world.data, world.out, settings))


class StopError(Exception):
    """What stops a process in these tests."""


@pytest.fixture
def begun(world: World) -> World:
    """A run that stopped in the middle of its masks, with a checkpoint of five steps."""
    step, steps = Masters.step, iter(range(5))

    def limited(self: Masters, lr: float, clip: float | None) -> float:
        if next(steps, None) is None:
            raise StopError
        return step(self, lr, clip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1.0)
        patch.setattr(Masters, "step", limited)
        with pytest.raises(StopError):
            converted(world)
    return world


def partial(world: World) -> Path:
    return world.out / "stages" / ".masks.partial"


@pytest.mark.parametrize("left", [0, 100, 0.5])
def test_a_damaged_checkpoint(begun: World, left: float) -> None:
    path = partial(begun) / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(left if left >= 1 else left * len(content))])
    before = snapshot(begun.out)
    answer = converted(begun)
    assert answer.status == 2
    *said, line = answer.err.splitlines()
    assert all(part.startswith(("[", "computes in")) or "trainable" in part for part in said)  # stages done, and this
    what = r"\.masks\.partial/checkpoint\.safetensors is missing or damaged\. Delete \S+\.masks\.partial and run"
    midway(answer, line, what)
    assert snapshot(begun.out) == before
    shutil.rmtree(partial(begun))  # as it says
    assert converted(begun).status == 0


def test_a_whole_checkpoint_is_continued(begun: World) -> None:
    answer = converted(begun)
    assert answer.status == 0, answer.err
    assert "masks: continuing at step 5 of 8" in answer.err
    whole = weights(begun.out)
    begun.out = begun.out.parent / "undisturbed"
    assert converted(begun).status == 0
    assert weights(begun.out) == whole


def test_a_loss_that_is_not_finite(world: World) -> None:
    answer = converted(world, "masks.lr=1e30")
    assert answer.status == 2
    says = r"masks: the loss is not finite at step \d+; its data is in \S+\. Lower the stage's lr"
    midway(answer, answer.err.splitlines()[-1], says)
    assert not (world.out / "stages" / "masks").exists()
    assert not (world.out / "model").exists()


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of learned masks."""
    run = tmp_path_factory.mktemp("run") / "run"
    answer = moesmith(*arguments("tomoe-50", home / "m", home / "d", run))
    assert answer.status == 0, answer.err
    return run


DAMAGE = {
    "shard": "model.safetensors",
    "truncated shard": "model.safetensors",
    "code": "modeling.py",
    "config": "config.json",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_finished_model_that_was_damaged(world: World, made: Path, case: str) -> None:
    shutil.copytree(made, world.out)
    path = world.out / "model" / DAMAGE[case]
    if case.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.unlink()
    damaged = rf"run/model/{re.escape(DAMAGE[case])} is missing or damaged\. Delete the folder and run the command"
    says = rf"({damaged}|has no finished model\. Run the same 'moesmith convert')"
    refused(moesmith("generate", world.out, "a"), says)
    shutil.rmtree(world.out / "model")  # as it says
    assert converted(world).status == 0
    assert weights(world.out) == weights(made)


def test_a_run_of_other_masks(world: World, made: Path) -> None:
    shutil.copytree(made, world.out)
    not_loaded(world)
    says = r"other settings: masks\.attention was hybrid, is none; masks\.budget was 0\.5, is 0\.7\. Give another --out"
    convert_is_refused(world, says, ["masks.attention=none", "masks.budget=0.7"], "tomoe-50")


def test_plan_refuses_the_same(world: World) -> None:
    words = ["plan", "tomoe-50", "--model", world.model, "--data", world.data]
    refused(moesmith(*words, "--set", "masks.buget=1"), r"no setting 'masks\.buget'")
    refused(moesmith(*words, "--set", "carve.top_k=2"), r"no setting 'carve\.top_k' with method tomoe")
