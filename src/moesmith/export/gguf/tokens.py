"""Check that llama.cpp makes a tokenizer's tokens: of text, of special tokens in it, of the start of a prompt."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

ODD = "It's 1234.5 °C; naïve — 🙂\n\n\tx += 1  y"
MARKS = 16  # special tokens in one text


def marked_texts(tokenizer: PreTrainedTokenizerBase, close: bool = False) -> list[str]:
    """Make texts with every special and every added token between words; unless ``close``, next to white space too."""
    marks = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
    pieces = [f"One{mark}two" + ("" if close else f" {mark}\n three {mark}  four ") for mark in marks]
    return ["".join(pieces[i : i + MARKS]) for i in range(0, len(pieces), MARKS)]


def differing_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], found: list[list[int]], add_special_tokens: bool = False
) -> str | None:
    """Say where llama.cpp first made other tokens of texts than a tokenizer does; ``None`` if nowhere."""
    for text, theirs in zip(texts, found, strict=True):
        ours = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            at = same.index(False) if False in same else len(same)
            near = tokenizer.decode(ours[max(0, at - 3) : at + 1])
            return f"tokens {theirs[at : at + 4]} and not {ours[at : at + 4]} at {near!r} in {text[:40]!r}"
    return None
