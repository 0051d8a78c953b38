"""vLLM: offline batches; decode is the time of many new tokens less that of one."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler in this process: no queue between
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import vllm

MARGIN = 1.2  # of the cache that the longest batch needs


class Model:
    """One model folder."""

    def __init__(self, job: dict[str, Any]) -> None:
        gib = MARGIN * job["cache_bytes"] / 2**30
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(gib + 0.999)))  # whole GiB, no less than one
        self.llm = vllm.LLM(
            model=job["path"],
            dtype=job["dtype"],
            max_model_len=job["context"],
            max_num_seqs=job["batch"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            trust_remote_code=job["own_code"],
            disable_log_stats=True,
            enforce_eager=os.environ.get("TORCH_COMPILE_DISABLE") == "1",
        )

    def facts(self) -> dict[str, Any]:
        """Versions, and whether the model is compiled."""
        config = self.llm.llm_engine.vllm_config
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "threads": int(os.environ["OMP_NUM_THREADS"]),
            "compiled": str(config.compilation_config.mode),
            "cache_gib": int(os.environ["VLLM_CPU_KVCACHE_SPACE"]),
        }

    def resize(self, batch: int) -> None:
        """Nothing to do: the engine takes any number of sequences."""

    def measure(self, rows: list[list[int]], new: int) -> dict[str, Any]:
        """Seconds of all prompts up to one token each, and what ``new`` more tokens take beyond that."""
        prefill = self._seconds(rows, 1)
        return {"prefill_seconds": prefill, "decode_seconds": max(self._seconds(rows, new + 1) - prefill, 1e-9)}

    def _seconds(self, rows: list[list[int]], tokens: int) -> float:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        return time.perf_counter() - started
