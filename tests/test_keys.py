"""A stage's key knows everything that its result depends on: each input is changed alone, and where a key stays the
result must stay too, bit for bit. Old runs, whose keys know less, count where their manifests say that the rest agrees.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert, snapshot, weights
from golden import ASSETS, settings_of_old
from pydantic import Field
from transformers import AutoTokenizer, GenerationConfig

import moesmith
from moesmith.conversion import convert as conversion
from moesmith.conversion.order import steps_of
from moesmith.errors import MoesmithError
from moesmith.files.artefact import FORMAT, MANIFEST, read_json
from moesmith.files.seal import digest
from moesmith.files.write import write_json, write_text
from moesmith.methods.registry import methods
from moesmith.methods.tomoe.method import DECIDED
from moesmith.parent.digests import tokenizer_digest
from moesmith.run.fingerprints import companions_digest, folder_companions, text_digest
from moesmith.run.folder import Run, open_run
from moesmith.run.legacy import Legacy
from moesmith.run.pipeline import Pipeline, check_folder
from moesmith.run.recipe import Recipe, keys, kind_of, load_recipe, parse
from moesmith.run.settings import LoopSection, Section, TrainSection
from moesmith.run.step import Job, Step
from moesmith.run.versions import versions
from moesmith.testing.parents import save_tiny, tiny_parent

FEW = ["stage1.tokens=512", "stage2.tokens=512"]
ALL = ("held-out", "corpus", "baseline", "domains", "moments", "affinity", "carve", "router", "experts", "export")
MADE_LAST = ("export", "evaluate")
NOT_A_RESULT = ("README.md", "SHA256SUMS", MANIFEST, "log.jsonl")


def keys_of(run: Run) -> dict[str, str]:
    """The key of every finished stage."""
    return {name: run.manifest(name)["key"] for name in run.manifests}


def results(run: Run) -> dict[str, dict[str, str]]:
    """sha256 of what each stage made; of *export* it is the finished folder."""
    found: dict[str, dict[str, str]] = {}
    for name in keys_of(run):
        folders = [run.folder / "model", run.folder / "stock"] if name == "export" else [run.path(name)]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        found[name] = {str(p.relative_to(run.folder)): _hash(p) for p in files if p.name not in NOT_A_RESULT}
    return found


def _hash(path: Path) -> str:
    if path.suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict):  # where a carving came from, and where a model lay, decide nothing
            value = {k: v for k, v in value.items() if k not in ("provenance", "_name_or_path")}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(before: Run, after: Run) -> set[str]:
    """The stages whose keys changed; the results of all others must be the same."""
    old, new = results(before), results(after)
    then, now = keys_of(before), keys_of(after)
    changed = {name for name in now if now[name] != then.get(name)}
    for name in set(now) - changed:
        assert new[name] == old[name], f"{name} has the same key and another result"
    return changed


@pytest.fixture(scope="module")
def base(home: Path) -> Run:
    """The run that each input is changed of."""
    return convert("dive-plus", home / "m", home / "d", home / "base", FEW)


def edited(model: Path, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads((model / name).read_text())
    change(value)
    (model / name).write_text(json.dumps(value))


def unseen_merge(found: dict[str, Any]) -> None:
    """Without a merge that the old digest's probe text does not use."""
    (merge,) = [merge for merge in found["model"]["merges"] if "".join(merge) == "the"]
    found["model"]["merges"].remove(merge)


def two_tokens_swapped(found: dict[str, Any]) -> None:
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda found: found.__setitem__(name, value)


INPUTS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "weights": (lambda m: save_tiny("llama", m, seed=1), {*ALL, "evaluate"}),
    "config": (lambda m: edited(m, "config.json", put("rms_norm_eps", 1e-3)), {*ALL, "evaluate"}),
    "merges": (lambda m: edited(m, "tokenizer.json", unseen_merge), {*ALL, "evaluate"}),
    "vocabulary": (lambda m: edited(m, "tokenizer.json", two_tokens_swapped), {*ALL, "evaluate"}),
    "end of text": (lambda m: edited(m, "tokenizer_config.json", put("eos_token", "!")), {*ALL, "evaluate"}),
    "begin of text": (lambda m: edited(m, "tokenizer_config.json", put("bos_token", "</s>")), set(MADE_LAST)),
    "padding": (lambda m: edited(m, "tokenizer_config.json", put("pad_token", "<s>")), set(MADE_LAST)),
    "padding side": (lambda m: edited(m, "tokenizer_config.json", put("padding_side", "left")), set(MADE_LAST)),
    "chat template": (lambda m: (m / "chat_template.jinja").write_text("{{ messages[0].content }}"), set(MADE_LAST)),
    "generation": (lambda m: edited(m, "generation_config.json", put("temperature", 0.3)), set(MADE_LAST)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_parent_with_one_thing_changed(home: Path, base: Run, tmp_path: Path, name: str) -> None:
    model = Path(shutil.copytree(home / "m", tmp_path / "m"))
    change, expected = INPUTS[name]
    change(model)
    fresh = convert("dive-plus", model, home / "d", tmp_path / "fresh", FEW)
    assert check(base, fresh) == expected
    if expected == set(MADE_LAST):  # the finished folder holds the new input
        assert results(fresh)["export"] != results(base)["export"]
    reused = convert("dive-plus", model, home / "d", tmp_path / "reused", FEW, reuse=base.folder)
    assert weights(reused.folder) == weights(fresh.folder)
    assert results(reused)["export"] == results(fresh)["export"]


def test_other_text_and_another_dtype(home: Path, base: Run, tmp_path: Path) -> None:
    shutil.copytree(home / "d", tmp_path / "d")
    with open(tmp_path / "d" / "sum.train.jsonl", "a") as file:
        file.write('{"text": "1 + 1"}\n')
    text = convert("dive-plus", home / "m", tmp_path / "d", tmp_path / "text", FEW)
    assert check(base, text) == {*ALL, "evaluate"}
    other = convert("dive-plus", home / "m", home / "d", tmp_path / "dtype", FEW, dtype=torch.bfloat16)
    assert check(base, other) == {*ALL, "evaluate"} - {
        "held-out",
        "corpus",
        "domains",
    }  # token ids do not depend on what computes


SETTINGS: dict[str, list[str]] = {  # a setting → another value, and what it takes for the value to matter
    "seed": ["seed=1"],
    "domains.names": ["domains.names=[sum, place, count, beast]"],
    "domains.tokens": ["domains.tokens=256"],
    "domains.window": ["domains.window=16"],
    "domains.reading": ["domains.reading=once"],
    "carve.method": ["carve.method=llama-moe"],
    "carve.experts": ["carve.experts=3"],
    "carve.top_k": ["carve.top_k=2"],
    "carve.redrawn": ["carve.redrawn=0.25"],  # tests/test_upcycling.py: no preset of these has it
    "carve.ratio": ["carve.ratio=0.25"],
    "carve.score": ["carve.score=magnitude"],
    "carve.selection": ["carve.selection=adaptive"],
    "carve.compensation": ["carve.compensation=bias"],
    "carve.split": ["carve.split=co-activation"],
    "carve.shared": ["carve.shared=1"],
    "carve.rescale": ["carve.rescale=false"],
    "carve.selector": ["carve.selector=norm"],
    "carve.select": ["carve.select=energy"],
    "carve.clusters": ["carve.clusters=distance"],
    "carve.prior": ["carve.prior=9999"],
    "carve.repair": ["carve.repair=false"],
    "carve.sinks": ["carve.sinks=false"],
    "carve.among": ["carve.among=0.75"],
    "carve.sample": ["carve.sample=64"],
    "carve.gram": ["carve.gram=64"],
    "carve.marked": ["carve.marked=3"],
    "carve.rounds": ["carve.rounds=2"],
    "carve.represent": ["carve.represent=cosine"],
    "carve.router": ["carve.router=linear"],
    "carve.shares": ["carve.shares=equal"],
    "carve.least": ["carve.least=0.05"],
    "carve.most": ["carve.most=0.25"],
    "carve.threshold": ["carve.threshold=0.1"],
    "carve.samples": ["carve.samples=4"],
    "carve.sensitivity": ["carve.sensitivity=64"],
    "carve.allocation": ["carve.allocation=sensitivity"],
    "carve.passes": ["carve.passes=3"],
    "carve.batch": ["carve.batch=24"],
    "carve.lr": ["carve.lr=0.1"],
    "carve.ridge": ["carve.ridge=0.5"],
    "carve.pool": ["carve.pool=0.9"],
    "affinity.method": ["affinity.method=perplexity"],
    "affinity.profile": ["affinity.method=perplexity", "affinity.profile=columns"],
    "affinity.linkage": ["affinity.linkage=single", "carve.experts=2"],
    "affinity.tokens": ["affinity.method=perplexity", "affinity.tokens=128"],
    "affinity.window": ["affinity.method=perplexity", "affinity.window=16"],
    "router.start": ["router.start=random"],
    "router.ridge": ["router.ridge=0.5"],
    "router.noise": ["router.noise=0.1"],
    "masks.micro_batch": ["masks.micro_batch=2"],
    "masks.lr": ["masks.lr=0.1"],
    "masks.schedule": ["masks.schedule=cosine"],
    "masks.min_ratio": ["masks.schedule=cosine", "masks.min_ratio=0.9"],
    "masks.warmup": ["masks.warmup=0.5"],
    "masks.clip": ["masks.clip=0.001"],
    "masks.weight_decay": ["masks.weight_decay=0.9"],
    "masks.checkpointing": ["masks.checkpointing=true"],
    "masks.tokens": ["masks.tokens=256"],
    "masks.window": ["masks.window=16"],
    "masks.batch": ["masks.batch=4"],
    "masks.budget": ["masks.budget=0.6"],
    "carve.start": ["carve.start=null"],
    "masks.attention": ["masks.attention=hybrid"],
    "masks.output_mask": ["masks.attention=hybrid", "masks.output_mask=false"],
    "masks.noise": ["masks.noise=token"],
    "masks.routing": ["masks.routing=sampled"],
    "masks.masking": ["masks.masking=double"],
    "masks.widths": ["masks.widths=threshold"],
    "masks.temperature": ["masks.temperature=2"],
    "masks.bias": ["masks.bias=1"],
    "masks.kl_weight": ["masks.kl_weight=9"],
    "masks.budget_weight": ["masks.budget_weight=1"],
    "masks.union": ["masks.union=plain"],
    "masks.union_weight": ["masks.union_weight=9"],
    "masks.balance_weight": ["masks.balance_weight=9"],
    "evaluate.tokens": ["evaluate.tokens=256"],
    "evaluate.window": ["evaluate.window=32"],
}
LOOP = {
    "tokens": "256", "window": "16", "batch": "4", "micro_batch": "2", "lr": "0.1", "schedule": "constant",
    "min_ratio": "0.9", "warmup": "0.5", "clip": "0.001", "weight_decay": "0.9", "checkpointing": "true",
    "loss": "next-token", "mix": "0.5", "hidden": "9", "kl_temperature": "3", "gate_temperature": "3",
    "train_router": "false", "lora_rank": "2", "lora_alpha": "99", "lora_dropout": "0.8", "norms": "false",
    "router_gradient": "none",
}  # fmt: skip
SETTINGS |= {f"stage2.{name}": [f"stage2.{name}={value}"] for name, value in LOOP.items()}
SETTINGS |= {
    f"stage1.{name}": [f"stage1.{name}={value}"]
    for name, value in LOOP.items()
    if name not in ("lora_rank", "lora_alpha", "lora_dropout", "norms", "train_router", "router_gradient", "schedule")
}
SPARSE = ["stage1.gate=sparse", "stage1.router_gradient=straight-through"]
SETTINGS |= {
    "stage1.schedule": ["stage1.schedule=cosine"],
    "stage1.gate": SPARSE,
    "stage1.router_gradient": [*SPARSE, "carve.top_k=2"],
    "stage1.train_router": [*SPARSE, "stage1.train_router=false", "stage1.norms=true"],
    "stage1.norms": [*SPARSE, "stage1.norms=true"],
    "stage1.lora_rank": [*SPARSE, "stage1.lora_rank=2"],
    "stage1.whole": [*SPARSE, "stage1.whole=true"],
    "stage2.whole": ["stage2.whole=true", "stage2.lora_rank=0"],
    "stage1.lora_alpha": [*SPARSE, "stage1.lora_rank=2", "stage1.lora_alpha=99"],
    "stage1.lora_dropout": [*SPARSE, "stage1.lora_rank=2", "stage1.lora_dropout=0.8"],
    "stage2.gate": ["stage2.gate=dense", "stage2.lora_rank=0", "stage2.norms=false"],
    **{f"assign.{name}": [f"assign.{name}={LOOP[name]}"] for name in LoopSection.model_fields if name != "schedule"},
    "assign.schedule": ["assign.schedule=cosine"],
    "assign.rounds": ["assign.rounds=2"],
    "assign.temperature": ["assign.temperature=3"],
    "assign.last_temperature": ["assign.last_temperature=0.9"],
    "assign.kl_weight": ["assign.kl_weight=9"],
    "assign.language_weight": ["assign.language_weight=9"],
    "assign.z_weight": ["assign.z_weight=9"],
    "assign.balance_weight": ["assign.balance_weight=9"],
    "affinity.published": ["affinity.method=random"],  # its names are not these domains': the third kind of clusters
}


# of what masks start from, which is a carving's settings inside a setting
STARTS: dict[str, list[str]] = {
    "carve.start.method": ["carve.start={method: llama-moe}"],
    "carve.start.score": ["carve.start.score=magnitude"],
    "carve.start.selection": ["carve.start.selection=adaptive"],
}


def test_every_setting_is_tried() -> None:
    kinds = [kind_of({"carve": {"method": name}}) for name in methods()]
    kinds.append(kind_of({"carve": {"method": "tomoe", "start": {"method": "dive"}}}))
    assert set(SETTINGS) == {key for kind in kinds for key in keys(kind)} - {"name", "description", "report_to"}
    start = set(methods()["dive"].Settings.model_fields) - set(DECIDED)
    assert set(STARTS) == {f"carve.start.{name}" for name in start}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dive-plus", "tomoe-plus", "token", "llama-moe-partition", "dot-moe"])
def test_every_setting_alone(home: Path, tmp_path: Path, preset: str) -> None:
    """Nearly a hundred conversions: a setting that a stage's key forgets would leave its result as it was."""
    token = ["carve.sample=32", "carve.batch=16", "carve.passes=1", "domains.reading=random"]
    few = {
        "dive-plus": FEW,
        "tomoe-plus": ["masks.budget=0.55"],
        "token": token,
        "llama-moe-partition": ["carve.selector=norm"],
        "dot-moe": ["carve.experts=4", "assign.tokens=512", "assign.window=32", "assign.batch=8", "stage2.tokens=0"],
    }[preset]
    learned = {"tomoe-plus": "masks.", "dot-moe": "assign."}
    before = convert(preset, home / "m", home / "d", tmp_path / "base", few)
    kept, refused = {}, {}
    for name, settings in (SETTINGS | (STARTS if preset == "tomoe-plus" else {})).items():
        own = name.startswith(learned[preset]) if preset in learned else not name.startswith((*learned.values(),))
        if own or name.startswith(("seed", "carve.", "domains.")):
            try:
                run = convert(preset, home / "m", home / "d", tmp_path / name, [*few, *settings])
            except MoesmithError as error:  # it does not go with this preset, or masks cannot be so narrow
                refused[name] = str(error)
                continue
            kept[name] = keys_of(run).keys() - check(before, run)
            shutil.rmtree(tmp_path / name)
    least = {"dive-plus": 60, "tomoe-plus": 30}
    assert len(kept) > least.get(preset, 15), refused
    assert not refused.keys() & STARTS.keys()
    assert all("held-out" in kept[name] for name in kept if name.startswith(("carve.", "stage", *learned.values())))


def first_keys(run: Path, home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The keys that the stages of a finished run would have had in moesmith 0.1, before there was a format."""
    folder, made = Path(shutil.copytree(run, scratch)), []

    class Known(Pipeline):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    without_format(folder / "run.json")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "Pipeline", Known)
        convert("dive-plus", home / "m", home / "d", folder, FEW)
    legacy = made[0].old[folder]
    assert legacy is not None
    assert legacy.oldest.keys() == {*ALL, "evaluate"}
    return dict(legacy.oldest)


def without_format(header: Path) -> None:
    """Make ``run.json`` one of moesmith 0.1: no format, and nothing that came later."""
    found = read_json(header)
    del found["format"]
    found["inputs"] = {k: v for k, v in found["inputs"].items() if k not in ("text_digest", "companions_digest")}
    found["recipe"]["masks"] = {"tokens": 0, "start": "random", "budget": 0.5}  # every recipe had every section
    write_json(header, found)


@pytest.fixture
def oldest(home: Path, base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The keys of moesmith 0.1 for the stages of the run."""
    return first_keys(base.folder, home, tmp_path / "scratch", monkeypatch)


@pytest.fixture
def old(base: Run, oldest: dict[str, str], tmp_path: Path) -> Run:
    """A run of moesmith 0.1: its keys, and nothing that came later."""
    run = Run(Path(shutil.copytree(base.folder, tmp_path / "old")))
    new = ("text_digest", "companions_digest")
    for name, key in oldest.items():
        path = run.path(name) / MANIFEST
        manifest = {k: v for k, v in read_json(path).items() if k not in ("format", "title", "headline", "version")}
        write_json(path, manifest | {"key": key, "inputs": {k: v for k, v in base.inputs.items() if k not in new}})
    without_format(run.folder / "run.json")
    return run


def said(capfd: pytest.CaptureFixture[str], what: str) -> list[str]:
    return [line.split("]")[0][1:] for line in capfd.readouterr().err.splitlines() if what in line]


class Made(Step):
    """A step of the tests: its name, settings, and what else a test says."""

    def __init__(self, recipe: Recipe, name: str, *needs: str, settings: Any = None, **facts: Any) -> None:
        super().__init__(recipe, *needs)
        self.__dict__ |= {"name": name, "given": settings or {}, **facts}

    def settings(self, job: Job) -> dict[str, Any]:
        return dict(self.given)

    def make(self, job: Job, work: Path) -> dict[str, Any]:
        return {}


DIGESTS = {"model": "m", "model_digest": "1", "data": "d", "data_digest": "2", "dtype": "bfloat16"}


def made(folder: Path, recipe: Recipe, *steps: Step, **inputs: str) -> Pipeline:
    """A run in which steps were made."""
    run = Pipeline(folder, recipe, DIGESTS | inputs)
    with run.lock():
        for step in steps:
            run.step(step, Job(run, None, []))  # type: ignore[arg-type]
    return run


def test_keys_of_the_first_version_are_what_they_were(tmp_path: Path) -> None:
    """As commit 1a90a56 hashed them."""
    inputs = {"model_digest": "m", "data_digest": "d", "text_digest": "t", "tokenizer_digest": "k", "dtype": "bfloat16"}
    recipe = load_recipe("dive-plus")
    header = {"recipe": recipe.model_dump(mode="json"), "inputs": inputs}
    run, legacy = Pipeline(tmp_path / "run", recipe, inputs), Legacy(tmp_path / "old", header, recipe)
    step = Made(recipe, "baseline", "held-out", settings={"x": 1})
    legacy.steps = [step]
    legacy.keys, legacy.oldest = {"held-out": "new"}, {"held-out": "old"}
    legacy.learn(step, Job(run, None, []), {"x": 1}, run)  # type: ignore[arg-type]
    facts = {"stage": "baseline", "settings": {"x": 1}, "seed": 42, "needs": {"held-out": "old"}}
    assert legacy.oldest["baseline"] == digest(facts | {"inputs": {"model_digest": "m", "data_digest": "d"}})
    assert legacy.oldest["baseline"] == "efd408224d966355"  # of that commit itself


def test_keys_of_version_0_1_are_known_for_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the runs that it left (tests/assets/old), by the manifests that it wrote."""
    shutil.copytree(ASSETS, tmp_path / "assets")
    monkeypatch.chdir(tmp_path / "assets")
    pipelines: list[Pipeline] = []

    class Known(Pipeline):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pipelines.append(self)

    monkeypatch.setattr(conversion, "Pipeline", Known)
    for preset, name in (("dive-plus", "run"), ("tomoe-plus", "learned")):
        folder = Path("old") / name
        written = {path.parent.name: read_json(path)["key"] for path in folder.glob(f"stages/*/{MANIFEST}")}
        given: dict[str, Any] = {"settings": settings_of_old(preset), "dtype": "fp32", "device": "cpu"}
        moesmith.convert(preset, "parents/llama", "text", folder, **given)
        legacy = pipelines[-1].old[folder]
        assert legacy is not None
        again = {"refit", "export", "evaluate"} if preset == "tomoe-plus" else set()  # another refit since
        assert legacy.keys.keys() == written.keys()
        assert {stage for stage, key in legacy.keys.items() if written[stage] != key} == again


def test_a_new_setting_changes_no_key_while_it_changes_nothing(tmp_path: Path) -> None:
    """A section that gets a setting later: runs from before are known while it has its neutral value."""

    class Later(TrainSection):
        damping: float = Field(0.0, json_schema_extra={"neutral": 0.0})
        other: int = 1

    before, after = TrainSection(tokens=2048), Later(tokens=2048)
    assert after.used() == before.used() | {"other": 1}  # without a neutral value it counts from the start
    assert Later(tokens=2048, damping=0.5).used() == after.used() | {"damping": 0.5}
    assert after.model_dump()["damping"] == 0.0  # in run.json it stands all the same

    # a run from before is read with the neutral value, whatever the default has become since
    class Since(TrainSection):
        damping: float = Field(0.5, json_schema_extra={"neutral": 0.0})

    assert Since.model_validate(before.model_dump(), context={"stored": True}).used() == before.used()
    assert Since.model_validate({"tokens": 2048}).damping == 0.5
    recipe = load_recipe("dive-plus")

    def key(section: Section) -> str:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return made(folder, recipe, Made(recipe, "experts", settings=section.used())).keys["experts"]

    class Neutral(TrainSection):
        damping: float = Field(0.0, json_schema_extra={"neutral": 0.0})

    assert key(before) == key(Neutral(tokens=2048)) != key(Neutral(tokens=2048, damping=0.5))


def test_a_version_of_its_mathematics_enters_a_steps_key(tmp_path: Path) -> None:
    recipe = load_recipe("dive-plus")

    def keys_with(version: int) -> dict[str, str]:
        steps = [Made(recipe, "moments", version=version), Made(recipe, "carve", "moments"), Made(recipe, "held-out")]
        return made(tmp_path / f"{version}", recipe, *steps).keys

    first, second = keys_with(1), keys_with(2)
    assert {name for name in first if first[name] != second[name]} == {"moments", "carve"}  # and of what needs it
    again = Made(recipe, "moments", version=2)
    made(tmp_path / "1", recipe, again)  # the folder of version 1 is made again
    assert read_json(tmp_path / "1" / "stages" / "moments" / MANIFEST)["key"] == second["moments"]
    plain = {"stage": "moments", "settings": {}, "seed": 42, "inputs": {"model_digest": "1", "data_digest": "2"}}
    assert first["moments"] == digest(plain | {"needs": {}})  # the first one is not written into it
    assert second["moments"] == digest(plain | {"needs": {}, "version": 2})


def test_a_methods_version_enters_its_carvings_key(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, parent = load_recipe("dive-plus"), tiny_parent("llama")
    before = recipe.method.key(parent)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(recipe.method), "version", 2)
    assert recipe.method.key(parent) == before | {"version": 2}  # type: ignore[attr-defined]


def test_settings_of_a_skipped_stage_refuse_no_folder(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    skipped = ["stage1.tokens=0", "stage2.tokens=512"]
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", skipped)
    before = keys_of(run)
    capfd.readouterr()
    again = convert(
        "dive-plus", home / "m", home / "d", tmp_path / "run", [*skipped, "stage1.lr=0.5", "stage1.window=16"]
    )
    assert said(capfd, "done before") == [name for name in [*ALL, "evaluate"] if name != "router"]
    assert keys_of(again) == before
    values = open_run(tmp_path / "run").settings
    for key in ("stage2.lr=0.5", "stage1.tokens=512"):  # of a stage that is not skipped they do
        section, name = key.partition("=")[0].split(".")
        changed = values | {section: values[section] | {name: float(key.partition("=")[2])}}
        with pytest.raises(MoesmithError, match=rf"other settings: .*{section}\.{name} was"):
            check_folder(tmp_path / "run", parse(changed, stored=True), run.inputs)
    # the temperature of stage 1 scales the router's closed form, whether the stage is skipped or not
    fresh = convert("dive-plus", home / "m", home / "d", tmp_path / "warm", [*skipped, "stage1.gate_temperature=2.0"])
    assert "carve" in check(run, fresh)


def test_a_run_of_the_first_version_is_finished(
    home: Path, base: Run, old: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(old.folder / "stages")
    again = convert("dive-plus", home / "m", home / "d", old.folder, FEW)
    assert said(capfd, "done before") == [*ALL, "evaluate"]
    assert snapshot(old.folder / "stages") == before
    assert read_json(old.folder / "run.json")["format"] == FORMAT
    convert("dive-plus", home / "m", home / "d", tmp_path / "new", FEW, reuse=again.folder)
    assert said(capfd, "taken over") == [*ALL[:-1], "evaluate"]


def test_a_run_of_the_first_version_gives_nothing_to_another_tokenizer(
    home: Path, old: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(home / "m", tmp_path / "m"))
    edited(model, "tokenizer.json", put("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True,
                                                          "trim_offsets": True, "use_regex": True}))  # fmt: skip
    convert("dive-plus", model, home / "d", tmp_path / "new", FEW, reuse=[old.folder])
    assert said(capfd, "taken over") == []
    for name in ALL:  # a manifest that does not say which tokenizer counts in its own folder only
        path = old.path(name) / MANIFEST
        manifest = read_json(path)
        del manifest["inputs"]["tokenizer_digest"]
        write_json(path, manifest)
    convert("dive-plus", home / "m", home / "d", tmp_path / "third", FEW, reuse=[old.folder])
    assert "domains" not in said(capfd, "taken over")
    convert("dive-plus", home / "m", home / "d", old.folder, FEW)
    assert said(capfd, "done before") == [*ALL, "evaluate"]


def test_a_half_trained_stage_of_the_first_version_goes_on(
    home: Path,
    base: Run,
    oldest: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from moesmith.training import loop as train

    monkeypatch.setattr(train, "SAVE_SECONDS", -1.0)
    step = train.Masters.step

    def stopped(self: Any, lr: float, clip: float | None) -> float:
        log = tmp_path / "run" / "stages" / ".experts.partial" / "log.jsonl"
        if log.is_file() and log.stat().st_size:
            raise KeyboardInterrupt
        return step(self, lr, clip)

    monkeypatch.setattr(train.Masters, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert("dive-plus", home / "m", home / "d", tmp_path / "run", FEW)
    monkeypatch.undo()
    write_text(tmp_path / "run" / "stages" / ".experts.partial" / ".key", oldest["experts"])
    without_format(tmp_path / "run" / "run.json")
    capfd.readouterr()
    run = convert("dive-plus", home / "m", home / "d", tmp_path / "run", FEW)
    assert "continuing at step 1 of 2" in capfd.readouterr().err
    assert weights(run.folder) == weights(base.folder)


@pytest.mark.parametrize("first", [False, True])
def test_a_changed_companion_makes_the_folder_again_and_nothing_else(
    home: Path, base: Run, old: Run, tmp_path: Path, first: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also in a folder that moesmith 0.1 left."""
    folder = old.folder if first else Path(shutil.copytree(base.folder, tmp_path / "run"))
    model = Path(shutil.copytree(home / "m", tmp_path / "m"))
    edited(model, "generation_config.json", put("temperature", 0.3))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    capfd.readouterr()
    convert("dive-plus", model, home / "d", folder, FEW)
    assert said(capfd, "done before")[: len(ALL) - 1] == list(ALL[:-1])
    assert GenerationConfig.from_pretrained(folder / "model").temperature == 0.3
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template == "{{ messages[0].content }}"
    assert weights(folder) == weights(base.folder)


def test_the_computing_dtype_is_in_the_keys_of_what_computes(tmp_path: Path) -> None:
    recipe = load_recipe("tomoe-plus", None, ["stage1.tokens=1024", "stage2.tokens=1024"])
    real = [*steps_of(recipe), *steps_of(load_recipe("flap-static"))]
    stages = {step.name: step for step in real}
    assert stages.keys() == {*ALL, "evaluate", "masks", "refit"}

    def keys_with(name: str, **inputs: str) -> dict[str, str]:
        steps = [Made(recipe, step.name, tokenises=step.tokenises, reads=step.reads) for step in stages.values()]
        return made(tmp_path / name, recipe, *steps, **inputs).keys

    plain, same = keys_with("a"), keys_with("b", compute="bfloat16")
    other = keys_with("c", compute="float32")
    assert plain == same
    assert {name for name in stages if plain[name] == other[name]} == {"held-out", "corpus", "domains"}
    with pytest.raises(MoesmithError, match="computed in bfloat16, is float32"):
        Pipeline(tmp_path / "a", recipe, DIGESTS | {"compute": "float32"})


def test_digests_see_what_the_old_one_did_not(home: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(home / "m", tmp_path / "m"))
    before = AutoTokenizer.from_pretrained(model)
    edited(model, "tokenizer.json", unseen_merge)
    after = AutoTokenizer.from_pretrained(model)
    assert tokenizer_digest(before) == tokenizer_digest(after)
    assert text_digest(before) != text_digest(after)
    before("a call leaves its state", truncation=True, max_length=3, padding="max_length")
    fresh = AutoTokenizer.from_pretrained(home / "m")
    assert text_digest(before) == text_digest(fresh)
    generation = GenerationConfig.from_pretrained(home / "m")
    assert folder_companions(home / "m") == companions_digest(fresh, generation)
    assert folder_companions(tmp_path / "nowhere") is None


def aged(run: Run, tmp_path: Path, stages: dict[str, dict[str, str]]) -> Path:
    """A copy of a run whose stages were made by other versions."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "aged"))
    for name, changed in stages.items():
        path = folder / "stages" / name / MANIFEST
        write_json(path, read_json(path) | {"versions": versions() | changed})
    return folder


def test_other_versions_are_said_and_shown(
    home: Path, base: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from moesmith.report.overview import describe, show

    now = versions()
    folder = aged(base, tmp_path, {"moments": {"torch": "2.0"}, "carve": {"torch": "2.0"}, "router": {"moesmith": "0"}})
    capfd.readouterr()
    convert("dive-plus", home / "m", home / "d", folder, FEW)
    lines = [line for line in capfd.readouterr().err.splitlines() if "other versions" in line]
    assert lines == [
        f"made by other versions and used as they are: carve, moments (torch 2.0, now {now['torch']})",
        f"made by other versions and used as they are: router (moesmith 0, now {now['moesmith']})",
    ]
    found = describe(folder)["versions"]
    assert "2.0 (moments, carve)" in found["torch"]
    assert found["transformers"] == now["transformers"]
    show(describe(folder))
    assert "2.0 (moments, carve)" in " ".join(capfd.readouterr().out.split())


def test_a_stage_begun_by_other_versions_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("dive-plus")

    def killed(job: Job, work: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "run", recipe, Made(recipe, "rows", make=killed))
    path = tmp_path / "run" / "stages" / ".rows.partial" / ".key"
    key, _, begun = path.read_text().partition("\n")
    write_text(path, f"{key}\n{json.dumps(json.loads(begun) | {'torch': '2.0'})}")
    run = made(tmp_path / "run", recipe, Made(recipe, "rows"))
    assert (
        f"[rows] was begun by other versions and goes on (torch 2.0, now {versions()['torch']})"
        in capfd.readouterr().err
    )
    manifest = run.manifest("rows")
    assert (manifest["begun_by"]["torch"], manifest["versions"]) == ("2.0", versions())


def test_a_newer_run_is_refused(home: Path, base: Run, tmp_path: Path) -> None:
    from moesmith.report.overview import describe

    folder = Path(shutil.copytree(base.folder, tmp_path / "run"))
    write_json(folder / "run.json", read_json(folder / "run.json") | {"format": FORMAT + 1})
    before = snapshot(folder)
    says = rf"run\.json was written by a newer moesmith \(format {FORMAT + 1}, this one knows {FORMAT}\)\. Upgrade"
    for work in (
        lambda: convert("dive-plus", home / "m", home / "d", folder, FEW),
        lambda: describe(folder),
        lambda: open_run(folder),
    ):
        with pytest.raises(MoesmithError, match=says):
            work()
    assert snapshot(folder) == before
    path = base.path("moments") / MANIFEST
    newer = Path(shutil.copytree(base.folder, tmp_path / "newer")) / "stages" / "moments" / MANIFEST
    write_json(newer, read_json(path) | {"format": FORMAT + 1})
    with pytest.raises(MoesmithError, match=r"moments/manifest\.json was written by a newer moesmith"):
        convert("dive-plus", home / "m", home / "d", tmp_path / "reusing", FEW, reuse=tmp_path / "newer")
