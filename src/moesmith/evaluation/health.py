"""What a model's answers are like, whatever they say: do they end, do they loop, how long are they, in which letters?

Perplexity of given text does not show it: a carved model may read as its parent does and still never stop writing.
"""

from __future__ import annotations

import statistics
import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.console import meter
from moesmith.evaluation.answers import ends_of, write_answers
from moesmith.evaluation.prompt import asked_ids
from moesmith.evaluation.writer import Written
from moesmith.parent.vocabulary import rows_of

NEW = 256  # most tokens of an answer
BATCH = 8
TIMES, LEAST, LONGEST = 3, 24, 64  # a loop: an end of 24 tokens or more that repeats at most 64 of them three times
PROMPTS = {
    "fact": (
        "Which planet is closest to the sun?", "Who wrote the play Hamlet?", "What is the capital of Japan?",
        "How many legs does a spider have?",
    ),
    "explanation": (
        "Why is the sky blue?", "How does a bicycle stay upright?", "What does a compiler do?",
        "Explain in a few sentences what inflation is.",
    ),
    "code": (
        "Write a Python function that reverses a string.", "Write a Python function that counts the words of a text.",
        "How do I read a file line by line in Python?", "Write an SQL query that counts the rows of a table.",
    ),
    "sums": (
        "What is 17 + 25?", "A book costs 12 euros and a pen 3 euros. What do two books and a pen cost?",
        "What is half of 150?", "A train travels 60 kilometres in one hour. How far does it travel in 90 minutes?",
    ),
    "list": (
        "Name five vegetables.", "List three ways to save water at home.", "Give me four words that rhyme with light.",
        "Which steps does it take to boil an egg?",
    ),
    "writing": (
        "Write a short story about a lost key.", "Write a polite letter that declines an invitation.",
        "Describe a walk on a beach in winter.", "Write two lines of a poem about rain.",
    ),
}  # fmt: skip


def loops(ids: Sequence[int]) -> bool:
    """Whether a text ends in a loop: its last tokens repeat (:data:`TIMES`, :data:`LEAST`, :data:`LONGEST`)."""
    for period in range(1, LONGEST + 1):
        size = max(TIMES * period, LEAST)
        if len(ids) < size:
            return False
        end = ids[-size:]
        if all(a == b for a, b in zip(end, end[period:], strict=False)):
            return True
    return False


def latin(text: str) -> float:
    """Compute the share of a text's letters that are Latin; 1 if it has none."""
    letters = [c for c in text if c.isalpha()]
    return sum("LATIN" in unicodedata.name(c, "") for c in letters) / len(letters) if letters else 1.0


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: int = NEW) -> list[Written]:
    """Answer every prompt greedily, in the parent's chat template if it has one, with ``new`` tokens at most."""
    texts = [prompt for kind in PROMPTS.values() for prompt in kind]
    rows, templated = rows_of(model), bool(tokenizer.chat_template)
    asked = [asked_ids(tokenizer, [{"role": "user", "content": t}], rows, templated=templated) for t in texts]
    prompts = [ids_1S[0].tolist() for ids_1S in asked]
    found: list[Written] = []
    with meter("answers", len(prompts), "prompts") as bar:
        for part in write_answers(model, ends_of(model, tokenizer), prompts, new, BATCH, bar=bar):
            found += part
    return found


def health(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: int = NEW) -> dict[str, float]:
    """Measure what a model's answers are like.

    Args:
        model: the parent, or a mixture made of it.
        tokenizer: the parent's.
        new: most tokens of an answer.

    Returns:
        ``ended``: the share of answers that end by themselves; ``loops``: of those that end in a loop; ``tokens``: of
        an answer, mean; ``latin``: share of Latin letters, mean.
    """
    found = answers(model, tokenizer, new)
    return {
        "ended": statistics.fmean(one.ended for one in found),
        "loops": statistics.fmean(not one.ended and loops(one.ids) for one in found),
        "tokens": statistics.fmean(len(one.ids) for one in found),
        "latin": statistics.fmean(latin(str(tokenizer.decode(one.ids))) for one in found),
    }
