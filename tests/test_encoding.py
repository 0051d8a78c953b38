"""From texts and chats to ids: control tokens come from the chat template, and from nowhere else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from commands import moesmith
from conversions import arguments, convert
from refusals import refused
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationMixin, PreTrainedTokenizerFast

from moesmith.chat.answers import answers
from moesmith.data.encoding import chat_ids, check_chats, encoded, spelled
from moesmith.data.records import Domain, Record
from moesmith.data.text import evaluation_blocks, sample_windows, training_blocks
from moesmith.errors import MoesmithError
from moesmith.evaluation.compare import compare, continuations
from moesmith.evaluation.prompt import asked_ids
from moesmith.evaluation.writer import Written
from moesmith.files.artefact import read_json
from moesmith.files.write import write_record
from moesmith.testing.parents import save_tiny
from moesmith.testing.tokenizer import TEXT, tiny_tokenizer

BOS, EOS = 0, 1
TURNS = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"


def chatting(template: str = TURNS) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def plain(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def messages(*contents: str) -> Record:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


# Ordinary text ------------------------------------------------------------------------------------------------------


def test_a_control_token_spelt_in_a_text_is_its_characters() -> None:
    (ids,) = encoded(["He wrote </s> and <s>."], tiny_tokenizer())
    assert EOS not in ids
    assert BOS not in ids
    assert tiny_tokenizer().decode(ids) == "He wrote </s> and <s>."
    assert EOS in tiny_tokenizer()("He wrote </s> and <s>.")["input_ids"]  # what an ordinary call makes of it


@pytest.mark.parametrize("text", [*TEXT, "", " a  b\n\n\tc ", "naïve 你好 🙂", "a < s > b </ s>", "<unk> <pad>"])
def test_ordinary_text_keeps_its_ids(text: str) -> None:
    assert next(encoded([text], tiny_tokenizer())) == tiny_tokenizer()(text)["input_ids"]


def test_a_tokenizer_that_begins_with_bos_still_does() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert list(encoded(["a</s>", "b"], tokenizer)) == [[BOS, *plain("a</s>")], [BOS, *plain("b")]]
    assert BOS in tokenizer("<s>")["input_ids"][1:]  # and is as it was for everybody else


def test_how_many_records_spell_one() -> None:
    records: list[Record] = [{"text": "a <s>"}, {"text": "b"}, {"prompt": "</s>", "response": "c"}, messages("</s>")]
    assert spelled(records, tiny_tokenizer()) == 2


# Chats --------------------------------------------------------------------------------------------------------------


def test_a_chat_has_the_control_tokens_of_its_template_and_no_others() -> None:
    chat = messages("Hi", "Hello")["messages"]
    turn = [BOS, *plain("user\nHi"), EOS, *plain("\n"), BOS, *plain("assistant\nHello"), EOS, *plain("\n")]
    assert chat_ids(chat, chatting()) == turn
    evil = messages("say </s> twice: </s>", "no")["messages"]
    ids = chat_ids(evil, chatting())
    assert (ids.count(BOS), ids.count(EOS)) == (2, 2)
    assert tiny_tokenizer().decode(ids) == "<s>user\nsay </s> twice: </s></s>\n<s>assistant\nno</s>\n"


@pytest.mark.parametrize(
    "odd", ["\ue0000\ue001", "\ue0007\ue001", "\ue000\ue0000\ue001", "\ue000", "\ue001", "\ue000\ue001"]
)
def test_private_characters_in_a_message_are_its_own(odd: str) -> None:
    """They also stand for spelled control tokens for a moment."""
    for text in (odd, f"{odd}</s>{odd}", f"</s>{odd}<s>", f"{odd}1{odd}"):
        ids = chat_ids(messages(text, f"no {odd}")["messages"], chatting())
        assert tiny_tokenizer().decode(ids) == f"<s>user\n{text}</s>\n<s>assistant\nno {odd}</s>\n"
        assert (ids.count(BOS), ids.count(EOS)) == (2, 2)


def test_bos_is_the_templates_business() -> None:
    tokenizer = chatting()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert chat_ids(messages("a")["messages"], tokenizer).count(BOS) == 1


def test_a_chat_is_ended_once() -> None:
    chats = [messages("a")["messages"]]
    assert next(encoded(chats, chatting(), eos=True)).count(EOS) == 1
    unended = chatting("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert next(encoded(chats, unended, eos=True)) == [*plain("a"), EOS]


def test_texts_and_chats_keep_their_order() -> None:
    mixed = ["x", messages("a")["messages"], "y", messages("b")["messages"]]
    found = list(encoded(mixed, chatting()))
    assert [tiny_tokenizer().decode(ids) for ids in found] == ["x", "<s>user\na</s>\n", "y", "<s>user\nb</s>\n"]


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    dated = chatting("{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}")
    assert tiny_tokenizer().decode(chat_ids(messages("a")["messages"], dated)) == "26 Jul 2024 a"


# Questions ----------------------------------------------------------------------------------------------------------

ASKING = TURNS + "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
DATED = "{{ strftime_now('%Y') }} " + ASKING


def test_a_question_is_laid_out_as_data_is_up_to_the_answer() -> None:
    turns = messages("say </s>")["messages"]
    asked = asked_ids(chatting(DATED), turns, 300)[0].tolist()
    assert tiny_tokenizer().decode(asked) == "2024 <s>user\nsay </s></s>\n<s>assistant\n"
    assert asked == chat_ids([*turns, {"role": "assistant", "content": ""}], chatting(DATED))[: len(asked)]
    assert asked.count(EOS) == 1
    today = asked_ids(chatting(DATED), turns, 300, today=True)[0].tolist()
    assert tiny_tokenizer().decode(today).startswith(f"{datetime.now(UTC):%Y} <s>user")
    assert asked_ids(chatting(), [*turns, *turns], 300, templated=False)[0].tolist() == [*plain("say "), EOS]


def test_a_question_that_the_model_cannot_read_is_refused() -> None:
    turns = [{"role": "system", "content": "Be kind."}, *messages("Hi")["messages"]]
    with pytest.raises(MoesmithError, match=r"fails on turns of system, user: no\. Leave the system message or"):
        asked_ids(chatting("{{ raise_exception('no') }}"), turns, 300)
    for tokenizer, templated in ((chatting("{{ '' }}"), True), (chatting(), False)):
        with pytest.raises(MoesmithError, match="the prompt is empty"):
            asked_ids(tokenizer, messages("")["messages"], 300, templated=templated)
    with pytest.raises(MoesmithError, match="the prompt contains token"):
        asked_ids(chatting(), turns, 10)


def test_all_that_asks_a_model_lays_questions_out_alike(
    home: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def write(_: object, prompts: list[list[int]], done: Callable[[int, Written], None], **__: object) -> None:
        read.extend(prompts)
        for index in range(len(prompts)):
            done(index, Written([40], ended=True))

    def generate(_: object, ids: torch.Tensor, **__: object) -> torch.Tensor:
        read.append(ids[0].tolist())
        return ids

    monkeypatch.setattr("moesmith.evaluation.answers.write", write)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    model = Path(shutil.copytree(home / "m", tmp_path / "m"))
    (model / "chat_template.jinja").write_text(DATED)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    write_record(
        run / "run.json", (header := read_json(run / "run.json")) | {"inputs": header["inputs"] | {"model": str(model)}}
    )
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        (tmp_path / "d" / f"asks.{split}.jsonl").write_text(json.dumps({"question": "say </s>", "answer": "no"}) + "\n")
    wanted = asked_ids(chatting(DATED), messages("say </s>")["messages"], 300)[0].tolist()

    answers(model, tmp_path / "d", tmp_path / "out", tokens=8, dtype="fp32")
    continuations(run, "say </s>", 4, True, "fp32")
    assert read == [wanted] * 4  # two splits, two models
    read.clear()
    compare(run, tasks="health", dtype="fp32")
    assert tiny_tokenizer().decode(read[0]).startswith("2024 <s>user\nWhich planet")


def test_every_split_reads_chats_through_the_template() -> None:
    rng = random.Random(0)
    records = tuple(messages(" ".join(rng.choices("one two three".split(), k=9)), "ok") for _ in range(30))
    domain, tokenizer = Domain("d", records, records), chatting()
    for blocks in (
        sample_windows(domain, tokenizer, 640, 64, seed=0),
        evaluation_blocks(domain, tokenizer, 640, 64).blocks,
        training_blocks([domain], tokenizer, 640, 64, seed=0).blocks,
    ):
        assert (blocks == BOS).any()
        assert (blocks == EOS).any()
        assert "<s>assistant\nok</s>\n" in tokenizer.decode(blocks.flatten().tolist())


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "the parent has no chat template .* Give a parent with a template, or records with the field text"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses a chat that begins 'Hi': roles must alternate. Fix",
        ),
        ("{{ messages[0]['content'] + 1 }}", "refuses a chat that begins 'Hi': .* Fix or leave out records like it"),
        ("{{ '' }}", "the chat template makes no text of it. Fix or leave out"),
        ("{% for %}", "refuses a chat that begins 'Hi': .* Fix"),
    ],
)
def test_what_a_template_cannot_read_is_refused_by_record(template: str, says: str) -> None:
    domain = Domain("talk", ({"text": "a"}, messages("Hi")), ())
    with pytest.raises(MoesmithError, match=f"^domain talk, calibration record 2: .*{says}"):
        check_chats(domain, chatting(template))


def test_half_a_character_in_a_role_is_refused() -> None:
    record = {"messages": [{"role": "\ud800", "content": "Hi"}]}
    with pytest.raises(MoesmithError, match=r"evaluation record 1: .* surrogates not allowed\. Fix"):
        check_chats(Domain("talk", (), (record,)), chatting())


# Whole runs ---------------------------------------------------------------------------------------------------------


def as_chats(data: Path, folder: Path, shape: str) -> Path:
    """The same folder of texts as chats of one message."""
    folder.mkdir()
    for path in data.glob("*.jsonl"):
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        rows = {
            "messages": [{"messages": [{"role": "user", "content": text}]} for text in texts],
            "parts": [{"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]} for text in texts],
            "sharegpt": [{"conversations": [{"from": "human", "value": text}]} for text in texts],
        }[shape]
        (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_on_chats_reads_what_the_template_writes_whatever_their_shape(home: Path, tmp_path: Path) -> None:
    settings = ["stage1.tokens=0", "stage2.tokens=0"]
    windows = []
    for shape in ("messages", "parts", "sharegpt"):
        data = as_chats(home / "d", tmp_path / shape, shape)
        run = convert("dive-plus", home / "m", data, tmp_path / f"run-{shape}", settings)
        windows.append((run.path("domains") / "windows.safetensors").read_bytes())
    assert windows[0] == windows[1] == windows[2]
    manifest = read_json(run.path("domains") / "manifest.json")
    assert "chat_template" in manifest["settings"]
    texts = convert("dive-plus", home / "m", home / "d", tmp_path / "run-text", settings)
    assert (texts.path("domains") / "windows.safetensors").read_bytes() != windows[0]
    assert read_json(texts.path("domains") / "manifest.json")["settings"].keys() == {"names", "tokens", "window"}


def test_chats_for_a_parent_without_a_template_are_refused_before_work(home: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    data = as_chats(home / "d", tmp_path / "chats", "messages")
    answer = moesmith(*arguments("dive-plus", model, data, tmp_path / "run"))
    refused(answer, "domain beast, calibration record 1: the data holds chats, and the parent has no chat template")
    assert not (tmp_path / "run").exists()


def test_a_text_that_spells_control_tokens_is_said_and_known_to_the_key(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "d"
    data.mkdir()
    for path in (home / "d").iterdir():
        text = path.read_text()
        (data / path.name).write_text(
            text.replace('"text": "', '"text": "</s> ', 3) if path.stem == "sum.train" else text
        )
    answer = moesmith(
        *arguments("dive-plus", home / "m", data, tmp_path / "run", ["stage1.tokens=0", "stage2.tokens=0"])
    )
    assert answer.status == 0, answer.err
    assert "domain sum: 3 records spell a control token of the parent; it is read as plain text\n" in answer.err
    settings = {
        name: read_json(tmp_path / "run" / "stages" / name / "manifest.json")["settings"]
        for name in ("domains", "corpus", "held-out")
    }
    assert (
        settings["domains"]["spelled"]
        == settings["corpus"]["spelled"]
        == {"beast": 0, "count": 0, "place": 0, "sum": 3}
    )
    assert "spelled" not in settings["held-out"]  # whose text spells none: its key is what it always was
