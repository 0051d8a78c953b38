"""A device that exists in Python only: an accelerator's faults are found where there is none.

``torch.device("pretend")`` is torch's PrivateUse1 key. Its tensors are ordinary dense tensors in the CPU's memory,
so every kernel computes the CPU's own bits. What is pretended is everything that fails or is slow on a real one:

* an operation that is given tensors of two devices raises, where CUDA raises;
* inside :func:`watching`, heavy work on plain CPU tensors and large copies to the host are written down, with the place
  in moesmith that asked for them;
* inside :func:`without_double` there is no float64, as on Apple's GPUs.

Import it before the first tensor of the device is made; it lasts as long as the process.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
DEVICE = torch.device("privateuseone", 0)
CPU_CODE, OWN_CODE = 1, 12  # DLPack's kDLCPU and kDLExtDev: the code of the same memory on either device
WORK = 4096  # multiply-adds on plain CPU tensors that count as a fallback
BYTES = 1 << 12  # of one copy to the host that is worth a look: results are small in the tests' tiny models

aten = torch.ops.aten


class _Settings:
    """What the device lacks just now."""

    double = True


class _Module:
    """``torch.pretend``: what torch and others ask of a device's module."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return False  # nobody takes it by itself: the other tests in this process are about the CPU

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Its numbers come from the CPU's generator, which ``torch.manual_seed`` seeds as well."""


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """``torch.accelerator``'s questions."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, _index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


# ---- one memory, two devices ----

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabel(x: Tensor, code: int) -> Tensor:
    """The same memory, shape and strides on the other device, through a DLPack capsule."""
    capsule = torch._C._to_dlpack(x)  # type: ignore[attr-defined]
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = code
    return torch._C._from_dlpack(capsule)  # type: ignore[attr-defined, no-any-return]


def _inner(x: Tensor) -> Tensor:
    return _relabel(x, CPU_CODE)


def _outer(x: Tensor) -> Tensor:
    return _relabel(x, OWN_CODE)


def _own(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


# ---- every operator ----

# what CUDA takes from the host as well: indices, and numbers without dimensions
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
SCALARS = {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::masked_fill", "aten::masked_fill_"}
SCALARS |= {"aten::fill", "aten::fill_", "aten::index_fill", "aten::index_fill_"}
CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class _Kind:
    """What a schema says, read once per operator."""

    def __init__(self, op: Any) -> None:
        schema = op._schema
        self.name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        self.arguments = [argument.name for argument in schema.arguments]
        self.scalars = torch.Tag.pointwise in op.tags or schema.name in SCALARS
        self.indexed = schema.name in INDEXED
        writes = {}
        views = {}
        for argument in schema.arguments:
            if argument.alias_info is not None:
                for label in argument.alias_info.before_set:
                    (writes if argument.alias_info.is_write else views)[label] = argument.name
        self.out = [argument.name for argument in schema.arguments if argument.is_out]
        self.returns: list[tuple[str, str | None]] = []
        for value in schema.returns:
            label = next(iter(value.alias_info.before_set), None) if value.alias_info is not None else None
            if label is None:
                self.returns.append(("new", None))
            elif label in writes:
                self.returns.append(("same", writes[label]))
            else:
                self.returns.append(("view", views.get(label, self.arguments[0])))


_kinds: dict[Any, _Kind] = {}


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator: its device's tensors as the CPU's, the CPU's kernel, and its results back."""
    kind = _kinds.get(op)
    if kind is None:
        kind = _kinds[op] = _Kind(op)
    if kind.name in REPLACED:
        return REPLACED[kind.name](op, *args, **kwargs)
    target = kwargs.get("device")
    made = target is not None and target.type == NAME
    if made:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)

    def enter(value: Any, name: str, nested: bool) -> Any:
        if isinstance(value, Tensor):
            if value.device.type == NAME:
                _double(value)
                return _inner(value)
            if not (kind.indexed and name == "indices") and not (kind.scalars and value.dim() == 0 and not nested):
                raise RuntimeError(
                    f"{kind.name}: expected all tensors to be on the same device, but {name} is on {value.device} and "
                    f"others are on {NAME}:0"
                )
            return value
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            return [enter(part, name, True) for part in value]
        return value

    inner_args = [enter(value, name, False) for value, name in zip(args, kind.arguments, strict=False)]
    inner_kwargs = {name: enter(value, name, False) for name, value in kwargs.items()}
    if not _Settings.double and made and kwargs.get("dtype") == torch.float64:
        raise TypeError("the pretended device has no float64")
    if _watch is not None and kind.name == "aten::_local_scalar_dense":
        _watch.syncs[_place()] += 1
    given = dict(zip(kind.arguments, args, strict=False)) | kwargs
    grown = {name: torch.empty(0, dtype=given[name].dtype) for name in kind.out if not given[name].numel()}
    inner_kwargs |= grown
    with torch._C._AutoDispatchBelowAutograd():
        found = op(*inner_args, **inner_kwargs)
    for name, value in grown.items():
        if value.numel():  # the kernel chose its size
            memory = _outer(value)
            place = (memory.untyped_storage(), 0, value.size(), value.stride())
            aten.set_.source_Storage_storage_offset.redispatch(CPU_KEY, given[name], *place)

    def leave(value: Any, how: str, source: str | None) -> Any:
        if isinstance(value, Tensor):
            if how == "same":
                return given[source]
            if how == "view":
                return _view(given[source], value)
            outer = _outer(value)
            _double(outer)
            return outer
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return [leave(part, how, source) for part in value]
        return value

    if len(kind.returns) == 1:
        how, source = kind.returns[0]
        if how == "same" and isinstance(given[source], (list, tuple)):
            return given[source]
        return leave(found, how, source)
    if not kind.returns:
        return None
    return tuple(leave(value, how, source) for value, (how, source) in zip(found, kind.returns, strict=True))


def _view(base: Tensor, like: Tensor) -> Tensor:
    """A view of ``base`` with ``like``'s shape, in ``base``'s own storage, as autograd's bookkeeping wants it."""
    offset = base.storage_offset() + like.storage_offset()
    return _strided(aten.as_strided.default, base, like.size(), like.stride(), offset)


def _strided(_op: Any, base: Tensor, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    # the CPU's kernel makes a view of whatever device its argument is on
    offset = base.storage_offset() if offset is None else offset
    return aten.as_strided.default.redispatch(CPU_KEY, base, size, stride, offset)  # type: ignore[no-any-return]


def _copy(_op: Any, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between the devices, or on the device: the only operator that may be given both."""
    _double(source, target)
    if _watch is not None and _own(source) and not _own(target) and source.nbytes >= BYTES:
        _watch.copies[_place()] += source.nbytes
    (_inner(target) if _own(target) else target).copy_(_inner(source) if _own(source) else source)
    return target


def _double(*tensors: Any) -> None:
    if not _Settings.double and any(_own(x) and x.dtype == torch.float64 for x in tensors):
        raise TypeError("the pretended device has no float64")


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention with the CPU's fused kernel where the CPU would take it, so that it has the CPU's bits."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    inner = [_inner(x.detach()) for x in (q, k, v)]
    mask = None if attn_mask is None else _inner(attn_mask.detach())
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    inner = [x.requires_grad_(needed) for x in inner]
    if aten._fused_sdp_choice(*inner, mask, dropout_p, is_causal, **options) == 0:
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, **options)[0]  # type: ignore[no-any-return]
    kernel = aten._scaled_dot_product_fused_attention_overrideable
    return kernel(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, p: float = 0.0, causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    mask = None if bias is None else _inner(bias)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = kernel(_inner(q), _inner(k), _inner(v), p, causal, attn_mask=mask, scale=scale)
    empty = _outer(torch.zeros(0, dtype=torch.int64))
    sizes = (q.shape[2], k.shape[2])
    return _outer(out), _outer(log_sum), empty, empty, *sizes, empty, empty, empty


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, _mask: Any, out: Tensor,
    log_sum: Tensor, _q: Any, _k: Any, _mq: int, _mk: int, p: float, causal: bool, _seed: Any, _offset: Any, *,
    scale: float | None = None,
) -> Any:  # fmt: skip
    inner = [_inner(x) for x in (grad, q, k, v, out, log_sum)]
    mask = None if bias is None else _inner(bias)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = kernel(*inner, p, causal, attn_mask=mask, scale=scale)
    return (*map(_outer, found), None)


def _gru(
    _op: Any, given: Tensor, hidden: Tensor, state: Tensor, in_bias: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    """The fused cell of an accelerator; a CPU has it as separate operations."""
    i, h, hx = (_inner(x) for x in (given, hidden, state))
    i = i if in_bias is None else i + _inner(in_bias)
    h = h if bias is None else h + _inner(bias)
    (ir, iz, i_new), (hr, hz, hn) = i.chunk(3, 1), h.chunk(3, 1)
    r, z = (hr + ir).sigmoid_(), (hz + iz).sigmoid_()
    new = (i_new + hn * r).tanh_()
    workspace = torch.cat([r, z, new, hx, hn], 1)
    return _outer((hx - new).mul_(z).add_(new)), _outer(workspace)


def _gru_backward(_op: Any, grad: Tensor, workspace: Tensor, has_bias: bool) -> Any:
    g = _inner(grad)
    r, z, new, hx, hn = _inner(workspace).chunk(5, 1)
    d_new = g * (1 - z) * (1 - new * new)
    d_z = g * (hx - new) * z * (1 - z)
    d_r = d_new * hn * r * (1 - r)
    given, hidden = torch.cat([d_r, d_z, d_new], 1), torch.cat([d_r, d_z, d_new * r], 1)
    biases = (_outer(given.sum(0)), _outer(hidden.sum(0))) if has_bias else (None, None)
    return _outer(given), _outer(hidden), _outer(g * z), *biases


def _histc(_op: Any, x: Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Tensor:
    """Of integers, which a CPU does not count."""
    return _outer(_inner(x).float().histc(bins, low, high).to(x.dtype))


REPLACED: dict[str, Callable[..., Any]] = {
    "aten::histc": _histc,
    "aten::_copy_from": _copy,
    "aten::as_strided": _strided,
    "aten::_thnn_fused_gru_cell": _gru,
    "aten::_thnn_fused_gru_cell_backward": _gru_backward,
}


# ---- the watch ----


@dataclass
class Fault:
    """Something that a device should not see: what, where in moesmith, and how much of it."""

    what: str
    place: str
    size: int


@dataclass
class Watch:
    """What happened inside :func:`watching`.

    Attributes:
        fallbacks: heavy work on plain CPU tensors; ``size`` in multiply-adds.
        copies: bytes copied from the device to the host, by place; copies below :data:`BYTES` are left out.
        syncs: how often the host waited for one number, by place.
        operations: how many operators ran on the device.
    """

    fallbacks: list[Fault] = field(default_factory=list)
    copies: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    operations: int = 0


_watch: Watch | None = None


def _place() -> str:
    """The innermost function of moesmith on the stack, ``file:function``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/moesmith/" in path and "/tests/" not in path:
            return f"{path.rpartition('/moesmith/')[2]}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"


def _products(args: Any) -> int:
    """Multiply-adds of an operator on these arguments, roughly: enough to tell large from small."""
    shapes = [x.shape for x in args if isinstance(x, Tensor) and x.dim() > 1]
    if not shapes:
        return 0
    if len(shapes) == 1:  # a decomposition
        return prod(shapes[0]) * shapes[0][-1]
    return prod(shapes[-2]) * shapes[-1][-1]


HEAVY = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "_convolution", "mkldnn_linear"}
HEAVY |= {"_scaled_dot_product_flash_attention_for_cpu", "linalg_cholesky_ex", "cholesky_solve", "_grouped_mm"}
HEAVY |= {"_linalg_solve_ex", "linalg_lu_factor_ex", "linalg_lstsq", "_linalg_svd", "_linalg_eigh", "linalg_inv_ex"}
HEAVY |= {"addmm_", "baddbmm_", "linalg_lu_solve", "linalg_qr", "cholesky_inverse", "addr", "addmv", "mv"}


class _CpuWatch(TorchDispatchMode):
    """Writes down heavy work on plain CPU tensors."""

    def __init__(self, watch: Watch, allowed: dict[str, str]) -> None:
        super().__init__()
        self.watch, self.allowed = watch, allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(_own(x) for x in args):
            self.watch.operations += 1
        elif func._schema.name.removeprefix("aten::") in HEAVY:
            size, place = _products(args), _place()
            if size >= WORK and place not in self.allowed:
                self.watch.fallbacks.append(Fault(func._schema.name, place, size))
        return func(*args, **kwargs or {})


class _Tensors(TorchFunctionMode):
    """``torch.tensor`` on the device, which torch cannot make inside a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(device)
        return func(*args, **kwargs)


@contextmanager
def watching(allowed: dict[str, str] | None = None) -> Iterator[Watch]:
    """Watch a stage that should run on the device.

    Args:
        allowed: places (``file:function`` below moesmith) that compute on the CPU on purpose, with the reason.
    """
    global _watch
    before, _watch = _watch, Watch()
    try:
        with _CpuWatch(_watch, allowed or {}), _Tensors():
            yield _watch
    finally:
        _watch = before


@contextmanager
def without_double() -> Iterator[None]:
    """No float64 on the device inside the ``with``."""
    _Settings.double = False
    try:
        yield
    finally:
        _Settings.double = True


# ---- registration ----

_setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module(), hook=_Hook())
_library = torch.library.Library("_", "IMPL")
_library.fallback(_fallback, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("_scaled_dot_product_fused_attention_overrideable", _attend, "PrivateUse1")
_aten.impl("_scaled_dot_product_fused_attention_overrideable_backward", _attend_backward, "PrivateUse1")
for _key in ("PrivateUse1", "AutogradPrivateUse1"):
    _aten.impl("scaled_dot_product_attention", _attention, _key)
_deepcopy = Tensor.__deepcopy__


def _copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    """Devices without an allocator of their own are copied as tensors, not as storages."""
    if not _own(x) or id(x) in memo:
        return _deepcopy(x, memo)
    memo[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    return memo[id(x)]  # type: ignore[no-any-return]


Tensor.__deepcopy__ = _copied  # type: ignore[method-assign, assignment]
_apply = torch.nn.Module._apply


def _applied(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Tied parameters stay tied on the way to a device, as they do on one that torch knows."""
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for owner in module.modules() if recurse else ():
        for name, parameter in owner.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((owner, name))
    _apply(module, fn, recurse)
    for (first, known), *others in places.values():
        for owner, name in others:
            setattr(owner, name, getattr(first, known))
    return module


torch.nn.Module._apply = _applied  # type: ignore[method-assign, assignment]
