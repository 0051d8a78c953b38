"""The routing recorder against a brute-force recount, on stock models and on our own blocks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import UNTRAINED, convert
from hypothesis import given
from hypothesis import strategies as st
from recording import record_routing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel, Qwen2MoeConfig

from moesmith.errors import MoesmithError
from moesmith.evaluation.routing import SAMPLE_TOKENS, Recorder, Routing, Sample, pieces
from moesmith.export.stock.experts import router_scales
from moesmith.export.stock.write import write_stock
from moesmith.mixture.folder import load_folder
from moesmith.mixture.moe import build, decoder
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The routers of a stock model in layer order, by name."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]


def stock(kind: str) -> PreTrainedModel:
    """A tiny random stock MoE: 3 layers, 4 experts, top-2."""
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    if kind == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=4)
    else:
        config = Qwen2MoeConfig(
            **sizes, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, decoder_sparse_step=1
        )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.normal_(0, 1)
    return model


def blocks_by_domain() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "low": torch.randint(2, 90, (5, 16), generator=generator),
        "high": torch.randint(200, 300, (3, 16), generator=generator),
    }


def recount(model: PreTrainedModel, blocks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts (L, E) and mean entropies (L,) token by token from the routers' inputs, one sequence at a time."""
    routers = routers_of(model)
    inputs: dict[int, list[Tensor]] = {}
    handles = [
        router.register_forward_pre_hook(
            lambda _, args, at=at: inputs.setdefault(at, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for at, router in enumerate(routers)
    ]
    model.eval()
    with torch.no_grad():
        for block in blocks:
            model(input_ids=block[None])
    for handle in handles:
        handle.remove()
    counts, entropy = np.zeros((len(routers), 4), int), np.zeros(len(routers))
    for at, router in enumerate(routers):
        x_TD = torch.cat(inputs[at])
        for x_D in x_TD:
            logits = (router.weight @ x_D).tolist()
            for expert in sorted(range(4), key=lambda e: -logits[e])[:2]:
                counts[at, expert] += 1
            p = np.exp(logits) / np.exp(logits).sum()
            entropy[at] -= (p * np.log(p)).sum() / len(x_TD)
    return counts, entropy


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_recorder_counts_what_a_stock_model_chooses(kind: str) -> None:
    model, texts = stock(kind), blocks_by_domain()
    model.train()
    routing = record_routing(model, tiny_tokenizer(), texts, batch=2)
    assert model.training, "the recorder leaves the mode as it was"
    assert routing.domains == ("low", "high")
    assert routing.tokens_D.tolist() == [80, 48]
    for index, blocks in enumerate(texts.values()):
        counts, entropy = recount(model, blocks)
        assert routing.counts_DLE[index].tolist() == counts.tolist()
        np.testing.assert_allclose(routing.entropy_DL[index], entropy, rtol=1e-4)
    assert not any(router._forward_hooks for router in routers_of(model))


def test_recorder_reads_our_own_blocks_and_the_sample_agrees() -> None:
    parent = tiny_parent("llama")
    model = build(parent, random_carving(parent, experts=4, top_k=2), "sliced")
    texts = {"a": torch.randint(2, 300, (1, 20)), "b": torch.randint(2, 300, (2, 150))}
    routing = record_routing(model, parent.tokenizer, texts, batch=8)
    first, second = routing.samples
    assert first.ids_LTK.shape == (2, 20, 2)
    assert second.ids_LTK.shape == (2, SAMPLE_TOKENS, 2)
    # one block is the whole text of "a": its sample must add up to its counts
    for layer in range(2):
        assert np.bincount(first.ids_LTK[layer].ravel(), minlength=4).tolist() == routing.counts_DLE[0, layer].tolist()
    assert "".join(first.tokens) == parent.tokenizer.decode(texts["a"][0], clean_up_tokenization_spaces=False)


def test_a_stock_folder_of_sums_tells_the_entropy_of_its_carving(tmp_path: Path) -> None:
    """There logits are scaled down to 1e-4, so that chosen experts weigh the same: their own softmax is flat."""
    parent, texts = tiny_parent("llama"), blocks_by_domain()
    carving = random_carving(parent, experts=4, top_k=2, kept=16, mix="sum")
    write_stock(parent, carving, tmp_path / "out", torch.float32)
    wanted = record_routing(build(parent, carving, "sliced"), parent.tokenizer, texts)
    stored = load_folder(tmp_path / "out", torch.float32)
    found = record_routing(stored, parent.tokenizer, texts, scales=router_scales(parent, carving))
    assert wanted.entropy_L.max() < 0.9
    np.testing.assert_allclose(found.entropy_DL[:, 0], wanted.entropy_DL[:, 0], rtol=1e-5)
    # layer 0 may decide a near tie otherwise
    np.testing.assert_allclose(found.entropy_DL, wanted.entropy_DL, rtol=0.03)
    assert record_routing(stored, parent.tokenizer, texts).entropy_L.min() > 0.999


@pytest.mark.parametrize(("preset", "stock"), [("moefication", True), ("cmoe", False), ("dive-plus", True)])
def test_a_run_records_its_carvings_own_routing(preset: str, stock: bool, home: Path, tmp_path: Path) -> None:
    settings = UNTRAINED if preset == "dive-plus" else []
    run = convert(preset, home / "m", home / "d", tmp_path / "run", settings)
    parent, carving = run.parent("fp32"), run.carving()
    assert carving.is_native(parent) != stock
    found = Routing.load(run.path("evaluate") / "routing.npz")
    wanted = record_routing(decoder(parent, carving), parent.tokenizer, run.held_out)
    np.testing.assert_allclose(found.entropy_DL, wanted.entropy_DL, rtol=0.02)


def test_recorder_refuses_what_it_cannot_read() -> None:
    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(MoesmithError, match="no router"):
        record_routing(dense, tiny_tokenizer(), blocks_by_domain())
    dense.model.layers[0].mlp = Odd()
    with pytest.raises(MoesmithError, match="does not return"):
        record_routing(dense, tiny_tokenizer(), blocks_by_domain())
    assert not dense.model.layers[0].mlp.gate._forward_hooks


class Odd(nn.Module):
    """A sparse block whose gate returns logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) * self.gate(x).mean()


def test_routing_numbers_by_hand(tmp_path: Path) -> None:
    counts = np.array([[[8, 0, 0, 0], [2, 2, 2, 2]], [[0, 8, 0, 0], [5, 3, 0, 0]]])
    entropy = np.array([[0.0, np.log(4)], [0.0, 0.0]])
    sample = Sample("a", ["x", " <y>\x00", "数"], np.arange(12).reshape(2, 3, 2))
    routing = Routing(("a", "b"), counts, entropy, np.array([8, 8]), [sample])
    assert routing.load_LE.tolist() == [[0.5, 0.5, 0, 0], [7 / 16, 5 / 16, 2 / 16, 2 / 16]]
    assert routing.share().tolist() == [[10 / 16, 2 / 16, 2 / 16, 2 / 16], [5 / 16, 11 / 16, 0, 0]]
    assert routing.share(0).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    # 4 of a's 8 choices in layer 0 would have to move to be half and half; in layer 1 shares are 4, 4, 4, 4 of 16
    # beside 7, 5, 2, 2: 3 and 1 too few, 2 and 2 too many
    assert routing.parting_DL.tolist() == [[0.5, 4 / 16], [0.5, 4 / 16]]
    np.testing.assert_allclose(routing.entropy_L, [0, 0.5])
    np.testing.assert_allclose(routing.balance_L[0], 0.5)  # two of four equally: log 2 / log 4
    assert routing.dead(0.05) == [(0, 2, 0.0), (0, 3, 0.0)]
    assert len(routing.dead(0.51)) == 4  # 2/16 is half of the uniform share
    routing.save(tmp_path / "routing.npz")
    again = Routing.load(tmp_path / "routing.npz")
    assert again.domains == routing.domains
    assert np.array_equal(again.counts_DLE, counts)
    assert np.array_equal(again.entropy_DL, entropy)
    assert again.samples[0].tokens == sample.tokens
    assert np.array_equal(again.samples[0].ids_LTK, sample.ids_LTK)


def test_damaged_routing_is_named(tmp_path: Path) -> None:
    (tmp_path / "routing.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(MoesmithError, match=r"routing\.npz is not a routing record"):
        Routing.load(tmp_path / "routing.npz")


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_layers_may_differ_in_experts_and_in_how_many_they_choose() -> None:
    recorder, texts = Recorder(), [torch.zeros(2, 8, dtype=torch.int64)]
    recorder.begin(texts, 2)
    logits = {0: torch.randn(16, 3), 1: torch.randn(16, 5)}
    for index, top_k in ((0, 1), (1, 2)):
        ids_TK = logits[index].topk(top_k).indices
        recorder._take(recorder.seen.setdefault(index, []), torch.nn.Identity(), None, (logits[index], None, ids_TK))
    routing = recorder.result(tiny_tokenizer(), ["a"])
    assert routing.counts_DLE.shape == (1, 2, 5)
    assert routing.sizes_L.tolist() == [3, 5]
    assert routing.counts_DLE.sum((0, 2)).tolist() == [16, 32]
    assert (routing.counts_DLE[0, 0, 3:] == 0).all()
    assert (routing.samples[0].ids_LTK[0, :, 1] == -1).all()
    assert all(
        expert < 3 for layer, expert, _ in routing.dead(1.0) if layer == 0
    )  # those that are not there are not dead
    for index, count in ((0, 3), (1, 5)):
        p = logits[index].double().softmax(-1)
        entropy = float(-(p * p.log()).sum(-1).mean()) / math.log(count)
        assert routing.entropy_L[index] == pytest.approx(entropy, rel=1e-5)


def test_sizes_of_layers_are_kept(tmp_path: Path) -> None:
    counts = np.array([[[3, 1, 0], [1, 2, 1]]])
    routing = Routing(("a",), counts, np.ones((1, 2)), np.array([4]), sizes_L=np.array([2, 3]))
    routing.save(tmp_path / "routing.npz")
    assert Routing.load(tmp_path / "routing.npz").sizes_L.tolist() == [2, 3]
    assert Routing(("a",), counts, np.ones((1, 2)), np.array([4])).sizes_L.tolist() == [3, 3]
