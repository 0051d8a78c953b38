"""Gate semantics as data; the modules that follow them are shipped with the weights (``native/gate.py``).

A gate turns router logits into "which experts, with what weight". Runtimes disagree on the details
without an error message (docs/gates.md), so the details are a value that is stored with the carving,
compared with each target and tested, never an accident of code.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from moesmith.errors import MoesmithError

Mix = Literal["average", "sum"]
Logits = Literal["linear", "biased", "hidden"]


class GateSpec(BaseModel):
    """How router logits become expert weights: the K largest logits decide, and

    * ``average``: their softmax gives the weights, which sum to 1 (DIVE, arXiv:2506.09351). The softmax over all
      experts, cut to K and divided by its sum, gives the same; that is the one gate on which transformers, vLLM, SGLang
      and llama.cpp agree.
    * ``sum``: every chosen expert counts in full (MoEfication, arXiv:2110.01786; CMoE, arXiv:2502.04416).

    Attributes:
        experts: how many there are, E.
        top_k: how many a token visits, K.
        mix: the weights of the chosen experts.
        noise: factor of DIVE's training noise.
        logits: ``linear`` in x; ``biased``, with the bias of the parent's rows that the router is made of; or
            ``hidden``: what one channel per expert computes (``layer.Analytic``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int
    top_k: int
    mix: Mix = "average"
    noise: float = 0.0
    logits: Logits = "linear"

    @model_validator(mode="after")
    def _fits(self) -> GateSpec:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k} but there are {self.experts} experts; give 1 <= top_k <= experts")
        return self

    @classmethod
    def read(cls, values: dict[str, Any]) -> GateSpec:
        """Read a gate from a file; version 0.1 also wrote the order of softmax and choice, but used only one order.

        Raises:
            MoesmithError: the weights of the gate do not sum to 1.
        """
        old = {"order": "topk-softmax", "renormalise": True, "scale": 1.0}
        same = values.get("renormalise", True) or values.get("order", "topk-softmax") == "topk-softmax"
        if not same or values.get("scale", 1.0) != 1.0:
            raise MoesmithError("the gate's weights do not sum to 1", "Only moesmith 0.1 can read it.")
        return cls(**{name: value for name, value in values.items() if name not in old})
