"""Run a decoder with one layer in memory at a time, while the batches' hidden states wait between layers.

A :class:`Layered` decoder makes each layer when its turn comes. :func:`last_hidden` runs it, or an ordinary model, over
batches of token ids. The model's own code embeds, masks, rotates and normalises: it runs once per batch up to the first
layer and once from after the last. Every layer sees every batch as in an ordinary forward pass, so the result is the
same to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.console import Meter
from moesmith.parent.hooks import hidden_output
from moesmith.parent.mapped import give_back
from moesmith.parent.structure import decoder_layers, put

HELD = 2**28  # most bytes of hidden states that wait between two layers
Module = TypeVar("Module", bound=nn.Module)
# maps a layer's index and the layer to a context manager for the time it runs, such as one that holds hooks on it
Visit = Callable[[int, nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Layered:
    """A decoder whose layers exist only while they run.

    Attributes:
        shell: the model without its layers: embedding, positions, final norm, output matrix.
        place: where in it the list of layers belongs, e.g. ``model.layers``.
        depth: how many layers there are.
        layer: makes the layer of an index, in evaluation mode, on the shell's device and in its dtype.
    """

    shell: PreTrainedModel
    place: str
    depth: int
    layer: Callable[[int], nn.Module]

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.shell.config

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.shell.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.shell.dtype

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        return self.shell.get_output_embeddings()


Decoder = PreTrainedModel | Layered


class Beside(nn.Module):
    """A module that is trained beside a frozen model, whose modules ask it: copies of the model ask the same one."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Beside:
        return self


def share(module: Module, change: Callable[[Tensor], Tensor] | None = None) -> Module:
    """Copy a module tree that shares the original's parameters and buffers; ``change`` replaces each parameter."""
    known: dict[int, Any] = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    if change is not None:
        for parameter in module.parameters():  # one that is used in two places is changed once
            known[id(parameter)] = nn.Parameter(change(parameter.detach()), requires_grad=False)
    return copy.deepcopy(module, known)


def layered(model: PreTrainedModel, layer: Callable[[int], nn.Module] | None = None) -> Layered:
    """Wrap ``model`` to run layer by layer; ``layer`` makes other layers. Weights are shared, ``model`` stays as is."""
    place, layers = decoder_layers(model)
    shell = share(model)
    put(shell, place, nn.ModuleList())
    return Layered(shell, place, len(layers), layer or (lambda index: layers[index]))


def cast(model: Decoder, dtype: torch.dtype, device: torch.device | None = None) -> Layered:
    """Return the decoder in another dtype or on another device, one layer at a time; the original stays as it is."""
    inner = model if isinstance(model, Layered) else layered(model)
    place = inner.device if device is None else device
    if (inner.dtype, inner.device) == (dtype, place):
        return inner
    shell = _brought(inner.shell, dtype, place)
    return Layered(shell, inner.place, inner.depth, lambda index: _brought(inner.layer(index), dtype, place))


def _brought(module: Module, dtype: torch.dtype, device: torch.device) -> Module:
    copied = share(module, lambda weight: weight.to(device, dtype))
    for part in copied.modules():
        for name, buffer in part.named_buffers(recurse=False):
            # a buffer finer than the weights stays so: rotary frequencies, attention's gates
            finer = not buffer.is_floating_point() or buffer.dtype.itemsize >= dtype.itemsize
            setattr(part, name, buffer.to(device) if finer else buffer.to(device, dtype))
    return copied


def last_hidden(
    model: Decoder, batches: Sequence[Tensor], *, visit: Visit | None = None, bar: Meter | None = None
) -> Iterator[Tensor]:
    """Yield the final hidden states (B, S, D) of every batch of token ids (B, S), in order.

    Args:
        model: an ordinary model, which takes one batch after the other, or one that is run layer by layer: as many
            batches as :data:`HELD` allows go through a layer before the next layer is made.
        batches: token ids, int64.
        visit: entered around each layer's work. A layer sees the batches in their order.
        bar: progress; gets the tokens of each batch once it has gone through all layers.
    """
    if isinstance(model, Layered):
        for group in _groups(batches, HELD // (model.config.hidden_size * model.dtype.itemsize)):
            yield from _sweep(model, group, visit, bar)
        return
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)[1] if visit is not None else ()):
            assert visit is not None
            stack.enter_context(visit(index, layer))
        for ids_BS in batches:
            yield model.base_model(input_ids=ids_BS.to(model.device), use_cache=False).last_hidden_state
            if bar is not None:
                bar.advance(ids_BS.numel())


def _groups(batches: Sequence[Tensor], tokens: int) -> Iterator[list[Tensor]]:
    """Group successive batches, at most ``tokens`` tokens together and at least one batch each."""
    group: list[Tensor] = []
    for ids_BS in batches:
        if group and sum(ids.numel() for ids in group) + ids_BS.numel() > tokens:
            yield group
            group = []
        group.append(ids_BS)
    if group:
        yield group


Call = tuple[Any, dict[str, Any]]  # what a layer is called with besides its hidden states


def starts(model: Layered, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Call]]]:
    """Yield what the layers get for every batch: the first one's hidden states (B, S, D), and the rest of every call.

    Layers may differ in masks and positions, so the model's own code calls a stand-in for each of them.
    """
    for ids_BS in batches:
        stand_ins = [_StandIn(model.config, index) for index in range(model.depth)]
        with _standing(model, stand_ins):
            model.shell.base_model(input_ids=ids_BS.to(model.device), use_cache=False)
        yield stand_ins[0].hidden_BSD, [stand_in.call for stand_in in stand_ins]


def _sweep(model: Layered, batches: list[Tensor], visit: Visit | None, bar: Meter | None) -> Iterator[Tensor]:
    waiting = list(starts(model, batches))
    states = [hidden_BSD for hidden_BSD, _ in waiting]
    for index in range(model.depth):
        layer = model.layer(index)
        with nullcontext() if visit is None else visit(index, layer):
            for position, (_, calls) in enumerate(waiting):
                args, options = calls[index]
                states[position] = hidden_output(layer(states[position], *args, **options))
                if bar is not None:
                    bar.advance(batches[position].numel() / model.depth)
        del layer  # before the next one is made
        give_back()
    for position, ids_BS in enumerate(batches):
        ends: list[nn.Module] = [_End(model.config, index, states[position]) for index in range(model.depth)]
        with _standing(model, ends):
            yield model.shell.base_model(input_ids=ids_BS.to(model.device), use_cache=False).last_hidden_state


@contextmanager
def _standing(model: Layered, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the ``with``, put other modules in the layers' place."""
    put(model.shell, model.place, nn.ModuleList(modules))
    try:
        yield
    finally:
        put(model.shell, model.place, nn.ModuleList())


class Seen(nn.Module):
    """Takes a network's place, keeps what the network would get, and gives zeros."""

    x: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Keep x."""
        self.x = x
        return torch.zeros_like(x)


class _Part(nn.Module):
    """Stands where a layer was, and says of itself what a decoder asks its layers."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        kinds = getattr(config, "layer_types", None)
        self.attention_type = kinds[index] if kinds else "full_attention"


class _StandIn(_Part):
    """Records what a layer would get."""

    def forward(self, hidden_BSD: Tensor, *args: Any, **options: Any) -> Tensor:
        self.hidden_BSD, self.call = hidden_BSD, (args, options)
        return hidden_BSD.as_subclass(_Returned)


class _End(_Part):
    """Returns what the last layer returned."""

    def __init__(self, config: Any, index: int, hidden_BSD: Tensor) -> None:
        super().__init__(config, index)
        self.hidden_BSD = hidden_BSD

    def forward(self, *_args: Any, **_options: Any) -> Tensor:
        return self.hidden_BSD.as_subclass(_Returned)


class _Returned(Tensor):
    """Hidden states for a decoder that takes what its layers return, or the first part of it: GPT-J's return more."""

    # what is computed from them is an ordinary tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        whole = self.as_subclass(Tensor)
        return whole if isinstance(index, int) and index == 0 else whole[index]
