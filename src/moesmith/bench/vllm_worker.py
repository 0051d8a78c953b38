"""Run vLLM: offline batches, its engine driven step by step, so that prefill and decode are timed separately."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler in this process: no queue between
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import vllm

MARGIN = 1.2  # factor over the cache that the longest batch needs


class Model:
    """One model folder."""

    def __init__(self, job: dict[str, Any]) -> None:
        gib = MARGIN * job["cache_bytes"] / 2**30
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(gib + 0.999)))  # whole GiB, at least one
        self.numbers = itertools.count()
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
        """Report versions, and whether the model is compiled."""
        config = self.llm.llm_engine.vllm_config
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "threads": int(os.environ["OMP_NUM_THREADS"]),
            "compiled": str(config.compilation_config.mode),
            "cache_gib": int(os.environ["VLLM_CPU_KVCACHE_SPACE"]),
        }

    def resize(self, batch: int) -> None:
        """Do nothing: the engine takes any number of sequences."""

    def measure(self, rows: list[list[int]], new: int) -> dict[str, Any]:
        """Time, in seconds, all prompts up to each one's first token, and ``new`` further tokens of all sequences.

        The scheduler may continue the first prompts while the last are still read. Tokens decoded by then do not count
        as decoding here: the time of the rest is scaled to all tokens.
        """
        engine = self.llm.llm_engine
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
        written: dict[str, int] = {}
        started = time.perf_counter()
        for row in rows:
            engine.add_request(f"{next(self.numbers)}", {"prompt_token_ids": row}, sampling)
        while len(written) < len(rows):
            self._step(written)
        first, early = time.perf_counter(), sum(written.values())
        while engine.has_unfinished_requests():
            self._step(written)
        ended, whole = time.perf_counter(), len(rows) * (new + 1)
        if sum(written.values()) != whole or early == whole:
            raise RuntimeError(f"vLLM wrote {sum(written.values())} tokens, {early} of them early, not {whole}")
        decode = (ended - first) * len(rows) * new / (whole - early)
        return {"prefill_seconds": first - started, "decode_seconds": decode}

    def _step(self, written: dict[str, int]) -> None:
        for output in self.llm.llm_engine.step():
            if found := len(output.outputs[0].token_ids):
                written[output.request_id] = found
