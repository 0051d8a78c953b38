"""A folder's weights as a GGUF file of it holds them, in a folder again: what fewer bits cost, measured anywhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moesmith.bench.bounds import weight_files
from moesmith.console import meter
from moesmith.export.gguf.quantise import quantiser

ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
PLAIN = ("F32", "BF16")  # types whose rounding is none, or the folder's own


def write_rounded(folder: Path, file: Path, out: Path) -> None:
    """Write ``out``, a folder like ``folder`` whose matrices are rounded as in its GGUF file.

    Every row of a matrix is quantised by itself. So of the file only each matrix's type is read, and it does not matter
    that it stacks experts and has the rows of attention in another order.

    Args:
        folder: a model in a stock architecture, as transformers stores it.
        file: the same model, quantised.
        out: a new folder.
    """
    import gguf

    reader, chunk = gguf.GGUFReader(str(file)), quantiser()
    arch = str(reader.fields["general.architecture"].contents())
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    layers = int(reader.fields[f"{arch}.block_count"].contents())
    known = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, layers)

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        place = names.get_name(ONE_EXPERT.sub(".experts.", name), try_suffixes=(".weight",))
        kind = kinds.get(place or "")
        if kind is None or kind.name in PLAIN or weight.dim() < 2:
            return weight
        data = chunk(weight.float().numpy(), int(kind), gguf.GGML_QUANT_SIZES[kind])
        return torch.from_numpy(np.asarray(gguf.quants.dequantize(data, kind))).view(weight.shape).to(weight.dtype)

    out.mkdir()
    files = weight_files(folder)
    for path in folder.iterdir():
        if path.is_file() and path not in files:
            shutil.copyfile(path, out / path.name)
    with meter(f"rounding as in {file.name}", sum(path.stat().st_size for path in files), "bytes") as bar:
        for path in files:
            tensors: dict[str, Any] = {}
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensors[name] = rounded(name, opened.get_tensor(name))
                    bar.advance(tensors[name].nbytes)
            save_file(tensors, out / path.name, {"format": "pt"})
