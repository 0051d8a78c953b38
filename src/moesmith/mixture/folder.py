"""Load a finished model's folder as any user would: whole, or one layer at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json
from moesmith.native.modeling import MoesmithConfig
from moesmith.parent.checkpoint import checked, empty, first_line, quiet
from moesmith.parent.layerwise import Layered
from moesmith.parent.structure import decoder_layers, put

REMAKE = "Delete the folder and run the command that made it again (for a run, the same 'moesmith convert')."


def load_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a finished folder as any user would, in evaluation mode.

    Raises:
        MoesmithError: it is damaged, or lacks tensors.
    """
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers and safetensors each have their own error types
        raise MoesmithError(f"{folder} cannot be loaded: {first_line(error)}", REMAKE) from error
    return checked(loaded, str(folder)).eval()


def layered_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> Layered:
    """Load a finished folder one layer at a time, each by transformers' own loader as a model of one layer.

    Raises:
        MoesmithError: it is damaged, or lacks tensors; raised for a layer when that layer is read.
    """
    cure = "Delete it and run the same 'moesmith convert' again."
    try:
        config = AutoConfig.from_pretrained(folder)
        files = _layer_files(folder)
    except Exception as error:
        raise MoesmithError(f"{folder} cannot be loaded: {first_line(error)}", cure) from error
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def read(index: int, *, shell: bool) -> PreTrainedModel:
        try:
            # ordinary tensors in any mode of the caller: our own format keeps slices by their tensors' versions
            with quiet(), torch.inference_mode(False), torch.no_grad():
                tensors: dict[str, Tensor] = {}
                for part in (None, index) if shell else (index,):
                    for file, names in files[part].items():
                        with safe_open(folder / file, framework="pt") as opened:
                            tensors |= {inner: opened.get_tensor(name) for name, inner in names.items()}
                loaded, info = kind.from_pretrained(
                    None,
                    config=_one_layer(config, index, shell),
                    state_dict=tensors,
                    dtype=dtype,
                    output_loading_info=True,
                )
        except Exception as error:  # as in load_folder
            raise MoesmithError(f"{folder} cannot be loaded: {first_line(error)}", cure) from error
        if not shell:  # it also has an unused rest of a model, one token wide
            info = {what: [n for n in names if _place(str(n))[1] is not None] for what, names in info.items()}
        model: Any = checked((loaded, info), str(folder))
        return cast(PreTrainedModel, model.to(device).eval())

    # the model's own code calls as many layers, of as many kinds, as its config says: so it is built whole, and empty
    with torch.inference_mode(False):
        given, whole = read(0, shell=True), empty(config, dtype)
    place, _ = decoder_layers(whole)
    put(whole, place, nn.ModuleList())
    stored = given.state_dict().keys()
    for name, tensor in [*given.named_parameters(), *given.named_buffers()]:
        if name in stored and not name.startswith(f"{place}."):
            put(whole, name, tensor)
    whole.tie_weights()
    shell: Any = whole.eval()
    return Layered(
        shell.to(device), place, config.num_hidden_layers, lambda i: decoder_layers(read(i, shell=False))[1][0]
    )


def _place(name: str) -> tuple[str, int | None]:
    """Return a tensor's name as if it were in the first layer, and its layer's index, ``None`` outside the layers."""
    found = re.fullmatch(r"(.+?\.)(\d+)(\..+)", name)
    return (name, None) if found is None else (f"{found[1]}0{found[3]}", int(found[2]))


def _layer_files(folder: Path) -> dict[int | None, dict[str, dict[str, str]]]:
    """Map, by layer and file, each tensor's name to its name in a model of one layer."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = read_json(index)["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            where = dict.fromkeys(opened.keys(), "model.safetensors")
    found: dict[int | None, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, file in where.items():
        inner, layer = _place(name)
        found[layer][file][name] = inner
    return found


def _one_layer(config: Any, index: int, shell: bool) -> PreTrainedConfig:
    """Make the config of a model that has only layer ``index``; without the shell its vocabulary is one token."""
    fields: dict[str, Any] = {"num_hidden_layers": 1}
    if not shell:
        fields |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    old = config.to_dict()
    if isinstance(config, MoesmithConfig):
        inner = old["parent"]
        described = config.described()
        old |= {"layers": [described[index] | {"path": described[0]["path"]}]}
        if old.get("attention"):
            old["attention"] = [old["attention"][index] | {"path": old["attention"][0]["path"]}]
    else:
        inner = old
    if inner.get("mlp_only_layers"):  # Qwen-MoE's layers with an ordinary network
        fields["mlp_only_layers"] = [0] if index in inner["mlp_only_layers"] else []
    if inner.get("layer_types"):
        fields["layer_types"] = inner["layer_types"][index : index + 1]
    inner |= fields
    return type(config).from_dict(old)
