"""Recipes: presets, budgets, ``--set``, and what DIVE's paper and code say."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesmith.errors import MoesmithError
from moesmith.run.recipe import BUDGETS, Recipe, TrainSection, keys, load_recipe, presets
from moesmith.training.loop import steps_of

# what --set, recipe files and run.json can name; renaming one breaks people's files
KEYS = {
    "": "name description seed",
    "domains": "names tokens window",
    "carve": "method experts top_k ratio score selection compensation ridge pool",
    "affinity": "method published profile linkage tokens window",
    "router": "start ridge noise",
    "evaluate": "tokens window",
}
LOOP_KEYS = "tokens window batch micro_batch lr schedule min_ratio warmup clip weight_decay checkpointing"
TRAIN_KEYS = LOOP_KEYS + (
    " loss mix kl_temperature gate gate_temperature router_gradient train_router lora_rank lora_alpha lora_dropout"
    " norms"
)
MASKS_KEYS = LOOP_KEYS + (
    " budget start attention output_mask noise routing masking widths temperature bias kl_weight budget_weight"
    " union_weight balance_weight"
)


def test_settings_keep_their_names() -> None:
    sections = KEYS | {"stage1": TRAIN_KEYS, "stage2": TRAIN_KEYS, "masks": MASKS_KEYS}
    expected = {f"{section}.{key}".lstrip(".") for section, names in sections.items() for key in names.split()}
    assert set(keys()) == expected
    assert len(keys()) == len(expected)


def test_every_preset_and_budget_loads_under_its_own_name() -> None:
    found = presets()
    assert {"dive-1of8", "dive-2of8", "dive-plus"} <= found.keys()
    for name, description in found.items():
        for budget in (None, *BUDGETS):
            recipe = load_recipe(name, budget)
            assert (recipe.name, recipe.description) == (name, description)
        assert load_recipe(name, "paper") == load_recipe(name)
        assert "\n" not in description


@pytest.mark.parametrize(("name", "top_k", "ratio", "temperature"), [("1of8", 1, 0.5, 0.05), ("2of8", 2, 0.75, 0.5)])
def test_dive_is_as_published(name: str, top_k: int, ratio: float, temperature: float) -> None:
    """dive.md §4.2 and §7."""
    recipe = load_recipe(f"dive-{name}")
    carve, one, two = recipe.carve, recipe.stage1, recipe.stage2
    assert (carve.experts, carve.top_k, carve.ratio) == (8, top_k, ratio)
    assert (carve.score, carve.selection, carve.compensation) == ("wifv", "uniform", "bias")
    assert (recipe.domains.tokens, recipe.domains.window, recipe.seed) == (1024 * 256, 256, 42)
    assert (recipe.router.start, recipe.router.noise) == ("random", 5e-4)
    assert (recipe.affinity.method, recipe.affinity.profile, recipe.affinity.linkage) == (
        "perplexity",
        "rows",
        "average",
    )
    assert (steps_of(one), one.tokens, one.batch, one.window) == (1905, 499_384_320, 4 * 16 * 4, 1024)
    assert (one.gate, one.gate_temperature, one.lr, one.schedule, one.warmup) == (
        "dense",
        temperature,
        1e-4,
        "constant",
        0,
    )
    assert (steps_of(two), two.tokens, two.batch, two.window) == (9535, 4_999_086_080, 4 * 32 * 4, 1024)
    assert (two.gate, two.lr, two.schedule, two.min_ratio, two.warmup) == ("sparse", 1e-4, "cosine", 0.1, 0.03)
    assert (two.lora_rank, two.lora_alpha, two.lora_dropout, two.norms) == (8, 16, 0.1, True)
    assert all(
        (stage.clip, stage.weight_decay, stage.loss, stage.router_gradient) == (1, 0, "next-token", "none")
        for stage in (one, two)
    )


def test_dive_plus_is_dive_but_for_what_its_preset_says() -> None:
    ours, theirs = (load_recipe(name).model_dump() for name in ("dive-plus", "dive-1of8"))
    differ = {
        f"{section}.{key}"
        for section in ours.keys() - {"name", "description", "seed"}
        for key in ours[section]
        if ours[section][key] != theirs[section][key]
    }
    assert differ == {
        "carve.compensation",
        "affinity.method",
        "router.start",
        "stage1.loss",
        "stage2.loss",
        "stage2.router_gradient",
    }


@pytest.mark.parametrize(("name", "budget"), [("tomoe-40", 0.4), ("tomoe-50", 0.5), ("tomoe-60", 0.6)])
def test_tomoe_is_as_published(name: str, budget: float) -> None:
    """tomoe.md §5, the released command."""
    recipe = load_recipe(name)
    masks = recipe.masks
    assert (recipe.carve.experts, recipe.carve.top_k, recipe.carve.compensation) == (8, 1, "none")
    assert (masks.budget, masks.temperature, masks.bias) == (budget, 0.4, 3.0)
    assert (masks.budget_weight, masks.union_weight, masks.balance_weight, masks.kl_weight) == (16, 3, 1, 2)
    assert (masks.lr, masks.schedule, masks.warmup, masks.weight_decay, masks.clip) == (1e-3, "constant", 0, 0.05, None)
    assert (steps_of(masks), masks.tokens, masks.batch, masks.window) == (20_000, 40_960_000, 1, 2048)
    assert (masks.micro_batch, masks.checkpointing) == (1, False)
    assert (masks.start, masks.attention, masks.output_mask) == ("random", "hybrid", True)
    assert (masks.noise, masks.routing, masks.masking, masks.widths) == ("token", "sampled", "double", "threshold")
    assert (recipe.learned, recipe.carved, recipe.clustered) == (True, False, False)
    assert recipe.stage1.tokens == recipe.stage2.tokens == 0  # no weight is ever trained


def test_tomoe_presets_differ_in_the_budget_alone() -> None:
    plain = load_recipe("tomoe-50").model_dump(exclude={"name", "description"})
    for name, budget in (("tomoe-40", 0.4), ("tomoe-60", 0.6)):
        found = load_recipe(name).model_dump(exclude={"name", "description"})
        assert found.pop("masks") == plain["masks"] | {"budget": budget}
        assert found == {section: value for section, value in plain.items() if section != "masks"}


def test_tomoe_plus_is_tomoe_but_for_what_its_preset_says() -> None:
    ours, theirs = (load_recipe(name).model_dump() for name in ("tomoe-plus", "tomoe-50"))
    differ = {
        f"{section}.{key}"
        for section in ours.keys() - {"name", "description", "seed"}
        for key in ours[section]
        if ours[section][key] != theirs[section][key]
    }
    assert differ == {
        "carve.compensation",
        "affinity.method",
        "router.start",
        "masks.start",
        "masks.attention",
        "masks.noise",
        "masks.routing",
        "masks.masking",
        "masks.widths",
    }


def test_a_budget_scales_the_stages_that_a_recipe_trains() -> None:
    for budget in ("demo", "small"):
        dive, tomoe = load_recipe("dive-2of8", budget), load_recipe("tomoe-50", budget)
        assert dive.masks == load_recipe("dive-2of8").masks
        assert dive.stage1.tokens < load_recipe("dive-2of8").stage1.tokens
        assert (tomoe.stage1, tomoe.stage2) == (load_recipe("tomoe-50").stage1, load_recipe("tomoe-50").stage2)
        assert 0 < tomoe.masks.tokens < load_recipe("tomoe-50").masks.tokens
        assert load_recipe("flap-static", budget).stage1.tokens == 0


def test_a_budget_is_an_overlay_and_settings_lie_on_top() -> None:
    plain, small = load_recipe("dive-2of8"), load_recipe("dive-2of8", "small", ["stage1.lr=0.5", "seed=7"])
    assert small.carve == plain.carve
    assert small.domains.tokens < plain.domains.tokens
    assert small.stage1.gate_temperature == plain.stage1.gate_temperature
    assert (small.stage1.lr, small.seed) == (0.5, 7)
    assert load_recipe("dive-2of8", "small").stage1.lr != 0.5


def test_the_last_setting_wins() -> None:
    assert load_recipe("dive-1of8", None, ["carve.experts=4", "carve.experts=5"]).carve.experts == 5


def test_a_file_can_build_on_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: dive-2of8\ncarve: {experts: 6}\nstage2: {tokens: 0}\n")
    recipe, base = load_recipe(path), load_recipe("dive-2of8")
    assert (recipe.name, recipe.carve.experts, recipe.stage2.tokens) == ("mine", 6, 0)
    assert recipe.carve.ratio == base.carve.ratio
    assert recipe.stage1 == base.stage1
    path.write_text("base: dive-2of8\nname: other\n")
    assert load_recipe(path).name == "other"


def test_a_written_recipe_reads_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe("dive-plus", "demo", ["domains.names=[a, b]"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path) == recipe


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(),
    "carve.experts": st.integers(1, 1024),
    "carve.ratio": st.floats(0, 0.999),
    "carve.score": st.sampled_from(["wifv", "ifv", "wifn", "magnitude"]),
    "router.noise": st.floats(0, 1e300),
    "stage1.lr": st.floats(1e-300, 1e300),
    "stage2.norms": st.booleans(),
    "domains.names": st.none() | st.lists(st.text(min_size=1), min_size=1),
    "description": st.text(),
}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.tuples(st.just(key), VALUES[key])))
def test_a_set_value_arrives(setting: tuple[str, Any]) -> None:
    key, value = setting
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")
    found: Any = load_recipe("dive-1of8", None, [f"{key}={text}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*keys(), "carve", "carve.", "", "stage1.lr.x"]),
    st.text(max_size=20) | st.text("[]{}:,0123456789.-+eEnaif~'\"&*!|>%@ \n", max_size=20),
)
@example("name", "2024-13-45")  # YAML takes it for a date
@example("name", "[" * 5000)
def test_any_set_loads_or_is_refused(key: str, value: str) -> None:
    with contextlib.suppress(MoesmithError):
        assert isinstance(load_recipe("dive-plus", None, [f"{key}={value}"]), Recipe)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["carve.expert=4"], r"no setting 'carve\.expert'.*mean 'carve\.experts'"),
        (["stage1.learning_rate=1"], r"no setting 'stage1\.learning_rate'.*mean 'stage1\."),
        (["carve.experts"], r"no '='.*section\.key=value"),
        (["carve.experts=many"], r"carve\.experts: Input should be a valid integer"),
        (["carve.top_k=9"], "top_k 9 is above experts 8"),
        (["carve.ratio=1.0"], r"ratio 1\.0 leaves no channel.*\[0, 1\)"),
        (["carve.ratio=-0.1"], r"ratio -0\.1.*\[0, 1\)"),
        (["carve.ratio=.nan"], r"ratio nan.*\[0, 1\)"),
        (["carve.method=static"], "carve.experts to 1"),
        (["affinity.method=published"], "affinity.published names clusters"),
        (["affinity.published=tinyllama-50"], "affinity.published names clusters"),
        (["stage1.norms=true"], "dense gate trains routers only"),
        (["stage2.lr=0"], r"stage2\.lr: Input should be greater than 0"),
        (["domains.tokens=255"], "255 tokens are fewer than one window of 256"),
        (["stage1.tokens=8"], "stage1: 8 tokens are fewer than one window of 1024"),
        (["evaluate.window=1000000"], "fewer than one window of 1000000"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(wanted: list[str], says: str) -> None:
    with pytest.raises(MoesmithError, match=says):
        load_recipe("dive-1of8", None, wanted)


def test_affinity_tokens_do_not_matter_where_nothing_is_measured() -> None:
    assert load_recipe("dive-plus", None, ["affinity.tokens=1"]).affinity.tokens == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("carve: {experts: 8\n", "not valid YAML.*Mend"),
        ("- dive-plus\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("1: 2\n", "is not a recipe"),
        ("base: dive-pluss\n", "no preset 'dive-pluss'.*'dive-plus'"),
        ("base: dive-plus\ncarve: {expert: 4}\n", r"no setting 'carve\.expert'.*'carve\.experts'"),
        ("base: dive-plus\ncarves: {}\n", "no setting 'carves'"),
        ("base: dive-plus\ncarve: 8\n", "carve: Input should be a valid dictionary"),
    ],
)
def test_a_bad_recipe_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(MoesmithError, match=says):
        load_recipe(path)


def test_a_recipe_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(MoesmithError, match="not valid YAML"):
        load_recipe(path)
    path.write_text(f"base: {path}\n")
    with pytest.raises(MoesmithError, match="is its own base"):
        load_recipe(path)
    with pytest.raises(MoesmithError, match="no recipe file"):
        load_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("name", "near"), [("dive-1of9", "dive-1of8"), ("diveplus", "dive-plus"), ("flap", "flap-static")]
)
def test_an_unknown_preset_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(MoesmithError, match=rf"no preset '{name}'\. Did you mean '{near}'"):
        load_recipe(name)


def test_an_unknown_budget_names_the_known() -> None:
    with pytest.raises(MoesmithError, match=r"no budget 'huge'\. Choose one of demo, small, paper"):
        load_recipe("dive-plus", "huge")


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(8, 256))
def test_steps_cover_the_tokens_and_no_more_than_a_step_above(tokens: int, batch: int, window: int) -> None:
    tokens = max(tokens, window)
    steps = steps_of(TrainSection(tokens=tokens, batch=batch, window=window))
    assert (steps - 1) * batch * window < tokens <= steps * batch * window


def test_the_package_offers_recipes() -> None:
    import moesmith

    assert moesmith.load_recipe is load_recipe
    with pytest.raises(AttributeError, match="no attribute 'forge'"):
        _ = moesmith.forge
