"""Record which expert took which token, in our own blocks and in stock Hugging Face MoE models.

The recorder hooks the routers themselves. ``output_router_logits`` is not used, because many architectures do
not return it. Shapes: D domains, L layers, E experts, K active experts, T tokens.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moesmith.errors import MoesmithError
from moesmith.files.artefact import check_file
from moesmith.files.write import write_atomic
from moesmith.parent.hooks import hooked

SAMPLE_TOKENS = 120


@dataclass
class Sample:
    """The beginning of one domain's text, with the experts of every layer and token.

    Attributes:
        domain: the domain's name.
        tokens: T pieces of text; joined they are the text. A token that ends inside a character is empty, and
            the token that completes the character carries it.
        ids_LTK: chosen experts (L, T, K), the one with the largest weight first; -1 where a layer chooses fewer.
    """

    domain: str
    tokens: list[str]
    ids_LTK: NDArray[np.int64]


@dataclass
class Routing:
    """Counts of a router's choices over text.

    Attributes:
        domains: names of the D domains.
        counts_DLE: how often each expert was chosen, (D, L, E) int64; a token counts K times. Layers with fewer experts
            than others have zeros at the end.
        entropy_DL: mean entropy of the router's softmax over all E experts, in nats, (D, L).
        tokens_D: tokens seen per domain.
        samples: one short text per domain.
        sizes_L: experts of each layer, (L,); E in all if left out.
    """

    domains: tuple[str, ...]
    counts_DLE: NDArray[np.int64]
    entropy_DL: NDArray[np.float64]
    tokens_D: NDArray[np.int64]
    samples: list[Sample] = field(default_factory=list)
    sizes_L: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.sizes_L):
            self.sizes_L = np.full(self.counts_DLE.shape[1], self.experts)

    @property
    def present_LE(self) -> NDArray[np.bool_]:
        """Which experts there are, (L, E)."""
        return np.arange(self.experts) < self.sizes_L[:, None]

    @property
    def experts(self) -> int:
        """The number of experts, E, of the layer that has the most."""
        return int(self.counts_DLE.shape[2])

    @property
    def load_LE(self) -> NDArray[np.float64]:
        """Each expert's share of the choices, all domains together, (L, E); rows sum to 1."""
        return _shares(self.counts_DLE.sum(0))

    def share(self, layer: int | None = None) -> NDArray[np.float64]:
        """Compute each expert's share of a domain's choices, in one layer or over all layers, (D, E); rows sum to 1."""
        return _shares(self.counts_DLE.sum(1) if layer is None else self.counts_DLE[:, layer])

    @property
    def parting_DL(self) -> NDArray[np.float64]:
        """Part of a domain's choices that would have to change to be those of all text, by layer, (D, L) in [0, 1].

        The total variation distance of two distributions over a layer's experts. Experts of different layers are not
        added up: where every layer groups its own tokens, their numbers have nothing in common.
        """
        share_DLE = _shares(self.counts_DLE)
        return np.abs(share_DLE - self.load_LE).sum(-1) / 2

    @property
    def entropy_L(self) -> NDArray[np.float64]:
        """Mean entropy of a token's router probabilities over log E, (L,) in [0, 1]; 0 means a certain router."""
        return self._over_log(np.average(self.entropy_DL, axis=0, weights=self.tokens_D))

    @property
    def balance_L(self) -> NDArray[np.float64]:
        """Entropy of the experts' load over log E, (L,) in [0, 1]; 1 means every expert is used equally."""
        load_LE = self.load_LE
        return self._over_log(-(load_LE * np.log(np.where(load_LE > 0, load_LE, 1))).sum(-1))

    def dead(self, threshold: float = 0.05) -> list[tuple[int, int, float]]:
        """List experts chosen less than ``threshold`` times the uniform share: (layer, expert, load)."""
        load_LE = self.load_LE
        few_LE = (load_LE < threshold / self.sizes_L[:, None]) & self.present_LE
        return [(int(layer), int(e), float(load_LE[layer, e])) for layer, e in np.argwhere(few_LE)]

    def _over_log(self, entropy_L: NDArray[np.float64]) -> NDArray[np.float64]:
        several_L = self.sizes_L > 1
        return np.where(several_L, entropy_L, 0) / np.log(np.where(several_L, self.sizes_L, 2))

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` of plain arrays; text is JSON in a byte array, so nothing is pickled."""
        text = {"domains": self.domains, "samples": [[s.domain, s.tokens] for s in self.samples]}
        arrays: dict[str, NDArray[Any]] = {f"sample_{i}": s.ids_LTK for i, s in enumerate(self.samples)}
        arrays |= {"counts_DLE": self.counts_DLE, "entropy_DL": self.entropy_DL, "tokens_D": self.tokens_D}
        if not self.present_LE.all():
            arrays["sizes_L"] = self.sizes_L
        arrays["text"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)

        write_atomic(Path(path), lambda temporary: temporary.write_bytes(buffer.getvalue()))

    @classmethod
    def load(cls, path: str | Path) -> Routing:
        """Read what :meth:`save` wrote.

        Raises:
            MoesmithError: the file is damaged or not a routing record.
        """
        check_file(Path(path))
        try:
            with np.load(path, allow_pickle=False) as arrays:
                text = json.loads(arrays["text"].tobytes())
                return cls(
                    domains=tuple(text["domains"]),
                    counts_DLE=arrays["counts_DLE"],
                    entropy_DL=arrays["entropy_DL"],
                    tokens_D=arrays["tokens_D"],
                    samples=[
                        Sample(name, tokens, arrays[f"sample_{i}"]) for i, (name, tokens) in enumerate(text["samples"])
                    ],
                    sizes_L=arrays["sizes_L"] if "sizes_L" in arrays else np.zeros(0, np.int64),
                )
        except FileNotFoundError:
            raise
        except Exception as error:  # numpy and zipfile have no common error type for a damaged file
            raise MoesmithError(f"{path} is not a routing record: {error}", "Delete it and evaluate again.") from error


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _routers(model: nn.Module) -> list[nn.Module]:
    """Find the routers in layer order: the ``router`` or ``gate`` next to an ``experts`` module."""
    routers = []
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            router = getattr(module, "router", None) or getattr(module, "gate", None)
            if isinstance(router, nn.Module):
                routers.append(router)
    return routers


class Recorder:
    """Records what every layer's router chooses while a model reads text; the code that runs it calls :meth:`visit`.

    So evaluation and recording share one pass (``perplexity.perplexities``).

    Args:
        scales: what each layer's logits are multiplied by in the model that is read
            (``export.stock.experts.router_scales``), so that entropies are those of the carving's own router; nothing
            if left out.
    """

    def __init__(self, scales: Sequence[float] = ()) -> None:
        self.scales = scales
        self.texts: list[Tensor] = []
        self.samples: list[int] = []  # by batch, how many of its first tokens are a text's sample
        self.seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def begin(self, texts: Sequence[Tensor], batch: int) -> None:
        """Get ready for texts (N, window), read one after another, ``batch`` windows at a time.

        Earlier records are forgotten.
        """
        self.texts, self.samples, self.seen = list(texts), [], {}
        for blocks in texts:
            rest = len(blocks.split(batch)) - 1
            self.samples += [min(SAMPLE_TOKENS, blocks.shape[1]), *[0] * rest]

    def visit(self, index: int, layer: nn.Module) -> AbstractContextManager[None]:
        """Hook a layer's router while it works."""
        take = partial(self._take, self.seen.setdefault(index, []), scale=self.scales[index] if self.scales else 1.0)
        return hooked((router, take) for router in _routers(layer))

    def _take(self, seen: list[Any], module: nn.Module, _: Any, output: Any, scale: float = 1.0) -> None:
        if not (isinstance(output, tuple) and len(output) == 3):
            raise MoesmithError(
                f"{type(module).__name__} does not return (logits, weights, ids)",
                "Its routing cannot be recorded; use a model with the Hugging Face router contract.",
            )
        logits_TE, ids_TK = (output[i].detach().flatten(0, -2) for i in (0, 2))
        sample_TK = ids_TK[: self.samples[len(seen)]]
        seen.append((_counts(logits_TE, ids_TK).cpu(), _entropy(logits_TE.float() / scale), sample_TK.cpu()))

    def result(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> Routing:
        """Return what was recorded; ``names`` are those of the texts, in order.

        Raises:
            MoesmithError: the model has no router.
        """
        some = next((layer for layer in self.seen.values() if layer), None)
        if some is None:
            raise MoesmithError("the model has no router to record", "Give a Mixture-of-Experts model.")
        # a layer without a router is one expert, which every token takes
        single = [(counts[:1] * 0 + counts.sum() // ids.shape[1], 0 * h, ids[:, :1] * 0) for counts, h, ids in some]
        seen = [self.seen[index] or single for index in sorted(self.seen)]
        counts, entropies, samples = [], [], []
        starts = [place for place, sample in enumerate(self.samples) if sample]
        for name, blocks, start, end in zip(names, self.texts, starts, [*starts[1:], None], strict=True):
            layers = [layer[start:end] for layer in seen]
            counts.append(_stacked([torch.stack([part[0] for part in layer]).sum(0) for layer in layers], 0))
            entropies.append(torch.stack([torch.stack([part[1] for part in layer]).sum(0) for layer in layers]))
            ids_LTK = _stacked([layer[0][2] for layer in layers], -1).numpy().astype(np.int64)
            text = pieces(tokenizer, blocks[0, : self.samples[start]].tolist())
            samples.append(Sample(name, text, ids_LTK))
        tokens_D = np.array([blocks.numel() for blocks in self.texts])
        return Routing(
            domains=tuple(names),
            counts_DLE=torch.stack(counts).numpy(),
            entropy_DL=torch.stack(entropies).numpy() / tokens_D[:, None],
            tokens_D=tokens_D,
            samples=samples,
            sizes_L=np.array([len(layer[0][0]) for layer in seen]),
        )


def _stacked(parts: Sequence[Tensor], filling: int) -> Tensor:
    """Stack layers' tensors, (L, …, E) or (L, …, K): layers with fewer experts are filled up at the end."""
    longest = max(part.shape[-1] for part in parts)
    return torch.stack([F.pad(part, (0, longest - part.shape[-1]), value=filling) for part in parts])


def _counts(logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Count how often each expert is among the ids, (E,) int64."""
    return torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[-1])


def _entropy(logits_TE: Tensor) -> Tensor:
    """Sum the entropy of softmax(logits) over tokens, in nats, float64 on the CPU."""
    log_TE = logits_TE.float().log_softmax(-1)
    return -(log_TE.exp() * log_TE).sum(-1).cpu().double().sum()  # in this order: some devices have no fp64


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the readable part that each token adds to the text; joined, the pieces are the decoded text."""
    parts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
        parts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return parts
