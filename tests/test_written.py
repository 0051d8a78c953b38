"""Answers that models write: programs apart from this process, and what passes of HumanEval, MBPP and GSM8K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moesmith.comparison.measure import is_written, right
from moesmith.errors import MoesmithError
from moesmith.evaluation import harness, sandbox, templates
from moesmith.evaluation.sandbox import passes
from moesmith.testing.parents import tiny_model
from moesmith.testing.tokenizer import tiny_tokenizer

torch.set_num_threads(1)
Record = dict[str, Any]
ADD: Record = {
    "id": "0",
    "prompt": 'def add(a: int, b: int) -> int:\n    """Add two numbers."""\n',
    "solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}
TWICE: Record = {
    "prompt": "Write a function that doubles a number.",
    "solution": "def twice(x):\n    return 2 * x",
    "tests": ["assert twice(1) == 2", "assert twice(2) == 4", "assert twice(-1) == -2"],
}
SUM: Record = {"question": "What is 1,000 + 234?", "solution": "It is <<1000+234=1234>>1,234.", "answer": "1,234"}


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("assert 1 + 1 == 2", True),
        ("import collections, itertools, math, re, typing\nassert math.gcd(4, 6) == 2", True),
        ("print('words that nobody reads' * 1000)", True),
        ("open('own', 'w').write('x')\nimport os\nos.remove('own')", True),
        ("assert 1 + 1 == 3", False),
        ("def (", False),
        ("import sys\nsys.exit(0)", False),  # leaving early is not passing
        ("import os\nos._exit(0)", False),
        ("input()", False),
        ("def f():\n    return f()\nf()", False),
    ],
)
def test_a_program_passes_when_it_runs_to_its_end(program: str, right: bool) -> None:
    assert passes(program) is right


def test_a_program_is_held_to_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    monkeypatch.setenv("HF_TOKEN", "secret")
    for program in (
        f"open({str(kept)!r}, 'w').write('theirs')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'here')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nfile = os.open({str(kept)!r}, os.O_WRONLY)",
        "import socket\nsocket.create_connection(('localhost', 1))",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import os\nos.system('true')",
        "import os\nos.fork()",
        "import os\nassert 'HF_TOKEN' in os.environ",
        "import os\nos.kill(os.getppid(), 9)",
        "big = bytearray(3 << 30)",
        "open('big', 'w').write('x' * (1 << 22))",
    ):
        assert not passes(program), program
    assert kept.read_text() == "mine"
    assert not passes("while True: pass", seconds=0.5)


class Scripted:
    """A language model that answers with a script, in place of the harness's wrapper."""

    def __init__(self, lm: Any, answers: list[str]) -> None:
        lm.generate_until = self.generate_until
        self.lm, self.answers, self.prompts = lm, answers, [""]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        self.prompts = [request.args[0] for request in requests]
        return self.answers


def asked(name: str, records: list[Record], train: list[Record], answers: list[str]) -> tuple[list[str], list[Any]]:
    """Return the prompts of a task and the metrics of scripted answers, item by item."""
    pytest.importorskip("lm_eval")
    template = yaml_of(name)
    task = templates.Task(name, template, tuple(records), tuple(train))
    with harness.silenced():
        script = Scripted(harness.language_model(tiny_model("llama"), tiny_tokenizer(), 4), answers)
        found = harness.run(script.lm, {"tasks": harness.local_tasks([task])}, None)
    return script.prompts, [{m: sample[m] for m in sample["metrics"]} for sample in found["samples"][name]]


def test_humaneval_runs_the_completed_function() -> None:
    wrong = "    return a - b\n"
    prompts, scores = asked("humaneval", [ADD] * 3, [], [ADD["solution"], wrong, "    return a +"])
    assert prompts == [ADD["prompt"]] * 3
    assert scores == [{"pass@1": 1.0}, {"pass@1": 0.0}, {"pass@1": 0.0}]


def test_mbpp_shows_three_examples_and_runs_all_tests() -> None:
    answers = [f"{TWICE['solution']}\n", "def twice(x):\n    return x + 1\n"]  # the second passes the first test alone
    prompts, scores = asked("mbpp", [TWICE] * 2, [TWICE] * 4, answers)
    assert prompts[0].count("[BEGIN]") == 4
    assert prompts[0].count("[DONE]") == 3
    assert prompts[0].endswith("assert twice(-1) == -2\n[BEGIN]\n")
    assert scores == [{"pass@1": 1.0}, {"pass@1": 0.0}]


def test_gsm8k_takes_the_number_after_the_mark() -> None:
    answers = [" So\n#### 1234", " It is 1,234.", " #### 1,233"]
    prompts, scores = asked("gsm8k", [SUM] * 3, [SUM] * 6, answers)
    assert prompts[0].count("#### 1,234") == 5
    assert [score["exact_match"] for score in scores] == [1.0, 0.0, 0.0]


def test_an_item_counts_once_however_many_filters_read_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own gsm8k has two: the strict one, and the last number wherever it is."""
    pytest.importorskip("lm_eval")
    template, make = yaml_of("gsm8k"), harness.language_model
    last = [{"function": "regex", "regex_pattern": "([0-9,]+)", "group_select": -1}, {"function": "take_first"}]
    template["filter_list"].append({"name": "flexible-extract", "filter": last})
    parts = [templates.Task(f"gsm8k_{n}", template, (SUM,) * 3, (SUM,) * 6) for n in range(2)]

    def scripted(*args: Any) -> Any:
        return Scripted(make(*args), [" So\n#### 1234", " It is 1,234.", " #### 1,233"] * 2).lm

    monkeypatch.setattr(harness, "language_model", scripted)
    found = harness.run_items(tiny_model("llama"), tiny_tokenizer(), {"gsm8k": parts})
    assert found == {"gsm8k": {"exact_match": [1.0, 0.0, 0.0] * 2}}


REGISTERED: dict[str, tuple[Record, Record]] = {  # our record, and its fields by the names of the harness's data set
    "humaneval": (ADD, ADD),
    "mbpp": (TWICE, {"text": TWICE["prompt"], "code": TWICE["solution"], "test_list": TWICE["tests"]}),
    "gsm8k": (SUM, {"question": SUM["question"], "answer": f"{SUM['solution']}\n#### {SUM['answer']}"}),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_prompts_examples_and_stops_are_those_of_the_registered_task(name: str) -> None:
    lm_eval = pytest.importorskip("lm_eval.tasks")
    from jinja2 import Template
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = load_yaml(Path(lm_eval.__file__).parent / name / f"{name}.yaml", resolve_func=False)
    mine = yaml_of(name)
    record, other = REGISTERED[name]
    for text in ("doc_to_text", "doc_to_target"):
        shown = Template(theirs[text]).render(**other, is_fewshot=True)
        assert Template(mine[text]).render(**record) == shown
    for key in ("num_fewshot", "target_delimiter", "unsafe_code", "output_type"):
        assert mine.get(key) == theirs.get(key) or (key, mine.get(key), theirs[key]) == ("num_fewshot", None, 0)
    assert mine["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"]


def test_every_written_task_is_compared() -> None:
    loaded = {name: yaml_of(name) for name in templates.task_names()}
    assert {name for name, found in loaded.items() if found["output_type"] == "generate_until"} == set(REGISTERED)


def yaml_of(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((templates.TEMPLATES / f"{name}.yaml").read_text()))


def write(folder: Path, name: str, records: list[Record]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def test_code_runs_only_with_leave(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write(tmp_path, "humaneval.test", [ADD])
    with pytest.raises(MoesmithError, match=r"humaneval runs what the models write\. Add --run-code"):
        harness.find_tasks(["humaneval"], tmp_path)
    tasks = harness.find_tasks(["humaneval"], tmp_path, run_code=True)
    found = harness.run_items(tiny_model("llama"), tiny_tokenizer(), tasks)
    assert found == {"humaneval": {"pass@1": [0.0]}}  # a random model writes no program, and says so
    assert is_written(found["humaneval"])
    assert right(found["humaneval"]) == [0.0]


def test_where_no_program_runs_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check_sandbox()
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(MoesmithError, match="no program runs to its end here within 10 s and 2 GiB"):
        sandbox.check_sandbox()


def test_a_record_without_a_field_is_named(tmp_path: Path) -> None:
    write(tmp_path, "humaneval.test", [ADD, {**ADD, "test": ""}])
    with pytest.raises(MoesmithError, match="record 2 has no 'test' text"):
        templates.load_task("humaneval", tmp_path)
    write(tmp_path, "mbpp.test", [{**TWICE, "tests": []}])
    with pytest.raises(MoesmithError, match="record 1 has no 'tests' text"):
        templates.load_task("mbpp", tmp_path)
