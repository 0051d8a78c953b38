"""Folders, files and names that somebody made to do harm: nothing of theirs runs, and nothing outside is touched.

The names of these tests are in SECURITY.md, beside what they show.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import moesmith
from conversions import arguments, snapshot
from readers import resealed
from refusals import World, convert_is_refused, refused
from safetensors.torch import load_file

from moesmith.comparison.compare import compare
from moesmith.comparison.spec import Spec
from moesmith.console import markdown, plain
from moesmith.data import formats
from moesmith.data.formats import read_records
from moesmith.errors import MoesmithError
from moesmith.export.delta import pack
from moesmith.files.artefact import SUMS, read_json, sums_of, verify_files, write_list, write_sums
from moesmith.files.write import write_json, write_record
from moesmith.parent.load import load_parent
from moesmith.report.page import write_report

CODE = "import pathlib\npathlib.Path({!r}).write_text('ran')\n"


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that hostile code makes."""
    return tmp_path / "ran"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def delta(finished: Path, tmp_path: Path) -> Path:
    """The finished run, packed."""
    pack(finished, tmp_path / "delta")
    return tmp_path / "delta"


# Pickle --------------------------------------------------------------------------------------------------------------

PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "model.ckpt", "tokenizer.pkl")


def test_the_trap_is_one(mark: Path) -> None:
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.read_text() == "ran"


def test_no_pickle_is_loaded(world: World, run: Path, mark: Path) -> None:
    """Beside a parent, in a run's folders and beside the text lie pickles, and commands work as if they did not."""
    for folder in (world.own_model(), world.own_data(), run, run / "model", run / "stages" / "carve"):
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Trap(mark)))
            torch.save({"a": Trap(mark)}, folder / f"torch-{name}")
    assert moesmith(*arguments("flap-static", world.model, world.data, world.out.parent / "new")).status == 0
    assert moesmith("report", run).status == 0
    assert moesmith("inspect", run).status == 0
    moesmith("generate", run, "one")  # what lies in the model's folder may be refused
    assert not mark.exists()


def test_a_parent_of_pickles_alone_is_refused(world: World, mark: Path) -> None:
    path = world.own_model() / "model.safetensors"
    torch.save({**load_file(path), "x": Trap(mark)}, path.with_name("pytorch_model.bin"))
    path.unlink()
    convert_is_refused(world, r"pytorch_model\.bin, a format that can run code and is not read", [], "dive-plus")
    assert not mark.exists()


def test_arrays_of_objects_are_not_read(run: Path, mark: Path) -> None:
    path = run / "stages" / "evaluate" / "routing.npz"
    with np.load(path) as arrays:
        found = dict(arrays)
    found["counts_DLE"] = np.array([Trap(mark)], dtype=object)
    np.savez(path, **found)
    resealed(run, "stages/evaluate/routing.npz")
    assert moesmith("report", run).status == 0
    assert "This part could not be read" in (run / "report.html").read_text()
    assert not mark.exists()


# Code ----------------------------------------------------------------------------------------------------------------


def with_code(folder: Path, mark: Path) -> None:
    """Put code beside a model, and let its config and its tokenizer's name it."""
    for name in ("modeling_mine", "configuration_mine", "tokenization_mine", "generate", "custom_generate/generate"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(CODE.format(str(mark)))
    maps = {
        "config.json": {"AutoConfig": "configuration_mine.C", "AutoModelForCausalLM": "modeling_mine.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_mine.T", "tokenization_mine.T"]},
        "generation_config.json": {"custom_generate": "custom_generate/generate.py"},
    }
    for name, found in maps.items():
        values = read_json(folder / name)
        write_json(folder / name, {**values, "auto_map": found})


def test_code_of_a_model_is_not_run(world: World, mark: Path) -> None:
    with_code(world.own_model(), mark)
    answer = moesmith(*arguments("flap-static", world.model, world.data, world.out))
    assert answer.status in (0, 2), answer.err
    assert not mark.exists()
    if answer.status == 0:
        moesmith("generate", world.out, "one")
        moesmith("eval", world.out, "--tokens", 64)
        assert not mark.exists()


def test_code_of_an_architecture_is_refused(world: World, mark: Path) -> None:
    with_code(world.own_model(), mark)
    path = world.model / "config.json"
    write_json(path, {**read_json(path), "model_type": "mine"})
    convert_is_refused(world, "brings its own Python code, which moesmith does not run", [], "dive-plus")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["mine.py", "loading.py"])
def test_code_of_a_data_set_is_not_run(world: World, mark: Path, name: str) -> None:
    pytest.importorskip("datasets")
    folder = world.out.parent / "mine"
    folder.mkdir()
    (folder / name).write_text(CODE.format(str(mark)))
    world.data = world.out.parent / "sets.yaml"
    entry = {"hub": str(folder if name == "mine.py" else folder / name), "eval_split": "test", "fields": ["text"]}
    world.data.write_text(yaml.safe_dump({"mine": entry}))
    convert_is_refused(world, "cannot be loaded: .* Check the connection", ["carve.experts=1"], "dive-plus")
    assert not mark.exists()


TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "a filter": "{{ messages|attr('__class__')|attr('__init__')|attr('__globals__') }}",
    "a change of the messages": "{% set _ = messages.append(1) %}x",
    "a range": "{% for i in range(10**12) %}x{% endfor %}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_is_in_a_sandbox(world: World, mark: Path, case: str) -> None:
    (world.own_model() / "chat_template.jinja").write_text(TEMPLATES[case].replace("MARK", str(mark)))
    for path in world.own_data().glob("*.jsonl"):
        chats = [{"messages": [{"role": "user", "content": f"{path.name} {n}"}]} for n in range(9)]
        path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    convert_is_refused(world, "the (parent's )?chat template (refuses a chat|makes no text)", [], "dive-plus")
    assert not mark.exists()


def test_a_chat_template_is_in_a_sandbox_for_a_prompt_too(world: World, run: Path, mark: Path) -> None:
    """The parent's template is not among what its digest covers: it may have changed since."""
    path = world.own_model() / "chat_template.jinja"
    path.write_text(TEMPLATES["globals"].replace("MARK", str(mark)))
    header = read_json(run / "run.json")
    header["inputs"]["model"] = str(world.model)
    write_record(run / "run.json", header)
    refused(moesmith("generate", run, "one", "--chat"), r"the chat template fails on turns of user: .*unsafe\. Leave")
    assert not mark.exists()


# Places --------------------------------------------------------------------------------------------------------------

OUTSIDE = ("../../secret", "{tmp}/secret", "a/../../../secret", "..", "")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_list_of_hashes_names_nothing_outside(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    sums = sums_of(run / "model")
    known = next(iter(sums.values()))
    name = name.format(tmp=tmp_path)
    write_list(run / "model" / SUMS, {**sums, name: sums_of(tmp_path)["secret"]})
    with pytest.raises(MoesmithError, match=r"SHA256SUMS is damaged"):
        verify_files(run / "model")
    (run / "model" / SUMS).write_text(f"{known}  {name}\n")  # not signed, as sha256sum writes it
    with pytest.raises(MoesmithError, match=r"SHA256SUMS is damaged"):
        verify_files(run / "model")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_nothing_outside(run: Path, tmp_path: Path, name: str) -> None:
    path = run / "stages" / "experts" / "manifest.json"
    manifest = read_json(path)
    manifest["files"][name.format(tmp=tmp_path)] = "0" * 64
    path.write_text(json.dumps(manifest))
    refused(moesmith("pack", run, "--out", tmp_path / "delta"), r"(damaged: it names files|is missing or damaged)")


@pytest.mark.parametrize("name", ["../carve", "{tmp}/carve"])
def test_a_step_is_a_folder_of_the_run(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run / "stages" / "experts", tmp_path / "carve")
    path = run / "stages" / "export" / "manifest.json"
    path.write_text(json.dumps(read_json(path) | {"needs": [name.format(tmp=tmp_path)]}))
    refused(moesmith("pack", run, "--out", tmp_path / "delta"), "is no name of a step")


@pytest.mark.parametrize("name", ["../m", "/etc", "model/../../m", "m", "."])
def test_a_delta_fills_its_own_folders_only(home: Path, delta: Path, tmp_path: Path, name: str) -> None:
    facts = read_json(delta / "delta.json")
    facts["folders"] = {name: "stock"}
    (delta / "delta.json").write_text(json.dumps(facts))
    write_sums(delta)
    before = snapshot(tmp_path)
    answer = moesmith("unpack", delta, "--model", home / "m", "--out", tmp_path / "made")
    refused(answer, r"delta\.json names folders that no run has")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["../model.safetensors", "{tmp}/m/model.safetensors", "/etc/passwd", "a.bin", ""])
def test_an_index_names_files_of_its_folder_only(world: World, name: str) -> None:
    path = world.own_model() / "model.safetensors"
    shutil.copy(path, path.parent.parent / "model.safetensors")
    (world.out.parent / "m").mkdir()
    index = dict.fromkeys(load_file(path), name.format(tmp=world.out.parent))
    shutil.move(path, world.out.parent / "m")
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    convert_is_refused(world, "which is no safetensors file of the folder", [], "dive-plus")


def test_a_link_in_a_delta_leads_to_listed_bytes_only(home: Path, delta: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (delta / "model" / "config.json").unlink()
    (delta / "model" / "config.json").symlink_to(tmp_path / "secret")
    answer = moesmith("unpack", delta, "--model", home / "m", "--out", tmp_path / "made")
    refused(answer, r"model/config\.json is missing or damaged\. Fetch the delta again")
    assert not (tmp_path / "made").exists()


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 2**23}, r"describes 268,\d+,\d+ parameters, and its files hold \d+,\d+\. Fix config"),
        ({"intermediate_size": 2**22, "num_hidden_layers": 2000}, r"describes [\d,]+ parameters"),
        ({"vocab_size": 2**40}, r"has vocab_size 1099511627776, and a model has 1 to 16,777,216\. Fix config"),
        ({"num_hidden_layers": 10**9}, r"has num_hidden_layers 1000000000, and a model has 1 to 2,000\. Fix config"),
    ],
)
def test_a_config_cannot_ask_for_memory_that_its_files_do_not_fill(
    world: World, fields: dict[str, int], says: str
) -> None:
    path = world.own_model() / "config.json"
    write_json(path, read_json(path) | fields)
    with pytest.raises(MoesmithError, match=says):
        load_parent(world.model)


def test_a_bomb_of_gzip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(80):
            file.write(b" " * 2**20)
    assert path.stat().st_size < 100_000
    with pytest.raises(MoesmithError, match=r"x\.jsonl\.gz unpacks to more than 200 times its size"):
        read_records(path)
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9))
    monkeypatch.setattr(formats, "LARGE", 0)
    assert len(read_records(path)) == 9  # dense, and meant so


def test_a_bomb_of_parquet_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(200_000, np.int32), ["x" * 1000])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    with pytest.raises(MoesmithError, match=r"x\.parquet unpacks to more than 200 times its size"):
        read_records(tmp_path / "x.parquet")


# Pages and terminals -------------------------------------------------------------------------------------------------

SCRIPT = "document.documentElement.dataset.injected=1"
NAMES = [f"<script>{SCRIPT}<", f'"><img src=x onerror={SCRIPT}>', f"' onload='{SCRIPT}", "<svg onload=x>"]
TOKENS = f"</script><script>{SCRIPT}</script> <img src=x onerror={SCRIPT}> ]]> --> &lt;script&gt; "
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TITLE = f"</title><script>{SCRIPT}</script><img src=x onerror={SCRIPT}>"


def hostile_text(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """Data whose domains are called, and whose text reads, like pages that run scripts."""
    folder.mkdir()
    for number, name in enumerate(names):
        for split in ("train", "test"):
            rows = [{"text": f"{TOKENS}{split} {number} {row} " * 4} for row in range(20)]
            (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def seen(page: Path) -> str:
    """What a browser makes of a page, with its scripts run."""
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium")
def test_pages_in_a_browser_run_nothing_of_a_name(world: World, tmp_path: Path) -> None:
    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><html><body><img src=x onerror={SCRIPT}></body></html>")
    assert "data-injected" in seen(control)  # it would be noticed

    data = hostile_text(tmp_path / "d")
    model = tmp_path / f"<img src=x onerror={SCRIPT}>"
    shutil.copytree(world.model, model)
    settings = [f"domains.names={json.dumps(NAMES)}", "stage1.tokens=0"]
    answer = moesmith(*arguments("dive-plus", model, data, world.out, settings))
    assert answer.status == 0, answer.err
    page = seen(write_report(world.out))
    assert "data-injected" not in page
    assert page.count("<script") == 2  # the page's own
    assert len(re.findall(r"data-index=", page)) > 100  # its own script ran, and shows the tokens

    page = seen(compared(world.model, tmp_path / "c") / "comparison.html")
    assert "data-injected" not in page
    assert "<script" not in page


def compared(model: Path, out: Path) -> Path:
    """A comparison whose titles are hostile."""
    values = {
        "title": TITLE,
        "settings": ["evaluate.tokens=128", "evaluate.window=64", "domains.tokens=256", "domains.window=32"],
        "measure": {"domains": {TITLE: ["sum"]}, "tokens": 128, "window": 64},
        "rows": [
            {"name": "static", "title": TITLE, "recipe": "flap-static", "settings": ["stage2.tokens=0"]},
            {"name": "refused", "title": TITLE, "recipe": "dive-1of8", "settings": ["carve.experts=64"]},
        ],
    }
    compare(
        Spec.model_validate(values), out, model=model, data=hostile_text(out.with_name("d&<b>"), ["sum"]), dtype="fp32"
    )
    return out


def test_markdown_holds_no_html_of_a_name(home: Path, tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = markdown_it.render((compared(home / "m", tmp_path / "c") / "comparison.md").read_text())
    page += markdown_it.render(markdown(("a", "b"), [(TITLE, "1.0"), ("x | y", TITLE)]))
    assert not re.search("<(script|img|title)", page)
    assert page.count("&lt;script&gt;") > 3


EVIL = "one \x1b]0;title\x07\x1b[2J\x9b31m\u202e two"


def test_a_prompt_cannot_drive_the_terminal(finished: Path) -> None:
    answer = moesmith("generate", finished, EVIL, "--tokens", 4)
    assert answer.status == 0
    assert answer.out == plain(answer.out)


@pytest.mark.parametrize(
    "words",
    [
        ["convert", EVIL, "--model", "m", "--data", "d", "--out", "o"],
        ["convert", "dive-plus", "--model", EVIL, "--data", "builtin", "--out", "o"],
        ["convert", "dive-plus", "--model", "m", "--data", EVIL, "--out", "o"],
        ["convert", "dive-plus", "--model", "m", "--data", "d", "--out", "o", "--set", f"carve.{EVIL}=1"],
        ["plan", "dive-plus", "--model", "m", "--set", f"domains.names=[{json.dumps(EVIL)}]"],
        ["study", EVIL, "--model", "m", "--data", "d", "--out", "o"],
        ["unpack", EVIL, "--model", "m", "--out", "o"],
        ["report", EVIL],
    ],
    ids=["recipe", "model", "data", "setting", "domain", "study", "delta", "run"],
)
def test_names_in_refusals_cannot_drive_the_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = moesmith(*words)
    assert answer.status == 2
    assert answer.err == plain(answer.err)
    assert "\\u001b" in answer.err
    assert os.listdir(tmp_path) == []


# Network, and the promises ------------------------------------------------------------------------------------------

WATCHED = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("network:", event, args, flush=True)
sys.addaudithook(watch)
from moesmith.cli import main
main()
"""


@pytest.mark.slow
def test_no_network_for_what_is_here(home: Path, tmp_path: Path) -> None:
    words = arguments("flap-static", home / "m", home / "d", tmp_path / "run")
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    for command in (words, ["report", str(tmp_path / "run")]):
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, *command], capture_output=True, text=True, env=online, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "network:" not in done.stdout


def test_every_promise_names_a_test() -> None:
    root = Path(__file__).parents[1]
    rows = [line for line in (root / "SECURITY.md").read_text().splitlines() if line.startswith("| **")]
    assert len(rows) >= 9
    for row in rows:
        promise, named = row.strip("| ").rpartition(" | ")[::2]
        files = re.findall(r"`tests/([\w./]+)`|`(test_\w+\.py)`", named)
        text = "".join((root / "tests" / "".join(names)).read_text() for names in files) + Path(__file__).read_text()
        tests = re.findall(r"`(test_\w+)`", named)
        assert tests or files, promise
        for name in tests:
            assert f"def {name}(" in text, name
