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
from transformers import AutoTokenizer, GenerationConfig

from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, digest, read_json, write_json
from moesmith.parent.digests import tokenizer_digest
from moesmith.run.fingerprints import companions_digest, folder_companions, text_digest
from moesmith.run.pipeline import TEXT, Run, versions
from moesmith.run.recipe import keys, load_recipe
from moesmith.testing.parents import save_tiny

FEW = ["stage1.tokens=512", "stage2.tokens=512"]
ALL = ("held-out", "corpus", "baseline", "domains", "moments", "affinity", "carve", "router", "experts", "export")
MADE_LAST = ("export", "evaluate")
NOT_A_RESULT = ("README.md", "SHA256SUMS", MANIFEST, "log.jsonl")


def results(run: Run) -> dict[str, dict[str, str]]:
    """sha256 of what each stage made; of *export* it is the finished folder."""
    found: dict[str, dict[str, str]] = {}
    for name in run.keys:
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
    changed = {name for name in after.keys if after.keys[name] != before.keys.get(name)}
    for name in set(after.keys) - changed:
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
    assert check(base, other) == {*ALL, "evaluate"} - set(TEXT)  # token ids do not depend on what computes


SETTINGS: dict[str, list[str]] = {  # a setting → another value, and what it takes for the value to matter
    "seed": ["seed=1"],
    "domains.names": ["domains.names=[sum, place, count, beast]"],
    "domains.tokens": ["domains.tokens=256"],
    "domains.window": ["domains.window=16"],
    "carve.method": ["carve.method=llama-moe"],
    "carve.experts": ["carve.experts=3"],
    "carve.top_k": ["carve.top_k=2"],
    "carve.ratio": ["carve.ratio=0.25"],
    "carve.score": ["carve.score=magnitude"],
    "carve.selection": ["carve.selection=adaptive"],
    "carve.compensation": ["carve.compensation=bias"],
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
    "masks.start": ["masks.start=random"],
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
    "masks.union_weight": ["masks.union_weight=9"],
    "masks.balance_weight": ["masks.balance_weight=9"],
    "evaluate.tokens": ["evaluate.tokens=256"],
    "evaluate.window": ["evaluate.window=32"],
}
LOOP = {
    "tokens": "256", "window": "16", "batch": "4", "micro_batch": "2", "lr": "0.1", "schedule": "constant",
    "min_ratio": "0.9", "warmup": "0.5", "clip": "0.001", "weight_decay": "0.9", "checkpointing": "true",
    "loss": "next-token", "mix": "0.5", "kl_temperature": "3", "gate_temperature": "3", "train_router": "false",
    "lora_rank": "2", "lora_alpha": "99", "lora_dropout": "0.8", "norms": "false",
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
    "stage1.lora_alpha": [*SPARSE, "stage1.lora_rank=2", "stage1.lora_alpha=99"],
    "stage1.lora_dropout": [*SPARSE, "stage1.lora_rank=2", "stage1.lora_dropout=0.8"],
    "stage2.gate": ["stage2.gate=dense", "stage2.lora_rank=0", "stage2.norms=false"],
    "affinity.published": ["affinity.method=random"],  # its names are not these domains': the third kind of clusters
}


def test_every_setting_is_tried() -> None:
    assert set(SETTINGS) == set(keys()) - {"name", "description"}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dive-plus", "tomoe-plus"])
def test_every_setting_alone(home: Path, tmp_path: Path, preset: str) -> None:
    """Nearly a hundred conversions: a setting that a stage's key forgets would leave its result as it was."""
    few = FEW if preset == "dive-plus" else ["masks.budget=0.55"]
    before = convert(preset, home / "m", home / "d", tmp_path / "base", few)
    kept, refused = {}, {}
    for name, settings in SETTINGS.items():
        if name.startswith("masks.") == (preset == "tomoe-plus") or name.startswith(("seed", "carve.", "domains.")):
            try:
                run = convert(preset, home / "m", home / "d", tmp_path / name, [*few, *settings])
            except MoesmithError as error:  # it does not go with this preset, or masks cannot be so narrow
                refused[name] = str(error)
                continue
            kept[name] = set(run.keys) - check(before, run)
            shutil.rmtree(tmp_path / name)
    assert len(kept) > (60 if preset == "dive-plus" else 30), refused
    assert all("held-out" in kept[name] for name in kept if name.startswith(("carve.", "stage", "masks.")))


def old_key(run: Run) -> None:
    """Make a finished run's folder one that moesmith 0.1 left: its keys, and nothing that came later."""
    new = ("text_digest", "companions_digest")
    for name, key in run.old_keys.items():
        path = run.path(name) / MANIFEST
        manifest = read_json(path)
        del manifest["format"]
        write_json(path, manifest | {"key": key, "inputs": {k: v for k, v in run.inputs.items() if k not in new}})
    header = read_json(run.folder / "run.json")
    del header["format"]
    header["inputs"] = {k: v for k, v in header["inputs"].items() if k not in new}
    write_json(run.folder / "run.json", header)


@pytest.fixture
def old(base: Run, tmp_path: Path) -> Run:
    """A run of moesmith 0.1."""
    shutil.copytree(base.folder, tmp_path / "old")
    run = Run(tmp_path / "old", base.recipe, base.inputs)
    run.old_keys = base.old_keys
    old_key(run)
    return run


def said(capfd: pytest.CaptureFixture[str], what: str) -> list[str]:
    return [line.split("]")[0][1:] for line in capfd.readouterr().err.splitlines() if what in line]


def test_keys_of_the_first_version_are_what_they_were(tmp_path: Path) -> None:
    """As commit 1a90a56 hashed them."""
    inputs = {"model_digest": "m", "data_digest": "d", "text_digest": "t", "tokenizer_digest": "k", "dtype": "bfloat16"}
    run = Run(tmp_path / "run", load_recipe("dive-plus"), inputs)
    run.keys, run.old_keys = {"held-out": "new"}, {"held-out": "old"}
    run.stage("baseline", ["held-out"], {"x": 1}, lambda work: {})
    facts = {"stage": "baseline", "settings": {"x": 1}, "seed": 42, "needs": {"held-out": "old"}}
    assert run.old_keys["baseline"] == digest(facts | {"inputs": {"model_digest": "m", "data_digest": "d"}})
    assert run.old_keys["baseline"] == "efd408224d966355"  # of that commit itself


def test_a_run_of_the_first_version_is_finished(
    home: Path, base: Run, old: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(old.folder / "stages")
    again = convert("dive-plus", home / "m", home / "d", old.folder, FEW)
    assert said(capfd, "done before") == [*ALL, "evaluate"]
    assert snapshot(old.folder / "stages") == before
    assert read_json(old.folder / "run.json")["format"] == 2
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
    home: Path, base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
    (tmp_path / "run" / "stages" / ".experts.partial" / ".key").write_text(base.old_keys["experts"])
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
    stages: dict[str, list[str]] = {"held-out": [], "domains": [], "moments": ["domains"], "evaluate": ["held-out"]}

    def keys_of(name: str, **inputs: str) -> dict[str, str]:
        known = {"model": "m", "model_digest": "1", "data": "d", "data_digest": "2", "dtype": "bfloat16"}
        run = Run(tmp_path / name, load_recipe("dive-plus"), known | inputs)
        with run.lock():
            for stage, needs in stages.items():
                run.stage(stage, needs, {}, lambda work: {})
        return run.keys

    plain, same = keys_of("a"), keys_of("b", compute="bfloat16")
    other = keys_of("c", compute="float32")
    assert plain == same
    assert {name for name in stages if plain[name] != other[name]} == {"moments", "evaluate"}
    known = {"model": "m", "model_digest": "1", "data": "d", "data_digest": "2", "dtype": "bfloat16"}
    with pytest.raises(MoesmithError, match="computed in bfloat16, is float32"):
        Run(tmp_path / "a", load_recipe("dive-plus"), known | {"compute": "float32"})


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
    inputs = dict.fromkeys(("model", "model_digest", "data", "data_digest"), "x")
    run = Run(tmp_path / "run", load_recipe("dive-plus"), inputs)

    def killed(work: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    with run.lock(), pytest.raises(KeyboardInterrupt):
        run.stage("rows", [], {}, killed)
    path = tmp_path / "run" / "stages" / ".rows.partial" / ".key"
    key, _, made = path.read_text().partition("\n")
    path.write_text(f"{key}\n{json.dumps(json.loads(made) | {'torch': '2.0'})}")
    with run.lock():
        run.stage("rows", [], {}, lambda work: {})
    assert (
        f"[rows] was begun by other versions and goes on (torch 2.0, now {versions()['torch']})"
        in capfd.readouterr().err
    )
    manifest = run.manifest("rows")
    assert (manifest["begun_by"]["torch"], manifest["versions"]) == ("2.0", versions())


def test_a_newer_run_is_refused(home: Path, base: Run, tmp_path: Path) -> None:
    from moesmith.evaluation.compare import header_of
    from moesmith.report.overview import describe

    folder = Path(shutil.copytree(base.folder, tmp_path / "run"))
    write_json(folder / "run.json", read_json(folder / "run.json") | {"format": 3})
    before = snapshot(folder)
    says = r"run\.json was written by a newer moesmith \(format 3, this one knows 2\)\. Upgrade moesmith"
    for work in (
        lambda: convert("dive-plus", home / "m", home / "d", folder, FEW),
        lambda: describe(folder),
        lambda: header_of(folder),
    ):
        with pytest.raises(MoesmithError, match=says):
            work()
    assert snapshot(folder) == before
    path = base.path("moments") / MANIFEST
    newer = Path(shutil.copytree(base.folder, tmp_path / "newer")) / "stages" / "moments" / MANIFEST
    write_json(newer, read_json(path) | {"format": 3})
    with pytest.raises(MoesmithError, match=r"moments/manifest\.json was written by a newer moesmith"):
        convert("dive-plus", home / "m", home / "d", tmp_path / "reusing", FEW, reuse=tmp_path / "newer")
