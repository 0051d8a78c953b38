"""``moesmith chat``: who answers, what a conversation holds, commands, and what a terminal is shown."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Answer as Said
from commands import moesmith
from gguf_files import changed, tiny_gguf
from refusals import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesmith.chat import chat as talking
from moesmith.chat.llamacpp import LlamaCpp
from moesmith.chat.speaker import Answer, Model, Speaker
from moesmith.errors import MoesmithError
from moesmith.evaluation.answers import go_on
from moesmith.evaluation.compare import continuations
from moesmith.evaluation.prompt import Turns
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json, write_record
from moesmith.run.folder import open_run
from moesmith.testing.parents import save_tiny

RATE = re.compile(r"\[(\d+) tokens?(, [\d,.]+ tokens/s)?, the first after [\d.]+ s\]")


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> Said:
    """Run ``moesmith chat`` with lines of text as its standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return moesmith("chat", *words)


class Stub:
    """A speaker that remembers what it is asked and says what it is told to say."""

    name, templated = "stub", True

    def __init__(self, *pieces: str, stops: bool = False, fails: bool = False) -> None:
        self.pieces, self.stops, self.fails, self.asked, self.closed = pieces, stops, fails, list[Any](), False

    def answer(self, turns: Turns, tokens: int, temperature: float, answer: Answer) -> None:
        self.asked.append([(turn["role"], turn["content"]) for turn in turns])
        if self.fails:
            raise MoesmithError("the prompt is empty", "Give some text to continue.")
        for piece in self.pieces:
            answer.count(1)
            answer.add(piece)
        if self.stops:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def stubbed(monkeypatch: pytest.MonkeyPatch, *stubs: Speaker) -> None:
    waiting = list(stubs)
    monkeypatch.setattr(talking, "speaker_of", lambda *_: waiting.pop(0))


def without_template(folder: Path) -> Path:
    """A tiny parent that only continues text."""
    save_tiny("llama", folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_parent_and_moe_answer_in_turn(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = piped(monkeypatch, "the fox\n", finished, "--parent", "--tokens", 9, "--dtype", "fp32")
    assert said.status == 0, said.err
    wanted = continuations(finished, "the fox", 9, True, "fp32")
    parts = re.split(r"^--- (.*) ---\n", said.out, flags=re.MULTILINE)
    assert parts[0] == "> the fox\n"
    assert parts[1::2] == ["dense parent", "MoE"]
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        text, rate = part.rstrip("\n").rsplit("\n", 1)
        assert text.rstrip("\n") == talking_plain(wanted[name])
        assert RATE.fullmatch(rate)
        assert "9 tokens," in rate


def talking_plain(text: str) -> str:
    from moesmith.console import plain

    return plain(text).rstrip("\n")


def test_a_run_a_folder_and_a_name(finished: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(lambda _: None)
    alone = piped(monkeypatch, "a\n", finished, "--tokens", 5, "--dtype", "fp32").out
    both = piped(monkeypatch, "a\n", finished, "--beside", home / "m", "--tokens", 5, "--dtype", "fp32").out
    assert both.startswith("> a\n--- m ---\n")
    moe = both.partition("--- MoE ---\n")[2]
    assert moe.rpartition("[")[0] == alone.partition("> a\n")[2].rpartition("[")[0]
    assert str(answer) == "no tokens"


def test_a_conversation_is_remembered_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub("yes", " and no")
    stubbed(monkeypatch, stub)
    said = piped(monkeypatch, "one\n\n two \n/reset\nthree\n/quit\nfour\n", "any", "--system", "be brief")
    assert said.status == 0, said.err
    first = [("system", "be brief"), ("user", "one")]
    assert stub.asked[0] == first
    assert stub.asked[1] == [*first, ("assistant", "yes and no"), ("user", "two")]
    assert stub.asked[2] == [("system", "be brief"), ("user", "three")]
    assert len(stub.asked) == 3  # an empty line and what follows /quit are no prompts
    assert "forgotten" in said.err
    assert stub.closed


def test_an_unknown_command_goes_to_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub("yes")
    stubbed(monkeypatch, stub)
    said = piped(monkeypatch, "/qiut\n/etc/hosts is a file\n", "any")
    assert "there is no /qiut" in said.err
    assert "/quit: end" in said.err
    assert [turns[-1][1] for turns in stub.asked] == ["/etc/hosts is a file"]


def test_an_interrupted_answer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub("half of", stops=True)
    stubbed(monkeypatch, stub)
    said = piped(monkeypatch, "one\ntwo\n", "any")
    assert said.status == 0
    assert said.out.count("half of\n[stopped; 1 token, the first after") == 2
    assert stub.asked[1][1] == ("assistant", "half of")


def test_what_cannot_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(fails=True)
    stubbed(monkeypatch, stub)
    said = piped(monkeypatch, "one\ntwo\n", "any")
    assert (said.status, len(stub.asked)) == (2, 1)  # a script is told
    assert "moesmith: the prompt is empty" in said.err
    assert stub.closed

    stub = Stub(fails=True)
    stubbed(monkeypatch, stub)
    typed = io.StringIO("one\ntwo\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    said = moesmith("chat", "any")  # a person can go on
    assert (said.status, len(stub.asked)) == (0, 2)
    assert stub.asked[1] == [("user", "two")]


def test_ctrl_c_at_the_prompt_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([KeyboardInterrupt(), "one", EOFError()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    stub = Stub("yes")
    stubbed(monkeypatch, stub)
    monkeypatch.setattr("builtins.input", typed)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert moesmith("chat", "any").status == 0
    assert stub.asked == [[("user", "one")]]


def test_a_model_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, Stub("a\x1b", "]0;title\x07[bold]\r", ":smile:\u202e"))
    said = piped(monkeypatch, "say\x1b[2J\n", "any")
    assert "a\\u001b]0;title\\u0007[bold]\\u000d:smile:\\u202e\n" in said.out
    assert "> say\\u001b[2J\n" in said.out
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", said.out)


def test_without_a_template_text_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = without_template(tmp_path / "m")
    said = piped(monkeypatch, "the fox\nthe fox\n", folder, "--tokens", 6, "--dtype", "fp32")
    assert "m has no chat template: it continues each text by itself" in said.err
    first, second = said.out.split("> the fox\n")[1:]
    assert first.rpartition("[")[0] == second.rpartition("[")[0]  # nothing is remembered
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("the fox", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert first.startswith(talking_plain(tokenizer.decode(made, skip_special_tokens=True)))
    refused(
        piped(monkeypatch, "a\n", folder, "--system", "be brief"),
        "m has no chat template, so no place for a system message",
    )


def test_temperature(home: Path) -> None:
    model = Model.load("m", str(home / "m"), "fp32", "cpu")

    def text(temperature: float, seed: int) -> str:
        torch.manual_seed(seed)
        answer = Answer(lambda _: None)
        model.answer([{"role": "user", "content": "a"}], 12, temperature, answer)
        return answer.text

    assert text(0.0, 0) == text(0.0, 1)
    assert len({text(2.0, seed) for seed in range(4)}) > 1
    assert text(1e-4, 3) == text(0.0, 0)


def test_the_context_is_the_limit(home: Path) -> None:
    model = Model.load("m", str(home / "m"), "fp32", "cpu")
    longest: int = model.model.config.max_position_embeddings  # type: ignore[union-attr, assignment]
    with pytest.raises(MoesmithError, match=r"leave no room for an answer.*write /reset"):
        model.answer([{"role": "user", "content": "a " * longest}], 4, 0.0, Answer(lambda _: None))


def test_generate_takes_the_most_likely_tokens_whatever_the_generation_config_says(
    finished: Path, home: Path, tmp_path: Path
) -> None:
    model, run = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (home / "m", finished))
    header, config = read_json(run / "run.json"), read_json(model / "generation_config.json")
    write_record(run / "run.json", header | {"inputs": header["inputs"] | {"model": str(model)}})
    write_json(model / "generation_config.json", config | {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1})
    found = continuations(run, "the fox", 12, False, "fp32")["dense parent"]
    parent = open_run(run).parent("fp32")
    assert parent.model.generation_config is not None
    assert parent.model.generation_config.repetition_penalty == 50.0
    ids = parent.tokenizer("the fox", return_tensors="pt")["input_ids"]
    for _ in range(12):
        ids = torch.cat([ids, parent.model(ids).logits[:, -1:].argmax(-1)], 1)
    assert found == parent.tokenizer.decode(ids[0, -12:])
    assert len({*ids[0].tolist()}) < ids.shape[1]  # it does repeat
    go_on(parent.model, parent.tokenizer, ids, 2)
    assert parent.model.generation_config.repetition_penalty == 50.0  # as it was for everybody else


def test_generate_refuses_a_prompt_that_fills_the_context(finished: Path) -> None:
    with pytest.raises(MoesmithError, match=r"^601 tokens leave no room for an answer in 512\. Give a shorter prompt"):
        continuations(finished, "a " * 600, 4, False, "fp32")


PART = b'data: {"content": "half", "stop": false, "tokens": [5]}\n\n'
END = b'data: {"content": "", "stop": true, "tokens_predicted": 2}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@contextmanager
def serving(reply: bytes) -> Iterator[LlamaCpp]:
    """A file's speaker whose server answers every request with these bytes, and then is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one, _ = listening.accept()
                    one.recv(65536)
                    one.sendall(reply)
                    one.shutdown(socket.SHUT_RDWR)
                    one.close()

        threading.Thread(target=serve, daemon=True).start()
        mine = LlamaCpp.__new__(LlamaCpp)
        mine.name, mine.templated, mine.said = "m", False, io.StringIO()  # type: ignore[assignment]
        mine.server = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
        mine.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield mine
        mine.server.wait()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"", r"llama\.cpp does not answer: it ended with status 7\. Start the chat again"),
        (HEAD + b"\r\n" + PART, r"llama\.cpp stopped in the middle of an answer: it ended with status 7\. Start"),
        (HEAD + b"\r\n" + PART + END[:20], r"stopped in the middle of an answer: it ended with status 7\. Start"),
        (CHUNKED + b"%x\r\n%s\r\n" % (len(PART), PART), r"stopped in the middle of an answer"),
        (CHUNKED + b"%x\r\n%s" % (len(PART), PART[:30]), r"stopped in the middle of an answer"),
    ],
    ids=["before the reply", "after a part", "in a part", "between chunks", "in a chunk"],
)
def test_a_server_that_dies_is_an_error_and_no_answer(reply: bytes, says: str) -> None:
    with serving(reply) as mine:
        talk = talking.Talk(mine)
        with pytest.raises(MoesmithError, match=says):
            talk.ask("Hi", 4, 0.0)
        assert talk.turns == []
        mine.templated = True
        with pytest.raises(MoesmithError, match="does not answer"):
            talk.ask("Hi", 4, 0.0)


def test_an_answer_is_whole_when_the_server_says_so() -> None:
    with serving(HEAD + b"\r\n" + PART + END) as mine:
        talk = talking.Talk(mine)
        assert talk.ask("Hi", 4, 0.0).tokens == 2
        assert talk.turns[1]["content"] == "half"


@pytest.mark.slow
def test_a_gguf_file_answers_as_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    file = tiny_gguf("llama", tmp_path / "m.gguf", monkeypatch)
    folder = Model.load("m", str(tmp_path / "m"), "fp32", "cpu")
    mine = LlamaCpp("m.gguf", file)
    try:
        assert mine.templated
        turns = [{"role": "user", "content": "the quick"}]
        for prompt in ("brown fox", "jumps"):
            found, wanted = Answer(lambda _: None), Answer(lambda _: None)
            mine.answer(turns, 8, 0.0, found)
            folder.answer(turns, 8, 0.0, wanted)
            assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
            turns += [{"role": "assistant", "content": found.text}, {"role": "user", "content": prompt}]
        with pytest.raises(MoesmithError, match=r"llama.cpp does not answer: .*context.*write /reset"):
            mine.answer([{"role": "user", "content": "a " * 5000}], 4, 0.0, Answer(lambda _: None))
    finally:
        mine.close()
    assert mine.server.returncode == 0
    plain = changed(file, tmp_path / "plain.gguf", {"tokenizer.chat_template": None})
    said = piped(monkeypatch, "the fox\n", plain, "--tokens", 4)
    assert "plain.gguf has no chat template" in said.err
    assert "[4 tokens" in said.out


@pytest.mark.slow
def test_llama_cpp_ends_with_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    file = tiny_gguf("llama", tmp_path / "m.gguf", monkeypatch)
    program = (
        "import sys; from pathlib import Path; from moesmith.chat.llamacpp import LlamaCpp\n"
        f"made = LlamaCpp('m', Path({str(file)!r})); print(made.server.pid, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("llama.cpp outlives the process that started it")


def test_refusals(finished: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(piped(monkeypatch, "a\n", home / "m", "--parent"), "is no run, so its parent is not known")
    refused(piped(monkeypatch, "a\n", finished, "--parent", "--beside", home / "m"), "--parent and --beside name the")
    refused(piped(monkeypatch, "a\n", home / "m", "--temperature", -1), "the temperature is -1")
    refused(piped(monkeypatch, "a\n", tmp_path / "none"), "is neither a folder")
    refused(piped(monkeypatch, "a\n", tmp_path / "none.gguf"), r"There is no file .*none\.gguf")
    pytest.importorskip("xllamacpp")
    file = changed(tiny_gguf("llama", tmp_path / "m.gguf", monkeypatch), tmp_path / "bad.gguf", edit=_without_heads)
    refused(piped(monkeypatch, "a\n", file), r"llama\.cpp does not run bad\.gguf: ")


def _without_heads(name: str, value: Any) -> Any:
    return None if "attn_q" in name else value
