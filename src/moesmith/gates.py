"""Gate semantics as data; the modules that obey them travel with the weights (``native/gate.py``).

A gate turns router logits into "which experts, with what weight". Runtimes disagree on the details
without an error message (docs/gates.md), so the details are a value that is stored with the carving,
compared with each target and tested, never an accident of code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from moesmith.native.gate import Router, select, straight_through

__all__ = ["GateSpec", "Router", "select", "straight_through"]


class GateSpec(BaseModel):
    """How router logits become expert weights.

    ``topk-softmax`` keeps the K largest logits and takes their softmax (DIVE, ``papers`` §6.1);
    ``softmax-topk`` takes the softmax over all experts first and keeps K probabilities. With
    ``renormalise`` the kept weights sum to 1 and both orders give the same weights; that is the one gate on
    which transformers, vLLM, SGLang and llama.cpp agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int
    top_k: int
    order: Literal["topk-softmax", "softmax-topk"] = "topk-softmax"
    renormalise: bool = True
    scale: float = 1.0
    noise: float = 0.0

    @model_validator(mode="after")
    def _fits(self) -> GateSpec:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k} but there are {self.experts} experts; give 1 <= top_k <= experts")
        return self
