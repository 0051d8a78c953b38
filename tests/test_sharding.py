"""Models whose weights are spread over processes compute what they compute whole."""

from __future__ import annotations

import pytest
import torch
from several import several
from transformers import GPT2Config

from moesmith.mixture.moe import Form, build
from moesmith.parent.load import Parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer
from moesmith.training.sharding import is_spread, spread
from moesmith.world import together


def gpt2() -> Parent:
    """A parent that stores its matrices the other way round, so that ours are views."""
    from test_families import model_of

    sizes = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=len(tiny_tokenizer()), bos_token_id=0, eos_token_id=1, **sizes)
    return Parent.from_model(model_of(config), tiny_tokenizer(), "tiny-gpt2")


def compare(_rank: int, family: str, form: Form) -> None:
    torch.set_num_threads(1)
    parent = gpt2() if family == "gpt2" else tiny_parent(family)
    assert parent.ffns[0].gate_FD.is_contiguous() == (family != "gpt2")
    model, ids = build(parent, random_carving(parent), form), torch.arange(40).view(2, 20)
    with together(), torch.no_grad():
        parted, found = spread(model, dict(model.named_parameters()), torch.float32, torch.device("cpu"))
        assert sum(map(is_spread, found.values())) > 10
        torch.testing.assert_close(parted(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "form"), [("gpt2", "masked"), ("gpt2", "sliced"), ("llama", "masked")])
def test_two_processes_compute_what_one_does(family: str, form: str) -> None:
    several(2, compare, family, form)
