"""llama.cpp through xllamacpp: next-token log-probabilities of every position of a GGUF file, and greedy tokens.

Reads a job (JSON) from standard input, writes the answer to the file that it names; ``clients.py`` says what they hold.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xllamacpp


def main() -> None:
    """llama.cpp tells probabilities of generated tokens only, so every prefix is asked for one token."""
    job = json.load(sys.stdin)
    ids, top, new = job["ids"], job["top"], job["new_tokens"]
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = len(ids[0]) + new + 1
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.warmup = False
    if job["dtype"] == "float32":  # the cache's default is half precision
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], tokens: int) -> list[dict[str, Any]]:
        request = {"prompt": prompt, "max_tokens": tokens, "logprobs": top, "temperature": 0.0, "ignore_eos": True}
        found = server.handle_completions(request)
        if "choices" not in found:
            raise SystemExit(f"llama.cpp answered {json.dumps(found)[:400]}")
        steps: list[dict[str, Any]] = found["choices"][0]["logprobs"]["content"]
        return steps

    answer: dict[str, Any] = {"top_ids": [], "top_logprobs": [], "greedy": []}
    for row in ids:
        places = [ask(row[: t + 1], 1)[0]["top_logprobs"] for t in range(len(row))]
        answer["top_ids"].append([[e["id"] for e in place] for place in places])
        answer["top_logprobs"].append([[e["logprob"] for e in place] for place in places])
        answer["greedy"].append([step["id"] for step in ask(row, new)])
    answer |= {"architecture": "gguf", "version": f"xllamacpp {version('xllamacpp')}"}
    Path(job["answer"]).write_text(json.dumps(answer))


main()
