"""Ask llama.cpp questions, through the server in the package xllamacpp, in a process of its own.

llama.cpp ends its process when an assertion fails; here that is an error message of ours, and its memory is free
afterwards. The process imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesmith.errors import MoesmithError

TOP = 64  # how many of the most likely tokens are compared at a position


@dataclass(frozen=True)
class Questions:
    """What to ask one model.

    Attributes:
        texts: to be tokenised as text: special tokens are not recognised, and none is added.
        marked: to be tokenised as prompts: special tokens in them are recognised, and none is added.
        begun: to be tokenised as prompts, with the tokens that the file says are added to one.
        rows: N lists of S token ids; the question is the log-probabilities after each token.
        lengths: after how many tokens of each row to ask, one answer each; after every token if empty.
        prompt: token ids to be continued greedily.
        tokens: how many new tokens.
        chat: messages to put through the chat template.
        context: the least room for a text; if 0, what the questions need.
        threads: CPU threads.
    """

    texts: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    tokens: int = 0
    chat: list[dict[str, str]] = field(default_factory=list)
    context: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Answers:
    """What llama.cpp answered.

    Attributes:
        texts: token ids of each text.
        marked: token ids of each prompt.
        begun: token ids of each prompt with what is added.
        rows: for each row and length the :data:`TOP` most likely next tokens, as [id, natural log-probability].
        greedy: the continuation's token ids, to the end of text if that comes first.
        chat: the prompt that the chat template makes, ``None`` if it was not asked for.
    """

    texts: list[list[int]]
    marked: list[list[int]]
    begun: list[list[int]]
    rows: list[list[list[tuple[int, float]]]]
    greedy: list[int]
    chat: str | None


def ask(model: Path, questions: Questions) -> Answers:
    """Load a GGUF file with llama.cpp on the CPU and ask it.

    Raises:
        MoesmithError: xllamacpp is not installed, or llama.cpp does not load the file or ends early.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise MoesmithError(
            "llama.cpp (package xllamacpp) is not installed, so a GGUF file cannot be verified",
            "pip install 'moesmith[gguf]'",
        )
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "questions.json", Path(scratch) / "answers.json"
        asked.write_text(json.dumps(asdict(questions) | {"model": str(model.absolute())}), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if "rror" in line or "GGML_ASSERT" in line]
            why = lines[0].strip()[:300] if lines else f"it ended with status {done.returncode}"
            raise MoesmithError(f"llama.cpp does not run {model.name}: {why}", "Write another target, such as hf.")
        return Answers(**json.loads(answer.read_text(encoding="utf-8")))


def _server(questions: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = questions["model"]
    longest = max(len(questions["prompt"]), *(len(row) for row in questions["rows"]), 0) + questions["tokens"]
    params.n_ctx = params.n_batch = 256 * (max(longest, questions["context"]) // 256 + 1)
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = questions["threads"]
    # by default cache and flash attention are f16, which would be part of the difference
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _answer(questions: dict[str, Any]) -> Answers:
    server = _server(questions)

    def post(path: str, **body: Any) -> Any:
        data, header = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(server.listening_address + path, data, header)) as reply:
            return json.load(reply)

    def tokenise(text: str, special: bool = False, added: bool = False) -> list[int]:
        return post("/tokenize", content=text, add_special=added, parse_special=special)["tokens"]

    greedy = {"temperature": 0.0, "samplers": ["temperature"], "cache_prompt": True, "return_tokens": True}
    # a token that is half a character gets no probabilities: force a whole one, which leaves the model's own unchanged
    whole = {"logit_bias": [[tokenise("a")[-1], 1e6]], "n_predict": 1, "n_probs": TOP}
    rows = []
    for row in questions["rows"]:
        found = []
        for end in questions["lengths"] or range(1, len(row) + 1):
            reply = post("/completion", prompt=row[:end], **greedy, **whole)
            top = reply["completion_probabilities"][0]["top_logprobs"]
            found.append([(entry["id"], entry["logprob"]) for entry in top])
        rows.append(found)
    continued: list[int] = []
    if questions["tokens"]:
        options = greedy | {"n_predict": questions["tokens"]}
        continued = post("/completion", prompt=questions["prompt"], **options)["tokens"]
    chat = post("/apply-template", messages=questions["chat"])["prompt"] if questions["chat"] else None
    return Answers(
        texts=[tokenise(text) for text in questions["texts"]],
        marked=[tokenise(text, special=True) for text in questions["marked"]],
        begun=[tokenise(text, special=True, added=True) for text in questions["begun"]],
        rows=rows,
        greedy=continued,
        chat=chat,
    )


def main(asked: str, answer: str) -> None:
    """Answer a file of questions in another file; raises an exception when llama.cpp fails."""
    found = _answer(json.loads(Path(asked).read_text(encoding="utf-8")))
    Path(answer).write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
