"""The Python API with what people hand over: paths, one for several, models in memory, other modes of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import TINY, convert, weights

import moesmith
from moesmith import MoesmithError
from moesmith.conversion.steps.training import prepare
from moesmith.data.text import load_domains, source_digest
from moesmith.evaluation.compare import compare, continuations
from moesmith.export.delta import pack, unpack
from moesmith.export.targets import explain_run, export_run
from moesmith.report.overview import describe
from moesmith.report.page import write_report
from moesmith.run.pipeline import Pipeline as Run
from moesmith.studies.run import study
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_model, tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer
from moesmith.training.loop import train
from moesmith.training.student import Student

FEW = ["stage1.tokens=256", "stage2.tokens=256"]


@pytest.fixture(scope="module")
def plain(home: Path) -> Run:
    """What every other way of saying the same must give."""
    return convert("dive-plus", home / "m", home / "d", home / "plain", FEW)


def again(home: Path, folder: Path, **changed: Any) -> Run:
    """The same conversion, said otherwise."""
    said: dict[str, Any] = {
        "recipe": "dive-plus",
        "model": str(home / "m"),
        "data": str(home / "d"),
        "out": str(folder),
    }
    return moesmith.convert(**{**said, "settings": [*TINY, *FEW], "dtype": torch.float32, **changed})


def test_paths_are_as_good_as_text(home: Path, plain: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: dive-plus\nname: dive-plus\n")
    run = again(
        home, tmp_path / "run", recipe=tmp_path / "mine.yaml", model=home / "m", data=home / "d", out=tmp_path / "run"
    )
    assert run.keys == plain.keys
    assert weights(run.folder) == weights(plain.folder)
    assert (run.inputs["model"], run.inputs["data"]) == (str(home / "m"), str(home / "d"))
    assert moesmith.load_parent(home / "m", torch.float32).digest == plain.inputs["model_digest"]
    assert source_digest(home / "d") == source_digest(str(home / "d"))
    assert [domain.name for domain in load_domains(home / "d", "sum")] == ["sum"]


def test_a_model_in_memory(home: Path, plain: Run, tmp_path: Path) -> None:
    run = again(home, tmp_path / "run", model=tiny_model("llama"), tokenizer=tiny_tokenizer())
    assert weights(run.folder) == weights(plain.folder)


def test_one_for_several(home: Path, plain: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again(home, tmp_path / "first", reuse=str(plain.folder))
    again(home, tmp_path / "second", reuse=plain.folder)
    assert capfd.readouterr().err.count("[experts] taken over") == 2
    assert moesmith.load_recipe("dive-plus", settings="seed=7").seed == 7
    assert moesmith.load_recipe("dive-plus", settings=None).seed == 42


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "recipe None": ({"recipe": None}, r"recipe is None\. Give"),
    "recipe": ({"recipe": 3}, r"recipe is an int\. Give"),
    "model None": ({"model": None}, r"model is None\. Give a folder, a hub id"),
    "model": ({"model": 3}, r"model is an int\. Give a folder"),
    "model bytes": ({"model": b"x"}, r"model is a bytes\. Give"),
    "tokenizer missing": ({"model": tiny_model("llama")}, r"comes without its tokenizer\. Give it as tokenizer="),
    "tokenizer too many": ({"tokenizer": tiny_tokenizer()}, r"has its own\. Leave tokenizer out"),
    "data None": ({"data": None}, r"data is None\. Give"),
    "data list": ({"data": ["d"]}, r"data is a list\. Give"),
    "data empty": ({"data": ""}, r"data is empty\. Give"),
    "out": ({"out": 3}, r"out is an int\. Give"),
    "settings dict": ({"settings": {"seed": 1}}, r"settings is a dict\. Give a list"),
    "settings numbers": ({"settings": [4]}, r"settings\[0\] is an int\. Give"),
    "settings of a recipe": (
        {"recipe": moesmith.load_recipe("dive-plus")},
        r"change no Recipe\. Give them to load_rec",
    ),
    "reuse number": ({"reuse": 3}, r"reuse is an int\. Give a list"),
    "reuse missing": ({"reuse": ["nope"]}, r"--reuse nope does not exist\. Give a folder"),
    "memory": ({"memory": [1]}, r"\[1\] is no size of memory\. Write"),
    "fp64": ({"dtype": torch.float64}, r"do not compute in torch\.float64\. Give one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_line(home: Path, tmp_path: Path, name: str) -> None:
    changed, says = REFUSED[name]
    with pytest.raises(MoesmithError, match=says) as caught:
        again(home, tmp_path / "run", **changed)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_reuse_of_no_run_is_refused_before_the_parent_is_loaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesmith.conversion import convert as conversion

    monkeypatch.setattr(conversion, "load_parent", None)
    with pytest.raises(MoesmithError, match=r"--reuse \S+ holds no moesmith run\. Give a folder made by"):
        again(home, tmp_path / "run", reuse=home / "m")


@contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dtype": doubles,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_mode_changes_nothing(home: Path, plain: Run, tmp_path: Path, mode: str) -> None:
    with MODES[mode]():
        run = again(home, tmp_path / "run")
    assert weights(run.folder) == weights(plain.folder)


def test_training_under_no_grad_trains(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    recipe = moesmith.load_recipe("dive-plus", settings=TINY)
    spec = recipe.stage2.model_copy(update={"loss": "next-token"})
    model = moesmith.build(parent, random_carving(parent))
    parameters = prepare(model, spec, 0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    blocks = torch.randint(0, 300, (8, 32))
    with torch.no_grad():
        train(Student(model, None, spec), parameters, blocks, spec, tmp_path)
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items() if name.endswith(".B"))


def test_weights_of_inference_mode_are_refused(home: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        parent = tiny_parent("llama")
    with pytest.raises(
        MoesmithError, match=r"weight was made under torch\.inference_mode\(\).*Load or build the model"
    ):
        again(home, tmp_path / "run", model=parent)
    ordinary, spec = tiny_parent("llama"), moesmith.load_recipe("dive-plus", settings=TINY).stage2
    with torch.inference_mode():
        model = moesmith.build(ordinary, random_carving(ordinary))
    with pytest.raises(MoesmithError, match="was made under"):
        train(Student(model, None, spec), {}, torch.zeros(8, 32, dtype=torch.int64), spec, tmp_path / "train")


def test_many_processes_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MoesmithError, match=r"WORLD_SIZE is 2, but RANK is not set\. Start it with torchrun"):
        again(home, tmp_path / "run")
    with pytest.raises(MoesmithError, match=r"one of 2 processes .*works in one\. Run it without torchrun"):
        study("union", "model", "data", tmp_path / "study")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(MoesmithError, match=r"one of 2 processes \(OMPI_COMM_WORLD_SIZE=2\)\. Start it with torchrun"):
        again(home, tmp_path / "run")


def test_a_run_may_be_named_by_text(plain: Run, tmp_path: Path) -> None:
    name = str(plain.folder)
    assert describe(name) == describe(plain.folder)
    assert moesmith.open_run(name).settings["name"] == "dive-plus"
    found = compare(name, tasks="domains", tokens=256)
    assert found["results"] == compare(plain.folder, None, ["domains"], None, 256)["results"]
    assert set(continuations(name, "one two", 2, False)) == {"dense parent", "MoE"}
    assert next(x["target"] for x in explain_run(name)) == "hf"
    pack(name, str(tmp_path / "delta"))
    unpack(str(tmp_path / "delta"), plain.inputs["model"], str(tmp_path / "back"))
    assert (tmp_path / "back" / "model" / "config.json").is_file()
    assert write_report(name, str(tmp_path / "page.html")).is_file()
    assert moesmith.Carving.load(str(plain.path("carve"))).experts == 4


PATHS: dict[str, Callable[[Any], Any]] = {
    "describe": describe,
    "open_run": moesmith.open_run,
    "compare": compare,
    "explain_run": explain_run,
    "export_run": lambda run: export_run(run, "hf", "y", None),  # type: ignore[arg-type]
    "pack": lambda run: pack(run, "x"),  # type: ignore[arg-type]
    "write_report": write_report,
    "Carving.load": moesmith.Carving.load,
    "load_parent": moesmith.load_parent,
    "load_recipe": moesmith.load_recipe,
    "load_domains": load_domains,
}


@pytest.mark.parametrize("given", [None, 3, b"x", ["x"]], ids=repr)
@pytest.mark.parametrize("name", PATHS)
def test_no_path_is_one_line(name: str, given: Any) -> None:
    with pytest.raises(MoesmithError, match=r"^\S+ is (None|an? \w+)\. Give "):
        PATHS[name](given)


def test_a_parent_needs_a_model_and_a_tokenizer() -> None:
    for model, tokenizer in ((tiny_model("llama"), None), ("x", tiny_tokenizer())):
        with pytest.raises(MoesmithError, match="a parent is made of a model and a tokenizer"):
            moesmith.Parent.from_model(model, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(MoesmithError, match=r"torch\.float64\. Give them in float32"):
        tiny_parent("llama", dtype=torch.float64)


def test_build_takes_no_other_parents_carving(home: Path, plain: Run) -> None:
    carving = moesmith.Carving.load(plain.path("carve"))
    assert moesmith.build(moesmith.load_parent(home / "m", torch.float32), carving)
    cure = r"\. Give the dense model that it was made from"
    for parent, says in (
        (tiny_parent("llama", 1), r"tiny-llama is not the parent of this carving \(weights \w+, not \w+\)"),
        (tiny_parent("llama", num_hidden_layers=3), "the carving has layers 2, and tiny-llama has 3"),
        (tiny_parent("llama", hidden_size=64), "the carving has model width 32, and tiny-llama has 64"),
        (tiny_parent("llama", intermediate_size=128), "the carving has channels 64, and tiny-llama has 128"),
    ):
        for form in ("masked", "sliced"):
            with pytest.raises(MoesmithError, match=says + cure):
                moesmith.build(parent, carving, form)  # type: ignore[arg-type]
    ours = tiny_parent("llama")
    for parent, given in ((ours, str(plain.path("carve"))), (str(home / "m"), carving)):
        with pytest.raises(MoesmithError, match="build takes a Parent and a Carving"):
            moesmith.build(parent, given)  # type: ignore[arg-type]
    with pytest.raises(MoesmithError, match=r"no form 'dense'\. Give masked or sliced"):
        moesmith.build(ours, carving, "dense")  # type: ignore[arg-type]


def test_a_parent_in_a_wider_dtype_is_known_by_rounding(home: Path, tmp_path: Path) -> None:
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", FEW, dtype=torch.bfloat16)
    carving = moesmith.Carving.load(run.path("carve"))
    assert moesmith.build(moesmith.load_parent(home / "m", torch.float32), carving)
    with pytest.raises(MoesmithError, match="is not the parent of this carving"):
        moesmith.build(tiny_parent("llama", 1), carving)


def test_channels_that_are_not_there() -> None:
    parent = tiny_parent("llama")
    carving = random_carving(parent)
    carving.layers[1].routed[0].channels = carving.layers[1].routed[0].channels + parent.F
    with pytest.raises(MoesmithError, match="layer 1 of the carving keeps channels that the parent does not have"):
        moesmith.build(parent, carving)
