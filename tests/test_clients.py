"""Exports in the clients people use, each in its own interpreter; and that the comparison can say no.

``MOESMITH_VLLM_PYTHON`` and ``MOESMITH_TRL_PYTHON`` name interpreters that have vLLM and TRL; what else is needed is
in this one, or in those that ``MOESMITH_LLAMA_CPP_PYTHON`` and ``MOESMITH_PYTHON`` name.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from moesmith.errors import MoesmithError
from moesmith.export.native import write_native
from moesmith.export.stock.write import stock_reference, write_stock
from moesmith.mixture.moe import build
from moesmith.testing.carvings import random_carving
from moesmith.testing.masks import harvested
from moesmith.testing.parents import tiny_parent

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import clients
import matrix
from clients import Question, check

WIDE = {"hidden_size": 128, "intermediate_size": 128}  # heads of 32, the narrowest that vLLM's CPU kernels take
OWN_HEADS = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32}


def interpreter(variable: str, package: str) -> Path:
    """The interpreter that has a client; the test is skipped where there is none."""
    if named := os.environ.get(variable):
        return Path(named)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not here: {variable} names an interpreter that has it (docs/serving.md)")
    return Path(sys.executable)


@pytest.fixture(scope="module")
def question() -> Question:
    parent = tiny_parent("llama")
    return Question(stock_reference(parent, random_carving(parent)), parent.tokenizer)


def answer(question: Question, **changes: Any) -> dict[str, Any]:
    """What a client says that computes the reference."""
    best = question.logprobs.topk(20)
    greedy = [question.greedy(row[None], question.new_tokens) for row in question.ids]
    found = {"top_ids": best.indices.tolist(), "top_logprobs": best.values.tolist(), "greedy": greedy}
    return found | changes


def test_a_right_answer_is_right(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ask", lambda *_: answer(question))
    found = check("vllm", Path("m"), question, Path("python"))
    assert found["ok"]
    assert found["logprob_difference"] == 0
    assert found["next_token_agreement"] == 1
    assert found["greedy_match"] == "24/24"


def test_a_wrong_answer_is_wrong(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    right = answer(question)
    shifted = (torch.tensor(right["top_logprobs"]) + 0.01).tolist()
    monkeypatch.setattr(clients, "ask", lambda *_: answer(question, top_logprobs=shifted))
    assert not check("vllm", Path("m"), question, Path("python"))["ok"]
    late = [[*row[:5], row[5] + 1, *row[6:]] for row in right["greedy"]]
    monkeypatch.setattr(clients, "ask", lambda *_: answer(question, greedy=late))
    assert check("vllm", Path("m"), question, Path("python"))["greedy_match"] == "10/24"


def test_a_client_that_fails_says_why(question: Question, tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match="no such tensor"):
        clients.run([sys.executable, "-c", "raise ValueError('no such tensor')"], str(tmp_path))
    found = check("transformers", Path("m"), question, tmp_path / "nowhere")
    assert not found["ok"]
    assert "cannot be run: No such file" in found["error"]


def test_a_server_that_does_not_come_up_says_why() -> None:
    command = [sys.executable, "-c", "raise RuntimeError('no model')"]
    with pytest.raises(MoesmithError, match="no model"), clients.serving(command, 1):
        pass


def test_the_page_of_a_matrix() -> None:
    place = {"family": "llama", "method": "tomoe", "target": "hf"}
    right = {"logprob_typical_difference": 1e-6, "logprob_difference": 0.2, "greedy_match": "24/24", "ok": True}
    found = [
        place | {"runtime": "transformers", "version": "transformers 5"} | right,
        place | {"runtime": "vllm"} | right | {"ok": False},
        place | {"target": "gguf", "runtime": "llama.cpp", "refused": "no | graph"},
    ]
    page = matrix.markdown(found)
    assert "| llama | tomoe | 1e-06 (2e-01), 24/24 | **wrong** 1e-06 (2e-01), 24/24 | refused (1) |" in page
    assert "1. no / graph" in page


STOCK = {"llama": WIDE, "llama3": OWN_HEADS, "qwen2": WIDE, "qwen3": OWN_HEADS}


@pytest.mark.slow
@pytest.mark.parametrize("family", STOCK)
def test_vllm_runs_a_stock_folder(family: str, tmp_path: Path) -> None:
    python = interpreter("MOESMITH_VLLM_PYTHON", "vllm")
    parent = tiny_parent(family, **STOCK[family])
    carving = random_carving(parent, top_k=2)
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    found = check("vllm", tmp_path / "moe", Question(stock_reference(parent, carving), parent.tokenizer), python)
    assert found["ok"], found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "4 of 16", "shared 2 of 8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_vllm_runs_shared_and_added_experts(family: str, kind: str, tmp_path: Path) -> None:
    python = interpreter("MOESMITH_VLLM_PYTHON", "vllm")
    parent = tiny_parent(family, **STOCK[family])
    form: dict[str, Any] = {
        "shared": {"kept": 32, "shared": 32},
        "4 of 16": {"experts": 16, "top_k": 4, "kept": 24, "mix": "sum"},
        "shared 2 of 8": {"experts": 8, "top_k": 2, "kept": 32, "mix": "sum", "shared": 32},
    }
    carving = random_carving(parent, **form[kind])
    write_stock(parent, carving, tmp_path / "moe", torch.float32)
    found = check("vllm", tmp_path / "moe", Question(stock_reference(parent, carving), parent.tokenizer), python)
    assert found["ok"], found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llama tomoe", "qwen3 tomoe", "phi tomoe", "llama bias"])
def test_vllm_runs_our_own_format(form: str, tmp_path: Path) -> None:
    python = interpreter("MOESMITH_VLLM_PYTHON", "vllm")
    family, method = form.split()
    parent = tiny_parent(family, **(OWN_HEADS if family == "qwen3" else WIDE))
    carving = harvested(parent) if method == "tomoe" else random_carving(parent, compensation="bias")
    write_native(parent, carving, tmp_path / "moe")
    found = check("vllm", tmp_path / "moe", Question(build(parent, carving), parent.tokenizer), python)
    assert found["ok"], found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stock", "native"])
def test_vllm_answers_over_http(form: str, tmp_path: Path) -> None:
    python = interpreter("MOESMITH_VLLM_PYTHON", "vllm")
    parent = tiny_parent("llama", **WIDE)
    carving = random_carving(parent, top_k=2)
    write = write_native if form == "native" else write_stock
    write(parent, carving, tmp_path / "moe")
    found = check("vllm-http", tmp_path / "moe", Question.of(tmp_path / "moe", "float32"), python)
    assert found["ok"], found


@pytest.mark.slow
@pytest.mark.parametrize("client", ["llama.cpp", "llama.cpp-http"])
def test_llama_cpp(client: str, tmp_path: Path) -> None:
    from moesmith.export.gguf.target import Gguf
    from moesmith.export.target import Options, Source

    python = interpreter("MOESMITH_LLAMA_CPP_PYTHON", "xllamacpp")
    parent = tiny_parent("llama", **WIDE)
    source = Source(parent, random_carving(parent), tmp_path, torch.arange(48).view(2, 24))
    Gguf().write(source, tmp_path / "moe.gguf", Options(quant="f32"))
    asked = Question(stock_reference(parent, source.carving), parent.tokenizer)
    found = check(client, tmp_path / "moe.gguf", asked, python)
    assert found["ok"], found


@pytest.mark.slow
@pytest.mark.parametrize("client", ["peft", "trl", "lm-eval"])
@pytest.mark.parametrize("form", ["stock", "native"])
def test_tools_that_train_and_score(client: str, form: str, tmp_path: Path) -> None:
    package = {"lm-eval": "lm_eval"}.get(client, client)
    python = interpreter("MOESMITH_TRL_PYTHON" if client == "trl" else "MOESMITH_PYTHON", package)
    parent = tiny_parent("llama")
    write = write_native if form == "native" else write_stock
    write(parent, random_carving(parent, top_k=2), tmp_path / "moe")
    found = check(client, tmp_path / "moe", Question.of(tmp_path / "moe", "float32"), python)
    assert found["ok"], found
