"""vLLM: next-token log-probabilities of every position of a folder, and greedy tokens.

Reads a job (JSON) from standard input, writes the answer to the file that it names; ``clients.py`` says what they hold.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: easier to stop, and no spinning beside it
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # even in eager mode the sampler would compile one small function

import vllm
from vllm import LLM, SamplingParams


def main() -> None:
    """One engine; prompts and continuations in one call."""
    job = json.load(sys.stdin)
    ids, top = job["ids"], job["top"]
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        trust_remote_code=job["remote_code"],
        enforce_eager=True,  # our own format cannot be traced; for a short question tracing would not pay anyhow
        max_model_len=len(ids[0]) + job["new_tokens"] + 1,
        max_num_seqs=len(ids),
        max_logprobs=top,
        enable_prefix_caching=False,  # it would leave out log-probabilities of a prompt
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    how = SamplingParams(
        temperature=0,
        max_tokens=job["new_tokens"],
        ignore_eos=True,
        logprobs=top,
        prompt_logprobs=top,
        detokenize=False,
    )
    found = engine.generate([{"prompt_token_ids": row} for row in ids], how)
    answer = {"top_ids": [], "top_logprobs": [], "greedy": [list(row.outputs[0].token_ids) for row in found]}
    for row in found:  # position t holds what follows ids[:t + 1]: the prompt's own entries begin with its second token
        places = [*row.prompt_logprobs[1:], row.outputs[0].logprobs[0]]
        best = [sorted(((e.logprob, i) for i, e in place.items()), reverse=True)[:top] for place in places]
        answer["top_ids"].append([[i for _, i in place] for place in best])
        answer["top_logprobs"].append([[value for value, _ in place] for place in best])
    model = engine.llm_engine.model_executor.driver_worker.worker.get_model()
    answer |= {"architecture": type(model).__name__, "version": f"vllm {vllm.__version__}"}
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
