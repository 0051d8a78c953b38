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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from moesmith.parent.checkpoint import empty, read_config
from moesmith.parent.stored import shards
from moesmith.parent.structure import attention_window, head_dim


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        count: E, how many there are.
        active: K, how many a token chooses.
        one: the weights of one of them, as bytes or as entries of matrices.
        all: of all as they are stored; less than E times one where they share channels.
    """

    count: int
    active: int
    one: float
    all: float

    def used(self, tokens: int) -> float:
        """Return what ``tokens`` tokens are expected to use, if each chooses uniformly and independently."""
        distinct = self.count * (1 - (1 - self.active / self.count) ** tokens)
        return min(self.one * distinct, max(self.all, self.one))


@dataclass(frozen=True)
class Count:
    """An amount of weights, as bytes or as entries of matrices.

    Attributes:
        always: the weights that every step uses: attention, norms, routers, a dense network.
        head: the output matrix, or the embedding where it is tied.
        layers: of each layer that has several experts, these.
    """

    always: float
    head: float
    layers: tuple[Experts, ...] = ()

    def used(self, tokens: int) -> float:
        """Return the amount that a step of ``tokens`` tokens uses."""
        return self.always + self.head + sum(layer.used(tokens) for layer in self.layers)


@dataclass(frozen=True)
class Weights:
    """A model's weights in one runtime.

    Attributes:
        bytes: bytes that the runtime reads.
        entries: entries of matrices.
        cache: bytes of the key/value cache per token of context, all layers.
        scores: FLOPs of attention per token and position that it attends to, all layers.
        window: the most positions that a token attends to, or ``None``.
    """

    bytes: Count
    entries: Count
    cache: float
    scores: float
    window: int | None

    def step_bytes(self, batch: int, context: float) -> float:
        """Count the bytes that a decode step reads for ``batch`` sequences with ``context`` tokens each."""
        return self.bytes.used(batch) + batch * self.cache * min(context, self.window or math.inf)

    def prompt_flops(self, length: int) -> float:
        """Count the FLOPs of one prompt up to its first new token."""
        attended = sum(min(place, self.window or place) for place in range(1, length + 1))
        body = self.entries.always + sum(layer.one * layer.active for layer in self.entries.layers)
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
    gates = _own_format(own)
    if not gates:
        experts = next((int(own[name]) for name in ("num_local_experts", "num_experts") if own.get(name)), 1)
        gates = [Gate(experts, int(own.get("num_experts_per_tok") or 1), 1 / experts)] * config.num_hidden_layers
    kept = [(a["qk"], a["vo"]) for a in own.get("attention") or ()]
    return _weights(_safetensors(folder, dtype), gates, config, dtype.itemsize, Ends.of(config), kept)


class Gate(NamedTuple):
    """How a layer's experts are chosen, and how they are stored."""

    experts: int
    top_k: int
    share: float  # one expert's part of what is stored of all


def _own_format(config: Mapping[str, Any]) -> list[Gate]:
    """Read each layer's gate from a config of moesmith's own format; empty for another format."""
    layers = config.get("layers") or [
        {"gate": config["gate"], "width": width, "union": union}  # version 0.1
        for width, union in zip(config.get("widths") or (), config.get("unions") or (), strict=True)
    ]
    return [
        Gate(gate["experts"], gate["top_k"], layer["width"] / layer["union"] if layer["union"] else 1 / gate["experts"])
        for layer in layers
        for gate in [layer["gate"]]
    ]


@dataclass(frozen=True)
class Ends:
    """How embedding and output matrix are known.

    Attributes:
        embedding, head: their names, such as ``wte`` and ``lm_head``.
        shape: of the output matrix: some classes call it otherwise in files (GPT-NeoX: ``embed_out``).
    """

    embedding: str
    head: str
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Ends:
        """Ask a config's class."""
        model: Any = empty(config)
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        return cls(names[id(embedding)], names[id(head)], tuple(head.weight.shape))

    def part(self, name: str, shape: Sequence[int]) -> str:
        """Return ``embedding``, ``head``, or nothing for a tensor that is neither."""
        *path, owner, _ = ["", *name.split(".")]
        if any(part.isdigit() for part in path):  # in a layer
            return ""
        if owner == self.embedding:
            return "embedding"
        return "head" if owner == self.head or tuple(shape) == self.shape else ""


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
    experts = field("expert_count") or 1
    gates = [Gate(experts, field("expert_used_count") or 1, 1 / experts)] * config.num_hidden_layers
    return _weights(tensors, gates, config, 2, Ends("token_embd", "output"))


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
    gates: Sequence[Gate],
    config: Any,
    cached: int,
    ends: Ends,
    kept: list[tuple[int, int]] | None = None,
) -> Weights:
    """Sum up tensors: of all ``gates`` layers, with caches of ``cached`` bytes a number.

    ``kept`` are the widths of pruned attention.
    """
    found: dict[str | int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # by a layer's index: of its experts
    for name, shape, stored in tensors:
        matrix = float(math.prod(shape)) if len(shape) > 1 and "bias" not in name else 0.0
        part: str | int = ends.part(name, shape) or "always"
        if (".experts." in name or "_exps." in name) and gates[_layer(name)].experts > 1:
            part = _layer(name)
        found[part][0] += stored
        found[part][1] += matrix
    if not found["head"][0]:
        found["head"] = found["embedding"]
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    widths = kept or [(head_dim(config),) * 2] * config.num_hidden_layers
    sparse = [(gate, found[index]) for index, gate in enumerate(gates) if index in found]
    size, entries = (
        Count(
            found["always"][i],
            found["head"][i],
            tuple(Experts(gate.experts, gate.top_k, all_[i] * gate.share, all_[i]) for gate, all_ in sparse),
        )
        for i in (0, 1)
    )
    return Weights(
        bytes=size,
        entries=entries,
        cache=float(sum(kv * (qk + vo) * cached for qk, vo in widths)),
        scores=float(sum(2 * heads * (qk + vo) for qk, vo in widths)),
        window=attention_window(config),
    )


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())
