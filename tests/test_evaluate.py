"""Perplexity and continuation likelihoods against Hugging Face's own loss, and the files they are read from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

from moesmith.data.text import Domain
from moesmith.errors import MoesmithError
from moesmith.evaluation import likelihoods
from moesmith.evaluation import perplexity as evaluate
from moesmith.mixture.moe import build
from moesmith.testing.masks import harvested
from moesmith.testing.parents import tiny_model, tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer

torch.set_num_threads(1)
TOKENIZER = tiny_tokenizer()


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def blocks(n: int, window: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 290, (n, window), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "phi3"])
def test_perplexity_is_the_models_own_loss(family: str) -> None:
    model, windows = tiny_model(family), blocks(5, 40)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
    assert evaluate.perplexity(model, windows, batch=2) == pytest.approx(
        float(torch.stack(losses).mean().exp()), rel=1e-5
    )


def test_perplexity_of_a_stock_mixture_of_experts() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=1, **sizes)
    model, windows = MixtralForCausalLM(config).eval(), blocks(3, 24)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert evaluate.perplexity(model, windows, batch=2) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_token_nll_in_bf16_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model("llama", dtype=torch.bfloat16), blocks(4, 33)
    monkeypatch.setattr(evaluate, "CHUNK", 7)  # divides neither the windows nor the batch
    nll = evaluate.token_nll(model, windows, batch=3)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].float()
    wanted = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(4, 32)
    assert nll.dtype == torch.float32
    assert nll.shape == (4, 32)
    torch.testing.assert_close(nll, wanted, rtol=0, atol=0.06)  # bf16 logits up to 8: half a step is 0.016


def test_perplexity_leaves_the_model_as_it_was() -> None:
    model, windows = tiny_model("llama", attention_dropout=0.9), blocks(2, 16)
    quiet = evaluate.perplexity(model, windows)
    model.train()
    assert evaluate.perplexity(model, windows) == quiet
    assert model.training
    model(input_ids=windows, labels=windows).loss.backward()  # nothing was left in inference mode


def test_perplexity_of_a_uniform_model_is_the_vocabulary_and_may_be_infinite() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate.perplexity(model, blocks(2, 8)) == pytest.approx(model.config.vocab_size, rel=1e-6)
    with torch.no_grad():
        model.lm_head.weight[0] = 1e6 * torch.randn(32)
        model.lm_head.weight[1] = -model.lm_head.weight[0]
    assert evaluate.perplexity(model, 2 + blocks(2, 8)) == math.inf


@pytest.mark.parametrize("shape", [(0, 16), (3, 1)])
def test_no_window_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(MoesmithError, match="not one whole window"):
        evaluate.perplexity(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64))


def test_geometric_mean() -> None:
    assert evaluate.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert evaluate.geometric_mean(iter([1.0, math.inf])) == math.inf


def test_domain_perplexities() -> None:
    texts = {"fox": "The quick brown fox jumps over the lazy dog. ", "code": "def add(a, b):\n    return a + b\n"}
    domains = [
        Domain(name, calibration=({"id": "c", "text": text},), evaluation=({"id": "e", "text": text * 20},))
        for name, text in texts.items()
    ]
    model = tiny_model("llama")
    found = evaluate.domain_perplexities(model, TOKENIZER, domains, tokens=96, window=32)
    for domain in domains:
        windows = evaluate.evaluation_blocks(domain, TOKENIZER, 96, 32).blocks
        assert len(windows) == 3
        assert found[domain.name] == evaluate.perplexity(model, windows)
    assert found["fox"] != found["code"]


# ----------------------------------------------------------------------------- continuations


def by_hand(model: torch.nn.Module, before: list[int], after: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
    log = logits.log_softmax(-1)[torch.arange(len(after)), torch.tensor(after)].sum()
    return float(log), logits.argmax(-1).tolist() == after


def test_log_likelihoods_of_awkward_pairs() -> None:
    model = tiny_model("llama")
    pairs = [
        ("T", " quick"),  # a context of a single token
        ("", "The fox"),  # none: bos stands in
        ("The fox ", "jumps"),  # a space at its end belongs to the continuation
        ("The quick", " brown fox"),  # continuations that share a prefix
        ("The quick", " brown dog"),
        ("The quick", " brown"),
        ("def add(a,", " b"),
        ("def add(a,", " b"),  # twice the same
    ]
    found = likelihoods.log_likelihoods(model, TOKENIZER, pairs, batch=1)
    for (context, continuation), likelihood in zip(pairs, found, strict=True):
        before, whole = TOKENIZER.encode(context.rstrip()), TOKENIZER.encode(context + continuation)
        before, after = (before, whole[len(before) :]) if before else ([TOKENIZER.bos_token_id], whole)
        total, greedy = by_hand(model, before, after)
        assert likelihood.total == pytest.approx(total, abs=1e-4)
        assert likelihood.greedy == greedy
        assert likelihood.truncated == 0
    assert found[6] == found[7]


MODELS: dict[str, Callable[[], Any]] = {
    **{family: partial(tiny_model, family) for family in ("llama", "qwen3", "phi")},
    "sliding window": partial(tiny_model, "mistral", sliding_window=32),
    "attention masked by token": lambda: build(tiny_parent("llama"), harvested(tiny_parent("llama"))),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_share_a_context_read_it_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And say what they say alone; a context that begins as the one before is read from where it differs."""
    model, read = MODELS[name](), 0
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 300, (count,), generator=draw).tolist()

    examples = ids(80)
    contexts = [examples + ids(5), examples + ids(7), ids(90), ids(6)]
    pairs = [(context, ids(count)) for context in contexts for count in (3, 1, 4, 2)]
    pairs += [(contexts[0], [*pairs[0][1][:2], 7]), pairs[1]]  # the same input as another row, and twice the same

    def counted(model: Any, ids_BS: torch.Tensor, *cache: Any) -> torch.Tensor:
        nonlocal read
        read += ids_BS.numel()
        return hidden(model, ids_BS, *cache)

    hidden = likelihoods.hidden
    monkeypatch.setattr(likelihoods, "hidden", counted)
    found = likelihoods.token_likelihoods(model, pairs, 120)
    for (before, after), likelihood in zip(pairs, found, strict=True):
        total, greedy = by_hand(model, before, after)
        assert likelihood.total == pytest.approx(total, abs=1e-4)
        assert likelihood.greedy == greedy
    shared = 84 + 6 + 89 + 3 * 4 * 4 + 4 * 9
    assert read == shared


def test_greedy_is_recognised() -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # without layers, and with embeddings of one length, a token predicts itself
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding = model.get_input_embeddings().weight
        embedding.copy_(F.normalize(embedding, dim=-1))
    found = likelihoods.log_likelihoods(model, TOKENIZER, [("x", "xx"), ("x", "xy"), ("x", "yy")])
    assert [likelihood.greedy for likelihood in found] == [True, False, False]


def test_long_contexts_lose_their_left_and_are_counted() -> None:
    model = tiny_model("llama", max_position_embeddings=16)
    context = "def add(a, b):\n" * 6
    (found,) = likelihoods.log_likelihoods(model, TOKENIZER, [(context, " return a")])
    before = TOKENIZER.encode(context.rstrip())
    after = TOKENIZER.encode(context + " return a")[len(before) :]
    kept = (before + after)[-17:]
    assert found.truncated == len(before) + len(after) - 17
    assert found.total == pytest.approx(by_hand(model, kept[: -len(after)], after)[0], abs=1e-4)
    with pytest.raises(MoesmithError, match="longer than the model's context of 16"):
        likelihoods.log_likelihoods(model, TOKENIZER, [("a", " xyzzy" * 20)])


def test_a_continuation_without_tokens_is_refused() -> None:
    with pytest.raises(MoesmithError, match="nothing to predict"):
        likelihoods.log_likelihoods(tiny_model("llama"), TOKENIZER, [("The fox", "")])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 64))
def test_batches_hold_every_row_once_and_keep_to_their_size(lengths: list[int], tokens: int) -> None:
    rows = [tuple(range(n)) for n in sorted(lengths, reverse=True)]
    found = list(likelihoods._batches(rows, tokens))
    assert [row for batch in found for row in batch] == rows
    assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= tokens for batch in found)


# ----------------------------------------------------------------------------- files


def test_wikitext2_text_is_the_usual_loaders_rows_joined_by_blank_lines(tmp_path: Path) -> None:
    raw = " \n = Du Fu = \n \n A poet\u2028of Tang . \n \n \n = = Life = = \n"
    path = write(tmp_path / "wikitext2.test.jsonl", [{"text": raw[:20]}, {"text": raw[20:]}])
    rows = ["", " = Du Fu = \n", "", " A poet\u2028of Tang . \n", "", "", " = = Life = = \n"]
    assert evaluate.wikitext2_text(path) == "\n\n".join(rows)


def test_wikitext2_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "wikitext2.test.jsonl", [{"text": " = Fox = \n \n The quick brown fox jumps . \n" * 20}])
    model = tiny_model("llama", max_position_embeddings=64)
    found = evaluate.wikitext2(model, TOKENIZER, tmp_path, windows=(32, 64, 128))
    assert list(found) == [32, 64]
    assert "[128] are longer than the model's context of 64" in capsys.readouterr().err
    stream = torch.tensor(TOKENIZER.encode(evaluate.wikitext2_text(tmp_path / "wikitext2.test.jsonl")))
    whole = len(stream) // 64
    assert found[64] == pytest.approx(evaluate.perplexity(model, stream[: whole * 64].view(whole, 64)), rel=1e-6)
    limited = evaluate.wikitext2(model, TOKENIZER, tmp_path, windows=(32,), tokens=70)
    assert limited[32] == pytest.approx(evaluate.perplexity(model, stream[:64].view(2, 32)), rel=1e-6)


def test_lambada(tmp_path: Path) -> None:
    records = [{"context": "The quick brown", "target": "fox"}, {"context": "def add(a, b): return a +", "target": "b"}]
    write(tmp_path / "lambada.test.jsonl", records)
    model = tiny_model("llama")
    found = likelihoods.lambada(model, TOKENIZER, tmp_path)
    totals = []
    for record in records:
        before = TOKENIZER.encode(record["context"])
        totals.append(
            by_hand(model, before, TOKENIZER.encode(record["context"] + " " + record["target"])[len(before) :])
        )
    assert found["perplexity"] == pytest.approx(math.exp(-sum(t for t, _ in totals) / 2), rel=1e-4)
    assert found["acc"] == sum(g for _, g in totals) / 2
    assert found["items"] == 2
    assert likelihoods.lambada(model, TOKENIZER, tmp_path, limit=1)["items"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lambada.test.jsonl cannot be read"),
        ("", "lambada.test.jsonl is empty"),
        ('{"context": "a", "target": "b"}\n{"context": \n', "lambada.test.jsonl:2: "),
        ('{"text": "a"}\n', "record 1 has no text under 'context'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "lambada.test.jsonl").write_text(content)
    with pytest.raises(MoesmithError, match=message):
        likelihoods.lambada(tiny_model("llama"), TOKENIZER, tmp_path)
