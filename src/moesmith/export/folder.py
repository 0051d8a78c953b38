"""A model's folder on disk: whole or absent, weights in shards, tokenizer and generation config beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesmith.artefact import write_json, write_tensors
from moesmith.errors import MoesmithError
from moesmith.parents import Parent, checked, first_line, quiet

SHARD_BYTES = 4 * 2**30


def load_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A finished folder as anybody would load it, in evaluation mode.

    Raises:
        MoesmithError: it is damaged, or lacks tensors.
    """
    import moesmith.native.modeling  # noqa: F401  registers our own architecture; a stock folder needs nothing of it

    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers and safetensors each have their own error types
        raise MoesmithError(
            f"{folder} cannot be loaded: {first_line(error)}", "Delete it and run the same 'moesmith convert' again."
        ) from error
    return checked(loaded, str(folder)).eval()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, renamed to ``folder`` at the end; an error leaves ``folder`` as it was.

    Raises:
        MoesmithError: ``folder`` is a file, or holds files and no model.
    """
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise MoesmithError(f"{folder} exists and holds no model", "Give another folder, or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    except OSError as error:
        raise MoesmithError(
            f"cannot write {folder}: {error.strerror or error}", "Free disk space and run again."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int | None = None) -> int:
    """Write safetensors of at most ``shard_bytes`` each, with an index if there are several; total bytes of tensors.

    :data:`SHARD_BYTES` if not given; a tensor that is larger has a file of its own.
    """
    shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        write_tensors(folder / f"part-{len(shards)}", shard, {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    filled = 0
    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > shard_bytes:
            flush()
            filled = 0
        shard[name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return total
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return total


def write_companions(parent: Parent, folder: Path) -> None:
    """What a model needs besides weights: tokenizer, chat template, generation config."""
    parent.tokenizer.save_pretrained(folder)
    if parent.model.generation_config is not None:  # as it is: its own save refuses what older models carry
        write_json(folder / "generation_config.json", parent.model.generation_config.to_diff_dict())
