"""Fingerprints of what a run's results depend on besides the parent's weights: text, chats and companion files.

``digests.tokenizer_digest`` is older: runs of moesmith 0.1 hold it, so it is still compared. It reads one probe text,
so it misses some changes of a tokenizer, and every change of what is written next to the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from moesmith.data.records import Record, chat
from moesmith.files.seal import digest
from moesmith.parent.checkpoint import quiet
from moesmith.parent.digests import PROBE
from moesmith.parent.load import Parent

STATE = ("version", "truncation", "padding")  # in a tokenizer's file: left by the last call, no property of it


def text_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash (short sha256) all that turns text into token ids: vocabulary, merges, normaliser, end-of-text token."""
    return digest([_rules(tokenizer), tokenizer.eos_token_id])


def chat_digest(tokenizer: PreTrainedTokenizerBase, records: Iterable[Record]) -> str | None:
    """Hash (short sha256) the chat template if any of the records is a conversation, else return ``None``."""
    if any(chat(record) for record in records):
        return digest(tokenizer.chat_template)
    return None


def companions_digest(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> str:
    """Hash (short sha256) a finished folder besides weights and config: tokenizer, chat template, generation."""
    names = ("chat_template", "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    special = {name: (token, tokenizer.convert_tokens_to_ids(token)) for name, token in named.items()}
    facts = {name: getattr(tokenizer, name, None) for name in names}
    settings = {} if generation is None else generation.to_diff_dict()
    settings = {name: value for name, value in settings.items() if name[0] != "_" and name != "transformers_version"}
    return digest([_rules(tokenizer), special, facts, settings])


def parent_digests(parent: Parent, domains: Iterable[Any] = ()) -> dict[str, str]:
    """Compute a parent's fingerprints besides those of its weights, for a run's inputs; ``domains`` are the text."""
    found = {"text_digest": text_digest(parent.tokenizer)}
    found["companions_digest"] = companions_digest(parent.tokenizer, parent.model.generation_config)
    records = (record for domain in domains for split in (domain.calibration, domain.evaluation) for record in split)
    chats = chat_digest(parent.tokenizer, records)
    return found if chats is None else found | {"chat_digest": chats}


def folder_companions(folder: Path) -> str | None:
    """Compute :func:`companions_digest` of a finished folder; ``None`` if its files cannot be read."""
    try:
        with quiet():
            generates = (folder / "generation_config.json").is_file()
            generation = GenerationConfig.from_pretrained(folder) if generates else None
            return companions_digest(AutoTokenizer.from_pretrained(folder), generation)
    except Exception:  # transformers has many error types: what cannot be read is not what we look for
        return None


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return {name: part for name, part in json.loads(backend.to_str()).items() if name not in STATE}
    # a tokenizer written in Python: described by what it does
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return [vocabulary, tokenizer(PROBE)["input_ids"], str(tokenizer.init_kwargs.get("sp_model_kwargs"))]
