"""A thousand different chats over HTTP with a served model: none lost, and the server's memory flat.

    python benchmarks/soak.py --model model.gguf --server llama.cpp-http
    python benchmarks/soak.py --model RUN/stock --server vllm-http --python vllm/bin/python

The server is started as docs/serving.md says (``clients.command_of``). Several clients ask at once, each question once,
except that every tenth is the first question again: its answers are counted, since a server that mixes up its slots
gives others. Memory is what the server's processes hold for themselves, looked at after every hundredth of the chats.
Prints one JSON line; the exit status is 1 if a chat was lost, or if memory grew after the first fifth of the chats by
more than ``--growth``.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from clients import WAIT, command_of, free_port, passages, serving

SERVERS = ("llama.cpp-http", "vllm-http")


def question(number: int, texts: list[str]) -> str:
    """Return a question that no other number has, except that every tenth is the first."""
    number = 0 if number % 10 == 0 else number
    text = texts[number % len(texts)]
    start = 7 * number % max(1, len(text) - 120)
    return f"Note {number}: {text[start : start + 120].strip()}. What is it about?"


def answer(base: str, text: str, tokens: int) -> str:
    """Ask one question; an answer of another kind is an error."""
    body = {"model": "moe", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens}
    request = urllib.request.Request(
        f"{base}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WAIT) as got:
        found = json.load(got)
    (choice,) = found["choices"]
    if choice["finish_reason"] not in ("stop", "length") or not isinstance(choice["message"]["content"], str):
        raise ValueError(f"an answer that did not end: {choice}")
    if found["usage"]["completion_tokens"] > tokens:
        raise ValueError(f"{found['usage']['completion_tokens']} tokens instead of {tokens}")
    return str(choice["message"]["content"])


def held() -> int:
    """Return the bytes that the server's processes, this one's children, hold for themselves."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            found += process.memory_full_info().uss
        except psutil.Error:  # one that has just ended
            continue
    return found


def soak(base: str, chats: int, clients: int, tokens: int) -> dict[str, Any]:
    """Ask all questions; returns how many were answered and lost, and the memory after each hundredth of them."""
    texts = passages(40)
    lost: list[str] = []
    same: Counter[str] = Counter()
    memory: list[int] = []
    lock, done = threading.Lock(), 0

    def ask(number: int) -> None:
        nonlocal done
        text, error = "", None
        try:
            text = answer(base, question(number, texts), tokens)
        except Exception as problem:
            error = f"chat {number}: {type(problem).__name__}: {problem}"
        with lock:
            done += 1
            if error is not None:
                lost.append(error)
            elif number % 10 == 0:
                same[text] += 1
            if done % max(1, chats // 100) == 0:
                memory.append(held())
                print(f"{done} of {chats} chats, {memory[-1] / 2**20:,.0f} MiB", file=sys.stderr, flush=True)

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(chats)))
    warm, end = memory[len(memory) // 5], max(memory[-5:])
    return {
        "chats": chats,
        "lost": lost[:20],
        "lost_count": len(lost),
        "answers_to_the_same_question": sorted(same.values(), reverse=True),
        "seconds": round(time.monotonic() - started, 1),
        "memory_first_mib": round(memory[0] / 2**20, 1),
        "memory_after_a_fifth_mib": round(warm / 2**20, 1),
        "memory_at_the_end_mib": round(end / 2**20, 1),
        "growth": round(end / max(1, warm) - 1, 4),
    }


def main() -> None:
    """One JSON line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, required=True, help="a folder, or a GGUF file for llama.cpp")
    options.add_argument("--server", choices=SERVERS, required=True)
    options.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that has the server")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--chats", type=int, default=1000)
    options.add_argument("--clients", type=int, default=4, help="that ask at once")
    options.add_argument("--tokens", type=int, default=16, help="of an answer, at most")
    options.add_argument("--growth", type=float, default=0.03, help="of memory, that is not taken for a leak")
    given = options.parse_args()
    port = free_port()
    command = command_of(given.server, given.model, given.python, port, given.dtype)
    with serving(command, port) as base:
        found = soak(base, given.chats, given.clients, given.tokens)
    print(json.dumps({"server": given.server, "model": given.model.name, **found}), flush=True)
    sys.exit(bool(found["lost_count"]) or found["growth"] > given.growth)


if __name__ == "__main__":
    main()
