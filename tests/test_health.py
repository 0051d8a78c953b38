"""What answers are like: loops and ends told apart, and the same numbers from the command as from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesmith.evaluation.answers import Written
from moesmith.evaluation.compare import compare
from moesmith.evaluation.health import LEAST, PROMPTS, TIMES, answers, health, latin, loops
from moesmith.testing.parents import tiny_model
from moesmith.testing.tokenizer import tiny_tokenizer


def test_a_loop_is_an_end_that_repeats() -> None:
    assert loops([7] * LEAST)
    assert not loops([7] * (LEAST - 1))
    assert loops([1, 2, 3, *[4, 5, 6, 7, 8] * 5])
    assert not loops([*[4, 5, 6, 7, 8] * 9, 1])  # it left the loop
    assert not loops(list(range(300)))
    assert not loops([])
    assert not loops([*range(60), *range(60)])  # twice is no loop


@given(st.lists(st.integers(0, 9), min_size=1, max_size=64), st.lists(st.integers(0, 9), max_size=40))
def test_three_times_the_same_is_a_loop(period: list[int], before: list[int]) -> None:
    times = max(TIMES, -(-LEAST // len(period)))
    assert loops([*before, *period * times])


def test_letters() -> None:
    assert latin("Straße, 123!") == 1
    assert latin("Привет") == 0
    assert latin("ab вг") == 0.5
    assert latin("42") == 1


class Speaks:
    """A model that answers by a list: an answer ends where its list does."""

    def __init__(self, said: list[list[int]], end: int) -> None:
        self.inner, self.said, self.end = tiny_model("llama"), said, end
        self.device, self.generation_config = torch.device("cpu"), self.inner.generation_config
        self.training = False

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, ids: Any, **options: Any) -> Any:
        assert (options["attention_mask"].sum(1) > 0).all()
        assert (options["attention_mask"][:, -1] == 1).all()  # prompts end together
        rows = []
        for _ in ids:
            row = self.said.pop(0)[: options["max_new_tokens"]]
            rows.append((row + [self.end] * options["max_new_tokens"])[: options["max_new_tokens"]])
        return torch.cat([ids, torch.tensor(rows)], 1)


def test_numbers_of_known_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesmith.evaluation.answers.keeps_all", lambda _model: False)
    tokenizer, count = tiny_tokenizer(), sum(map(len, PROMPTS.values()))
    end = tokenizer.eos_token_id
    said = [[5, 6, 7]] * (count - 3) + [[9] * 40, list(range(10, 50)), [8] * 30]
    model: Any = Speaks([list(row) for row in said], end)
    found = health(model, tokenizer, new=40)
    assert found["ended"] == pytest.approx((count - 2) / count)
    assert found["loops"] == pytest.approx(1 / count)  # one that ended is no loop, whatever it said
    assert found["tokens"] == pytest.approx((3 * (count - 3) + 40 + 40 + 30) / count)


def test_a_model_answers_as_it_does_one_by_one() -> None:
    """Prompts of a batch are padded on the left: answers are those that each gets alone."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = answers(model, tokenizer, new=6)
    prompt = [{"role": "user", "content": PROMPTS["fact"][0]}]
    ids = tokenizer(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
                    add_special_tokens=False, return_tensors="pt")["input_ids"]  # fmt: skip
    alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    ended = tokenizer.eos_token_id in alone
    assert found[0] == Written(alone[: alone.index(tokenizer.eos_token_id)] if ended else alone, ended)


def test_the_command_shows_it(finished: Path) -> None:
    rows = {row["metric"]: row for row in compare(finished, tasks="health", dtype="fp32")["results"]}
    assert set(rows) == {"ended", "loops", "tokens", "latin"}
    assert all(0 <= rows[name][side] <= 1 for name in ("ended", "loops", "latin") for side in ("parent", "moe"))
