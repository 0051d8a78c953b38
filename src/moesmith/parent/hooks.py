"""Put hooks on modules for the duration of a ``with``, and find the hidden states among what a hook is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False, kwargs: bool = False
) -> Iterator[None]:
    """Call a hook after each module's forward pass, or ``before`` it, inside the ``with``.

    Args:
        hooks: modules, each with its hook, as ``register_forward_hook`` takes them.
        before: as ``register_forward_pre_hook``.
        kwargs: hooks get keyword arguments as well.
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.enter_context(register(hook, with_kwargs=kwargs))
        yield


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states among a call's arguments: the first one, or by name; ``None`` where there are none."""
    return args[0] if args else kwargs.get("hidden_states")


def hidden_output(output: Any) -> Any:
    """Return the hidden states among what a layer returns: all of it, or the first part."""
    return output[0] if isinstance(output, tuple) else output
