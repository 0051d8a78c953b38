"""Bound what a mixture can gain: bytes that a decode step reads, and FLOPs that a prompt costs, dense over MoE.

Both are counted from the tensors of the files that a runtime loads, so they include every type and every padding. A
decode step of b sequences reads attention, norms, routers and the head once, and in each layer those of the E experts
that some sequence chose. If each token chose K experts independently and uniformly, these would be E (1 - (1 - K/E)^b)
experts; real text chooses fewer, because its tokens agree. The step also reads the cache of every sequence's context. A
prompt costs two FLOPs per weight and token, with the weights of K experts only, plus the scores of attention; the head
is computed only for the last token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moesmith.parent.checkpoint import read_config
from moesmith.parent.stored import shards
from moesmith.parent.structure import attention_window, head_dim


@dataclass(frozen=True)
class Count:
    """An amount of weights, as bytes or as entries of matrices.

    Attributes:
        always: the weights that every step uses: attention, norms, routers, a dense network.
        head: the output matrix, or the embedding where it is tied.
        expert: one expert, summed over the layers.
        experts: all experts as they are stored; less than E times one expert where they share channels.
    """

    always: float
    head: float
    expert: float = 0.0
    experts: float = 0.0

    def used(self, distinct: float) -> float:
        """Return the amount that a step uses with ``distinct`` experts in every layer."""
        return self.always + self.head + min(self.expert * distinct, max(self.experts, self.expert))


@dataclass(frozen=True)
class Weights:
    """A model's weights in one runtime.

    Attributes:
        bytes: bytes that the runtime reads.
        entries: entries of matrices.
        experts: E, the experts of a layer; 1 for a dense model.
        active: K, the experts that a token chooses.
        cache: bytes of the key/value cache per token of context, all layers.
        scores: FLOPs of attention per token and position that it attends to, all layers.
        window: the most positions that a token attends to, or ``None``.
    """

    bytes: Count
    entries: Count
    experts: int
    active: int
    cache: float
    scores: float
    window: int | None

    def distinct(self, tokens: int) -> float:
        """Return how many experts of a layer ``tokens`` tokens are expected to choose, uniformly and independently."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens)

    def step_bytes(self, batch: int, context: float) -> float:
        """Count the bytes that a decode step reads for ``batch`` sequences with ``context`` tokens each."""
        return self.bytes.used(self.distinct(batch)) + batch * self.cache * min(context, self.window or math.inf)

    def prompt_flops(self, length: int) -> float:
        """Count the FLOPs of one prompt up to its first new token."""
        attended = sum(min(place, self.window or place) for place in range(1, length + 1))
        body = self.entries.always + self.entries.expert * self.active
        return 2 * body * length + 2 * self.entries.head + self.scores * attended


def bounds(dense: Weights, moe: Weights, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Compute the largest ratio MoE : dense of tokens per second that arithmetic allows, and what it comes from.

    Args:
        dense, moe: the two models.
        batch: sequences at once.
        prompt: tokens of each prompt.
        new: tokens decoded after them; the context is that of the middle step.

    Returns:
        ``prefill`` and ``decode``, each with ``bound`` and, for ``dense`` and ``moe``, FLOPs per prompt token or bytes
        per step.
    """
    flops = [model.prompt_flops(prompt) / prompt for model in (dense, moe)]
    read = [model.step_bytes(batch, prompt + new / 2) for model in (dense, moe)]
    return {
        "prefill": {"bound": flops[0] / flops[1], "flops_per_token": {"dense": flops[0], "moe": flops[1]}},
        "decode": {"bound": read[0] / read[1], "bytes_per_step": {"dense": read[0], "moe": read[1]}},
    }


Tensors = Iterable[tuple[str, list[int], float]]  # name, shape, bytes


def of_folder(folder: Path, config: Any, dtype: torch.dtype) -> Weights:
    """Measure the weights of a Hugging Face folder that is loaded in ``dtype``.

    Args:
        folder: the one with config and safetensors.
        config: the parent's loaded config, for attention.
        dtype: the weights' dtype in memory.
    """
    own = read_config(str(folder))
    gate, widths, unions = _own_format(own)
    experts = next((int(own[name]) for name in ("num_local_experts", "num_experts") if own.get(name)), 1)
    active = int(own.get("num_experts_per_tok") or 1) if experts > 1 else 1
    shared = [width / union if union else 1 / gate["experts"] for width, union in zip(widths, unions, strict=True)]
    return _weights(
        _safetensors(folder, dtype),
        gate.get("experts", experts),
        gate.get("top_k", active),
        config,
        dtype.itemsize,
        shared,
        [(a["qk"], a["vo"]) for a in own.get("attention") or ()],
    )


def _own_format(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[int], list[int | None]]:
    """Read gate, expert widths and unions by layer from a config of moesmith's own format; empty for another format."""
    if layers := config.get("layers"):
        return layers[0]["gate"], [layer["width"] for layer in layers], [layer["union"] for layer in layers]
    return config.get("gate") or {}, config.get("widths") or [], config.get("unions") or []  # version 0.1


def of_gguf(file: Path, config: Any) -> Weights:
    """Measure the weights of a GGUF file in llama.cpp, whose cache is in f16.

    Args:
        file: the model.
        config: the parent's loaded config, for attention.
    """
    import gguf

    reader = gguf.GGUFReader(str(file))
    arch = reader.fields["general.architecture"].contents()

    def field(name: str) -> int:
        found = reader.fields.get(f"{arch}.{name}")
        return int(found.contents()) if found is not None else 0

    tensors = [(t.name, [int(n) for n in reversed(t.shape)], float(t.n_bytes)) for t in reader.tensors]
    return _weights(tensors, field("expert_count") or 1, field("expert_used_count") or 1, config, 2)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors that a folder is loaded from; some published folders hold the weights a second time."""
    return [folder / name for name in shards(folder, str(folder))]


def _safetensors(folder: Path, dtype: torch.dtype) -> Tensors:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = part.get_shape()
                if str(part.get_dtype()).startswith(("F", "BF")):  # index lists are not weights
                    yield name, shape, math.prod(shape) * dtype.itemsize


def _weights(
    tensors: Tensors,
    experts: int,
    active: int,
    config: Any,
    cached: int,
    shared: list[float] | None = None,
    kept: list[tuple[int, int]] | None = None,
) -> Weights:
    found: dict[str, list[float]] = {part: [0.0, 0.0] for part in ("always", "head", "embedding", "expert", "experts")}
    for name, shape, stored in tensors:
        matrix = float(math.prod(shape)) if len(shape) > 1 and "bias" not in name else 0.0
        part = _part(name) if experts > 1 else _part(name).replace("experts", "always")
        found[part][0] += stored
        found[part][1] += matrix
        if part == "experts":
            share = shared[_layer(name)] if shared else 1 / experts
            found["expert"][0] += stored * share
            found["expert"][1] += matrix * share
    if not found["head"][0]:
        found["head"] = found["embedding"]
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    widths = kept or [(head_dim(config),) * 2] * config.num_hidden_layers
    size, entries = (Count(*(found[part][i] for part in ("always", "head", "expert", "experts"))) for i in (0, 1))
    return Weights(
        bytes=size,
        entries=entries,
        experts=experts,
        active=active,
        cache=float(sum(kv * (qk + vo) * cached for qk, vo in widths)),
        scores=float(sum(2 * heads * (qk + vo) for qk, vo in widths)),
        window=attention_window(config),
    )


def _part(name: str) -> str:
    if "embed_tokens" in name or name == "token_embd.weight":
        return "embedding"
    if name.startswith("lm_head.") or ".lm_head." in name or name == "output.weight":
        return "head"
    return "experts" if ".experts." in name or "_exps." in name else "always"


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())
