"""Many answers at the same time are those that transformers' ``generate`` writes one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Lfm2Config

from moesmith.errors import MoesmithError
from moesmith.evaluation import harness, writer
from moesmith.evaluation.answers import write_answers
from moesmith.evaluation.likelihoods import token_likelihoods
from moesmith.evaluation.writer import Written, keeps_pairs, write
from moesmith.export.native import write_native
from moesmith.mixture.folder import load_folder
from moesmith.mixture.moe import build
from moesmith.parent.load import Parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.masks import harvested
from moesmith.testing.parents import tiny_model, tiny_parent
from moesmith.testing.tokenizer import tiny_tokenizer

torch.set_num_threads(1)
DRAW = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(2, 300, (n,), generator=DRAW).tolist() for n in (3, 40, 1, 17, 5, 5, 60, 2, 9, 33, 4)]
MODELS: dict[str, Callable[[], Any]] = {
    **{family: partial(tiny_model, family) for family in ("llama", "qwen3", "phi")},
    "sliding window": partial(tiny_model, "mistral", sliding_window=16),
    "experts": lambda: build(tiny_parent("llama"), random_carving(tiny_parent("llama"))),
    "attention masked by token": lambda: build(tiny_parent("llama"), harvested(tiny_parent("llama"))),
}


def alone(model: Any, prompt: list[int], ends: list[int], new: int) -> Written:
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=new, **options)[0, len(prompt) :].tolist()
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return Written(ids if end is None else ids[:end], end is not None)


def ends_of(model: Any) -> list[int]:
    """Tokens that end some answers at different places."""
    answers = [alone(model, prompt, [1], 12).ids for prompt in PROMPTS]
    late = [ids[place] for place, ids in enumerate(answers[: len(PROMPTS) // 2 + 2], 3) if len(ids) > place]
    return sorted({1, *late})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_answers_are_those_of_each_prompt_alone(name: str, rows: int) -> None:
    model = MODELS[name]()
    ends, found, order = ends_of(model), dict[int, Written](), []

    def done(index: int, answer: Written) -> None:
        found[index] = answer
        order.append(index)

    write(model, PROMPTS, done, ends=ends, new=12, rows=rows)
    known = [alone(model, prompt, ends, 12) for prompt in PROMPTS]
    assert [found[index] for index in range(len(PROMPTS))] == known
    assert len(order) == len(PROMPTS)
    assert len({len(answer.ids) for answer in known}) > 3, "answers of different lengths"
    assert {answer.ended for answer in known} == {True, False}


def convolutions() -> Any:
    """A random LFM2: two of three layers keep the input of a convolution, and no keys and values."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
    config = Lfm2Config(vocab_size=300, pad_token_id=0, bos_token_id=0, eos_token_id=1, **sizes, **layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)  # else all answers are one token again and again
    return model


@pytest.mark.parametrize("mixture", [False, True])
def test_layers_that_keep_more_than_keys_and_values_write_too(mixture: bool, tmp_path: Path) -> None:
    model = convolutions()
    if mixture:
        parent = Parent.from_model(model, tiny_tokenizer())
        write_native(parent, random_carving(parent), tmp_path / "out")
        model = load_folder(tmp_path / "out", torch.float32)
    assert not keeps_pairs(model)
    found, begun = dict[int, Written](), list(range(2, 72))
    prompts = [*PROMPTS, begun + PROMPTS[0], begun + PROMPTS[1]]
    write(model, prompts, found.__setitem__, ends=[1], new=6, rows=4)
    assert [found[index] for index in range(len(prompts))] == [alone(model, prompt, [1], 6) for prompt in prompts]
    pairs = [(begun, [7, 8]), (begun, [9]), (begun, [10, 11, 12])]  # choices behind one long context
    for (before, after), one in zip(pairs, token_likelihoods(model, pairs, 512), strict=True):
        log_SV = model(torch.tensor([before + after])).logits[0].detach().log_softmax(-1)
        wanted = sum(float(log_SV[len(before) - 1 + place, token]) for place, token in enumerate(after))
        assert one.total == pytest.approx(wanted, rel=1e-4)


def test_a_model_without_a_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(writer, "DynamicCache", refuses_configs)
    with pytest.raises(MoesmithError, match=r"no cache for the layers of LlamaModel, so it cannot write here\. Leave"):
        write(model, PROMPTS, {}.__setitem__, ends=[1], new=6, rows=4)


def refuses_configs(*_: Any, config: Any = None) -> DynamicCache:
    """A cache of a transformers that does not know a kind of layer."""
    if config is not None:
        raise KeyError("layer_type")
    return DynamicCache()


@pytest.mark.parametrize("name", MODELS)
def test_what_all_prompts_begin_with_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found, read = MODELS[name](), dict[int, Written](), [0]
    given = torch.randint(2, 300, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [given + prompt for prompt in PROMPTS]
    known = [alone(model, prompt, [1], 8) for prompt in prompts]
    hidden = writer.hidden

    def counted(model: Any, ids_BS: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        read[0] += ids_BS.numel()
        return hidden(model, ids_BS, *rest, **options)

    monkeypatch.setattr(writer, "hidden", counted)
    write(model, prompts, found.__setitem__, ends=[1], new=8, rows=4)
    assert [found[index] for index in range(len(prompts))] == known
    assert writer.has_windows(model) == (name == "sliding window")
    once = 70 + 4 * (sum(map(len, PROMPTS)) + 8 * len(PROMPTS))
    assert (read[0] < once) == (name != "sliding window")  # where places count, every prompt is read whole
    assert writer.beginning(prompts) == given
    assert writer.beginning([*prompts, given[:50]]) == []
    assert writer.beginning([given, given[:40], given[:60]]) == given[:39]


def test_a_place_that_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps than batches that wait for their longest answer."""
    model, steps, held = tiny_model("llama"), [0], list[int]()
    ends, step = ends_of(model), writer.Board.step

    def counted(self: writer.Board, tokens: list[int]) -> torch.Tensor:
        steps[0] += 1
        held.append(self.mask_BN.shape[1])
        assert self.mask_BN[:, 0].any(), "no position that is none's"
        return step(self, tokens)

    monkeypatch.setattr(writer.Board, "step", counted)
    found: dict[int, Written] = {}
    write(model, PROMPTS * 3, found.__setitem__, ends=ends, new=12, rows=4)
    lengths = [len(found[index].ids) for index in range(len(found))]
    assert steps[0] < sum(max(lengths[start : start + 4]) for start in range(0, len(lengths), 4))
    assert max(held) < max(map(len, PROMPTS)) + 12
    assert len(found) == 3 * len(PROMPTS)
    assert [found[i] for i in range(len(PROMPTS))] == [found[i + len(PROMPTS)] for i in range(len(PROMPTS))]


def test_draws_depend_on_the_prompt_alone() -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"ends": [1], "new": 8, "temperature": 1.5}
    runs: list[dict[int, Written]] = [{}, {}, {}]
    write(model, PROMPTS, runs[0].__setitem__, rows=2, seed=5, **options)
    write(model, PROMPTS, runs[1].__setitem__, rows=7, seed=5, **options)
    write(model, PROMPTS, runs[2].__setitem__, rows=7, seed=6, **options)
    assert runs[0] == runs[1] != runs[2]
    parts = list(write_answers(model, [1], PROMPTS, 8, 1, 1.5, seed=5))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert [answer for part in parts for answer in part] == [runs[0][index] for index in range(len(PROMPTS))]


def test_it_stops_where_it_is_told() -> None:
    model, found = tiny_model("llama"), dict[int, Written]()
    write(model, PROMPTS, found.__setitem__, ends=[1], new=9, rows=3, stop=lambda ids: ids[-1] % 3 == 0)
    for index, prompt in enumerate(PROMPTS):
        whole = alone(model, prompt, [1], 9).ids
        end = next((place for place, token in enumerate(whole) if token % 3 == 0), None)
        assert found[index] == Written(whole if end is None else whole[: end + 1], end is not None or len(whole) < 9)


@pytest.mark.parametrize("until", [["\n"], ["e", "the fox"], []])
def test_the_harness_gets_what_its_own_model_writes(until: list[str]) -> None:
    hf = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    texts = [tokenizer.decode(prompt) for prompt in PROMPTS]

    def requests() -> list[Any]:
        given = [(text, {"until": list(until), "max_gen_toks": 10, "do_sample": False}) for text in texts]
        return [Instance("generate_until", {}, arguments, 0) for arguments in given]

    with harness.silenced():
        ours = harness.language_model(model, tokenizer, 4).generate_until(requests())
        theirs = hf.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=1)
        assert ours == theirs.generate_until(requests(), disable_tqdm=True)
    assert len(set(ours)) > 5
