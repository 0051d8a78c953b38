"""Pushing to the hub: the folder, its card, and the upload to a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import moesmith
from conversions import UNTRAINED, convert
from huggingface_hub import ModelCard, constants
from refusals import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesmith.errors import MoesmithError
from moesmith.export.delta import pack, unpack
from moesmith.export.push import push
from moesmith.files.artefact import read_json, sums_of, verify_files, write_list
from moesmith.files.outputs import list_of
from moesmith.files.seal import file_digest
from moesmith.files.write import write_record
from moesmith.run.folder import open_run


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files takes."""

    seen: list[tuple[str, Any]]
    refuses = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.seen.append((self.path, lines))
        if self.refuses and self.refuses in self.path:
            self._answer(400, {"error": "not like this"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {})
        elif self.path == "/api/repos/create":
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/moe"})
        elif "/preupload/" in self.path:
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            self._answer(200, {"files": modes})
        elif "/commit/" in self.path:
            host = self.headers["Host"]
            self._answer(200, {"commitUrl": f"http://{host}/me/moe/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer(404, {"error": self.path})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A running stand-in; only it is online."""
    handler = type("Mine", (Hub,), {"seen": [], "refuses": ""})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_dry_run_writes_the_folder(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "moe-q8_0.gguf"
    file.write_bytes(b"GGUF of another command")
    out = tmp_path / "out"
    found = push(finished, "me/moe", out=out, base_model="org/parent", licence="mit", files=[file], dry_run=True)
    assert (found["url"], found["repository"]) == (None, "me/moe")
    verify_files(out, "")
    assert set(found["files"]) == {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", file.name} <= set(sums_of(out)) | {"x"}
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("mit", "org/parent", "finetune")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"mixture-of-experts", "moesmith", "gguf"} <= set(data["tags"])
    stages = open_run(finished).evaluation["stages"]
    values = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in data["model-index"][0]["results"]}
    assert values["held-out text: geometric mean"] == pytest.approx(list(stages.values())[-1]["geomean"], abs=1e-3)
    assert "as a Mixture-of-Experts" in card.text
    assert f"`llama-server --hf-repo me/moe --hf-file {file.name}`" in card.text
    assert f"`ollama run hf.co/me/moe:{file.name}`" in card.text
    AutoModelForCausalLM.from_pretrained(out)


def test_the_folder_has_files_of_its_own_outside_the_run(finished: Path, tmp_path: Path) -> None:
    """Whoever edits it, such as the config, changes nothing in the run."""
    push(finished, "me/moe", out=tmp_path / "out", licence="mit", dry_run=True)
    model = open_run(finished).model
    assert not any((tmp_path / "out" / path.name).samefile(path) for path in model.iterdir())
    for out in (finished / "stock", open_run(finished).inputs["model"]):
        with pytest.raises(MoesmithError, match="which this command reads"):
            push(finished, "me/moe", out=out, licence="mit", dry_run=True)
    assert not (finished / "stock").exists()


def test_named_templates_are_carried(home: Path, tmp_path: Path) -> None:
    """A tokenizer may have a template for each use; all but the default lie in a folder of their own."""
    parent = Path(shutil.copytree(home / "m", tmp_path / "m"))
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")
    run = convert("dive-plus", parent, home / "d", tmp_path / "run", UNTRAINED).folder
    name = "additional_chat_templates/tool_use.jinja"
    assert name in push(run, "me/moe", out=tmp_path / "out", licence="mit", dry_run=True)["files"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template["tool_use"] == "tools: {{ tools }}"
    pack(run, tmp_path / "delta")
    unpack(tmp_path / "delta", str(parent), tmp_path / "back")
    assert sums_of(tmp_path / "back" / "model") == sums_of(run / "model")
    assert (tmp_path / "back" / "model" / name).read_text() == "tools: {{ tools }}"


def test_what_lies_beside_a_file_may_be_edited(finished: Path, tmp_path: Path) -> None:
    file, beside = tmp_path / "moe.gguf", tmp_path / "moe.Modelfile"
    file.write_bytes(b"GGUF")
    beside.write_text("FROM moe.gguf")
    write_list(list_of(file), {path.name: file_digest(path) for path in (file, beside)})
    beside.write_text("FROM moe.gguf\nSYSTEM be brief")
    push(finished, "me/moe", out=tmp_path / "out", licence="mit", files=[file], dry_run=True)
    file.write_bytes(b"GGUF of another command")
    with pytest.raises(MoesmithError, match=r"moe\.gguf has changed since moesmith wrote it"):
        push(finished, "me/moe", out=tmp_path / "again", licence="mit", files=[file], dry_run=True)


def test_data_sets_are_those_that_the_run_read(finished: Path, tmp_path: Path) -> None:
    run, own = Path(shutil.copytree(finished, tmp_path / "run")), tmp_path / "own.yaml"
    own.write_text("a: {hub: org/a, eval_split: test, fields: [x]}\nb: {hub: org/b, eval_split: test, fields: [x]}\n")
    header = read_json(run / "run.json")
    cases = {
        (str(own), None): {"org/a", "org/b"},
        (str(own), ("b",)): {"org/b"},
        ("paper24", ("boolq", "coqa")): {"google/boolq", "stanfordnlp/coqa"},
        ("builtin", None): set(),
        ("/nowhere/else", None): set(),
    }
    for number, ((data, names), wanted) in enumerate(cases.items()):
        recipe = header["recipe"] | {"domains": header["recipe"]["domains"] | {"names": names}}
        write_record(run / "run.json", header | {"inputs": header["inputs"] | {"data": data}, "recipe": recipe})
        found = push(run, "me/moe", out=tmp_path / f"out-{number}", licence="mit", dry_run=True)["metadata"]
        assert set(found.get("datasets") or ()) == wanted


def test_quantised_files_have_a_repository_of_their_own(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "moe-q8_0.gguf"
    file.write_bytes(b"GGUF of another command")
    words = ["push", finished, "--to", "me/moe-GGUF", "--quantized-of", "me/moe", "--base-model", "org/parent"]
    answer = moesmith(*words, "--file", file, "--license", "mit", "--out", tmp_path / "out", "--dry-run", "--json")
    assert answer.status == 0, answer.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "SHA256SUMS", file.name}
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("me/moe", "quantized", "mit")
    assert not {"library_name", "model-index"} & data.keys()
    assert "gguf" in data["tags"]


def test_an_upload_sends_every_file(finished: Path, hub: type[Hub]) -> None:
    answer = moesmith("push", finished, "--to", "me/moe", "--license", "mit", "--json")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["url"].endswith("/me/moe/commit/1")
    paths = [path for path, _ in hub.seen]
    assert paths[0] == "/api/validate-yaml"  # before anything is made
    assert paths[1] == "/api/repos/create"
    commits = [lines for path, lines in hub.seen if "/commit/" in path]
    files = {entry["value"]["path"]: entry["value"]["content"] for entry in commits[-1] if entry["key"] == "file"}
    model = open_run(finished).model
    assert set(files) == {path.name for path in model.iterdir()} | {"SHA256SUMS"}
    config = base64.b64decode(files["config.json"])
    assert config == (model / "config.json").read_bytes()


@pytest.mark.parametrize("where", ["validate-yaml", "repos/create", "commit"])
def test_what_the_hub_refuses_is_one_line(finished: Path, hub: type[Hub], where: str) -> None:
    hub.refuses = where
    refused(
        moesmith("push", finished, "--to", "me/moe", "--license", "mit"),
        r"the hub did not take me/moe: .*hf auth login",
    )


def test_refusals(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match="'moe' is no repository"):
        push(finished, "moe", out=tmp_path / "out", dry_run=True)
    with pytest.raises(MoesmithError, match="a dry run writes a folder"):
        push(finished, "me/moe", dry_run=True)
    with pytest.raises(MoesmithError, match=r"there is no file .*absent\.gguf"):
        push(finished, "me/moe", out=tmp_path / "out", files=str(tmp_path / "absent.gguf"), dry_run=True)
    with pytest.raises(MoesmithError, match=r"two files would be called config\.json"):
        push(finished, "me/moe", out=tmp_path / "out", files=finished / "model" / "config.json", dry_run=True)
    with pytest.raises(MoesmithError, match=r"no quantised files are named"):
        push(finished, "me/moe-GGUF", out=tmp_path / "out", quantized_of="me/moe", dry_run=True)
    with pytest.raises(MoesmithError, match=r"me/moe cannot be quantised from itself"):
        push(finished, "me/moe", out=tmp_path / "out", quantized_of="me/moe", dry_run=True)
    with pytest.raises(MoesmithError, match=r"'moe' is no repository\. Write --quantized-of"):
        push(finished, "me/moe-GGUF", out=tmp_path / "out", quantized_of="moe", dry_run=True)
    damaged = Path(shutil.copytree(finished, tmp_path / "run"))
    (damaged / "model" / "config.json").write_text("{}")
    with pytest.raises(MoesmithError, match=r"config\.json"):
        push(damaged, "me/moe", out=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_a_parents_card_says_its_licence(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(finished)
    parent = Path(run.inputs["model"])
    found = push(finished, "me/moe", out=tmp_path / "none", dry_run=True)
    assert "license" not in found["metadata"]
    assert "the card says no licence" in capsys.readouterr().err
    card = parent / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n# A parent\n")
    try:
        found = push(finished, "me/moe", out=tmp_path / "out", dry_run=True)
    finally:
        card.unlink()
    assert found["metadata"]["license"] == "apache-2.0"
