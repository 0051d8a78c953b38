"""Write a carving in moesmith's own format, with the code that runs it next to the weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moesmith.export.folder import whole_folder, write_companions, write_shards
from moesmith.export.target import Options, Source, Target
from moesmith.export.verify import verify_folder
from moesmith.mixture.attention import narrowed
from moesmith.mixture.carving import Carving
from moesmith.mixture.moe import besides, block, build
from moesmith.native.modeling import MoesmithConfig, MoesmithForCausalLM, MoesmithModel
from moesmith.parent.load import Parent
from moesmith.parent.mapped import give_back
from moesmith.parent.sizes import Sizes
from moesmith.parent.structure import attention_of, attention_weights, decoder_layers
from moesmith.world import crew

CODE = ("modeling", "experts", "gate", "heads")  # files of moesmith.native that are shipped with the weights


class Native(Target):
    """``--to native``: moesmith's own format holds every carving as it is."""

    name, takes, suffix = "native", frozenset({"shard_bytes"}), ""

    def explain(self, source: Source) -> str | None:
        """Return ``None``: it always fits."""
        return None

    def lost(self, source: Source, options: Options | None) -> list[str]:
        """Return nothing: nothing is lost."""
        return []

    def write(self, source: Source, out: Path, options: Options) -> dict[str, Any]:
        """Write the folder; see :func:`write_native`."""
        return write_native(source.parent, source.carving, out, options.shard_bytes)

    def verify(self, source: Source, out: Path, ids: Tensor) -> dict[str, Any]:
        """Compare logits in transformers, with the code of this package, the same as next to the weights."""
        return verify_folder(source.parent, out, build(source.parent, source.carving, "sliced"), ids)


def write_native(
    parent: Parent, carving: Carving, folder: Path, shard_bytes: int | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write ``folder`` in moesmith's own format, in the parent's dtype, whole or not at all.

    ``from_pretrained`` gives back ``moe.build(parent, carving, "sliced")`` to the last bit, except for attention, which
    is narrower here where it is masked there. Weights are made and written one shard at a time, of at most
    ``shard_bytes`` (default :data:`folder.SHARD_BYTES`). With ``overwrite`` a model that moesmith wrote is replaced.

    Returns:
        ``architecture``, ``expert_width`` (channels of the widest expert), ``zero_channels`` (share of channels on disk
        that is padding) and ``bytes``.

    Raises:
        MoesmithError: ``folder`` holds something (:func:`folder.whole_folder`), or cannot be written.
    """
    config = MoesmithConfig(
        parent=parent.config.to_dict() | {"dtype": None},
        layers=[_described(parent, carving, i) for i in range(parent.L)],
        attention=[_shape(parent, carving, i) for i in range(parent.L)] if carving.attention else None,
        activation=parent.ffns[0].activation_name,
        gated=parent.ffns[0].up_FD is not None,
        has_gate_bias=parent.ffns[0].gate_bias_F is not None,
        architectures=[MoesmithForCausalLM.__name__],
        dtype=parent.model.dtype,
    )
    classes = {"AutoConfig": MoesmithConfig, "AutoModel": MoesmithModel, "AutoModelForCausalLM": MoesmithForCausalLM}
    config.auto_map = {name: f"modeling.{known.__name__}" for name, known in classes.items()}
    with whole_folder(folder, overwrite=overwrite) as work:
        size = write_shards(work, named_tensors(parent, carving), shard_bytes)
        if crew().first:
            config.save_pretrained(work)
            for name in CODE:
                shutil.copyfile(str(files("moesmith") / "native" / f"{name}.py"), work / f"{name}.py")
            write_companions(parent, work)
    kept = sum(sum(layer.widths) for layer in carving.layers)
    stored = sum(max(layer.widths) * len(layer.routed) for layer in carving.layers)
    return {
        "architecture": MoesmithForCausalLM.__name__,
        "expert_width": max(max(layer.widths) for layer in carving.layers),
        "zero_channels": 0.0 if carving.subsets else round(1 - kept / stored, 4),
        "bytes": size,
    }


def _described(parent: Parent, carving: Carving, index: int) -> dict[str, Any]:
    """Describe one layer as in ``MoesmithConfig.layers``."""
    layer, ffn = carving.layers[index], parent.ffns[index]
    shared = layer.shared
    return {
        "path": ffn.path,
        "gate": layer.gate(ffn).model_dump(),
        "width": max(layer.widths),
        "union": int(carving.mask(index).any(0).sum()) if carving.subsets else None,
        "bias": carving.expert_biases(parent, index, 0)[2] is not None,
        "shared": 0 if shared is None else shared.width,
        "shared_bias": shared is not None and carving.expert_biases(parent, index, shared)[2] is not None,
    }


def named_tensors(parent: Parent, carving: Carving) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the folder, in the parent's dtype, by its name on disk.

    That is ``inner.`` before its name in the parent's architecture with our blocks.
    """
    layers = decoder_layers(parent.model)[1]
    paths = {id(module): name for name, module in parent.model.named_modules()}
    replaced = [f"{ffn.path}." for ffn in parent.ffns]
    if carving.attention:
        replaced += [f"{paths[id(attention_of(layer))]}." for layer in layers]
    for name, p in parent.model.named_parameters():
        if not name.startswith(tuple(replaced)):
            yield f"inner.{name}", carving.norms.get(name, p.detach()).to(p.dtype)
    for index, ffn in enumerate(parent.ffns):
        found = _union(parent, carving, index) if carving.subsets else _stack(parent, carving, index)
        yield from ((f"inner.{ffn.path}.{name}", tensor) for name, tensor in found)
        if parent.layerwise:
            give_back()
    for index, layer in enumerate(layers if carving.attention else ()):
        path = paths[id(attention_of(layer))]
        found = _attention(parent, carving, index, path)
        yield from ((f"inner.{path}.{name}", tensor) for name, tensor in found)


def _stack(parent: Parent, carving: Carving, index: int) -> Iterator[tuple[str, Tensor]]:
    for name, p in block(parent, carving, index).named_parameters():
        if name != "router.noise":  # it belongs to router training and stays in the carving
            yield name, p.detach()


def _union(parent: Parent, carving: Carving, index: int) -> Iterator[tuple[str, Tensor]]:
    ffn, carved = parent.ffns[index], carving.layers[index]
    dtype = ffn.gate_FD.dtype
    union = carving.mask(index).any(0).nonzero()[:, 0]
    for name, p in nn.ModuleDict(besides(parent, carving, index)).named_parameters():
        if name != "router.noise":
            yield name, p.detach()
    yield "experts.gate_UD", ffn.gate_FD[union.to(ffn.gate_FD.device)]
    if ffn.up_FD is not None:
        yield "experts.up_UD", ffn.up_FD[union.to(ffn.up_FD.device)]
    yield "experts.down_DU", ffn.down_DF[:, union.to(ffn.down_DF.device)]
    for name, bias_F in zip(("gate", "up"), ffn.biases, strict=False):
        if bias_F is not None:
            yield f"experts.{name}_bias_U", bias_F[union.to(bias_F.device)]
    biases = [carving.expert_biases(parent, index, e)[2] for e in range(len(carved.routed))]
    if biases[0] is not None:
        yield "experts.bias_ED", torch.stack([b for b in biases if b is not None]).to(dtype)
    places = [torch.searchsorted(union, expert.channels).to(torch.int32) for expert in carved.routed]
    yield "experts.index_EF", pad_sequence(places, batch_first=True, padding_value=-1)


def _shape(parent: Parent, carving: Carving, index: int) -> dict[str, Any]:
    """Return what ``native.heads.PrunedAttention`` is built from."""
    layer, carved = decoder_layers(parent.model)[1][index], carving.attention[index]
    weights = attention_weights(layer, parent.config)
    h, W = len(carved.qk_h), Sizes.of(parent).static
    return {
        "path": next(name for name, module in parent.model.named_modules() if module is attention_of(layer)),
        "qk": int(carved.qk_h.sum()),
        "vo": int(carved.vo_h.sum()),
        "pairs": int(carved.qk_h[: h - W].sum()),
        "biases": [name[0] for name in weights if name.endswith("_proj.bias")],
        "norms": "q_norm.weight" in weights,
        "gate": {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in carved.tensors().items()},
    }


def _attention(parent: Parent, carving: Carving, index: int, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield one layer's projections without the dropped dimensions, and its gate."""
    layer, carved = decoder_layers(parent.model)[1][index], carving.attention[index]
    for name, tensor in attention_weights(layer, parent.config).items():
        if "norm" in name:
            trained = carving.norms.get(f"{path}.{name}", tensor)
            yield name.removesuffix(".weight"), trained[carved.qk_h.to(trained.device)].to(tensor.dtype)
        elif name == "o_proj.bias":
            yield name, tensor
        else:
            yield name, narrowed(name, tensor, carved)
    yield from ((f"head_gate.{name}", tensor) for name, tensor in carved.tensors().items())
