"""Run transformers: our own greedy loop with a cache, so that prefill and decode are timed separately."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

GATHERED = 2**28  # most elements that batched_mm may gather: it copies the weights of a token's experts for every token
TRIAL = 4  # decode steps that time an implementation of the experts


class Model:
    """One model folder, in the dtype asked for.

    Where transformers has several implementations of the experts, :meth:`resize` times each on the first rows that it
    is given, for prefill and decode separately, and keeps the fastest.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        trust = False
        if job["own_code"]:
            try:
                import moesmith.native.modeling  # noqa: F401  registers moesmith's own architecture
            except ImportError:
                trust = True  # the same code is stored next to the weights
        model: Any = AutoModelForCausalLM.from_pretrained(
            job["path"], dtype=getattr(torch, job["dtype"]), trust_remote_code=trust
        )
        self.device = torch.device(job["device"])
        self.model = model.eval().to(self.device)
        self.choice: dict[str, str] = {}
        self.tried: dict[str, dict[str, float]] = {}
        stacked = [p for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n]
        switchable = stacked and model._can_set_experts_implementation()
        self.kinds = ("grouped_mm", "eager", "batched_mm") if switchable else ()
        self.per_token = max((p[0].numel() for p in stacked), default=0)

    def facts(self) -> dict[str, Any]:
        """Report versions, attention kernel, and the experts' implementation chosen for the present batch."""
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "attention": self.model.config._attn_implementation,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "experts": dict(self.choice),
            "experts_tried": self.tried,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        }

    def resize(self, batch: int) -> None:
        """Forget which implementation was fastest at another batch."""
        self.choice, self.tried = {}, {}

    def measure(self, rows: list[list[int]], new: int) -> dict[str, Any]:
        """Time, in seconds, the prompt up to its first new token, and ``new`` further steps."""
        ids_BS = torch.tensor(rows, device=self.device)
        if self.kinds and not self.choice:
            self._choose(ids_BS)
        with torch.inference_mode():
            self._use("prefill")
            started = time.perf_counter()
            cache, last_B1 = self._prefill(ids_BS)
            self._wait()
            first = time.perf_counter()
            self._use("decode")
            begun = time.perf_counter()
            self._decode(cache, last_B1, new)
            self._wait()
            ended = time.perf_counter()
        return {"prefill_seconds": first - started, "decode_seconds": ended - begun}

    def _prefill(self, ids_BS: torch.Tensor) -> tuple[Any, torch.Tensor]:
        out = self.model(ids_BS, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1:].argmax(-1)

    def _decode(self, cache: Any, last_B1: torch.Tensor, steps: int) -> tuple[Any, torch.Tensor]:
        for _ in range(steps):
            out = self.model(last_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, last_B1 = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return cache, last_B1

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _use(self, phase: str) -> None:
        if self.choice:
            self.model.set_experts_implementation(self.choice[phase])

    @torch.inference_mode()
    def _choose(self, ids_BS: torch.Tensor) -> None:
        times: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
        cache, last_B1 = self._prefill(ids_BS)  # so that the first one tried does not pay for cold memory
        for kind in self.kinds:
            # it gathers (tokens, experts' weights): for prompts the copies alone would outgrow memory
            if kind == "batched_mm" and ids_BS.numel() * self.per_token > GATHERED:
                continue
            self.model.set_experts_implementation(kind)
            self._prefill(ids_BS[:, :8])
            del cache
            started = time.perf_counter()
            cache, last_B1 = self._prefill(ids_BS)
            self._wait()
            times["prefill"][kind] = time.perf_counter() - started
        for kind in self.kinds:
            if kind == "batched_mm" and len(ids_BS) * self.per_token > GATHERED:
                continue
            self.model.set_experts_implementation(kind)
            cache, last_B1 = self._decode(cache, last_B1, 1)
            started = time.perf_counter()
            cache, last_B1 = self._decode(cache, last_B1, TRIAL)
            self._wait()
            times["decode"][kind] = (time.perf_counter() - started) / TRIAL
        self.tried = times
        self.choice = {phase: min(found, key=found.__getitem__) for phase, found in times.items()}
