"""What lies beside a GGUF file: a Modelfile for Ollama, and the lines that serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from refusals import refused

from moesmith.export.gguf import target
from moesmith.export.gguf.modelfile import commands, context_of, modelfile_of, write_modelfile
from moesmith.export.target import Source
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent


def source(**config: Any) -> Source:
    """A tiny mixture of a Llama."""
    parent = tiny_parent("llama", **config)
    return Source(parent, random_carving(parent), Path("run"), torch.zeros(1, 8, dtype=torch.long))


def lines(made: Source, file: Path) -> list[str]:
    write_modelfile(made, file)
    return modelfile_of(file).read_text(encoding="utf-8").splitlines()


def test_a_chat_model(tmp_path: Path) -> None:
    """Ollama reads the template in the file: none is written here."""
    found = lines(source(), tmp_path / "moe q8_0.gguf")
    assert found[1:] == ['FROM "./moe q8_0.gguf"', "PARAMETER num_ctx 512", 'PARAMETER stop "</s>"']
    assert found[0] == "# ollama create moe-q8_0 -f THIS_FILE && ollama run moe-q8_0"


def test_a_model_without_a_template(tmp_path: Path) -> None:
    made = source()
    made.parent.tokenizer.chat_template = None
    assert lines(made, tmp_path / "moe.gguf")[-1] == 'TEMPLATE "{{ .Prompt }}"'


def test_every_special_token_that_ends_a_text_stops(tmp_path: Path) -> None:
    made = source()
    made.parent.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", 'odd "one"']})
    made.parent.tokenizer.add_tokens(["plainly"])
    ids = made.parent.tokenizer.convert_tokens_to_ids(["<|im_end|>", "plainly", 'odd "one"', "a"])
    made.parent.model.generation_config.eos_token_id = ids  # type: ignore[union-attr]
    assert lines(made, tmp_path / "moe.gguf")[3:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "</s>"']


@pytest.mark.parametrize(("config", "context"), [
    ({"max_position_embeddings": 300}, 300), ({"max_position_embeddings": 131_072}, 4096),
])  # fmt: skip
def test_the_context_is_what_the_model_reads(config: dict[str, Any], context: int) -> None:
    made = source(**config)
    assert context_of(made) == context
    assert commands(made, Path("a b.gguf"))["llama_server"] == f"llama-server -m 'a b.gguf' -c {context}"


def test_the_name_of_a_file_is_no_instruction(tmp_path: Path) -> None:
    found = lines(source(), tmp_path / 'x"\nSYSTEM y.gguf')
    assert "\n".join(found).count('FROM """./x"\nSYSTEM y.gguf"""') == 1


def test_a_strangers_file_is_refused_before_work(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise AssertionError("it was written")

    monkeypatch.setattr(target.Gguf, "write", write)
    (tmp_path / "moe.Modelfile").write_text("FROM llama3.2\n")
    answer = moesmith("export", finished, "--to", "gguf", "--out", tmp_path / "moe.gguf")
    refused(answer, r"moe\.Modelfile exists and is not in a list of moesmith's")
    assert (tmp_path / "moe.Modelfile").read_text() == "FROM llama3.2\n"
