"""Write what is stored otherwise as an ordinary folder: quantised weights unpacked, an adapter merged into its base.

A parent is proved and carved from plain weights, so what unpacks them runs once, before, and what it made can be looked
at. Nothing is read from pickles, and no code of the source's own runs.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesmith.errors import MoesmithError
from moesmith.files.artefact import write_sums
from moesmith.files.outputs import check_folder, check_place, new_folder
from moesmith.files.parse import parse_json
from moesmith.parent.checkpoint import checked, first_line, from_folder, quiet, read_config, rebuilt, stored_dtype
from moesmith.parent.structure import close

# what transformers unpacks while it loads; of other methods it unpacks the model that it has loaded, if their package
# is there
WHILE_LOADING = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "gguf": "GgufConfig"}
LENGTH = 64  # tokens on which a merged model is compared with the base and the adapter beside it
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def dequantize(source: str, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a quantised model's weights in bf16, as transformers unpacks them.

    Args:
        source: a folder or hub id whose config has a ``quantization_config``, or a ``.gguf`` file of any architecture
            that transformers reads.
        out: a new or empty folder.
        overwrite: replace what moesmith wrote there.

    Returns:
        ``method``, ``parameters`` and ``dtype``.

    Raises:
        MoesmithError: it is not quantised, transformers cannot load or unpack it here, or ``out`` may not be written.
    """
    check_place(out, _files(source))
    check_folder(out, overwrite=overwrite)
    path, options = Path(source), dict[str, Any]()
    if path.suffix == ".gguf":
        method, place, options = "gguf", str(path.parent), {"gguf_file": path.name}
    else:
        method, place = _method(source), source
    try:
        with quiet():
            if (kind := WHILE_LOADING.get(method)) is not None:
                options["quantization_config"] = getattr(transformers, kind)(dequantize=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.bfloat16, use_safetensors=True, output_loading_info=True, **options
            )
            model: Any = checked(loaded, source)
            model = model if method in WHILE_LOADING else model.dequantize()
            tokens = AutoTokenizer.from_pretrained(place, **{k: v for k, v in options.items() if k == "gguf_file"})
    except MoesmithError:
        raise
    except Exception as error:  # every method has a package of its own, with errors of its own
        cure = "Install what it names, or give the unquantised model that it was made from."
        raise MoesmithError(f"{source} ({method}) cannot be unpacked: {first_line(error)}", cure) from error
    plain = _plain(model, source)
    _write(plain, tokens, out, overwrite)
    return {"method": method, "parameters": sum(p.numel() for p in plain.parameters()), "dtype": "bfloat16"}


def _files(source: str) -> list[Path]:
    """What is read of this machine's files; a hub id is none of them."""
    return [Path(source)] if Path(source).exists() else []


def _method(source: str) -> str:
    given = read_config(source).get("quantization_config")
    if not isinstance(given, dict):
        raise MoesmithError(f"the weights of {source} are not quantised", "Give it to --model as it is.")
    return str(given.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in given else "an unknown method"))


def _plain(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """The same weights in a model that was never quantised.

    Raises:
        MoesmithError: something is still packed.
    """
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    try:
        plain, wrong = rebuilt(config, weights, torch.bfloat16)
    except RuntimeError as error:
        raise MoesmithError(f"{source} is still packed: {first_line(error)}", "Update transformers.") from error
    if wrong:
        raise MoesmithError(f"{source} is still packed: {', '.join(wrong[:3])}", "Give the unquantised model.")
    plain.generation_config = model.generation_config
    return plain


def merge(adapter: str, out: Path, *, base: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Merge a PEFT adapter into its base, in fp32, and write the sum in the base's dtype.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: a new or empty folder.
        base: the base's folder or hub id; the one that the adapter names if left out.
        overwrite: replace what moesmith wrote there.

    Returns:
        ``base``, ``kind`` (of adapter), ``parameters`` (of the model) and ``dtype``.

    Raises:
        MoesmithError: the package peft is missing, the adapter cannot be read or merged, does not fit to the base, or
            the merged model computes something else than the base with the adapter beside it.
    """
    folder = Path(adapter)
    given = _adapter(folder)
    base = base or given.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise MoesmithError(f"{adapter} does not name its base", "Give --base.")
    check_place(out, [folder, *_files(base)])
    check_folder(out, overwrite=overwrite)
    if importlib.util.find_spec("peft") is None:
        raise MoesmithError("merging an adapter needs the package peft, which is not installed", "pip install peft")
    import peft

    model, tokens = from_folder(base, torch.float32, "cpu")
    dtype = stored_dtype(base)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        rows = [file.get_slice(n).get_shape()[0] for n in names if "embed_tokens" in n and "lora" not in n]
    embedding: Any = model.get_input_embeddings()
    if rows and rows[0] != len(embedding.weight):
        model.resize_token_embeddings(rows[0])
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that do not fit, which are an error below
            beside: Any = peft.PeftModel.from_pretrained(model, folder, torch_device="cpu").eval()
            known = set(peft.get_peft_model_state_dict(beside))
            if known != names:
                odd = ", ".join(sorted(known ^ names)[:3])
                raise MoesmithError(f"{adapter} does not fit to {base}: {odd}", "Give the base that it was made for.")
            ids = torch.randint(model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
            before = _logits(beside, ids)
            merged: Any = beside.merge_and_unload(safe_merge=True).eval()
            own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
            tokens = AutoTokenizer.from_pretrained(folder) if own else tokens
    except MoesmithError:
        raise
    except Exception as error:  # PEFT, safetensors and transformers each have their own
        cure = "Give --base, the model that it was made for."
        raise MoesmithError(f"{adapter} cannot be merged into {base}: {first_line(error)}", cure) from error
    if not close(_logits(merged, ids), before):
        what = f"{base} with {adapter} merged computes something else than with it beside"
        raise MoesmithError(what, "Please report it: a fault of PEFT or of moesmith.")
    _write(merged.to(dtype), tokens, out, overwrite)
    facts = {"base": base, "kind": str(given.get("peft_type")), "dtype": str(dtype).removeprefix("torch.")}
    return facts | {"parameters": sum(p.numel() for p in merged.parameters())}


def _adapter(folder: Path) -> dict[str, Any]:
    """Read what an adapter says of itself; its weights must be there as safetensors."""
    try:
        given = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoesmithError(f"{folder} holds no adapter: {CONFIG} cannot be read", "Give PEFT's folder.") from error
    if not isinstance(given, dict):
        raise MoesmithError(f"{folder / CONFIG} is not an adapter's config", "Give PEFT's folder.")
    if not (folder / WEIGHTS).is_file():
        raise MoesmithError(f"{folder} has no {WEIGHTS}", "Save the adapter as safetensors.")
    return given


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def _write(model: PreTrainedModel, tokenizer: Any, out: Path, overwrite: bool) -> None:
    with new_folder(out, overwrite=overwrite) as work, quiet():
        work.mkdir()
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_sums(work)
