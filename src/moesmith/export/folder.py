"""Write a model's folder: whole or not at all, weights in shards, with tokenizer and generation config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from moesmith.files.artefact import write_sums
from moesmith.files.outputs import new_folder
from moesmith.files.write import write_json, write_tensors
from moesmith.parent.checkpoint import first_line
from moesmith.parent.load import Parent
from moesmith.world import crew

SHARD_BYTES = 2**30  # a shard is in memory while it is written


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False, sums: bool = True) -> Iterator[Path]:
    """Yield a hidden folder to fill; at the end, list its files in ``SHA256SUMS`` and rename it to ``folder``.

    An error leaves ``folder`` as it was. Of several processes that make it together the first one creates, lists and
    renames it, and the others get its path.

    Args:
        folder: a new or empty folder, or with ``overwrite`` one that moesmith wrote and that is unchanged.
        overwrite: replace what moesmith wrote.
        sums: write the list; false for a folder of models that have their own lists.

    Raises:
        MoesmithError: ``folder`` is a file, holds something else, or cannot be written.
    """
    team = crew()
    if not team.first:
        yield Path(team.share(""))
        return
    with new_folder(folder, overwrite=overwrite) as work:
        work.mkdir()
        team.share(str(work))
        yield work
        if sums:
            write_sums(work)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int | None = None) -> int:
    """Write safetensors of at most ``shard_bytes`` each, with an index if there are several; return total tensor bytes.

    The default is :data:`SHARD_BYTES`; a tensor that is larger has a file of its own. Of several processes each writes
    every size-th shard, which takes much longer than to cut its tensors, so all cut all of them; the files are the same
    for any number of processes.
    """
    team = crew()
    shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if len(shards) % team.size == team.rank:
            write_tensors(folder / f"part-{len(shards)}", shard, {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    filled = 0
    with team.agreed():
        for name, tensor in tensors:
            if shard and filled + tensor.nbytes > shard_bytes:
                flush()
                filled = 0
            shard[name] = tensor
            filled += tensor.nbytes
            total += tensor.nbytes
        flush()
    if not team.first:
        return total
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
    """Write what a model needs besides weights: tokenizer, chat template, generation config."""
    try:
        parent.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library reports a full disk as a plain Exception
        raise OSError(0, f"the tokenizer cannot be saved: {first_line(error)}") from error
    if parent.model.generation_config is not None:  # as it is: its own save refuses fields of older models
        write_json(folder / "generation_config.json", parent.model.generation_config.to_diff_dict())
