"""DIVE's calibration sampler, and packing: no token is lost without being counted."""

from __future__ import annotations

import hashlib
import logging
import random
from itertools import pairwise

import pytest
import torch
from golden import ASSETS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moesmith.data.sampling import packed_windows
from moesmith.data.text import Domain, as_text, evaluation_blocks, load_domains, pack, sample_windows, training_blocks
from moesmith.errors import MoesmithError
from moesmith.testing.tokenizer import tiny_tokenizer

BOS, EOS = 0, 1
PLAIN = tiny_tokenizer()


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with its BOS, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert tokenizer("a")["input_ids"][0] == BOS
    return tokenizer


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(str(rng.randrange(10**6)) for _ in range(count))


def domain(name: str = "d", calibration: int = 20, length: int = 4, evaluation: int = 20, mode: str = "") -> Domain:
    records = [{"text": words(length, seed)} for seed in range(calibration + evaluation)]
    return Domain(name, tuple(records[:calibration]), tuple(records[calibration:]), mode=mode)  # type: ignore[arg-type]


def ids(text: str, tokenizer: PreTrainedTokenizerFast = PLAIN) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def contains(whole: list[int], piece: list[int]) -> bool:
    return any(whole[i : i + len(piece)] == piece for i in range(len(whole) - len(piece) + 1))


# The sampler --------------------------------------------------------------------------------------------------------


def test_windows_have_the_asked_shape_and_depend_on_seed_and_name_only() -> None:
    source = domain()
    windows = sample_windows(source, PLAIN, 100, 16, seed=3)
    assert windows.shape == (6, 16)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, sample_windows(source, PLAIN, 100, 16, seed=3))
    assert not torch.equal(windows, sample_windows(source, PLAIN, 100, 16, seed=4))
    assert not torch.equal(windows, sample_windows(domain("e"), PLAIN, 100, 16, seed=3))


def test_a_long_domain_gives_contiguous_pieces_of_long_records() -> None:
    long = [{"text": words(40, seed)} for seed in range(5)]
    short = [{"text": f"short {seed}"} for seed in range(4)]
    source = Domain("long", tuple(short + long), ())
    records = [ids(as_text(record)) for record in long]
    rows = sample_windows(source, PLAIN, 40 * 30, 30, seed=0).tolist()
    assert all(any(contains(record, row) for record in records) for row in rows)
    assert all(any(contains(record, row) for row in rows) for record in records)  # none is favoured


def test_a_short_domain_appends_whole_records_each_with_its_bos() -> None:
    tokenizer = bos_tokenizer()
    source = domain(length=2)
    records = [ids(as_text(record), tokenizer) for record in source.calibration]
    bodies = [record[1:] for record in records]
    window = 3 * max(map(len, records))
    rows = sample_windows(source, tokenizer, 30 * window, window, seed=0).tolist()
    for row in rows:
        assert row.count(BOS) >= 2
        assert EOS not in row
        starts = [i for i, token in enumerate(row) if token == BOS]
        first, last = row[: starts[0]], row[starts[-1] + 1 :]
        middle = [row[a + 1 : b] for a, b in pairwise(starts)]
        assert all(piece in bodies for piece in middle)
        assert not first or any(body[-len(first) :] == first for body in bodies)
        assert any(body[: len(last)] == last for body in bodies)


def test_two_field_records_give_one_field_per_window() -> None:
    records = tuple({"premise": f"{i} aaaa" * 2, "hypothesis": f"{i} zzzz"} for i in range(30))
    a, z = ids(" aaaa")[-1], ids(" zzzz")[-1]
    rows = sample_windows(Domain("pairs", records, ()), PLAIN, 40 * 24, 24, seed=1).tolist()
    kinds = [(a in row, z in row) for row in rows]
    assert set(kinds) == {(True, False), (False, True)}
    assert 8 < kinds.count((True, False)) < 32


def test_the_mode_overrules_the_lengths() -> None:
    records = tuple([{"text": "q" * 50}] * 8 + [{"text": words(40, seed)} for seed in range(12)])
    q = ids("q")[0]
    for mode, short_records_used in (("", False), ("long", False), ("concat", True)):
        windows = sample_windows(Domain("mixed", records, (), mode=mode), PLAIN, 40 * 60, 60, seed=0)  # type: ignore[arg-type]
        assert bool((windows == q).any()) == short_records_used
    with pytest.raises(MoesmithError, match="no calibration record longer than a window of 64"):
        sample_windows(domain(mode="long"), PLAIN, 128, 64, seed=0)


def test_too_little_text_is_refused() -> None:
    few = domain(calibration=2, evaluation=1)
    with pytest.raises(MoesmithError, match=r"domain d has \d+ tokens in its calibration split, fewer than one window"):
        sample_windows(few, PLAIN, 1000, 500, seed=0)
    with pytest.raises(MoesmithError, match="in its evaluation split, fewer than one window of 500"):
        evaluation_blocks(few, PLAIN, 1000, 500)
    for call in (
        lambda: sample_windows(few, PLAIN, 7, 8, seed=0),
        lambda: evaluation_blocks(few, PLAIN, 7, 8),
        lambda: training_blocks([few], PLAIN, 7, 8, seed=0),
    ):
        with pytest.raises(MoesmithError, match="7 tokens are fewer than one window of 8"):
            call()
    with pytest.raises(MoesmithError, match="has 0 tokens in its calibration split"):
        sample_windows(Domain("none", (), ()), PLAIN, 16, 8, seed=0)


def test_a_split_of_exactly_one_window_is_enough() -> None:
    one = domain(calibration=1, evaluation=1)
    length = len(ids(as_text(one.calibration[0])))
    assert sample_windows(one, PLAIN, length, length, seed=0).shape == (1, length)
    length = len(ids(as_text(one.evaluation[0]))) + 1  # its EOS
    assert evaluation_blocks(one, PLAIN, length, length).blocks.shape == (1, length)


def test_records_beyond_the_models_context_raise_no_warning() -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 4
        sample_windows(domain(length=40), tokenizer, 32, 16, seed=0)
        pack(["a longer text than four tokens"], tokenizer, 8)
        assert heard == []
        tokenizer("a longer text than four tokens")  # without care it would have been heard
        assert len(heard) == 1
    finally:
        logger.removeHandler(handler)


# Packing ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(st.text(max_size=40), max_size=12),
    window=st.integers(1, 24),
    limit=st.none() | st.integers(0, 120),
    eos=st.booleans(),
)
def test_every_token_is_in_a_block_or_counted_as_dropped(
    texts: list[str], window: int, limit: int | None, eos: bool
) -> None:
    packed = pack(texts, PLAIN, window, limit, eos)
    read = [token for text in texts[: packed.records] for token in [*ids(text), *([EOS] if eos else [])]]
    flat = packed.blocks.flatten().tolist()
    assert packed.blocks.shape == (len(packed.blocks), window)
    assert packed.tokens == len(read) == len(flat) + packed.dropped
    assert flat == read[: len(flat)]
    if limit is None:
        assert packed.records == len(texts)
        assert packed.dropped < window
    else:
        assert len(flat) <= limit
        assert len(flat) == limit // window * window or packed.records == len(texts)


def test_an_end_token_that_is_there_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer()
    ended = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ended
    assert pack(["a", "b"], tokenizer, 1).blocks.flatten().tolist() == [*ids("a"), EOS, *ids("b"), EOS]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert EOS not in pack(["a", "b"], tokenizer, 1).blocks


def test_a_whole_evaluation_split_is_in_file_order() -> None:
    source = domain()
    packed = evaluation_blocks(source, PLAIN, 10**6, 8)
    assert torch.equal(packed.blocks, pack(map(as_text, source.evaluation), PLAIN, 8).blocks)
    assert packed.records == len(source.evaluation)


def test_part_of_a_split_comes_from_all_of_it_in_file_order() -> None:
    source = domain(evaluation=200)
    packed = evaluation_blocks(source, PLAIN, 400, 8)
    assert packed.blocks.numel() == 400
    assert torch.equal(packed.blocks, evaluation_blocks(source, PLAIN, 400, 8).blocks)
    text = PLAIN.decode(packed.blocks.flatten().tolist())
    positions = [i for i, record in enumerate(source.evaluation) if as_text(record) in text]
    found = [text.index(as_text(source.evaluation[i])) for i in positions]
    assert found == sorted(found)
    assert packed.records - 1 <= len(positions) <= packed.records < 100
    assert min(positions) < 50 < 150 < max(positions)


def test_training_mixes_evenly_repeats_where_needed_and_says_so() -> None:
    large, small = domain("large", calibration=300), domain("small", calibration=3)
    third = Domain("third", tuple({"text": "x" * 50} for _ in range(40)), ())
    packed = training_blocks([large, small, third], PLAIN, 16 * 31, 16, seed=5)
    assert packed.blocks.shape == (31, 16)
    assert packed.blocks.numel() + packed.dropped == packed.tokens
    assert packed.epochs["large"] < 1 < packed.epochs["small"]
    assert packed.records == sum(round(packed.epochs[d.name] * len(d.calibration)) for d in (large, small, third))
    x = set(ids("x" * 50)) | {EOS}
    of_third = [set(row) <= x for row in packed.blocks.tolist()]
    assert sum(of_third) == 10  # 31 blocks over 3 domains: 11, 10, 10
    assert of_third != sorted(of_third)  # shuffled
    again = training_blocks([large, small, third], PLAIN, 16 * 31, 16, seed=5)
    assert torch.equal(packed.blocks, again.blocks)
    assert not torch.equal(packed.blocks, training_blocks([large, small, third], PLAIN, 16 * 31, 16, seed=6).blocks)


def test_training_begins_with_what_was_not_calibrated() -> None:
    source = Domain("d", tuple({"text": chr(48 + n) * 12} for n in range(40)), ())
    calibrated = packed_windows(source, PLAIN, 13 * 20, 13, 7)  # a window is a record and its end
    packed = training_blocks([source], PLAIN, 13 * 20, 13, seed=7, calibrated=7)
    read = {tuple(row) for row in calibrated.tolist()}, {tuple(row) for row in packed.blocks.tolist()}
    assert len(read[0] | read[1]) == 40
    assert not read[0] & read[1]
    same = training_blocks([source], PLAIN, 13 * 20, 13, seed=7)  # the same seed alone reads the same records
    assert {tuple(row) for row in same.blocks.tolist()} == read[0]
    more = training_blocks([source], PLAIN, 13 * 60, 13, seed=7, calibrated=7)
    assert len({tuple(row) for row in more.blocks.tolist()}) == 40
    assert more.epochs == {"d": 1.5}


def test_a_repeated_domain_reads_every_record_once_per_epoch() -> None:
    source = domain(calibration=6)
    length = sum(len(ids(as_text(record))) + 1 for record in source.calibration)
    packed = training_blocks([source], PLAIN, 3 * length, length, seed=0)
    assert packed.epochs == {"d": 3.0}
    assert packed.dropped == 0
    expected = sorted(token for record in source.calibration for token in [*ids(as_text(record)), EOS])
    rows = packed.blocks.tolist()
    assert all(sorted(row) == expected for row in rows)
    assert rows[0] != rows[1]  # in another order


# of the same text as version 0.1 packed it, where it had these settings
PACKED = {
    (8192, 32, 3, None): "53678ac9e8e88458",
    (40000, 48, 5, 5): "dc5de371b7a09510",
    (500, 100, 1, 2): "3a483b2faff8e3dc",
}


@pytest.mark.parametrize("case", PACKED)
def test_blocks_are_those_of_before(case: tuple[int, int, int, int | None]) -> None:
    """Written into a tensor of one's own or a new one, of any integer type."""
    domains, tokenizer = load_domains(ASSETS / "text"), tiny_tokenizer()
    tokens, window, seed, calibrated = case
    packed = training_blocks(domains, tokenizer, *case)
    assert hashlib.sha256(packed.blocks.numpy().tobytes()).hexdigest()[:16] == PACKED[case]
    assert packed.blocks.numel() + packed.dropped == packed.tokens
    out = torch.zeros(tokens // window, window, dtype=torch.int32)
    assert training_blocks(domains, tokenizer, tokens, window, seed, calibrated, out=out).blocks is out
    assert torch.equal(out.long(), packed.blocks)
