"""Your own model and your own text, from Python: write domains, convert, look at the result.

    python examples/own_text.py                          # under a minute on a CPU, nothing is downloaded
    moesmith inspect runs/example/run                    # what was made
    moesmith report runs/example/run                     # the page about it

The "own model" is a Llama of some 400 thousand parameters that this script trains for a few seconds on the "own text",
four domains from Python's standard library, so that the perplexities mean something. Put your own folders into
:func:`main` and the rest stays as it is.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import moesmith
from moesmith.data.text import load_domains, training_blocks
from moesmith.files.artefact import read_json

SETTINGS = ["carve.experts=4", "carve.ratio=0.75", "stage1.tokens=16384", "stage2.tokens=65536", "evaluate.window=256"]


def texts() -> Iterator[tuple[str, list[str]]]:
    """Four domains, each a name and its texts."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))[:60]
    sources = [path.read_text(encoding="utf-8") for path in modules]
    trees = [ast.parse(source) for source in sources]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(n) for tree in trees for n in ast.walk(tree) if isinstance(n, documented)]
    yield "code", [source[:2000] for source in sources]
    yield "prose", [text for text in found if text and len(text) > 150]
    rng = random.Random(0)
    sums = [(rng.randrange(100), rng.randrange(100)) for _ in range(4000)]
    lines = [f"{a} + {b} = {a + b}" for a, b in sums]
    yield "sums", ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    names = [name for i in range(0x100, 0x1400) if (name := unicodedata.name(chr(i), ""))]
    yield "characters", ["\n".join(names[i : i + 20]) for i in range(0, len(names), 20)]


def write_domains(folder: Path) -> None:
    """The format of docs/data.md: a pair of JSONL files per domain, one record per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in texts():
        random.Random(name).shuffle(records)
        held_out = len(records) // 4  # the two files must not share a record
        for split, part in (("test", records[:held_out]), ("train", records[held_out:])):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"{name}.{split}.jsonl").write_text(lines, encoding="utf-8")


def make_parent(folder: Path, data: Path, steps: int = 150) -> None:
    """A small Llama trained on the domains, saved as an ordinary Hugging Face folder."""
    torch.manual_seed(0)
    domains = load_domains(str(data))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"vocab_size": 512, "special_tokens": ["<s>", "</s>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special)
    bpe.train_from_iterator((r["text"] for domain in domains for r in domain.calibration), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.08,  # a narrow model starts from larger weights
    )
    model = LlamaForCausalLM(config)
    blocks = training_blocks(domains, tokenizer, steps * 8 * 256, 256, seed=0).blocks
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for ids in blocks.split(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"own model: {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss.item():.2f}")
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write text and model, convert, and print what came out."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/example"))
    # a model this small gains nothing from bf16
    options.add_argument("--dtype", default="fp32", help="what models compute in: auto, bf16, fp32")
    options.add_argument("--device", default="auto", help="where: auto, cpu, cuda, mps, xpu")
    given = options.parse_args()
    out = given.out
    parent, data = out / "parent", out / "text"
    if not (parent / "config.json").is_file():  # kept from an earlier call: the run below is then continued
        write_domains(data)
        make_parent(parent, data)

    run = moesmith.convert(
        "dive-plus",
        str(parent),
        str(data),
        out / "run",
        budget="demo",
        settings=SETTINGS,
        dtype=given.dtype,
        device=given.device,
    )

    stages = read_json(run.path("evaluate") / "evaluation.json")["stages"]
    for name, result in stages.items():
        print(f"{name:8} perplexity {result['geomean']:.2f}")
    carving = moesmith.Carving.load(run.path("experts"))
    print(f"experts: {carving.provenance['clusters']}, union of channels {carving.union().mean():.2f}")


if __name__ == "__main__":
    main()
