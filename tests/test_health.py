"""What answers are like: loops and ends told apart, and the same numbers from the command as from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesmith.evaluation.answers import Written, ends_of
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


@pytest.mark.parametrize(("own", "ends"), [(None, [1]), (1, [1]), (7, [7, 1]), ([9, 7], [9, 7, 1]), ([1, 9], [1, 9])])
def test_an_answer_ends_with_what_the_generation_config_or_the_tokenizer_says(own: Any, ends: list[int]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = own
    assert ends_of(model, tokenizer) == ends


def test_numbers_of_known_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, count = tiny_tokenizer(), sum(map(len, PROMPTS.values()))
    said = [Written([5, 6, 7], True)] * (count - 3)
    said += [Written([9] * 40, False), Written(list(range(10, 50)), False), Written([8] * 30, True)]

    def speaks(_model: Any, prompts: list[list[int]], done: Any, *, new: int, **_: Any) -> None:
        assert new == 40
        for index in range(len(prompts)):
            done(index, said.pop(0))

    monkeypatch.setattr("moesmith.evaluation.answers.write", speaks)
    found = health(tiny_model("llama"), tokenizer, new=40)
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
