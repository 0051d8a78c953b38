"""Turn records into token windows: DIVE's calibration sampler, and packing for evaluation and training."""

from __future__ import annotations

import itertools
import random
import statistics
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moesmith.arguments import ceil_div
from moesmith.data.encoding import encoded
from moesmith.data.records import Chat, Domain, Record, fields, whole
from moesmith.errors import MoesmithError


@dataclass(frozen=True)
class Packed:
    """Token windows cut from whole records, with an account of every token: ``N * window + dropped == tokens``.

    Attributes:
        blocks: (N, window) int64.
        records: records read.
        tokens: tokens of those records.
        dropped: tokens that filled no block: the last incomplete block, and what a record held beyond the limit.
        epochs: for training, how often each domain's calibration split was read (above 1: records were repeated).
    """

    blocks: Tensor
    records: int
    tokens: int
    dropped: int
    epochs: dict[str, float] = field(default_factory=dict)


def sample_windows(domain: Domain, tokenizer: PreTrainedTokenizerBase, tokens: int, window: int, seed: int) -> Tensor:
    """Draw ``tokens // window`` calibration windows as DIVE's published code draws them.

    In a domain of long texts, random records are drawn until one is longer than the window, and a random window of it
    is taken. In a domain of short texts, random records, each tokenised by itself (with its own BOS where the tokenizer
    adds one), are joined until they are longer than the window, and a random window is taken. Where records have
    several fields, one is drawn for the window and used for all its records. No EOS, no separators. A domain is long
    by its ``mode``, else when its median record is longer than the window.

    Args:
        domain: its calibration split is used.
        tokens: tokens wanted.
        window: tokens per window.
        seed: with the domain's name it decides everything; other domains have no influence.

    Returns:
        (N, window) int64 token ids.

    Raises:
        MoesmithError: fewer tokens are asked for, or are in the domain, than one window; a domain of mode "long" has no
            record longer than the window.
    """
    count = _whole_windows(tokens, window)
    source = _Fields(domain, tokenizer)
    source.must_hold(window)
    long = domain.mode == "long" or (not domain.mode and source.median() > window)
    rng = random.Random(f"{seed}:{domain.name}")
    rows = []
    for _ in range(count):
        which = rng.randrange(source.width)
        text = _long_text(source, which, window, rng) if long else _short_texts(source, which, window, rng)
        start = rng.randrange(len(text) - window + 1)
        rows.append(text[start : start + window])
    return torch.tensor(rows, dtype=torch.int64)


def packed_windows(domain: Domain, tokenizer: PreTrainedTokenizerBase, tokens: int, window: int, seed: int) -> Tensor:
    """Cut calibration windows from whole records in random order, none read twice: (N, window) int64 token ids.

    Args:
        domain: its calibration split is used.
        tokens: tokens wanted; a domain with fewer gives all that it has.
        window: tokens per window.
        seed: with the domain's name it decides the order.

    Raises:
        MoesmithError: fewer tokens asked for, or in the domain, than one window.
    """
    limit = _whole_windows(tokens, window) * window
    packed = pack(map(whole, _shuffled(domain, seed)), tokenizer, window, limit)
    if not len(packed.blocks):
        raise _too_few(domain.name, "calibration", packed.tokens, window)
    return packed.blocks


def must_hold(domain: Domain, tokenizer: PreTrainedTokenizerBase, calibration: int, evaluation: int) -> None:
    """Check that each split holds a window of so many tokens, reading only as many records as that takes.

    Raises:
        MoesmithError: it does not.
    """
    _Fields(domain, tokenizer).must_hold(calibration)
    total = 0
    for ids in encoded(map(whole, domain.evaluation), tokenizer, eos=True):
        total += len(ids)
        if total >= evaluation:
            return
    raise _too_few(domain.name, "evaluation", total, evaluation)


class _Fields:
    """The calibration fields of a domain, tokenised when first asked for."""

    def __init__(self, domain: Domain, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.records, self.tokenizer = domain.name, domain.calibration, tokenizer
        self.width = len(fields(domain.calibration[0])) if domain.calibration else 0
        self.known: dict[tuple[int, int], list[int]] = {}
        self.too_short: dict[int, set[int]] = {}  # field → records seen to be no longer than the window

    def __len__(self) -> int:
        return len(self.records)

    def ids(self, record: int, which: int) -> list[int]:
        key = (record, which)
        if key not in self.known:
            texts = fields(self.records[record])
            self.known[key] = next(encoded([texts[min(which, len(texts) - 1)]], self.tokenizer))
        return self.known[key]

    def must_hold(self, window: int) -> None:
        """Refuse a domain with fewer tokens than one window in any of its fields."""
        for which in range(self.width) or [0]:
            total = 0
            for record in range(len(self)):
                total += len(self.ids(record, which))
                if total >= window:
                    break
            else:
                raise _too_few(self.name, "calibration", total, window)

    def median(self) -> float:
        """Median tokens per record, over at most 200 records spread evenly; a record counts by its longest field."""
        some = range(0, len(self), ceil_div(len(self), 200))
        return statistics.median(max(len(self.ids(i, which)) for which in range(self.width)) for i in some)


def _long_text(source: _Fields, which: int, window: int, rng: random.Random) -> list[int]:
    short = source.too_short.setdefault(which, set())
    while len(short) < len(source):
        record = rng.randrange(len(source))
        if len(ids := source.ids(record, which)) > window:
            return ids
        short.add(record)
    raise MoesmithError(
        f"domain {source.name} has no calibration record longer than a window of {window} tokens",
        "Use shorter windows or mode: concat.",
    )


def _short_texts(source: _Fields, which: int, window: int, rng: random.Random) -> list[int]:
    ids: list[int] = []
    while len(ids) <= window:
        ids.extend(source.ids(rng.randrange(len(source)), which))
    return ids


def pack(
    texts: Iterable[str | Chat],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    limit: int | None = None,
    eos: bool = True,
) -> Packed:
    """Join texts into one stream of tokens and cut it into blocks.

    Args:
        texts: texts or chats, each tokenised by itself (``encoding``).
        window: tokens per block.
        limit: stop reading at this many tokens; the blocks hold at most this many.
        eos: end each text with the tokenizer's end-of-text token, if it has one.

    Returns:
        The blocks, possibly none of them, and the account of the tokens read.
    """
    return _cut(encoded(texts, tokenizer, eos), window, limit)


def evaluation_blocks(domain: Domain, tokenizer: PreTrainedTokenizerBase, tokens: int, window: int) -> Packed:
    """Cut blocks from the evaluation split, whole records in file order, at most ``tokens`` tokens.

    If the split holds more than that, the records are a fixed random choice from all of it (the same at every call),
    put in file order: files are often sorted, by language or subject, and their start does not represent the domain.

    Raises:
        MoesmithError: fewer tokens are asked for, or are in the split, than one window.
    """
    limit = _whole_windows(tokens, window) * window
    order = list(range(len(domain.evaluation)))
    random.Random(domain.name).shuffle(order)
    chosen: dict[int, list[int]] = {}
    total = 0
    sources = (whole(domain.evaluation[index]) for index in order)
    for index, ids in zip(order, encoded(sources, tokenizer, eos=True), strict=True):
        chosen[index] = ids
        total += len(ids)
        if total >= limit:
            break
    if total < window:
        raise _too_few(domain.name, "evaluation", total, window)
    return _cut((chosen[index] for index in sorted(chosen)), window, limit)


def training_blocks(
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    window: int,
    seed: int,
    calibrated: int | None = None,
    out: Tensor | None = None,
) -> Packed:
    """Mix the calibration splits evenly: as many blocks from each domain (to within one), shuffled.

    A block holds records of one domain. A domain with too little text is read again, in another order;
    ``Packed.epochs`` says how often each was read.

    Args:
        domains: their calibration splits are used.
        tokenizer: the parent's.
        tokens: tokens wanted.
        window: tokens per block.
        seed: with the domains' names it decides the order.
        calibrated: the seed of :func:`packed_windows`, where experts were fitted to its windows: records that it read
            last, or not at all, then come first. What experts were fitted to teaches them little more.
        out: where the blocks go, (tokens // window, window) of an integer type; a new tensor if left out.

    Raises:
        MoesmithError: there are fewer tokens than one window, or a domain has no token.
    """
    count = _whole_windows(tokens, window)
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    place = array("q", order)  # of every block, counted domain after domain
    for position, block in enumerate(order):
        place[block] = position
    if out is None:
        out = torch.empty(count, window, dtype=torch.int64)
    read, begun, epochs = [0, 0], 0, {}
    for position, domain in enumerate(domains):
        share = count // len(domains) + (position < count % len(domains))
        stream = _epochs(domain, tokenizer, random.Random(f"{seed}:{domain.name}"), calibrated)
        records, total = _fill(stream, out, place[begun : begun + share])
        read, begun = [read[0] + records, read[1] + total], begun + share
        epochs[domain.name] = records / len(domain.calibration)
    return Packed(out, read[0], read[1], read[1] - count * window, epochs)


def _fill(stream: Iterator[list[int]], out: Tensor, rows: Sequence[int]) -> tuple[int, int]:
    """Fill rows of ``out`` from texts, one after the other; return how many texts were read, and their tokens."""
    records = total = done = 0
    waiting: list[int] = []
    window = out.shape[1]
    while done < len(rows):
        ids = next(stream)
        records, total = records + 1, total + len(ids)
        waiting += ids
        full = min(len(waiting) // window, len(rows) - done)
        for block in range(full):
            out[rows[done + block]] = torch.tensor(waiting[block * window : (block + 1) * window], dtype=out.dtype)
        waiting, done = waiting[full * window :], done + full
    return records, total


class _Order(Sequence[Record]):
    """Records in another order, read when they are asked for."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records, self.order = records, array("q", range(len(records)))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        return self.records[self.order[index]]


def _shuffled(domain: Domain, seed: int) -> _Order:
    """Return the calibration records in the order of :func:`packed_windows`."""
    found = _Order(domain.calibration)
    random.Random(f"{seed}:{domain.name}").shuffle(found.order)
    return found


def _epochs(
    domain: Domain, tokenizer: PreTrainedTokenizerBase, rng: random.Random, calibrated: int | None
) -> Iterator[list[int]]:
    """Yield tokenised calibration records in random order, again and again."""
    records = _Order(domain.calibration)
    for epoch in itertools.count():
        if epoch == 0 and calibrated is not None:
            records = _shuffled(domain, calibrated)
            records.order.reverse()
        else:
            rng.shuffle(records.order)
        total = 0
        for ids in encoded(map(whole, records), tokenizer, eos=True):
            total += len(ids)
            yield ids
        if total == 0:
            raise _too_few(domain.name, "calibration", 0, 1)


def _cut(stream: Iterable[list[int]], window: int, limit: int | None) -> Packed:
    most = None if limit is None else limit // window * window
    tokens, records = array("q"), 0
    if most != 0:
        for ids in stream:
            tokens.extend(ids)
            records += 1
            if most is not None and len(tokens) >= most:
                break
    used = min(len(tokens) // window * window, len(tokens) if most is None else most)
    # A copy, since the buffer belongs to Python; frombuffer refuses an empty one.
    flat = (
        torch.frombuffer(tokens, dtype=torch.int64, count=used).clone() if used else torch.zeros(0, dtype=torch.int64)
    )
    return Packed(flat.view(-1, window), records, len(tokens), len(tokens) - used)


def _whole_windows(tokens: int, window: int) -> int:
    if tokens < window:
        raise MoesmithError(
            f"{tokens} tokens are fewer than one window of {window}", "Ask for more tokens or shorter windows."
        )
    return tokens // window


def _too_few(name: str, split: str, tokens: int, window: int) -> MoesmithError:
    return MoesmithError(
        f"domain {name} has {tokens} tokens in its {split} split, fewer than one window of {window}",
        "Add text, leave the domain out, or use shorter windows.",
    )
