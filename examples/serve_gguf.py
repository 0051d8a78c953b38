"""Serve a GGUF file with llama.cpp's own server, as the package ``xllamacpp`` carries it.

    pip install xllamacpp
    python examples/serve_gguf.py model.gguf --port 8080

It answers OpenAI's routes (``/v1/chat/completions`` and the others of ``llama-server``) until it is stopped with
Ctrl-C. Where llama.cpp is installed, ``llama-server -m model.gguf --port 8080`` does the same.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

import xllamacpp


def main() -> None:
    """Start the server and wait for a signal."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8080)
    options.add_argument("--context", type=int, default=2048, help="tokens, prompt and answer together")
    options.add_argument("--cache", type=int, default=256, help="MiB for prompts of earlier chats (llama.cpp: 8192)")
    options.add_argument("--threads", type=int, help="of the CPU; all of them if left out")
    given = options.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = str(given.model)
    params.hostnames = [given.host]
    params.port, params.n_ctx, params.cache_ram_mib = given.port, given.context, given.cache
    if given.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = xllamacpp.Server(params)
    print(f"{given.model.name} answers at {server.listening_address}/v1", flush=True)
    stop.wait()


if __name__ == "__main__":
    main()
