"""Recipes: presets, budgets, ``--set``, and what DIVE's paper and code say."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesmith.errors import MoesmithError
from moesmith.methods.registry import methods
from moesmith.run.recipe import BUDGETS, Recipe, applicable, keys, kind_of, load_recipe, parse, presets
from moesmith.run.settings import TrainSection
from moesmith.training.loop import steps_of

# what --set, recipe files and run.json can name with each method; renaming one breaks people's files
EVERY = {"": "name description seed report_to", "domains": "names tokens window reading", "evaluate": "tokens window"}
LOOP_KEYS = "tokens window batch micro_batch lr schedule min_ratio warmup clip weight_decay checkpointing"
TRAIN_KEYS = LOOP_KEYS + (
    " loss mix kl_temperature gate gate_temperature router_gradient train_router lora_rank lora_alpha lora_dropout"
    " norms hidden whole"
)
MASKS_KEYS = LOOP_KEYS + (
    " budget attention output_mask noise routing masking widths temperature bias kl_weight budget_weight"
    " union union_weight balance_weight"
)
ASSIGN = " rounds temperature last_temperature kl_weight language_weight z_weight balance_weight"
AFFINITY, ROUTER = {"affinity": "method published profile linkage tokens window"}, {"router": "start ridge noise"}
STAGE1, STAGE2 = {"stage1": TRAIN_KEYS}, {"stage2": TRAIN_KEYS}
SHARES = "method ratio compensation ridge pool"
KEYS = {
    "dive": {"carve": f"{SHARES} experts top_k score selection"} | AFFINITY | ROUTER | STAGE1 | STAGE2,
    "static": {"carve": f"{SHARES} score selection"} | STAGE2,
    "llama-moe": {"carve": f"{SHARES} experts top_k"} | ROUTER | STAGE1 | STAGE2,
    "llama-moe-partition": {"carve": "method experts ratio sample ridge split selector shared rescale"} | STAGE2,
    "moefication": {"carve": "method experts ratio sample ridge split selector"} | STAGE2,
    "token": {
        "carve": "method experts ratio clusters select among sinks repair ridge pool prior sample gram sensitivity"
        " allocation passes batch lr"
    }
    | STAGE2,
    "cmoe": {"carve": "method experts top_k ratio marked sample rounds represent router ridge"} | STAGE2,
    "expert-weaver": {"carve": "method experts ratio shares least most threshold samples rounds"} | STAGE2,
    "tomoe": {"carve": "method experts start compensation ridge pool", "masks": MASKS_KEYS} | STAGE1 | STAGE2,
    "dot-moe": {"carve": "method experts ratio split", "assign": LOOP_KEYS + ASSIGN} | STAGE2,
    "upcycling": {"carve": "method experts top_k"} | STAGE2,
    "drop-upcycling": {"carve": "method experts top_k redrawn"} | STAGE2,
}
# what a start adds to tomoe
STARTS = {"dive": AFFINITY | ROUTER | STAGE1, "static": {}, "llama-moe": ROUTER | STAGE1}


def names(sections: dict[str, str]) -> list[str]:
    return sorted(f"{section}.{key}".lstrip(".") for section, keys in sections.items() for key in keys.split())


def test_settings_keep_their_names() -> None:
    assert methods().keys() == KEYS.keys()
    for method, sections in KEYS.items():
        assert sorted(keys(kind_of({"carve": {"method": method}}))) == names(EVERY | sections), method
    for start, more in STARTS.items():
        kind = kind_of({"carve": {"method": "tomoe", "start": {"method": start}}})
        assert sorted(keys(kind)) == names(EVERY | KEYS["tomoe"] | more), start
    assert kind_of({}).model_fields.keys() == kind_of({"carve": {"method": "dive"}}).model_fields.keys()


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
    """Hyper-parameters of the paper (arXiv:2506.09351) and its published code."""
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
        for section in ours.keys() - {"name", "description", "seed", "report_to"}
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
    """Hyper-parameters of the released command (arXiv:2501.15316)."""
    recipe = load_recipe(name)
    masks = recipe.masks
    assert (recipe.method.name, recipe.method.experts, recipe.method.top_k) == ("tomoe", 8, 1)
    assert recipe.carve.compensation == "none"
    assert (masks.budget, masks.temperature, masks.bias) == (budget, 0.4, 3.0)
    assert (masks.budget_weight, masks.union_weight, masks.balance_weight, masks.kl_weight) == (16, 3, 1, 2)
    assert (masks.lr, masks.schedule, masks.warmup, masks.weight_decay, masks.clip) == (1e-3, "constant", 0, 0.05, None)
    assert (steps_of(masks), masks.tokens, masks.batch, masks.window) == (20_000, 40_960_000, 1, 2048)
    assert (masks.micro_batch, masks.checkpointing) == (1, False)
    assert (recipe.carve.start, masks.attention, masks.output_mask) == (None, "hybrid", True)
    assert (masks.noise, masks.routing, masks.masking, masks.widths) == ("token", "sampled", "double", "threshold")
    made = [step.name for step in recipe.method.steps()]
    assert made == ["masks"]  # no carving, no clusters: masks alone
    assert recipe.stage1.tokens == recipe.stage2.tokens == 0  # no weight is ever trained


def test_tomoe_presets_differ_in_the_budget_alone() -> None:
    plain = load_recipe("tomoe-50").model_dump(exclude={"name", "description"})
    for name, budget in (("tomoe-40", 0.4), ("tomoe-60", 0.6)):
        found = load_recipe(name).model_dump(exclude={"name", "description"})
        assert found.pop("masks") == plain["masks"] | {"budget": budget}
        assert found == {section: value for section, value in plain.items() if section != "masks"}


def test_tomoe_plus_is_tomoe_but_for_what_its_preset_says() -> None:
    ours, theirs = (load_recipe(name).model_dump() for name in ("tomoe-plus", "tomoe-50"))
    assert set(ours) - set(theirs) == {"affinity", "router"}  # of its start
    differ = {
        f"{section}.{key}"
        for section in theirs.keys() - {"name", "description", "seed", "report_to"}
        for key in ours[section]
        if ours[section][key] != theirs[section][key]
    }
    assert differ == {
        "carve.compensation",
        "carve.start",
        "masks.attention",
        "masks.noise",
        "masks.routing",
        "masks.masking",
        "masks.widths",
    }
    assert ours["carve"]["start"]["method"] == "dive"
    plain = load_recipe("dive").model_dump()
    assert ours["affinity"] == plain["affinity"] | {"method": "scores"}
    assert ours["router"] == plain["router"] | {"start": "lda", "noise": 0}
    made = [step.name for step in load_recipe("tomoe-plus").method.steps()]
    assert made == ["domains", "moments", "affinity", "carve", "masks", "refit"]


def test_a_budget_scales_the_stages_that_a_recipe_trains() -> None:
    for budget in ("demo", "small"):
        dive, tomoe = load_recipe("dive-2of8", budget), load_recipe("tomoe-50", budget)
        assert "masks" not in type(dive).model_fields
        assert dive.stage1.tokens < load_recipe("dive-2of8").stage1.tokens
        assert (tomoe.stage1, tomoe.stage2) == (load_recipe("tomoe-50").stage1, load_recipe("tomoe-50").stage2)
        assert 0 < tomoe.masks.tokens < load_recipe("tomoe-50").masks.tokens
        assert "stage1" not in type(load_recipe("flap-static", budget)).model_fields
        assert load_recipe("dive", budget).stage1 == load_recipe("dive").stage1  # it trains nothing


def test_a_recipe_may_say_what_a_budget_means_for_it(tmp_path: Path) -> None:
    path, above = tmp_path / "mine.yaml", tmp_path / "above.yaml"
    path.write_text("base: dive-2of8\nbudgets: {demo: {stage2: {lr: 0.5}, domains: {tokens: 777}}}\n")
    above.write_text(f"base: {path}\nbudgets: {{demo: {{domains: {{tokens: 999}}}}}}\n")
    plain, mine, top = (load_recipe(name, "demo") for name in ("dive-2of8", path, above))
    assert mine.stage2 == plain.stage2.model_copy(update={"lr": 0.5})
    assert (mine.domains.tokens, top.domains.tokens, top.stage2.lr) == (777, 999, 0.5)
    assert load_recipe(path).stage2 == load_recipe("dive-2of8").stage2
    assert load_recipe(path, "demo", ["stage2.lr=0.25"]).stage2.lr == 0.25
    for text in ("budgets: 3", "budgets: {huge: {}}"):
        path.write_text(f"base: dive-2of8\n{text}\n")
        with pytest.raises(MoesmithError, match="budgets is no mapping of demo, small, evening, paper"):
            load_recipe(path)


def test_token_is_distilled_at_rates_of_whole_matrices() -> None:
    for budget in (None, "demo", "small", "paper"):
        recipe = load_recipe("token", budget)
        assert recipe.stage2.whole
        assert (recipe.stage2.lr, recipe.stage2.window, recipe.stage2.batch) == (1e-4, 512, 4)
        assert (recipe.domains.window, recipe.domains.reading) == (512, "once")


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
    "carve.score": st.sampled_from(["wifv", "ifv", "wifn", "magnitude", "taylor", "random"]),
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


PLUS = type(load_recipe("dive-plus"))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["dive-plus", "tomoe-plus", "static"]),
    st.sampled_from(
        [*keys(PLUS), "carve", "carve.", "", "stage1.lr.x", "carve.start", "carve.start.method", "masks.lr"]
    ),
    st.text(max_size=20) | st.text("[]{}:,0123456789.-+eEnaif~'\"&*!|>%@ \n", max_size=20),
)
@example("dive-plus", "name", "2024-13-45")  # YAML takes it for a date
@example("dive-plus", "name", "[" * 5000)
@example("dive-plus", "carve.method", "[dive]")
@example("tomoe-plus", "carve.start", "dive")
@example("tomoe-50", "carve.start.method", "{}")
def test_any_set_loads_or_is_refused(preset: str, key: str, value: str) -> None:
    with contextlib.suppress(MoesmithError):
        assert isinstance(load_recipe(preset, None, [f"{key}={value}"]), Recipe)


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
        (["carve.method=static", "carve.experts=1"], r"no setting 'carve\.experts' with method static"),
        (["carve.method=static", "stage1.tokens=0"], r"no setting 'stage1\.tokens' with method static"),
        (["carve.method=llama-moe", "carve.score=wifv"], r"no setting 'carve\.score' with method llama-moe"),
        (["carve.method=sttic"], r"no method 'sttic'\. Did you mean 'static'\? .*--method-file"),
        (["carve.method=tomoe"], r"carve\.compensation: Input should be 'none' or 'refit'"),
        (["masks.tokens=4096"], r"no setting 'masks\.tokens' with method dive"),
        (["masks.start=carving"], r"no setting 'masks\.start'.*Write carve\.start\.method"),
        (["carve.start={method: dive}"], r"no setting 'carve\.start' with method dive"),
        (["carve.ridge=0.5"], r"carve: ridge has no effect: carve\.compensation is not refit"),
        (["carve.pool=0.5"], r"carve: pool has no effect: carve\.compensation is not refit"),
        (["router.ridge=0.5"], r"router: ridge has no effect: router\.start is not lda"),
        (["affinity.method=published"], "set affinity.published with affinity.method published"),
        (["affinity.published=tinyllama-50"], "set affinity.published with affinity.method published"),
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


def test_a_setting_without_effect_may_stand_there_at_its_default() -> None:
    settings = ["carve.ridge=0.01", "carve.pool=0.2", "router.ridge=0.01"]
    assert load_recipe("dive-1of8", None, settings) == load_recipe("dive-1of8")
    matters = ["carve.compensation=refit", "carve.ridge=0.5", "router.start=lda", "router.ridge=0.5"]
    assert load_recipe("dive-1of8", None, matters).router.ridge == 0.5


def test_a_stored_recipe_is_taken_as_it_is() -> None:
    values = load_recipe("dive-1of8").model_dump(mode="json")
    values["carve"]["ridge"] = 0.5
    with pytest.raises(MoesmithError, match="ridge has no effect"):
        parse(values)
    assert parse(values, stored=True).carve.ridge == 0.5


@pytest.mark.parametrize("name", [name for name in KEYS if name not in presets()])
def test_a_methods_name_is_a_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.name, recipe.description, recipe.method.name) == (name, methods()[name].title, name)
    assert recipe == parse({"name": name, "description": methods()[name].title, "carve": {"method": name}})
    assert recipe.carve == methods()[name].Settings()
    own = KEYS[name]["carve"].split()
    refit = ["carve.compensation=refit"] if "compensation" in own else []
    for key, value in (("ridge", 0.5), ("top_k", 3)):
        if key in own:
            assert getattr(load_recipe(name, None, [f"carve.{key}={value}", *refit]).carve, key) == value


@pytest.mark.parametrize(("preset", "method"), [(p, m) for p in ("dive-1of8", "dive-plus", "tomoe-plus") for m in KEYS])
def test_another_method_takes_of_a_recipe_what_it_knows(preset: str, method: str, tmp_path: Path) -> None:
    """The same from a file that builds on it as from the command line."""
    values: dict[str, Any] = {"compensation": "none", "ratio": 0.25, "top_k": 2}
    known = KEYS[method]["carve"].split()
    mine = dict([next((key, value) for key, value in values.items() if key in known)])
    compensation = [f"carve.{key}={value}" for key, value in mine.items()]
    changed, base = load_recipe(preset, None, [f"carve.method={method}", *compensation]), load_recipe(preset)
    assert (changed.method.name, changed.name) == (method, preset)
    path = tmp_path / f"{preset}.yaml"
    path.write_text(f"base: {preset}\ncarve: {json.dumps({'method': method} | mine)}\n")
    assert load_recipe(path) == changed
    for section in ("domains", "stage1", "stage2", "evaluate", "affinity", "router"):
        if section in type(changed).model_fields and section in type(base).model_fields:
            assert getattr(changed, section) == getattr(base, section)
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"base: {preset}\ncarve: {{rati: 0.5}}\n")
    with pytest.raises(MoesmithError, match=r"no setting 'carve\.rati'"):  # a slip is not another method's setting
        load_recipe(bad, None, [f"carve.method={method}"])


def test_a_copy_has_a_method_of_its_own() -> None:
    recipe = load_recipe("dive-1of8")
    assert recipe.method.settings.experts == 8
    copied = recipe.model_copy(update={"carve": recipe.carve.model_copy(update={"experts": 4})})
    assert (copied.method.settings.experts, copied.method.recipe) == (4, copied)
    assert recipe.method.settings.experts == 8


def test_what_a_recipe_skips_is_not_its_work() -> None:
    names = {"name": "x", "description": "y"}
    recipe = load_recipe("dive-plus", None, ["stage1.tokens=0"])
    other = load_recipe("dive-plus", None, ["stage1.tokens=0", "stage1.lr=0.5", "name=x", "description=y"])
    assert other != recipe
    assert other.same_work() == recipe.same_work() == recipe.model_copy(update=names).same_work()
    assert load_recipe("dive-plus", None, ["stage2.lr=0.5"]).same_work() != load_recipe("dive-plus").same_work()


def test_affinity_tokens_do_not_matter_where_nothing_is_measured() -> None:
    assert load_recipe("dive-plus", None, ["affinity.tokens=1"]).affinity.tokens == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("carve: {experts: 8\n", "not YAML.*Fix"),
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
    with pytest.raises(MoesmithError, match="not YAML"):
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
    with pytest.raises(MoesmithError, match=r"no budget 'huge'\. Choose one of demo, small, evening, paper"):
        load_recipe("dive-plus", "huge")


def test_the_active_share_of_channels() -> None:
    """Width times the experts that a token visits; what has no such setting says which one to use."""
    for name, visited in (("token", 1), ("dive-2of8", 2), ("flap-static", 1), ("llama-moe", 1), ("moefication", 1)):
        for active in (0.25, 0.75, 1.0):
            recipe: Any = load_recipe(name, active=active)
            assert visited * (1 - recipe.carve.ratio) == pytest.approx(active, abs=1e-5)
    for name in ("cmoe", "expert-weaver"):  # experts that add up: the ratio is a token's, however many it visits
        for active in (0.5, 0.75, 1.0):
            recipe = load_recipe(name, active=active)
            assert (recipe.carve.ratio, recipe.method.active) == pytest.approx((1 - active, active))
    with pytest.raises(MoesmithError, match=r"method tomoe has no carve.ratio .* Set masks.budget\."):
        load_recipe("tomoe-50", active=0.5)
    with pytest.raises(MoesmithError, match="say the same"):
        load_recipe("token", settings=["carve.ratio=0.2"], active=0.5)
    for active in (0.0, 1.5):
        with pytest.raises(MoesmithError, match="no share"):
            load_recipe("token", active=active)
    for setting in ("carve.top_k=two", "carve=5"):
        with pytest.raises(MoesmithError, match=r"carve.*: Input should be"):
            load_recipe("dive-2of8", settings=[setting], active=0.5)


@pytest.mark.parametrize("start", ["carve.start={method: dive}", "carve.start.method=dive"])
def test_recipes_take_what_their_start_reads(start: str) -> None:
    common = ["affinity.method=scores", "router.start=lda", "carve.ratio=0.5"]
    assert applicable("tomoe-50", [start, *common], common) == common[:2]
    assert applicable("tomoe-50", common, common) == []


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
