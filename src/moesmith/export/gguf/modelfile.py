"""What goes beside a GGUF file: a Modelfile for Ollama, and the commands that serve it.

Ollama reads the chat template in the file itself, so none is translated here. A model without one gets a template that
passes the prompt on as it is: servers would else put one of their own around it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from moesmith.evaluation.answers import ends_of
from moesmith.export.target import Source
from moesmith.files.write import write_text
from moesmith.parent.load import Parent

CONTEXT = 4096  # tokens that are served, where the model reads as many: a longer context needs more memory
PLAIN = "{{ .Prompt }}"


def modelfile_of(file: Path) -> Path:
    """Return the path of the Modelfile beside a GGUF file."""
    return file.with_suffix(".Modelfile")


def write_modelfile(source: Source, file: Path) -> None:
    """Write the Modelfile beside a GGUF file: where it is, how much it reads, and what ends an answer."""
    name = _model_name(file)
    lines = [f"# ollama create {name} -f THIS_FILE && ollama run {name}", f"FROM {_quoted(f'./{file.name}')}"]
    lines.append(f"PARAMETER num_ctx {context_of(source)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops(source.parent)]
    if not source.parent.tokenizer.chat_template:
        lines.append(f"TEMPLATE {_quoted(PLAIN)}")
    write_text(modelfile_of(file), "\n".join(lines) + "\n")


def commands(source: Source, file: Path) -> dict[str, str]:
    """Return the lines that serve a GGUF file: ``ollama`` and ``llama_server``."""
    create = f"ollama create {_model_name(file)} -f {shlex.quote(str(modelfile_of(file)))}"
    return {"ollama": create, "llama_server": f"llama-server -m {shlex.quote(str(file))} -c {context_of(source)}"}


def context_of(source: Source) -> int:
    """Return how many tokens to serve, prompt and answer together."""
    return min(CONTEXT, source.context or source.parent.config.max_position_embeddings)


def stops(parent: Parent) -> list[str]:
    """List the special tokens that end an answer (``answers.ends_of``), as text."""
    ids, special = ends_of(parent.model, parent.tokenizer), parent.tokenizer.added_tokens_decoder
    names = [special[index].content for index in ids if index in special and special[index].special]
    return [name for name in names if not re.search(r'["\s]', name)]


def _model_name(file: Path) -> str:
    """Make a name that Ollama takes out of a file's."""
    return re.sub(r"[^a-z0-9_.-]+", "-", file.stem.lower()).strip("-.") or "moe"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
