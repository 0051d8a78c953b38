"""Measure how well a model predicts text: perplexity of blocks, of domains and of WikiText-2.

The output head is applied to the hidden states of a few hundred tokens at a time, so that the logits
of a window (tokens × vocabulary in fp32) never exist as a whole. Everything runs in evaluation mode, without autograd,
in the model's own dtype; probabilities are taken in fp32 and summed in double precision.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import Meter, meter, say
from moesmith.data.text import Domain, Record, evaluation_blocks, read_records, records_file
from moesmith.errors import MoesmithError
from moesmith.parent.accelerator import halving
from moesmith.parent.head import head_of
from moesmith.parent.layerwise import Decoder, Layered, last_hidden
from moesmith.parent.vocabulary import refuse_ids, rows_of
from moesmith.world import crew

CHUNK, DEVICE_CHUNK = 64, 512  # tokens whose logits exist at once: on a CPU, and where starting a kernel costs more
WINDOW = 512  # a batch holds this many tokens per sequence it was asked for
WINDOWS = (512, 1024, 2048)  # WikiText-2 lengths of DIVE's published test script


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Inside the ``with``, put the model in evaluation mode without autograd; its own mode comes back afterwards."""
    if isinstance(model, Layered):  # its layers are made in evaluation mode
        model = model.shell
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def logits_of(model: Decoder, hidden_TD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield fp32 logits (≤ CHUNK, vocabulary) of the next token, chunk by chunk, each with the rows it belongs to."""
    head = head_of(model)
    chunk = CHUNK if hidden_TD.device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, len(hidden_TD), chunk):
        part = slice(start, start + chunk)
        yield part, head(hidden_TD[part])


def token_nll(
    model: Decoder, blocks: Tensor, batch: int = 8, *, label: str | None = None, bar: Meter | None = None
) -> Tensor:
    """Compute the negative log-likelihood, in nats, of every token given those before it in its window.

    Args:
        model: a causal language model.
        blocks: token ids (N, window), int64.
        batch: windows per forward pass.
        label: show progress under this name.
        bar: add the tokens to this progress bar instead.

    Returns:
        (N, window − 1) in fp32 on the CPU; the first token of a window is not predicted.

    Raises:
        MoesmithError: there is no window, or it is too short to predict anything.
    """
    shown = meter(label, blocks.numel()) if label else nullcontext(bar)
    with shown as progress:
        return token_nlls(model, [blocks], batch, bar=progress)[0]


class Listener(Protocol):
    """Watches the layers while text is read, such as ``evaluation.routing.Recorder``."""

    def begin(self, texts: Sequence[Tensor], batch: int) -> None:
        """Expect the texts from the first on, ``batch`` windows at a time; called again when they are read anew."""

    def visit(self, index: int, layer: nn.Module) -> AbstractContextManager[Any]:
        """Return what to enter around a layer's work (``layerwise.Visit``)."""


def token_nlls(
    model: Decoder,
    texts: Sequence[Tensor],
    batch: int = 8,
    *,
    bar: Meter | None = None,
    listener: Listener | None = None,
) -> list[Tensor]:
    """Compute :func:`token_nll` of several texts; a ``listener`` watches the layers in the same pass.

    Processes that work together share the windows out; with a listener each of them reads all.
    """

    def read(some: Sequence[Tensor]) -> list[Tensor]:
        return halving("perplexity", model.device, batch, lambda rows: _text_nlls(model, some, rows, bar, listener))

    team = crew()
    if team.size == 1 or listener is not None:
        return read(texts)
    nlls = [torch.zeros(len(blocks), blocks.shape[1] - 1) for blocks in texts]
    mine = [(nll, blocks) for nll, blocks in zip(nlls, texts, strict=True) if len(team.mine(blocks))]
    if mine:
        for (nll, _), found in zip(mine, read([team.mine(blocks) for _, blocks in mine]), strict=True):
            nll[team.rank :: team.size] = found
    team.add(*nlls)
    return nlls


def _text_nlls(
    model: Decoder, texts: Sequence[Tensor], batch: int, bar: Meter | None, listener: Listener | None
) -> list[Tensor]:
    """Compute :func:`token_nll` of several texts; run layer by layer, they go through a layer together."""
    if not all(len(blocks) and blocks.shape[1] > 1 for blocks in texts):
        raise MoesmithError("There is not one whole window of text to predict", "Give more text or a shorter window.")
    for blocks in texts:
        refuse_ids(blocks, rows_of(model.shell if isinstance(model, Layered) else model), "the text")
    nlls = [torch.empty(len(blocks), blocks.shape[1] - 1) for blocks in texts]
    batches = [rows for blocks in texts for rows in blocks.split(batch)]
    outs = [rows for nll in nlls for rows in nll.split(batch)]
    visit = None
    if listener is not None:
        listener.begin(texts, batch)
        visit = listener.visit
    with evaluating(model):
        hidden = last_hidden(model, batches, visit=visit, bar=bar)
        for rows_BS, out_BS, hidden_BSD in zip(batches, outs, hidden, strict=True):
            hidden_TD = hidden_BSD[:, :-1].flatten(0, 1)
            targets_T = rows_BS[:, 1:].flatten().to(hidden_TD.device)
            found = [
                F.cross_entropy(logits_CV, targets_T[part], reduction="none")
                for part, logits_CV in logits_of(model, hidden_TD)
            ]
            out_BS.copy_(torch.cat(found).view_as(out_BS))  # the batch's only wait for the device
    return nlls


def perplexity(model: Decoder, blocks: Tensor, batch: int = 8, *, label: str | None = None) -> float:
    """Compute exp of the mean negative log-likelihood over all predicted tokens of ``blocks`` (N, window).

    It is the mean over windows of each window's mean loss, as in DIVE's published test script; infinite where the
    exponential overflows. Raises as ``token_nll``.
    """
    return _exp_mean(token_nll(model, blocks, batch, label=label))


def _exp_mean(nll: Tensor) -> float:
    return float(nll.double().mean().exp())


def perplexities(
    model: Decoder,
    blocks: Mapping[str, Tensor],
    batch: int = 8,
    *,
    label: str = "perplexity",
    bar: Meter | None = None,
    listener: Listener | None = None,
) -> dict[str, float]:
    """Compute :func:`perplexity` of several named texts under one progress bar: a new one, or ``bar``.

    A ``listener`` watches the layers in the same pass.
    """
    shown = nullcontext(bar) if bar is not None else meter(label, sum(ids.numel() for ids in blocks.values()))
    with shown as progress:
        nlls = token_nlls(model, list(blocks.values()), batch, bar=progress, listener=listener)
    return {name: _exp_mean(nll) for name, nll in zip(blocks, nlls, strict=True)}


def geometric_mean(values: Iterable[float]) -> float:
    """Compute exp of the mean logarithm of positive numbers; the usual mean of perplexities."""
    return statistics.geometric_mean(values)


def domain_perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
    tokens: int,
    window: int,
    batch: int = 8,
) -> dict[str, float]:
    """Compute perplexity on at most ``tokens`` tokens of each domain's evaluation split, in windows of ``window``.

    Raises:
        MoesmithError: a domain has less evaluation text than one window.
    """
    blocks = {domain.name: evaluation_blocks(domain, tokenizer, tokens, window).blocks for domain in domains}
    return perplexities(model, blocks, batch)


def text_field(record: Record, name: str, path: Path, number: int) -> str:
    """Return the text that record ``number`` of a file has under a name.

    Raises:
        MoesmithError: there is none.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise MoesmithError(f"{path}: record {number} has no text under {name!r}", "Fix or remove the record.")
    return value


def wikitext2_text(path: Path) -> str:
    """Return the one string the literature tokenizes: the lines of the raw test file joined by blank lines.

    The records of ``path``, concatenated, are the raw file. The usual loader yields one row per line, with its line
    end unless the line is blank, and every published script joins those rows with ``"\\n\\n"``.
    """
    raw = "".join(text_field(r, "text", path, n) for n, r in enumerate(read_records(path), 1))
    lines = raw.split("\n")
    ends = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    return "\n\n".join(line if line.strip() else "" for line in ends)


def wikitext2(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    windows: Sequence[int] = WINDOWS,
    tokens: int | None = None,
    batch: int = 8,
) -> dict[int, float]:
    """Compute WikiText-2 perplexity by window length, as DIVE's published code does.

    The text is one stream of tokens, without special ones except those the tokenizer puts at its start; windows do not
    overlap, and the remainder is dropped.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        data: folder that holds ``wikitext2.test.jsonl``.
        windows: lengths to report; those longer than the model's context are left out, with a message.
        tokens: stop after this many tokens of the stream, for a quick look.
        batch: windows of 512 tokens per forward pass; fewer if they are longer.

    Raises:
        MoesmithError: the file is missing or malformed, or the text is shorter than a window.
    """
    longest = context_length(model, tokenizer)
    if beyond := [w for w in windows if w > longest]:
        say(f"wikitext2: windows {beyond} are longer than the model's context of {longest} tokens and were left out")
    stream = _wikitext2_stream(tokenizer, data, tokens)
    result = {}
    for window in (w for w in windows if w <= longest):
        rows = max(1, batch * WINDOW // window)
        result[window] = perplexity(model, _in_windows(stream, window), rows, label=f"wikitext2 at {window}")
    return result


def wikitext2_blocks(tokenizer: PreTrainedTokenizerBase, data: Path, window: int, tokens: int | None = None) -> Tensor:
    """Cut the text of :func:`wikitext2` into windows, (N, window)."""
    return _in_windows(_wikitext2_stream(tokenizer, data, tokens), window)


def _wikitext2_stream(tokenizer: PreTrainedTokenizerBase, data: Path, tokens: int | None) -> Tensor:
    text = wikitext2_text(records_file(data, "wikitext2.test"))
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens])


def _in_windows(stream: Tensor, window: int) -> Tensor:
    return stream[: len(stream) // window * window].view(-1, window)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that the model was made for (as its config says, else its tokenizer, else 2048)."""
    length = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(length) if length < 1e9 else 2048  # a tokenizer without a limit says 1e30
