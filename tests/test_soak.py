"""The soak of served models counts what is lost, other answers, and memory that grows."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import soak


@contextmanager
def server(fault: str) -> Iterator[str]:
    """A chat server that repeats what it is asked, and has a fault in every fifth answer."""
    count, lock = [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count[0] += 1
                odd = fault if count[0] % 5 == 0 else ""
            choice: dict[str, Any] = {"finish_reason": "length", "message": body["messages"][0]}
            if odd == "null":
                choice["finish_reason"] = None
            if odd == "other":
                choice["message"] = {"content": f"answer {count[0]}"}
            tokens = 99 if odd == "long" else 3
            text = json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()
            self.send_response(500 if odd == "status" else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{own.server_port}/v1"
        own.shutdown()


@pytest.mark.parametrize("fault", ["", "status", "null", "long", "other"])
def test_every_chat_is_counted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "held", lambda: 100 * 2**20)
    with server(fault) as base:
        found = soak.soak(base, chats=40, clients=4, tokens=3)
    lost = 8 if fault in ("status", "null", "long") else 0
    assert (found["chats"], found["lost_count"], found["growth"]) == (40, lost, 0)
    assert len(found["lost"]) == lost
    if not fault:
        assert found["answers_to_the_same_question"] == [4]


def test_memory_that_grows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(100, 1000))
    monkeypatch.setattr(soak, "held", lambda: next(sizes) * 2**20)
    with server("") as base:
        found = soak.soak(base, chats=100, clients=2, tokens=3)
    assert found["memory_first_mib"] == 100
    assert found["growth"] == pytest.approx(199 / 120 - 1, abs=1e-3)


def test_questions_differ_apart_from_every_tenth() -> None:
    texts = [letter * 300 for letter in "abc"]
    asked = [soak.question(number, texts) for number in range(100)]
    assert len(set(asked)) == 91
    assert {asked[number] for number in range(0, 100, 10)} == {asked[0]}
