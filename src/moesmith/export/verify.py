"""Check for every export, by its logits, that the folder computes what the carving computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.mixture.folder import layered_folder, load_folder
from moesmith.mixture.moe import moe_blocks
from moesmith.native.gate import Router
from moesmith.native.heads import HeadGate
from moesmith.parent.accelerator import free_memory
from moesmith.parent.checkpoint import first_line
from moesmith.parent.head import head_of
from moesmith.parent.hooks import hooked
from moesmith.parent.layerwise import Decoder, Layered, cast, last_hidden
from moesmith.parent.load import Parent

TOLERANCE = 1e-3  # of the logits' standard deviation, in fp32


def verify_folder(
    parent: Parent, folder: Path, reference: Decoder, ids: Tensor, *, judged: bool = True
) -> dict[str, Any]:
    """Load ``folder`` as any user would and compare it with ``reference`` in fp32.

    It is loaded in the dtype of ``reference`` first: some classes round constants to it, such as Gemma's scale of the
    embedding, which are then the same on both sides.

    Two correct models part when rounding flips a router between two nearly equal experts, or the gate of an attention
    dimension: that token and those after it then differ. So tokens are compared up to the first such flip in their row,
    and there all must agree; if flips leave less than half of the tokens, routers or gates differ. If the parent is run
    layer by layer, or an fp32 copy does not fit in memory, both models are run layer by layer, and transformers loads
    one layer at a time.

    Args:
        parent: its device runs the comparison.
        folder: what ``stock.write_stock`` or ``native.write_native`` wrote. It is only read: the caller wrote it under
            a hidden name, and renames it when this has returned.
        reference: ``stock.stock_reference`` of the same parent and carving, or ``moe.decoder``'s model for the native
            format. A model with exact biases cannot agree with constant channels to the last digits: if the folder
            has no biases, the difference is measured, not judged.
        ids: (N, S) token ids.
        judged: whether it must agree; else the difference is measured, over all tokens.

    Returns:
        ``logits_difference`` (largest, over compared tokens), ``logits_kl`` (mean Kullback-Leibler divergence in nats),
        ``argmax_agreement``, ``compared_tokens`` and ``verified``: ``whole`` or ``layerwise``.

    Raises:
        MoesmithError: the folder does not load, lacks tensors, cannot be run or computes something else.
    """
    with judging(folder):
        whole = not isinstance(reference, Layered) and fits(reference)
        expected = run(reference, ids)
        if whole:
            loaded: Decoder = load_folder(folder, reference.dtype).to(parent.device)  # type: ignore[arg-type]
        else:
            loaded = layered_folder(folder, reference.dtype, parent.device)
        return _judge(folder, expected, run(loaded, ids), judged) | {"verified": "whole" if whole else "layerwise"}


@contextmanager
def judging(made: Path) -> Iterator[None]:
    """Turn any error while ``made`` is compared, such as a kernel's refusal or full memory, into one line.

    Raises:
        MoesmithError: instead of any exception but an interruption.
    """
    try:
        yield
    except MoesmithError:
        raise
    except MemoryError as error:
        raise MoesmithError(f"{made} cannot be verified: memory is full", "Free memory and run again.") from error
    except Exception as error:
        what = f"{made} cannot be verified: {type(error).__name__}: {first_line(error)}"
        raise MoesmithError(what, "Give a model or settings that run here.") from error


def _judge(folder: Path, expected: Result, found: Result, judged: bool) -> dict[str, Any]:
    approximate = not judged or (expected.biased and not found.biased)
    same_NS = expected.logits.argmax(-1) == found.logits.argmax(-1)
    difference_NS = (expected.logits - found.logits).abs().amax(-1)
    flipped_NS = torch.zeros_like(same_NS)
    if not approximate:
        for one_TK, other_TK in zip(expected.routed, found.routed, strict=True):
            flipped_NS |= (one_TK.sort(-1).values != other_TK.sort(-1).values).any(-1).view_as(flipped_NS)
        for one_NSh, other_NSh in zip(expected.kept, found.kept, strict=True):
            flipped_NS |= (one_NSh != other_NSh).any(-1)
    compared_NS = flipped_NS.long().cumsum(-1) == 0
    agreement, compared = float(same_NS.double().mean()), float(compared_NS.double().mean())
    largest = float(difference_NS[compared_NS].max()) if compared else float("inf")
    good = compared >= 0.5 and largest <= TOLERANCE * float(expected.logits.std())
    if not (good or approximate):
        raise MoesmithError(
            f"{folder} does not compute what the carving computes: the logits differ by up to "
            f"{float(difference_NS.max()):.3g}, {agreement:.0%} of next tokens agree",
            "Delete it if it is still there, and report it: a fault of moesmith or of the installed transformers.",
        )
    ours, theirs = expected.logits.log_softmax(-1), found.logits.log_softmax(-1)
    return {
        "logits_difference": largest,
        "logits_kl": max(0.0, float((ours.exp() * (ours - theirs)).sum(-1).mean())),
        "argmax_agreement": round(agreement, 4),
        "compared_tokens": int(compared_NS.sum()),
    }


def fits(model: PreTrainedModel) -> bool:
    """Whether an fp32 copy fits in the free memory of the model's device."""
    return fp32_fits(sum(p.numel() for p in model.parameters()), model.device)


def fp32_fits(parameters: int, device: torch.device) -> bool:
    """Whether so many parameters fit in a device's free memory in fp32."""
    return 1.2 * 4 * parameters < free_memory(device)


@dataclass
class Result:
    """What a model computes of token ids (N, S).

    Attributes:
        logits: (N, S, V) fp32, on the CPU.
        routed: expert ids of every layer that has several experts, (N·S, K).
        kept: dimensions of attention heads that each token keeps, where that depends on it, (N, S, h).
        biased: whether experts have biases.
    """

    logits: Tensor
    routed: list[Tensor]
    kept: list[Tensor] = field(default_factory=list)
    biased: bool = False

    @contextmanager
    def visit(self, _index: int, layer: nn.Module) -> Iterator[None]:
        """Collect while a layer works what our router or a stock architecture's chooses, and what heads keep."""
        self.biased |= any(getattr(block.experts, "bias_ED", None) is not None for block in moe_blocks(layer))
        routers = [m for m in layer.modules() if isinstance(m, Router) or type(m).__name__.endswith("TopKRouter")]
        with hooked((router, self._chosen) for router in routers):
            yield
        for gate in (m for m in layer.modules() if isinstance(m, HeadGate)):
            self.kept += [mask.bool().cpu() for mask in (gate.qk, gate.vo) if mask.dim() > 1]

    def _chosen(self, _router: nn.Module, _args: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        if out[0].shape[-1] > 1:  # a stock folder has an ordinary network instead of a single expert
            self.routed.append(out[2].cpu())


@torch.no_grad()
def run(model: Decoder, ids: Tensor) -> Result:
    """Compute a model's fp32 logits and routing for token ids (N, S), layer by layer if an fp32 copy does not fit."""
    if model.dtype != torch.float32:
        if isinstance(model, Layered) or not fits(model):
            model = cast(model, torch.float32)
        else:  # a copy: our own models share the parent's tensors
            model = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
    result = Result(torch.empty(0), [])
    (hidden_NSD,) = last_hidden(model, [ids], visit=result.visit)
    result.logits = head_of(model)(hidden_NSD).cpu()
    return result
