"""Plain transformers: next-token log-probabilities and greedy tokens of a folder, moesmith not installed.

Reads a job (JSON) from standard input, writes the answer to the file that it names; ``clients.py`` says what they hold.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    """Load as anybody would, ask for every position, then continue greedily with a cache."""
    job = json.load(sys.stdin)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), trust_remote_code=job["remote_code"]
    ).eval()
    ids = torch.tensor(job["ids"])
    with torch.no_grad():
        best = model(input_ids=ids).logits.float().log_softmax(-1).topk(job["top"])
        greedy, step, cache = [], ids, None
        for _ in range(job["new_tokens"]):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            greedy.append(step)
    answer = {
        "top_ids": best.indices.tolist(),
        "top_logprobs": best.values.tolist(),
        "greedy": torch.cat(greedy, 1).tolist(),
        "architecture": type(model).__name__,
        "moesmith_installed": importlib.util.find_spec("moesmith") is not None,
        "version": f"transformers {transformers.__version__}",
    }
    Path(job["answer"]).write_text(json.dumps(answer))


main()
