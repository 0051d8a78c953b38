"""Run llama.cpp: the server inside xllamacpp, one slot per sequence, asked over HTTP; times are the server's own."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import xllamacpp


class Model:
    """One GGUF file; the server is restarted for each batch, so that its cache is as large as the batch needs."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.path, self.threads, self.context = job["path"], job["threads"], job["context"]
        self.repack = job["repack"]
        self.server: Any = None
        self.batch = 0

    def facts(self) -> dict[str, Any]:
        """Report versions and what the library was built for."""
        return {
            "versions": {"xllamacpp": metadata.version("xllamacpp")},
            "system": str(xllamacpp.get_system_info()),
            "threads": self.threads,
        }

    def resize(self, batch: int) -> None:
        """Start a server with as many slots as sequences."""
        if batch == self.batch:
            return
        self.server = None  # free the old one's memory first
        params = xllamacpp.CommonParams()
        params.model.path = self.path
        slot = 256 * (self.context // 256 + 1)  # llama.cpp rounds a sequence's cells up to this
        params.n_ctx, params.n_parallel = slot * batch, batch
        params.n_gpu_layers, params.verbosity = 0, 0
        params.no_extra_bufts = not self.repack
        params.n_threads_http = batch + 2
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.cache_ram_mib = 0  # prompts of earlier rounds are not kept
        params.swa_full = True  # a sliding window's cells stay, so that a prompt can be continued
        self.server, self.batch = xllamacpp.Server(params), batch

    def measure(self, rows: list[list[int]], new: int) -> dict[str, Any]:
        """Time, in seconds, all prompts up to each one's first token, and ``new`` further tokens of all sequences.

        First every slot reads its prompt and stops after one token. Then the same prompts are sent again: a slot still
        has all but the last token, so that all sequences start to decode in the same step.
        """
        started = time.perf_counter()
        self._ask(rows, 1, False)
        prefill = time.perf_counter() - started
        replies = self._ask(rows, new + 1, True)
        read = max(reply["timings"]["prompt_n"] for reply in replies)
        written = min(reply["timings"]["predicted_n"] for reply in replies)
        if read > 1 or written != new + 1:
            raise RuntimeError(f"llama.cpp read {read} tokens again and wrote {written}, not 1 and {new + 1}")
        # the clock of a slot starts at its first token
        decode = max(reply["timings"]["predicted_ms"] for reply in replies) / 1000
        return {"prefill_seconds": prefill, "decode_seconds": decode}

    def _ask(self, rows: list[list[int]], tokens: int, keep: bool) -> list[dict[str, Any]]:
        def one(slot: int) -> dict[str, Any]:
            body = {
                "prompt": rows[slot],
                "id_slot": slot,
                "n_predict": tokens,
                "ignore_eos": True,
                "cache_prompt": keep,
                "temperature": 0.0,
                "samplers": ["temperature"],
            }
            data, header = json.dumps(body).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(self.server.listening_address + "/completion", data, header)
            with urllib.request.urlopen(request) as reply:
                found: dict[str, Any] = json.load(reply)
            return found

        with ThreadPoolExecutor(len(rows)) as pool:
            return list(pool.map(one, range(len(rows))))
