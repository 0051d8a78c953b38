"""``--to gguf``: one file for llama.cpp, by its own converter, proved in llama.cpp.

Of the graphs in llama.cpp that hold our models, ``llama`` with experts and ``qwen3moe`` divide the gate's weights by
their sum, and ``qwen2moe`` does not. So Llama, Mistral and Phi-3 go through a folder with Mixtral's names to ``llama``,
Qwen3 to ``qwen3moe``, and Qwen2 with Mixtral's names plus biases to ``llama``, which takes them. Only a shared expert
next to experts that count in full goes to ``qwen2moe``: there all weights are made 1/E (``mixture/home.py``). Ordinary
networks between layers with experts are held by ``mimo2`` alone, whose attention is Llama's.

A quantised model does not answer like its source, so comparing the two cannot tell noise from a fault. Therefore the
same folder is first written in f32, or in bf16 where f32 does not fit in memory, and llama.cpp must give the
reference's probabilities with it; what is quantised from it then has to stay within the tolerance of its type.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.export.folder import write_companions
from moesmith.export.gguf.converter import NAME, convert, converter_refusal, name_for
from moesmith.export.gguf.llamacpp import Answers, Questions, ask
from moesmith.export.gguf.modelfile import commands, modelfile_of, write_modelfile
from moesmith.export.gguf.quantise import quantise, tensor_type
from moesmith.export.gguf.tokens import ODD, differing_tokens, marked_texts
from moesmith.export.stock.write import Layout, stock_config, stock_reference, stock_refusal, write_stock
from moesmith.export.target import Options, Source, Target, reach_loss, stock_losses
from moesmith.export.verify import fp32_fits, judging, run
from moesmith.files.artefact import hidden_beside
from moesmith.files.write import write_cure
from moesmith.mixture.count import parameters
from moesmith.mixture.home import aligned
from moesmith.parent.structure import head_dim, rope_of

SHORTEST = 8  # tokens of the shortest window that leaves something to compare
CHAT = [{"role": "user", "content": "Who are you?"}]
POSITIONS = 48  # of each row, asked one by one
NEW = 24  # greedy tokens
AGREED = 0.8  # share of positions that must be within the tolerance: a router between two equal experts may tip
# largest difference of log-probabilities at a position, over the reference logits' standard deviation
TOLERANCE = {"ALL_F32": 0.002, "MOSTLY_BF16": 0.15, "MOSTLY_Q8_0": 0.3, "MOSTLY_Q4_K_M": 2.0}
ROPE = {
    "llama": ("default", "llama3", "linear", "yarn"),
    "qwen2moe": ("default", "yarn"),
    "qwen3moe": ("default", "yarn"),
    "mimo2": ("default",),
}


class Gguf(Target):
    """One GGUF file."""

    name, takes, suffix = "gguf", frozenset({"quant", "untie"}), ".gguf"

    def explain(self, source: Source) -> str | None:
        """Name what no stock architecture holds, or llama.cpp's graphs do not compute."""
        parent = source.parent
        if (refusal := stock_refusal(parent, source.carving)) is not None:
            return refusal[0]
        if source.carving.dense and (odd := odd_beside_dense(source)) is not None:
            return f"llama.cpp's only graph with experts in some of the layers has no {odd}"
        if (activation := parent.ffns[0].activation_name) != "silu":
            return f"llama.cpp's experts compute silu, and this model's compute {activation}"
        rope = rope_of(parent.config).get("rope_type", "default")
        graph = graph_of(source)
        if rope not in ROPE[graph]:
            return f"llama.cpp's graph {graph!r} does not scale positions as this model does ({rope})"
        if rope == "yarn" and (odd := odd_yarn(parent.config)) is not None:
            return f"llama.cpp's graph {graph!r} computes YaRN with its own {odd}"
        if source.reach is not None and source.reach < SHORTEST:
            return f"llama.cpp knows no sliding window, and this model's of {source.reach} tokens leaves no text"
        if importlib.util.find_spec("xllamacpp") is None:
            return "llama.cpp (package xllamacpp) is not installed, so a GGUF file cannot be verified"
        vocabulary, rows = max(parent.tokenizer.get_vocab().values()), parent.config.vocab_size
        if vocabulary >= rows:
            return f"the tokenizer has a token {vocabulary} and the model has {rows:,} rows of embedding"
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            stock_config(parent, source.carving, layout_of(source, Options())).save_pretrained(folder)
            write_companions(parent, folder)
            return converter_refusal(folder)

    def lost(self, source: Source, options: Options | None) -> list[str]:
        """List masks by token, exact biases, text beyond a sliding window, and what q4_k_m cannot quantise."""
        home = layout_of(source, Options()).home(source.parent, source.carving)
        found = [*stock_losses(source, home), *reach_loss(source), *mark_losses(source.parent.tokenizer)]
        if options is not None and options.quant != "q4_k_m":
            return found
        config: Any = source.parent.config
        heads = config.num_attention_heads * head_dim(config)
        return found + wide_rows(source.parent.D, heads, home.width)

    def write(self, source: Source, out: Path, options: Options) -> dict[str, Any]:
        """Convert, prove in f32 (bf16 where that does not fit in memory), then quantise.

        Raises:
            MoesmithError: it does not fit, a package is missing, the tokenizer is unknown to llama.cpp, or the file
                that is proved does not compute what the carving computes.
        """
        if (reason := self.explain(source)) is not None:
            raise MoesmithError(reason, "Write another target, such as native.")
        parent, quant = source.parent, options.quant or "bf16"
        if out.exists():
            raise MoesmithError(f"{out} exists", "Give another name.")
        work = hidden_beside(out)
        try:
            folder, plain, made = work / "folder", work / "plain.gguf", work / out.name
            first = "f32" if quant == "f32" or _fits(source) else "bf16"
            facts = write_stock(parent, source.carving, folder, parent.model.dtype, layout_of(source, options))
            convert(folder, plain, first)
            if quant == first:
                plain.rename(made)
            else:
                say(f"  comparing in {first} before {quant}")
                with judging(out):
                    compare(source, plain, source.ids)
                if quant == "q4_k_m":
                    facts["tensors"] = quantise(plain, made)
                else:
                    convert(folder, made, quant)
            os.replace(made, out)
        except OSError as error:
            raise MoesmithError(f"cannot write {out}: {error.strerror or error}", write_cure(error)) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return facts | {"architecture": graph_of(source), "quant": quant, "bytes": out.stat().st_size}

    def beside(self, out: Path) -> list[str]:
        """Name the Modelfile."""
        return [modelfile_of(out).name]

    def accompany(self, source: Source, made: Path, out: Path) -> dict[str, Any]:
        """Write the Modelfile; return the lines for Ollama and ``llama-server``."""
        write_modelfile(source, made)
        return commands(source, out)

    def verify(self, source: Source, out: Path, ids: Tensor) -> dict[str, Any]:
        """Compare log-probabilities and greedy tokens in llama.cpp, tokens of the text, and the chat template."""
        with judging(out):
            return compare(source, out, ids)


def graph_of(source: Source) -> str:
    """Return llama.cpp's name for the graph that runs a model."""
    home = layout_of(source, Options()).home(source.parent, source.carving)
    return {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "mimo2": "mimo2"}[home.dialect]


def layout_of(source: Source, options: Options) -> Layout:
    """Return the layout of the folder for the converter."""
    return Layout(llamacpp=True, untied=options.untie, context=source.context)


def odd_beside_dense(source: Source) -> str | None:
    """Name the first thing that the graph ``mimo2`` lacks; ``None`` if there is nothing."""
    if source.parent.family != "mixtral":
        return "biases or norms of queries and keys"
    return "softmax over several chosen experts" if source.carving.top_k > 1 else None


def odd_yarn(config: Any) -> str | None:
    """Name the first number of a YaRN scaling that llama.cpp does not read from a file; ``None`` if there is none."""
    rope = config.rope_parameters
    level = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    fixed = {"beta_fast": 32, "beta_slow": 1, "attention_factor": level, "truncate": True, "mscale": 0}
    for name, value in (fixed | {"mscale_all_dim": 0}).items():
        if not math.isclose(found := rope.get(name) or value, value, rel_tol=1e-6):
            return f"{name} of {value:g} where this model has {found:g}"
    return None


def mark_losses(tokenizer: Any) -> list[str]:
    """List special tokens that swallow white space next to them, which a GGUF file cannot say."""
    if name_for(tokenizer) != NAME:
        return []
    added = tokenizer.added_tokens_decoder.values()
    odd = sorted(token.content for token in added if token.lstrip or token.rstrip or token.single_word)
    shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    return [f"{shown} swallow the white space next to them, which llama.cpp keeps"] if odd else []


def wide_rows(D: int, heads: int, width: int) -> list[str]:
    """List matrices that q4_k_m leaves in a larger type, whose rows are no multiple of 256, and the next good size.

    Args:
        D: the model's width.
        heads: query heads times head_dim.
        width: channels of an expert on disk.
    """
    rows = {width: ("experts' down_proj", "blk.0.ffn_down_exps.weight")}
    rows.setdefault(D, ("what reads the residual stream", "blk.0.attn_q.weight"))
    rows.setdefault(heads, ("attention's o_proj", "blk.0.attn_output.weight"))
    found = []
    for row, (what, name) in rows.items():
        if row % 256:
            kind = str(tensor_type(name, row, 4, 0, False)).lower()
            found.append(f"q4_k_m keeps {what} in {kind} or larger: rows of {row}, next good {aligned(row, 256)}")
    return found


def compare(source: Source, file: Path, ids: Tensor) -> dict[str, Any]:
    """Ask llama.cpp and the reference the same questions, and judge the answers.

    Returns:
        ``logprob_difference`` (median over positions of the largest difference among llama.cpp's most likely tokens),
        ``logprob_difference_max``, ``within_tolerance`` (share of positions), ``tolerance`` (all in nats),
        ``argmax_agreement``, ``greedy_match`` of ``greedy_tokens``.

    Raises:
        MoesmithError: the tokens, the chat template or the probabilities differ.
    """
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    kind = gguf.LlamaFileType(int(fields["general.file_type"].contents())).name
    tokenizer = source.parent.tokenizer
    template = fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    if template != _template(tokenizer):
        raise _wrong(file, "its chat template is not the parent's")
    longest = (source.reach or POSITIONS + NEW) - 1  # the server needs room for one more
    ids = ids[:, : min(POSITIONS, longest)]
    start = ids.shape[1] // 3 + 1
    new = min(NEW, longest - start)
    # without the marks between documents: llama.cpp is asked to read text as text
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids] + [ODD]
    prompt = chat_prompt(tokenizer)
    questions = Questions(
        texts=texts,
        marked=[*marked_texts(tokenizer, close=bool(mark_losses(tokenizer))), *([] if prompt is None else [prompt])],
        begun=[ODD],
        rows=ids.tolist(),
        prompt=ids[0, :start].tolist(),
        tokens=new,
        chat=[] if prompt is None else CHAT,
        threads=torch.get_num_threads(),
    )
    answers = ask(file, questions)
    for asked, found, added in (
        (texts, answers.texts, False),
        (questions.marked, answers.marked, False),
        (questions.begun, answers.begun, True),
    ):
        if (odd := differing_tokens(tokenizer, asked, found, add_special_tokens=added)) is not None:
            raise _wrong(file, f"llama.cpp makes other tokens than the parent's tokenizer: {odd}")
    if prompt is not None and answers.chat != prompt:
        raise _wrong(file, f"its chat template makes {str(answers.chat)[:80]!r} of a question and not {prompt[:80]!r}")
    for mark in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{mark}_token_id")
        theirs = None if field is None else int(field.contents())
        if (ours := getattr(tokenizer, f"{mark}_token_id")) is not None and ours != theirs:
            raise _wrong(file, f"its {mark} token is {theirs} and not {ours}")
    return _judge(source, file, ids, start, answers, TOLERANCE[kind])


def _template(tokenizer: Any) -> str | None:
    """Return the template of an ordinary chat; a tokenizer may have others by name, for tools or documents."""
    own = tokenizer.chat_template
    return (own.get("default") if isinstance(own, dict) else own) or None


def chat_prompt(tokenizer: Any) -> str | None:
    """Write a question with the chat template; ``None`` without a template that takes one."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may insist on a system message, on tools, on anything
        return None


def _judge(source: Source, file: Path, ids: Tensor, start: int, answers: Answers, relative: float) -> dict[str, Any]:
    reference = stock_reference(source.parent, source.carving, whole=_fits(source))
    logits_NSV = run(reference, ids).logits
    expected_NSV = logits_NSV.log_softmax(-1)
    tolerance = relative * float(logits_NSV.std())
    tokens_NST = torch.tensor([[[token for token, _ in top] for top in row] for row in answers.rows])
    found_NST = torch.tensor([[[value for _, value in top] for top in row] for row in answers.rows])
    worst_NS = (expected_NSV.gather(-1, tokens_NST) - found_NST).abs().amax(-1)
    within = float((worst_NS <= tolerance).double().mean())
    path = torch.cat([ids[0, :start], torch.tensor(answers.greedy, dtype=torch.long)])[None]
    steps_TV = run(reference, path).logits[0, start - 1 : -1].log_softmax(-1)
    chosen_T = torch.tensor(answers.greedy, dtype=torch.long)
    behind_T = steps_TV.amax(-1) - steps_TV.gather(-1, chosen_T[:, None])[:, 0]
    near = float((behind_T <= 2 * tolerance).double().mean()) if len(chosen_T) else 1.0
    same_T = (steps_TV.argmax(-1) == chosen_T).long()
    if within < AGREED or near < AGREED:
        raise _wrong(
            file,
            f"its log-probabilities are within {tolerance:.2g} nats at {within:.0%} of the positions, {near:.0%} of its"
            f" greedy tokens are near the best",
        )
    return {
        "logprob_difference": float(worst_NS.median()),
        "logprob_difference_max": float(worst_NS.max()),
        "within_tolerance": round(within, 4),
        "tolerance": tolerance,
        "argmax_agreement": round(float((logits_NSV.argmax(-1) == tokens_NST[..., 0]).double().mean()), 4),
        "greedy_match": int(same_T.cumprod(0).sum()),
        "greedy_tokens": len(chosen_T),
    }


def _fits(source: Source) -> bool:
    """Whether the whole mixture fits in memory in fp32."""
    return fp32_fits(parameters(source.parent, source.carving)["parameters_total"], source.parent.device)


def _wrong(file: Path, why: str) -> MoesmithError:
    return MoesmithError(
        f"{file} does not answer in llama.cpp as the carving does: {why}",
        "It was deleted. This is a fault of moesmith or of the installed converter: please report it.",
    )
