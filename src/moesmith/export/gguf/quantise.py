"""Make a GGUF file in q4_k_m from one in f32 or bf16: llama.cpp's mixture of types, quantised by ggml itself.

The package xllamacpp holds ggml's quantisers but not llama.cpp's program llama-quantize. So the types are chosen here,
by the rules of that program, and every tensor is quantised by ``ggml_quantize_chunk`` of the library inside xllamacpp.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesmith.console import meter
from moesmith.errors import MoesmithError

# largest root mean square error of a quantised matrix, relative to its own: about twice that of normal numbers
ERROR = {"Q4_K": 0.16, "Q5_0": 0.1, "Q5_1": 0.1, "Q5_K": 0.1, "Q6_K": 0.05, "Q8_0": 0.02, "F16": 0.01}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # if rows are not a multiple of 256


def tensor_type(name: str, row: int, layers: int, experts: int, tied: bool) -> str | None:
    """Choose the type of a matrix in q4_k_m.

    Args:
        name: its name in the file.
        row: its row length: the expert width for ``ffn_down_exps``, heads times head_dim for ``attn_output``, else D.
        layers: decoder layers of the model.
        experts: experts of the model; llama.cpp gives attention more bits where there are eight.
        tied: the file has no ``output.weight``, and the embedding takes its place.

    Returns:
        a name of ``gguf.GGMLQuantizationType``, or ``None`` for what stays as it is.
    """
    if not name.endswith(".weight") or "norm" in name or "ffn_gate_inp" in name or name == "rope_freqs.weight":
        return None
    kind = "Q4_K"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = "Q6_K"
    elif "attn_v" in name or "ffn_down" in name:
        layer = int(name.split(".")[1])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        kind = "Q6_K" if more else kind
    if experts == 8:
        if "attn_v" in name or "attn_k" in name:
            kind = "Q8_0"
        elif "attn_output" in name:
            kind = "Q5_K"
    if kind in FALLBACK and row % 256:
        kind = FALLBACK[kind]
    return "F16" if row % 32 else kind


def quantise(source: Path, out: Path) -> dict[str, int]:
    """Write ``out`` in q4_k_m from the f32 or bf16 file ``source``, one tensor in memory at a time.

    Returns:
        how many tensors are of each type.

    Raises:
        MoesmithError: gguf or xllamacpp is missing, xllamacpp's library does not offer the quantiser, or a tensor
            comes out too different.
    """
    import gguf

    chunk = quantiser()
    reader = gguf.GGUFReader(str(source))
    fields = reader.fields
    arch = str(fields["general.architecture"].contents())
    layers = int(fields[f"{arch}.block_count"].contents())
    counted = fields.get(f"{arch}.expert_count")  # a dense model has no such key
    experts = 0 if counted is None else int(counted.contents())
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    writer = gguf.GGUFWriter(str(out), arch)
    for name, kv in fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub = kv.types[-1] if kv.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, kv.contents(), kv.types[0], sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    chosen: list[tuple[Any, Any]] = []
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        chosen_type = tensor_type(tensor.name, shape[-1], layers, experts, tied) if len(shape) > 1 else None
        kind = tensor.tensor_type if chosen_type is None else gguf.GGMLQuantizationType[chosen_type]
        chosen.append((tensor, kind))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = [*shape[:-1], shape[-1] // block * size]
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    counts: dict[str, int] = {}
    with meter("q4_k_m", sum(tensor.n_elements for tensor, _ in chosen), "weights") as bar:
        for tensor, kind in chosen:
            data = tensor.data
            if kind != tensor.tensor_type:
                plain = gguf.quants.dequantize(data, tensor.tensor_type)
                data = chunk(plain, int(kind), gguf.GGML_QUANT_SIZES[kind])
                error = np.linalg.norm(gguf.quants.dequantize(data, kind) - plain) / (np.linalg.norm(plain) or 1.0)
                if not error <= ERROR[kind.name]:
                    raise MoesmithError(
                        f"{tensor.name} in {kind.name.lower()} is {error:.0%} off what it was", "Give --quant q8_0."
                    )
            writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
            counts[kind.name] = counts.get(kind.name, 0) + 1
            bar.advance(tensor.n_elements)
    writer.close()
    return counts


def quantiser() -> Callable[[Any, int, tuple[int, int]], Any]:
    """Return ``ggml_quantize_chunk`` for numpy arrays."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise MoesmithError("q4_k_m is quantised by the package xllamacpp", "pip install 'moesmith[gguf]'")
    try:
        function = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise MoesmithError(
            "The installed xllamacpp does not offer ggml's quantiser", "Give --quant q8_0, or the tested version."
        ) from error
    # enum ggml_type, const float * src, void * dst, int64 start, int64 nrows, int64 n_per_row, const float * imatrix
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t

    def chunk(array: Any, kind: int, sizes: tuple[int, int]) -> Any:
        source = np.ascontiguousarray(array, np.float32)
        row = source.shape[-1]
        out = np.empty((*source.shape[:-1], row // sizes[0] * sizes[1]), np.uint8)
        done = function(kind, source.ctypes.data, out.ctypes.data, 0, source.size // row, row, None)
        if done != out.nbytes:
            raise MoesmithError(f"ggml wrote {done} bytes for a tensor of {out.nbytes}", "Give --quant q8_0.")
        return out

    return chunk
