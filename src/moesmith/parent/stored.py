"""Refuse what a parent's folder holds and its model does not read, from file headers alone, without weights.

transformers loads what a model has places for, and is silent about the rest: scales of weights that were stored in
eight bits, an adapter that was never merged, layers beyond the config's count. If any of it changes the function, the
parent would be another model than the one its maker published, so it is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moesmith.errors import MoesmithError
from moesmith.files.parse import parse_json

# tensors that older versions of transformers and other trainers store although they follow from the config
HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(masked_bias|position_ids)$|\.attn\.bias$")
PLAIN = ("F64", "F32", "F16", "BF16")  # dtypes, as safetensors names them, of weights that need no scales
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")  # a file of the same folder
DEEPEST = 2000  # layers; a config with more is damaged, and would take minutes to be built
WIDEST = 2**22  # channels
LARGEST = dict.fromkeys(("hidden_size", "vocab_size", "head_dim"), 2**24) | {"intermediate_size": WIDEST}  # likewise
LARGEST |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**24) | {"max_position_embeddings": 2**31}
LARGEST |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), DEEPEST)
AGAIN = "Fetch or save the model again."
UNQUANTISED = "Give the unquantised model that it was made from, or unpack it with moesmith dequantize."


def shown(names: Iterable[str]) -> str:
    """List the first three names, and how many more there are."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def refuse_adapter(folder: Path, source: str) -> None:
    """Refuse a folder with an adapter: alone it is not a model, and next to one transformers would add it silently.

    Raises:
        MoesmithError: there is an ``adapter_config.json``.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = parse_json(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise MoesmithError(
        f"{source} holds an adapter{f' of {base}' if base else ''} (adapter_config.json), not a whole model",
        "Give the folder that 'moesmith merge' makes of it and its base.",
    )


def refuse_config(config: dict[str, Any], source: str) -> None:
    """Refuse a config of quantised weights, with a size that no model has, or with a padding token without a row.

    Raises:
        MoesmithError: one of these.
    """
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        method = method or ("bitsandbytes" if "load_in_4bit" in str(quantised) else "unknown method")
        raise MoesmithError(f"The weights of {source} are quantised ({method})", UNQUANTISED)
    for name, most in LARGEST.items():
        value = config.get(name)
        if isinstance(value, int) and not 1 <= value <= most:
            what = f"the config of {source} has {name} {value!s:.40}, and a model has 1 to {most:,}"
            raise MoesmithError(what, "Fix config.json.")
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        raise MoesmithError(
            f"{source} pads with token {pad}, and its embedding has {rows:,} rows", "Set pad_token_id in config.json."
        )


def refuse_files(folder: Path, source: str) -> int:
    """Refuse a folder whose safetensors are missing, ambiguous, or of a dtype that means nothing without scales.

    Args:
        folder: the one with ``config.json``.
        source: what the user named.

    Returns:
        How many numbers the files hold.

    Raises:
        MoesmithError: one of these; the file or the tensor is named.
    """
    numbers = 0
    odd: dict[str, str] = {}
    owner: dict[str, str] = {}
    for file in shards(folder, source):
        for name, entry in _header(folder / file, source).items():
            if name in owner:
                raise MoesmithError(f"{source} has {name} twice, in {owner[name]} and in {file}", AGAIN)
            owner[name] = file
            numbers += math.prod(entry["shape"])
            if entry["dtype"] not in PLAIN and not HARMLESS.search(name):
                odd[name] = entry["dtype"]
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        raise MoesmithError(f"{source} stores weights as {kinds}: {shown(odd)}", UNQUANTISED)
    return numbers


def shards(folder: Path, source: str) -> list[str]:
    """List the safetensors files that make up the model, by name.

    Raises:
        MoesmithError: they are missing or ambiguous; ``source``, what the user named, is named.
    """
    there = sorted(path.name for path in folder.glob("model*.safetensors"))
    index = folder / INDEX
    if not index.is_file():
        if WHOLE in there:
            return [WHOLE]
        if pickled := [path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))]:
            raise MoesmithError(
                f"{source} has its weights in {shown(pickled)}, a format that can run code and is not read",
                "Save it as safetensors: load it with transformers' from_pretrained, then save_pretrained().",
            )
        if gguf := [path.name for path in sorted(folder.glob("*.gguf"))]:
            raise MoesmithError(f"{source} has no safetensors, but {gguf[0]}", f"Give {folder / gguf[0]} itself.")
        if there:
            raise MoesmithError(f"{source} has {shown(there)} and no {INDEX} that says what is in them", AGAIN)
        raise MoesmithError(f"{source} cannot be loaded: it has a config and no weights (*.safetensors)", AGAIN)
    try:
        files = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoesmithError(f"{source} cannot be loaded: its {INDEX} cannot be read", AGAIN) from error
    if odd := [str(name) for name in files if not (isinstance(name, str) and SHARD.fullmatch(name))]:
        what = f"{source} cannot be loaded: {INDEX} names {shown(odd)!r}, which is no safetensors file of the folder"
        raise MoesmithError(what, AGAIN)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise MoesmithError(f"{source} cannot be loaded: {INDEX} names {shown(missing)}, which is not there", AGAIN)
    if WHOLE in there and WHOLE not in files:
        raise MoesmithError(
            f"{source} has two sets of weights: {WHOLE}, and the files that {INDEX} names",
            "Delete the one that is not meant.",
        )
    return files


def _header(path: Path, source: str) -> dict[str, dict[str, Any]]:
    """Read a safetensors file's header: every tensor's name, with its dtype and shape."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size < path.stat().st_size:
                raise ValueError
            found: dict[str, dict[str, Any]] = parse_json(file.read(size))
        found.pop("__metadata__", None)
        for entry in found.values():
            if not isinstance(entry["dtype"], str) or min(map(int, entry["shape"]), default=0) < 0:
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise MoesmithError(f"{source} cannot be loaded: {path.name} is not a whole safetensors file", AGAIN) from error
    return found
