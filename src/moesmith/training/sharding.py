"""A model whose layers no process holds whole: each of several keeps a part of every weight (FSDP2).

A layer's weights are brought together when it runs and let go after it; gradients come back as parts. Only embedding
and head stay whole, since the loss reads the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from moesmith.mixture.moe import moe_blocks
from moesmith.parent.layerwise import cast, share
from moesmith.parent.load import Parent
from moesmith.parent.structure import put
from moesmith.world import crew

Parameters = dict[str, nn.Parameter]


def spread(
    model: PreTrainedModel,
    parameters: Parameters,
    dtype: torch.dtype,
    device: torch.device,
    beside: nn.Module | None = None,
) -> tuple[PreTrainedModel, Parameters]:
    """Return the model with its layers' weights spread over all processes; the original stays as it is.

    Layers are brought to the device one after the other, so that none but the one at hand is ever there whole.

    Args:
        model: the same in every process; its weights may be mapped files.
        parameters: those of its parameters that are wanted, by any name.
        dtype: what it computes in.
        device: where.
        beside: what is trained beside the model and stays whole, though the model's modules hold it.

    Returns:
        The model, and what ``parameters`` have become in it.
    """
    size = crew().size
    mesh = init_device_mesh(device.type, (size,))

    def placed(weight: nn.Parameter) -> Shard | None:
        """Stacked experts are cut along another axis than that of the experts: there may be few of them."""
        even = (axis for axis in range(1, weight.dim()) if weight.shape[axis] % size == 0)
        axis = next(even, None) if weight.dim() == 3 else None
        return None if axis is None else Shard(axis)

    # parts are added up in fp32
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "shard_placement_fn": placed}
    whole = set() if beside is None else set(beside.parameters())
    names = {id(weight): name for name, weight in model.named_parameters()}
    inner = cast(model, dtype, device)
    layers = nn.ModuleList()
    for index in range(inner.depth):
        layer = share(inner.layer(index))
        for name, weight in list(layer.named_parameters()):
            if not weight.is_contiguous() and weight not in whole:  # GPT-2 stores a matrix the other way round
                put(layer, name, nn.Parameter(weight.detach().contiguous(), weight.requires_grad))
        fully_shard(layer, reshard_after_forward=True, ignored_params=whole, **options)
        layers.append(layer)
    found = inner.shell
    put(found, inner.place, layers)
    ends = (found.get_input_embeddings(), found.get_output_embeddings())
    whole |= {weight for end in ends for weight in end.parameters()}
    fully_shard(found.base_model, ignored_params=whole, **options)
    known = dict(found.named_parameters())
    return found, {name: known[names[id(weight)]] for name, weight in parameters.items()}


def student_and_teacher(
    parent: Parent, model: PreTrainedModel, beside: nn.Module
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a frozen model beside which something is trained, and its teacher, spread if the parent does not fit."""
    if not parent.layerwise:
        return model, parent.model
    place = parent.dtype, parent.device
    return spread(model, {}, *place, beside)[0], spread(parent.model, {}, *place)[0]


def gather(model: PreTrainedModel, parameters: Parameters) -> Parameters:
    """Make ``parameters`` and the routers of a spread model whole again, on the CPU; all processes must call it.

    The model does not compute any more after it.
    """
    ours = {id(weight) for weight in parameters.values()}
    ours |= {id(weight) for block in moe_blocks(model) for weight in block.router.parameters()}
    known: dict[int, nn.Parameter] = {}
    for name, weight in list(model.named_parameters()):
        if id(weight) in ours and isinstance(weight.data, DTensor):
            known[id(weight)] = nn.Parameter(weight.data.full_tensor().cpu(), requires_grad=False)
            put(model, name, known[id(weight)])
    return {name: known.get(id(weight), weight) for name, weight in parameters.items()}


def is_spread(weight: Tensor) -> bool:
    """Whether a process holds a part of this weight only."""
    return isinstance(weight, DTensor)


def part(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight or a gradient: its part, or all of one that is not spread."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def part_of(weight: Tensor, own: Tensor) -> Tensor:
    """Describe ``own`` as this process's part of a tensor that is spread like ``weight``."""
    if not isinstance(weight, DTensor):
        return own
    place = weight.device_mesh, weight.placements
    return DTensor.from_local(own, *place, run_check=False, shape=weight.shape, stride=weight.stride())


def cut(weight: Tensor, whole: Tensor) -> Tensor:
    """Cut this process's part out of a whole tensor, as ``weight`` is spread."""
    if not isinstance(weight, DTensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return placed.to_local()
