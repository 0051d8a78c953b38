"""llama.cpp through xllamacpp: next-token log-probabilities of every position of a GGUF file, and greedy tokens.

Reads a job (JSON) from standard input, writes the answer to the file that it names; ``clients.py`` says what they hold.
"""

import json
import sys
import urllib.request
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
    if job["dtype"] == "float32":  # the defaults of cache and attention are half precision
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def post(path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    greedy = {"temperature": 0.0, "samplers": ["temperature"], "cache_prompt": True, "return_tokens": True}
    # a token that ends within a character is reported without probabilities: let it choose one that does not
    (letter,) = post("/tokenize", content="a", add_special=False)["tokens"][-1:]
    one = greedy | {"n_predict": 1, "n_probs": top, "logit_bias": [[letter, 1e6]]}
    answer: dict[str, Any] = {"top_ids": [], "top_logprobs": [], "greedy": []}
    for row in ids:
        asked = (post("/completion", prompt=row[: t + 1], **one) for t in range(len(row)))
        places = [found["completion_probabilities"][0]["top_logprobs"] for found in asked]
        answer["top_ids"].append([[e["id"] for e in place] for place in places])
        answer["top_logprobs"].append([[e["logprob"] for e in place] for place in places])
        answer["greedy"].append(post("/completion", prompt=row, n_predict=new, **greedy)["tokens"])
    answer |= {"architecture": "gguf", "version": f"xllamacpp {version('xllamacpp')}"}
    Path(job["answer"]).write_text(json.dumps(answer))


main()
