"""A GGUF file that answers: llama.cpp's server, as the package xllamacpp carries it, in a process of its own.

llama.cpp ends its process when an assertion fails; here that is an error message of ours. The process ends when its
standard input does, so it does not outlive this one, and Ctrl-C does not reach it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesmith.chat.speaker import Answer
from moesmith.errors import MoesmithError
from moesmith.evaluation.answers import TOO_LONG
from moesmith.evaluation.prompt import Turns
from moesmith.export.gguf.modelfile import CONTEXT
from moesmith.parent.gguf.file import open_gguf

AGAIN = "Start the chat again."


class LlamaCpp:
    """One GGUF file on the CPU.

    Args:
        name: what it is called.
        file: the file.

    Raises:
        MoesmithError: there is no such file, a package is missing, or llama.cpp does not load it.
    """

    def __init__(self, name: str, file: Path) -> None:
        import torch

        _, keys = open_gguf(file)
        if importlib.util.find_spec("xllamacpp") is None:
            what = "llama.cpp (package xllamacpp) is not installed, so a GGUF file cannot answer"
            raise MoesmithError(what, "pip install 'moesmith[gguf]'")
        self.name, self.templated = name, bool(keys.get("tokenizer.chat_template"))
        trained = keys.get(f"{keys.get('general.architecture')}.context_length", CONTEXT)
        context = str(min(CONTEXT, int(trained)))
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", __name__, str(file.absolute()), context, str(torch.get_num_threads())]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, start_new_session=True
        )
        assert self.server.stdout is not None
        self.address = self.server.stdout.readline().strip()
        if not self.address:
            self.close()
            raise MoesmithError(f"llama.cpp does not run {file.name}: {self._why()}", "Give another file.")

    def _why(self) -> str:
        """What the server said last about an error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.wait(1)  # a connection breaks a moment before its process is gone
        self.said.seek(0)
        lines = [line.strip() for line in self.said if "rror" in line or "GGML_ASSERT" in line]
        status = self.server.poll()
        return (
            lines[0][:300] if lines else "the connection broke" if status is None else f"it ended with status {status}"
        )

    def answer(self, turns: Turns, tokens: int, temperature: float, answer: Answer) -> None:
        """As :meth:`moesmith.chat.speaker.Speaker.answer`."""
        prompt = turns[-1]["content"]
        if self.templated:
            with self._post("/apply-template", messages=list(turns)) as reply:
                try:
                    prompt = json.load(reply)["prompt"]
                except (http.client.HTTPException, OSError, ValueError) as error:
                    raise MoesmithError(f"llama.cpp does not answer: {self._why()}", AGAIN) from error
        options = {"temperature": temperature, "samplers": ["temperature"], "return_tokens": True}
        ended = False
        with self._post("/completion", prompt=prompt, n_predict=tokens, stream=True, **options) as reply:
            for line in _lines(reply):
                kind, _, text = line.decode("utf-8").partition(": ")
                if kind == "error":
                    raise MoesmithError(f"llama.cpp stopped: {text.strip()[:300]}", TOO_LONG)
                if kind == "data":
                    part = json.loads(text)
                    ended = ended or part["stop"]
                    made = part["tokens_predicted"] if part["stop"] else answer.tokens + len(part.get("tokens") or ())
                    if made > answer.tokens:  # some come without text: halves of a character, the end
                        answer.count(made - answer.tokens)
                    answer.add(part["content"])
        if not ended:  # the server died: half an answer is no turn of a conversation
            raise MoesmithError(f"llama.cpp stopped in the middle of an answer: {self._why()}", AGAIN)

    def _post(self, path: str, **body: Any) -> Any:
        header = {"Content-Type": "application/json"}
        try:
            return urllib.request.urlopen(
                urllib.request.Request(self.address + path, json.dumps(body).encode(), header)
            )
        except urllib.error.HTTPError as error:
            try:
                said = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = str(error)
            raise MoesmithError(f"llama.cpp does not answer: {said[:300]}", TOO_LONG) from error
        except (http.client.HTTPException, OSError) as error:
            raise MoesmithError(f"llama.cpp does not answer: {self._why()}", AGAIN) from error

    def close(self) -> None:
        """End the process."""
        for pipe in (self.server.stdin, self.server.stdout):
            if pipe is not None:
                pipe.close()
        self.server.wait()


def _lines(reply: Any) -> Iterator[bytes]:
    """Yield whole lines of a reply, up to where it ends or the connection breaks."""
    with contextlib.suppress(http.client.HTTPException, OSError):
        yield from (line for line in reply if line.endswith(b"\n"))


def main(file: str, context: str, threads: str) -> None:
    """Serve a file until standard input ends; the server's address is the only line on standard output."""
    import xllamacpp

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers = int(context), 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(params)
    print(server.listening_address, file=answer, flush=True)
    sys.stdin.read()
    os._exit(0)  # nothing of the server's is worth waiting for


if __name__ == "__main__":
    main(*sys.argv[1:])
