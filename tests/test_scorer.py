"""Our scorer against lm-evaluation-harness: the same prompts, log-likelihoods and accuracies on the same items."""

from __future__ import annotations

import copy
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scorer import items, quick_tasks, score_choices

from moesmith.errors import MoesmithError
from moesmith.evaluation import harness, likelihoods, templates
from moesmith.testing.parents import tiny_model
from moesmith.testing.tokenizer import tiny_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM

torch.set_num_threads(1)
TOKENIZER = tiny_tokenizer()
WORDS = ["the", "quick", "brown", "fox", "over", "a", "lazy", "dog", "def add", "return", "é", "12", "_x", "(b)", "Yes"]
Record = dict[str, Any]


def write(folder: Path, name: str, records: list[Record]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: list[str], data: Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Through the harness, as 'moesmith evaluate' does it."""
    return harness.run_tasks(model, tokenizer, harness.find_tasks(tasks, data), limit)


def phrase(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def record(task: str, draw: random.Random, index: int) -> Record:
    """A random record of the task's form."""
    n = {"boolq": 2, "winogrande": 2, "mathqa": 5, "arc_easy": draw.randint(3, 5)}.get(task, 4)
    question, choices = phrase(draw, 8), [phrase(draw, 4) for _ in range(n)]
    made: Record = {"id": f"{task}-{index}", "question": question, "choices": choices, "answer": draw.randrange(n)}
    if task in ("boolq", "logiqa") or (task == "sciq" and index % 3 == 0):
        made["context"] = phrase(draw, 12)
    if task == "arc_easy" and index % 5 == 0:
        made["question"] += "  "  # spaces before the delimiter
        made["choices"][1] = made["choices"][0] + " fox"  # one choice continues another
    if task == "winogrande":
        made["question"] = f"{question} _ {phrase(draw, 6)} ."
    if task == "mmlu":
        made["subject"] = "abstract_algebra" if index % 11 else "anatomy"
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(5)
    for task in ("arc_easy", "boolq", "winogrande", "hellaswag", "mmlu", "sciq", "logiqa"):
        write(folder, f"{task}.test", [record(task, draw, i) for i in range(54)])
        write(folder, f"{task}.train", [record(task, draw, i) for i in range(30)][: 9 if task == "mmlu" else None])
    write(folder, "lambada.test", [{"context": phrase(draw, 20), "target": draw.choice(WORDS)} for _ in range(54)])
    return folder


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "winogrande", "hellaswag", "mmlu", "sciq", "logiqa"])
def test_scorer_and_harness_agree_on_every_item(name: str, data: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=128)  # some prompts are longer: both cut them
    parts = templates.load_task(name, data)
    given: dict[str, Any] = {"backend": "causal", "batch_size": 4, "softmax_dtype": torch.float32}
    with harness.silenced():
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(TOKENIZER), **given)  # the harness's own, not ours
        found = harness.run(lm, {"tasks": harness.local_tasks(parts)}, None)
    cut = seen = 0
    for part in parts:
        asked = items(part)
        for item, ours, theirs in zip(
            asked, score_choices(model, TOKENIZER, asked), found["samples"][part.name], strict=True
        ):
            assert [tuple(pair) for pair in theirs["arguments"]] == list(item.pairs)
            likelihoods = [likelihood for likelihood, _ in theirs["filtered_resps"]]
            assert list(ours.log_likelihoods) == pytest.approx(likelihoods, abs=1e-3)
            assert [float(getattr(ours, m)) for m in part.metrics] == [theirs[m] for m in part.metrics]
            cut, seen = cut + ours.truncated, seen + 1
    assert seen == 54
    assert (cut > 0) == (name in ("hellaswag", "mmlu"))
    assert {part.shots for part in parts} == {"hellaswag": {10}, "mmlu": {1, 5}}.get(name, {0})


def test_both_report_the_same_table_and_leave_the_model_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama").train()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    names = ["arc_easy", "mmlu", "winogrande"]
    ours = quick_tasks(model, tokenizer, names, data, limit=11)
    theirs = evaluate_tasks(model, tokenizer, [*names, "lambada"], data, limit=11)
    capsys.readouterr()
    assert theirs.pop("lambada") == pytest.approx(likelihoods.lambada(model, tokenizer, data, limit=11), rel=1e-4)
    assert {name: pytest.approx(row) for name, row in ours.items()} == theirs
    assert list(ours["arc_easy"]) == ["acc", "acc_norm", "items"]
    assert list(ours["winogrande"]) == ["acc", "items"]
    assert ours["arc_easy"]["items"] == 11
    assert ours["mmlu"]["items"] == 11  # six of each of two subjects, one of which has but five
    assert model.training
    assert tokenizer.pad_token is None


def test_the_harness_is_quiet(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate_tasks(tiny_model("llama"), TOKENIZER, ["arc_easy"], data, limit=3)
    assert capfd.readouterr() == ("", "")


def test_probabilities_are_fp32_for_a_bf16_model(data: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    tasks = harness.local_tasks(templates.load_task("boolq", data))
    with harness.silenced():
        found = harness.run(harness.language_model(model, TOKENIZER, 4), {"tasks": tasks}, 10)
    exact = torch.tensor([value for sample in found["samples"]["boolq"] for value, _ in sample["filtered_resps"]])
    assert (exact != exact.bfloat16().float()).any()


def test_examples_are_drawn_with_the_harness_own_seed() -> None:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    assert harness.FEWSHOT_SEED == DEFAULT_OTHER_SEED


# ------------------------------------------------------------ the prompts of the harness's own tasks

LABELS = ["A", "B", "C", "D", "E"]


def _arc(r: Record) -> Record:
    labels = LABELS[: len(r["choices"])]
    return {
        "question": r["question"],
        "choices": {"text": r["choices"], "label": labels},
        "answerKey": labels[r["answer"]],
    }


def _mathqa(r: Record) -> Record:
    options = " , ".join(f"{letter} ) {choice}" for letter, choice in zip("abcde", r["choices"], strict=True))
    return {"Problem": r["question"], "options": options, "correct": "abcde"[r["answer"]]}


# task → its file in the harness, and our fields under the names its data set has for them
REGISTERED: dict[str, tuple[str, Any]] = {
    "arc_easy": ("arc/arc_easy.yaml", _arc),
    "arc_challenge": ("arc/arc_challenge.yaml", _arc),
    "boolq": (
        "super_glue/boolq/default.yaml",
        lambda r: {"passage": r["context"], "question": r["question"], "label": r["answer"]},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        lambda r: {"goal": r["question"], **_numbered("sol", r["choices"]), "label": r["answer"]},
    ),
    "rte": (
        "glue/rte/default.yaml",
        lambda r: {"sentence1": r["context"], "sentence2": r["question"], "label": r["answer"]},
    ),
    "mnli": (
        "glue/mnli/default.yaml",
        lambda r: {"premise": r["context"], "hypothesis": r["question"], "label": r["answer"]},
    ),
    "winogrande": (
        "winogrande/default.yaml",
        lambda r: {
            "sentence": r["question"],
            **_numbered("option", r["choices"]),
            "answer": str(r["answer"] + 1),
        },
    ),
    "mathqa": ("mathqa/mathqa.yaml", _mathqa),
    "sciq": (
        "sciq/sciq.yaml",
        lambda r: {
            "support": r["context"],
            "question": r["question"],
            **_numbered("distractor", r["choices"][:3]),
            "correct_answer": r["choices"][3],
        },
    ),
    "logiqa": (
        "logiqa/logiqa.yaml",
        lambda r: {
            "context": r["context"],
            "question": r["question"],
            "options": r["choices"],
            "label": "abcd"[r["answer"]],
        },
    ),
    "openbookqa": ("openbookqa/openbookqa.yaml", lambda r: {**_arc(r), "question_stem": r["question"]}),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        lambda r: {
            "activity_label": "High jump",
            "ctx_a": "A boy runs.",
            "ctx_b": "the boy",
            "endings": r["choices"],
            "label": str(r["answer"]),
        },
    ),
    "mmlu": (
        "mmlu/default/mmlu_anatomy.yaml",
        lambda r: {"question": r["question"], "choices": r["choices"], "answer": r["answer"]},
    ),
    "lambada": ("lambada/lambada_openai.yaml", lambda r: {"text": r["context"] + " " + r["target"]}),
}
QUESTIONS = {
    "winogrande": "The dog saw the fox because _ was quick.",
    "hellaswag": "High jump: A boy runs. The boy",
}


def _numbered(name: str, choices: list[str]) -> Record:
    return {f"{name}{number}": choice for number, choice in enumerate(choices, 1)}


@pytest.mark.parametrize("name", REGISTERED)
def test_prompts_are_those_of_the_registered_task(name: str) -> None:
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    n = {"mathqa": 5, "arc_easy": 4}.get(name, 2 if name in ("boolq", "piqa", "rte", "winogrande") else 4)
    choices = ["no", "yes"] if name == "boolq" else ["very high", "low", "12 metres", "not at all", "none"][:n]
    ours: Record = {
        "context": "Foxes jump.",
        "target": "high",
        "subject": "anatomy",
        "question": QUESTIONS.get(name, "how high does it jump"),
        "choices": choices,
        "answer": 3 if name == "sciq" else 1,
    }
    path, as_registered = REGISTERED[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / path)
    theirs = Dataset.from_list([as_registered(ours)])
    for key in ("tag", "dataset_path", "dataset_name", "training_split", "validation_split", "fewshot_split"):
        config.pop(key, None)
    config |= {"test_split": "test", "custom_dataset": lambda **_: {"test": theirs}, "num_fewshot": 0}
    with harness.silenced():
        task = ConfigurableTask(config=config)
        task.build_all_requests()
        template = yaml.safe_load((templates.TEMPLATES / f"{name}.yaml").read_text())
        local = harness.local_tasks([templates.Task(name, template, (ours,), ())])[name]
        local.set_config("num_fewshot", 0)
        local.build_all_requests()
    assert [instance.args for instance in local.instances] == [instance.args for instance in task.instances]
    assert set(local.aggregation()) == set(task.aggregation())
    if name != "lambada":
        (item,) = items(templates.Task(name, template, (ours,), ()))
        assert list(item.pairs) == [instance.args for instance in task.instances]
        assert item.answer == ours["answer"]


def test_every_template_is_compared() -> None:
    kinds = {
        n: yaml.safe_load((templates.TEMPLATES / f"{n}.yaml").read_text())["output_type"]
        for n in templates.task_names()
    }
    assert {n for n, kind in kinds.items() if kind != "generate_until"} == set(REGISTERED)  # test_written.py has those


# ------------------------------------------------------------ the registry


@pytest.fixture
def registry(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small registry in place of the harness's own: two tasks of one tag and one group, and one without data."""
    import lm_eval.tasks

    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "arc_easy.test.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        **{k: v for k, v in yaml.safe_load((templates.TEMPLATES / "arc_easy.yaml").read_text()).items() if k != "task"},
    }
    lost = {**base, "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
    both = {
        "group": "both",
        "task": ["hard", "soft"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    for name, config in {
        "hard": {**base, "task": "hard", "tag": "science"},
        "soft": {**base, "task": "soft", "tag": "science"},
        "lost": {**lost, "task": "lost"},
        "both": both,
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    small = partial(lm_eval.tasks.TaskManager, include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)


@pytest.mark.usefixtures("registry")
def test_registered_tasks_tags_and_groups(data: Path) -> None:
    model = tiny_model("llama")
    local = quick_tasks(model, TOKENIZER, ["arc_easy"], data, limit=7)["arc_easy"]
    found = evaluate_tasks(model, TOKENIZER, ["hard", "arc_easy"], data, limit=7)
    assert found == {"hard": pytest.approx(local), "arc_easy": pytest.approx(local)}
    tag = evaluate_tasks(model, TOKENIZER, ["science"], limit=7)
    assert tag == {"hard": found["hard"], "soft": found["hard"]}
    group = evaluate_tasks(model, TOKENIZER, ["both"], limit=7)
    assert group == {"both": pytest.approx({"acc": local["acc"], "items": 14})}
    once = harness.find_tasks(["hard", "both", "arc_easy"], data)  # and run with one model after another
    first, again = (harness.run_tasks(model, TOKENIZER, once, limit=7) for _ in range(2))
    assert first == again == found | group


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hardd", "no task 'hardd'.*Did you mean 'hard'"),
        ("hella_swag", "Did you mean 'hellaswag'"),
        ("zzz", "lm-eval ls tasks"),
        ("lost", "data of task 'lost' cannot be loaded: .*put lost.test.jsonl"),
    ],
)
def test_unknown_or_unloadable_tasks(name: str, message: str) -> None:
    with pytest.raises(MoesmithError, match=message):
        harness.find_tasks([name])


# ------------------------------------------------------------ bad input


GOOD: Record = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "arc_easy.test.jsonl is empty"),
        ([{**GOOD, "answer": None}], "no record with an answer"),
        ([GOOD, {"text": "q"}], "record 2 has no 'question' text"),
        ([{**GOOD, "choices": ["a", ""]}], "record 1 has no list of 'choices'"),
        ([{**GOOD, "choices": ["a"], "answer": 0}], "record 1 has no list of 'choices'"),
        ([GOOD, {**GOOD, "choices": "ab"}], "arc_easy.test.jsonl:2: "),
        ([{**GOOD, "answer": 2}], "arc_easy.test.jsonl:1: "),
        ([{"question": "q", "choices": ["a", "b"]}], "record 1 has no 'answer' from 0 to 1"),
    ],
)
def test_malformed_records(records: list[Record], message: str, tmp_path: Path) -> None:
    write(tmp_path, "arc_easy.test", records)
    with pytest.raises(MoesmithError, match=message):
        harness.find_tasks(["arc_easy"], tmp_path)


def test_unlabelled_records_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "piqa.test", [GOOD, {**GOOD, "answer": None}, GOOD])
    assert len(templates.load_task("piqa", tmp_path)[0].test) == 2


def test_a_fewshot_task_needs_its_training_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "arc_challenge.test", [GOOD])
    with pytest.raises(MoesmithError, match=r"arc_challenge\.train\.jsonl cannot be read"):
        templates.load_task("arc_challenge", tmp_path)
    write(tmp_path, "arc_challenge.train", [GOOD] * 3)
    assert templates.load_task("arc_challenge", tmp_path)[0].shots == 3
    assert "fewer than 25 examples" in capsys.readouterr().err


def test_a_missing_harness_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(MoesmithError, match=r"pip install 'moesmith\[eval\]'"):
        harness.find_tasks(["arc_easy"], data)
