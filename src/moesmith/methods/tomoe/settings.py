"""The recipe's section ``masks``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moesmith.run.settings import LoopSection


class MasksSection(LoopSection):
    """ToMoE: experts, routers and attention masks learned over frozen weights."""

    budget: float = Field(0.5, gt=0, lt=1, description="share p of the block parameters active per token")
    attention: Literal["none", "hybrid", "dynamic"] = Field("hybrid", description="which attention masks are learned")
    output_mask: bool = Field(True, description="mask the output projection by the query token as well")
    noise: Literal["token", "expert"] = Field("token", description="whose Gumbel noise a channel mask has")
    routing: Literal["sampled", "argmax"] = Field("sampled", description="whether routing has Gumbel noise in training")
    masking: Literal["double", "single"] = Field("double", description="how often a mask multiplies a gated product")
    widths: Literal["threshold", "equal"] = Field("threshold", description="narrower experts as they are, or filled up")
    temperature: float = Field(0.4, gt=0)
    bias: float = Field(3.0, description="added to every mask logit: masks start open")
    kl_weight: float = Field(2.0, ge=0)
    budget_weight: float = Field(16.0, ge=0)
    union_weight: float = Field(3.0, ge=0, description="spread over attention and FFN positions: half of it acts")
    union: Literal["sampled", "plain"] = Field(
        "sampled",
        description="which masks' union is asked for: of sampled ones (published) or of those without noise",
        json_schema_extra={"neutral": "sampled"},
    )
    balance_weight: float = Field(1.0, ge=0)
