"""Score continuations after their contexts, as lm-evaluation-harness does, and LAMBADA's last words with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import meter
from moesmith.data.text import read_records, records_file
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import WINDOW, context_length, evaluating, logits_of, text_field
from moesmith.evaluation.writer import hidden, keeps_pairs, layers_of
from moesmith.parent.accelerator import halving
from moesmith.parent.vocabulary import refuse_ids, rows_of

LONG = 64  # tokens of a context that is worth sharing


class Likelihood(NamedTuple):
    """How likely a model finds a continuation after its context."""

    total: float  # log-probability of the whole continuation, nats
    greedy: bool  # every token of it is the most likely one
    truncated: int  # tokens cut off the left of the context because both were longer than the model's context


def _encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Turn context and continuation into token ids, split as lm-evaluation-harness splits them.

    Spaces at the end of a context move to the continuation, and both are tokenized together; the tokens after as many
    as the context alone has are the continuation. An empty context is replaced by bos (or eos).
    """
    moved = [(c.rstrip(), c[len(c.rstrip()) :] + continuation) for c, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    lengths = dict(zip(contexts, map(len, _ids(tokenizer, contexts)), strict=True))
    wholes = _ids(tokenizer, [context + continuation for context, continuation in moved])
    encoded = []
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        if context:
            before, after = whole[: lengths[context]], whole[lengths[context] :]
        else:
            after = tokenizer.encode(continuation, add_special_tokens=False)
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            before, after = ([first], after) if after[:1] != [first] else (after[:1], after[1:])
        if not before or not after or before == [None]:
            raise MoesmithError(
                f"The tokenizer leaves nothing to predict in {continuation!r} after {context[-40:]!r}",
                "Fix or remove the record.",
            )
        encoded.append((before, after))
    return encoded


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch: int = 8,
    *,
    label: str | None = None,
) -> list[Likelihood]:
    """Compute each continuation's log-likelihood after its context, token for token as lm-evaluation-harness does.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        pairs: (context, continuation) texts; the space between them belongs to the continuation.
        batch: sequences of 512 tokens per forward pass; more if they are shorter.
        label: show progress under this name.

    Raises:
        MoesmithError: a continuation has no token of its own, or more tokens than the model's context.
    """
    encoded = _encode(tokenizer, pairs)
    return token_likelihoods(model, encoded, context_length(model, tokenizer), batch, label=label)


def token_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    longest: int,
    batch: int = 8,
    *,
    label: str | None = None,
) -> list[Likelihood]:
    """Compute the same for (context, continuation) in token ids, each of one token at least.

    Pairs whose input is the same (all but the last token) share one row. Rows that share a long context, such as the
    choices of a question behind its examples, go through the model behind it, and a next context keeps what it has in
    common with the one before (the model's own key-value cache; a model whose layers keep something else reads each row
    whole). Logits are computed where a token is asked for alone.

    Args:
        model: a causal language model.
        pairs: token ids.
        longest: the model's context; longer pairs lose tokens on their left.
        batch: sequences of 512 tokens per forward pass; more if they are shorter.
        label: show progress under this name.

    Raises:
        MoesmithError: a continuation has more tokens than the model's context.
    """
    return halving(
        label or "log-likelihoods", model.device, batch, lambda n: _likelihoods(model, pairs, longest, n, label)
    )


Row = tuple[int, ...]
Asked = dict[Row, list[tuple[int, list[int]]]]  # what a model reads → the pairs it serves, each with its continuation


def _likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], longest: int, batch: int, label: str | None
) -> list[Likelihood]:
    known, cut = rows_of(model), list[int]()
    rows: Asked = {}
    contexts: dict[Row, Row] = {}  # of a row, all but the last token of its context
    for index, (before, after) in enumerate(pairs):
        if len(after) > longest:
            raise MoesmithError(
                f"A continuation of {len(after)} tokens is longer than the model's context of {longest}",
                "Remove the record.",
            )
        refuse_ids(torch.tensor(before + after), known, "a record")
        whole = (before + after)[-(longest + 1) :]
        cut.append(len(before) + len(after) - len(whole))
        row = tuple(whole[:-1])
        rows.setdefault(row, []).append((index, after))
        here = row[: len(row) - len(after)]
        contexts[row] = min(contexts.get(row, here), here, key=len)

    result: list[Likelihood] = [Likelihood(math.nan, False, 0)] * len(cut)
    shown = meter(label, len(rows), "prompts") if label else nullcontext()
    alone, families = _families(contexts) if keeps_pairs(model) else (list(contexts), {})
    with shown as bar, evaluating(model):

        def answer(inputs: Sequence[Row], skipped: int, hidden_BSD: Tensor) -> None:
            asked = [(row, index, after) for row, ids in enumerate(inputs) for index, after in rows[ids]]
            wanted_T3 = torch.tensor(
                [
                    (row, len(inputs[row]) - skipped - len(after) + k, token)
                    for row, _, after in asked
                    for k, token in enumerate(after)
                ]
            )
            row_T, position_T, target_T = wanted_T3.to(model.device).T
            log_T, greedy_T = _score(model, hidden_BSD[row_T, position_T], target_T)
            sizes = [len(after) for _, _, after in asked]
            for (_, index, _), log, greedy in zip(asked, log_T.split(sizes), greedy_T.split(sizes), strict=True):
                result[index] = Likelihood(float(log.double().sum()), bool(greedy.all()), cut[index])
            if bar is not None:
                bar.advance(len(inputs))

        for inputs in _batches(sorted(alone, key=len, reverse=True), batch * WINDOW):
            answer(inputs, 0, hidden(model, _padded(inputs)))
        context = Shared(model)
        for shared in sorted(families):
            context.become(shared)
            behind = sorted((row[len(shared) :] for row in families[shared]), key=len, reverse=True)
            for some in _batches(behind, batch * len(behind[0])):  # each row holds the context's keys and values
                answer([shared + row for row in some], len(shared), context.behind(_padded(some)))
    return result


def _families(contexts: dict[Row, Row]) -> tuple[list[Row], dict[Row, list[Row]]]:
    """Part rows that go alone from those that share a long context, by it."""
    found: dict[Row, list[Row]] = {}
    for row, context in contexts.items():
        found.setdefault(context, []).append(row)
    families = {context: rows for context, rows in found.items() if len(rows) > 1 and len(context) >= LONG}
    return [row for row, context in contexts.items() if context not in families], families


def _padded(inputs: Sequence[Row]) -> Tensor:
    """Stack rows, the longest first: padded on the right, which earlier tokens do not see."""
    ids_BS = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.int64)
    for row_S, ids in zip(ids_BS, inputs, strict=True):
        row_S[: len(ids)] = torch.tensor(ids)
    return ids_BS


class Shared:
    """A context that several rows share, as the model's keys and values of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, DynamicCache()
        self.ids: Row = ()

    def become(self, ids: Row) -> None:
        """Read another context, from where it differs from the one before."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))
        self.cache.crop(same - len(self.ids))
        if same < len(ids):
            hidden(self.model, torch.tensor([ids[same:]]), self.cache)
        self.ids = ids

    def behind(self, ids_BS: Tensor) -> Tensor:
        """Compute the final hidden states of rows behind the context, (B, S, D); the context stays as it is."""
        wide = [tuple(part.expand(len(ids_BS), -1, -1, -1) for part in pair) for pair in layers_of(self.cache)]
        return hidden(self.model, ids_BS, DynamicCache(wide))


def _score(model: PreTrainedModel, hidden_TD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each target's log-probability (T) and whether it is the most likely token (T), on the CPU."""
    log, greedy = [], []
    for part, logits_CV in logits_of(model, hidden_TD):
        target_C = target_T[part]
        log.append(-F.cross_entropy(logits_CV, target_C, reduction="none"))
        greedy.append(logits_CV.argmax(-1) == target_C)
    return torch.cat(log).cpu(), torch.cat(greedy).cpu()


def _batches(inputs: Sequence[Row], tokens: int) -> Iterator[Sequence[Row]]:
    """Split ``inputs``, longest first, into batches that fill at most ``tokens`` when padded to their first."""
    start = 0
    while start < len(inputs):
        stop = start + max(1, tokens // len(inputs[start]))
        yield inputs[start:stop]
        start = stop


def lambada_pairs(data: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """Read LAMBADA's passages, each with its last word; arguments and errors as :func:`lambada`."""
    path = records_file(data, "lambada.test")
    records = read_records(path)[:limit]
    return [
        (text_field(r, "context", path, n), " " + text_field(r, "target", path, n)) for n, r in enumerate(records, 1)
    ]


def lambada(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, limit: int | None = None, batch: int = 8
) -> dict[str, Any]:
    """Compute LAMBADA: perplexity of the last word, exp(−mean log-likelihood of whole words), and greedy accuracy.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        data: folder that holds ``lambada.test.jsonl`` with ``context`` and ``target``.
        limit: use only this many items, the first ones.
        batch: sequences of 512 tokens per forward pass.

    Returns:
        ``perplexity``, ``acc`` (as the harness task lambada_openai defines them) and ``items``.

    Raises:
        MoesmithError: the file is missing or malformed.
    """
    scores = log_likelihoods(model, tokenizer, lambada_pairs(data, limit), batch, label="lambada")
    mean = statistics.fmean(s.total for s in scores)
    return {
        "perplexity": float(torch.tensor(-mean, dtype=torch.float64).exp()),
        "acc": statistics.fmean(s.greedy for s in scores),
        "items": len(scores),
    }
