"""Check that a GGUF parent answers as llama.cpp answers from the same file.

Our own code reads config and weights of such a parent, and comparing a model with itself says nothing about that code.
llama.cpp is the other reader. It is asked twice:

* about a *twin*: a file with the same keys, byte by byte, and the first layers' tensors in f32. Quantised matrices make
  llama.cpp round activations to 8 bits, and that noise would hide a lost scaling of positions or a window that is off
  by one; in f32 the two readers agree to a millionth, so the bound is tight (:data:`TIGHT`). For longrope it is asked
  again with room beyond the original context, because llama.cpp then takes other factors;
* about the file itself, once, with a wide bound (:data:`WIDE`): a tensor that was unpacked wrongly is far outside. The
  model answers in its own dtype.

The tokenizer must make the same tokens from text too; other tokens around special ones are only reported.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesmith.arguments import ceil_div
from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.export.gguf.llamacpp import Answers, Questions, ask
from moesmith.export.gguf.tokens import ODD, differing_tokens, marked_texts

LAYERS = 2  # of the twin
LENGTHS = (16, 48, 200)
# largest root mean square difference of the most likely tokens' log-probabilities, over the logits' standard deviation;
# measured on tiny models: 5e-6 for twins, 0.05 for files of every type (docs/exports.md)
TIGHT, WIDE = 1e-4, 0.25
CURE = "Give the model as a folder in safetensors, and please report this."
TEXT = (
    "The old clock in the hall had stopped at 7:45. Nobody wound it any more, and yet, she said, it's right twice."
    "\n\ndef add(a, b):\n    return a + b  # 12 + 30 = 42\n"
)


def prove_gguf(
    path: Path,
    reader: Any,
    first: dict[str, Tensor],
    model: PreTrainedModel,
    twin: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Compare what was loaded from a file with llama.cpp; where that is not installed, say that it was not compared.

    Args:
        path: the file.
        reader: a ``gguf.GGUFReader`` of it.
        first: its tensors in f32, without those of layers after the first :data:`LAYERS`.
        model: what was loaded.
        twin: the model of ``first``.
        tokenizer: what was loaded.

    Raises:
        MoesmithError: llama.cpp does not run the file, makes other tokens, or gives other probabilities.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        say(f"  {path.name} was not compared with llama.cpp: the package xllamacpp is not installed")
        return
    config, rope = model.config, model.config.rope_parameters
    longest = config.max_position_embeddings - 1  # the server needs room for one more
    if (window := getattr(config, "sliding_window", None)) is not None and window < longest:
        say(f"  {path.name} has a sliding window of {window:,} tokens, which llama.cpp reads but does not apply")
        longest = window
    # llama.cpp chooses longrope's factors by the room for a text, transformers by its length
    original = int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None
    lengths = [n for n in LENGTHS if n <= min(longest, original or longest)] or [longest]
    ids = _row(tokenizer, config.vocab_size, lengths[-1])
    questions = Questions(rows=[ids], lengths=lengths, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "twin.gguf"
        write_twin(reader, first, file, twin.config.num_hidden_layers)
        if original is None or original >= 256:  # the smallest context that llama.cpp gives
            _same_numbers(path, twin, ids, lengths, ask(file, questions), TIGHT)
        if original is not None and longest > original:
            far = Questions(rows=[ids], lengths=lengths, context=original + 256, threads=questions.threads)
            _same_numbers(path, _with_long_factors(twin), ids, lengths, ask(file, far), TIGHT)
    tokens = Questions([TEXT, ODD], marked_texts(tokenizer), [ODD], [ids[: lengths[0]]], lengths[:1])
    answers = ask(path, tokens)
    if (odd := differing_tokens(tokenizer, tokens.texts, answers.texts)) is not None:
        raise MoesmithError(f"The tokenizer read from {path.name} is not llama.cpp's: {odd}", CURE)
    odd = differing_tokens(tokenizer, tokens.marked, answers.marked)
    odd = odd or differing_tokens(tokenizer, tokens.begun, answers.begun, add_special_tokens=True)
    if odd is not None:  # the model is right, and so is plain text
        say(f"  {path.name}: around special tokens llama.cpp makes {odd}")
    if original is None or original >= 256:
        _same_numbers(path, model, ids, lengths[:1], answers, WIDE)


def _same_numbers(
    path: Path, model: PreTrainedModel, ids: list[int], lengths: list[int], answers: Answers, bound: float
) -> None:
    for length, top in zip(lengths, answers.rows[0], strict=True):
        apart = difference(model, ids[:length], top)
        if not apart <= bound:
            raise MoesmithError(
                f"{path.name} answers differently in llama.cpp than as it was read: after {length} tokens the"
                f" log-probabilities are {apart:.2g} of the logits' standard deviation apart, not {bound:g}",
                CURE,
            )


@torch.no_grad()
def difference(model: PreTrainedModel, ids: list[int], top: Sequence[tuple[int, float | None]]) -> float:
    """Measure how far a model is from llama.cpp's most likely tokens and their log-probabilities after a text.

    The root mean square difference, over the standard deviation of the model's logits. llama.cpp adds the V numbers of
    a softmax one after the other in fp32, which moves all its log-probabilities alike; as much of a common difference
    as that can make, V / 2^24 nats, does not count (5e-4 nats of 0.009 in a vocabulary of 151,936).
    """
    text_1S = torch.tensor([ids], device=model.device)
    hidden_1SD: Tensor = model.base_model(input_ids=text_1S, use_cache=False).last_hidden_state
    logits_V: Tensor = model.get_output_embeddings()(hidden_1SD[0, -1]).float().cpu()
    theirs = torch.tensor([math.nan if value is None else value for _, value in top])  # of numbers that are none
    ours = logits_V.log_softmax(-1)[torch.tensor([token for token, _ in top])]
    apart, sums = ours - theirs, len(logits_V) * 2.0**-24
    return float((apart - apart.mean().clamp(-sums, sums)).square().mean().sqrt() / logits_V.std())


def _with_long_factors(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the model so that it takes longrope's factors for long texts at every length."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = dict(config.rope_parameters) | {"short_factor": config.rope_parameters["long_factor"]}
    copied: Any = type(model)._from_config(config, dtype=torch.float32)  # type: ignore[attr-defined]
    copied.load_state_dict(model.state_dict())
    return copied.eval()  # type: ignore[no-any-return]


def _row(tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int) -> list[int]:
    """Repeat one text up to ``length`` token ids, all of which the model has rows for."""
    ids = [i for i in tokenizer.encode(TEXT, add_special_tokens=False) if i < vocabulary] or [0]
    return (ids * (length // len(ids) + 1))[:length]


def write_twin(reader: Any, tensors: dict[str, Tensor], out: Path, layers: int) -> None:
    """Write a GGUF file with another's keys, byte for byte except the number of layers, and tensors in f32.

    Args:
        reader: a ``gguf.GGUFReader`` of the other file.
        tensors: the tensors by their names in the file.
        out: the file to write.
        layers: how many layers it has.
    """
    import gguf

    keys = bytearray(reader.data[: int(reader.tensors[0].field.offset)])  # the tensors' infos follow the keys
    struct.pack_into("<Q", keys, 8, len(tensors))
    architecture = reader.fields["general.architecture"].contents()
    count = reader.fields[f"{architecture}.block_count"]
    value = count.parts[count.data[0]]
    place = int(count.offset) + sum(part.nbytes for part in count.parts[: count.data[0]])
    keys[place : place + value.nbytes] = np.array([layers], value.dtype).tobytes()
    infos, offset = bytearray(), 0
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))
        infos += struct.pack("<Q", len(name.encode())) + name.encode()
        infos += struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", gguf.GGMLQuantizationType.F32, offset)
        offset += _padded(tensor.nbytes, reader.alignment)
    with open(out, "wb") as file:
        file.write(keys + infos)
        file.write(bytes(_padded(file.tell(), reader.alignment) - file.tell()))
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().data)
            file.write(bytes(_padded(tensor.nbytes, reader.alignment) - tensor.nbytes))


def beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer that a model of ``layers`` layers does not have."""
    parts = name.split(".")
    return parts[0] == "blk" and int(parts[1]) >= layers


def _padded(size: int, alignment: int) -> int:
    return ceil_div(size, alignment) * alignment
