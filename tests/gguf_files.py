"""GGUF files of tiny parents, made by llama.cpp's own converter, and changed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesmith.export.gguf import converter
from moesmith.export.gguf.quantise import quantiser
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.testing.parents import save_tiny

BASE = {"rope_theta": 10000.0}


def tiny_gguf(family: str, out: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> Path:
    """Convert a tiny parent to ``out`` in f32; its folder lies beside, under the same name without the suffix."""
    folder = save_tiny(family, out.with_suffix(""), **overrides)
    if family == "phi3":  # the converter asks for a sentencepiece model unless the class says byte-level
        path = folder / "tokenizer_config.json"
        write_json(path, read_json(path) | {"tokenizer_class": "GPT2Tokenizer"})
    if family == "qwen2":  # transformers splits as Qwen2 does, whatever the file says
        monkeypatch.setattr(converter, "structural", lambda _: "qwen2")
    converter.convert(folder, out, "f32")
    return out


def changed(
    source: Path,
    out: Path,
    keys: dict[str, Any] | None = None,
    kind: str | None = None,
    edit: Callable[[str, Any], Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``source`` again.

    Args:
        source: a GGUF file in f32.
        out: the file to write.
        keys: values to add or to replace; ``None`` removes one.
        kind: quantise matrices to this type, where their rows allow it.
        edit: what becomes of a tensor, by name and f32 array; ``None`` leaves it out.
        extra: further tensors.
    """
    import gguf

    keys = keys or {}
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(out), str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in keys:
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    of = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    for name, value in keys.items():
        if value is not None:
            getattr(writer, of[type(value)])(name, value)
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        array = array if edit is None else edit(tensor.name, array)
        if array is None:
            continue
        chosen = gguf.GGMLQuantizationType[kind or "F32"]
        sizes = gguf.GGML_QUANT_SIZES[chosen]
        if chosen.name == "F32" or array.ndim < 2 or array.shape[-1] % sizes[0]:
            writer.add_tensor(tensor.name, np.ascontiguousarray(array, np.float32))
        elif chosen.name in ("F16", "BF16"):
            writer.add_tensor(tensor.name, gguf.quants.quantize(array, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(tensor.name, quantiser()(array, int(chosen), sizes), raw_dtype=chosen)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
