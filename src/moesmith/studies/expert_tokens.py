"""What decides a token's expert: the token, its class, the one before it, its domain, its place?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from moesmith.console import meter
from moesmith.evaluation.perplexity import evaluating
from moesmith.evaluation.routing import pieces
from moesmith.mixture.moe import build, moe_blocks
from moesmith.parent.hooks import hooked
from moesmith.run.settings import Section
from moesmith.studies.bench import Bench, digest_of, key_of
from moesmith.studies.figures import by_layer
from moesmith.studies.routing_domains import information
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS: dict[str, tuple[str, str]] = {
    "tomoe-50": ("ToMoE as published", "tomoe-50"),
    "tomoe-plus": ("tomoe-plus", "tomoe-plus"),
    "dive-plus": ("dive-plus", "dive-plus"),
    "token": ("token carving", "token"),
}
FACTORS = ("token", "token before", "class", "domain", "place")
FUNCTION = frozenset(
    "a an the this that these those and or but nor so if then than as of in on at by for from to with without into"
    " over under about between is are was were be been being am do does did has have had will would can could may"
    " might must shall should not no i you he she it we they me him her us them my your his its our their who whom"
    " which what when where why how there here".split()
)


@register
class ExpertTokens(Study):
    """Mutual information of expert and five properties of a token, by layer, in four mixtures."""

    name = "expert-tokens"
    title = "What decides a token's expert?"
    paper = "ToMoE, arXiv:2501.15316, expert visualisations"
    question = (
        "Are experts chosen by syntax or by meaning: by the token itself, its class, the token before it, the text's"
        " domain, or its place in the window?"
    )
    expected = (
        "ToMoE's figures suggest syntax: punctuation, numbers, parts of words. DIVE's experts are made for domains."
    )
    settings = (
        f"domains.names=[{SIXTEEN}]", "domains.tokens=6144", "affinity.method=scores", "evaluate.tokens=1024",
        "masks.window=512", "masks.batch=1", "masks.micro_batch=1", "stage1.tokens=0", "stage2.tokens=0",
    )  # fmt: skip

    class Options(Section):
        """How much text is looked at."""

        tokens: int = Field(2048, ge=512, description="held-out tokens of every domain")

    def conversions(self) -> list[Planned]:
        """The mixtures that are looked at."""
        return [Planned(name, recipe, (), title) for name, (title, recipe) in ROWS.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Four conversions; every token's experts on the same text."""
        found = {}
        for one in self.conversions():
            run, name, title = bench.make(one), one.name, one.title
            blocks = bench.blocks(list(run.held_out), self.options.tokens)

            def look(run: Any = run, blocks: Any = blocks) -> dict[str, Any]:
                model = build(bench.parent, run.carving())
                ids_LT = chosen(model, torch.cat(list(blocks.values())), run.folder.name)
                return shares_of(ids_LT, properties(bench.parent.tokenizer, blocks)) | {
                    "examples": examples(ids_LT[len(ids_LT) // 2], bench.parent.tokenizer, blocks)
                }

            found[name] = {"title": title} | bench.once(name, [key_of(run), digest_of(blocks)], look)
        return found

    def tables(self, found: Found) -> list[Table]:
        """Shares, mean over layers; what each expert of the middle layer takes."""
        body = [[r["title"], *(f"{np.mean(r[f]):.1%}" for f in FACTORS)] for r in found.values()]
        tables = [
            Table("How much of an expert's entropy each property explains, mean over layers", ["", *FACTORS], body)
        ]
        for row in found.values():
            lines = [[f"E{e}", f"{x['share']:.1%}", " · ".join(x["tokens"])] for e, x in enumerate(row["examples"])]
            head = ["expert", "of all tokens", "tokens that it takes most above its share"]
            tables.append(Table(f"{row['title']}: middle layer", head, lines))
        return tables

    def figures(self, found: Found) -> dict[str, Figure]:
        """The shares by layer."""
        return {
            f"shares-{name}": by_layer(
                "explained share of the expert's entropy", {f: row[f] for f in FACTORS}, row["title"]
            )
            for name, row in found.items()
        }


def chosen(model: Any, ids_NS: Tensor, label: str, batch: int = 8) -> np.ndarray:
    """Return the expert with the largest weight of every token, (L, T); layers without a choice are left out."""
    routers = [block.router for block in moe_blocks(model) if block.router.spec.experts > 1]
    seen: list[list[Tensor]] = [[] for _ in routers]

    def hook(index: int) -> Any:
        def see(_module: Any, _args: Any, out: Any) -> None:
            seen[index].append(out[2][..., 0].flatten().cpu())

        return see

    hooks = hooked((router, hook(i)) for i, router in enumerate(routers))
    with hooks, evaluating(model), meter(label, ids_NS.numel()) as bar:
        for part_BS in ids_NS.split(batch):
            model.base_model(input_ids=part_BS.to(model.device), use_cache=False)
            bar.advance(part_BS.numel())
    return torch.stack([torch.cat(parts) for parts in seen]).numpy()


def properties(tokenizer: Any, blocks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return what is known of every token, as numbers (T,): of ``FACTORS``."""
    ids_NS = torch.cat(list(blocks.values()))
    before_NS = torch.cat([torch.full_like(ids_NS[:, :1], -1), ids_NS[:, :-1]], 1)
    known = {int(i): class_of(tokenizer, int(i)) for i in ids_NS.unique()}
    names = sorted(set(known.values()))
    domains = np.repeat(np.arange(len(blocks)), [part.numel() for part in blocks.values()])
    place_S = torch.arange(ids_NS.shape[1]).clamp_min(1).log2().long()
    return {
        "token": ids_NS.flatten().numpy(),
        "token before": before_NS.flatten().numpy(),
        "class": np.array([names.index(known[int(i)]) for i in ids_NS.flatten()]),
        "domain": domains,
        "place": place_S.expand_as(ids_NS).flatten().numpy(),
    }


def class_of(tokenizer: Any, index: int) -> str:
    """Name the class of a token: what can be said of it without the others."""
    piece = str(tokenizer.convert_ids_to_tokens(index))
    begins = piece.startswith(("Ġ", "▁", " "))
    word = str(tokenizer.decode([index])).strip()
    if not word:
        return "space"
    if word.isdigit():
        return "number"
    if not any(map(str.isalnum, word)):
        return "punctuation"
    if not word.isascii():
        return "other letters"
    if word.lower() in FUNCTION:
        return "function word"
    if not begins:
        return "part of a word"
    return "capitalised word" if word[0].isupper() else "word"


def shares_of(ids_LT: np.ndarray, known: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, list[float]]:
    """Compute by property and layer the mutual information with the expert, over the expert's entropy.

    What shuffled experts would give is subtracted: with many values of a property chance alone looks like knowledge.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(ids_LT.shape[1])
    found: dict[str, list[float]] = {}
    for name, values_T in known.items():
        values_T = np.unique(values_T, return_inverse=True)[1]
        found[name] = [max(0.0, _share(e_T, values_T) - _share(e_T[order], values_T)) for e_T in ids_LT]
    return found


def _share(experts_T: np.ndarray, values_T: np.ndarray) -> float:
    table = np.zeros((int(experts_T.max()) + 1, int(values_T.max()) + 1))
    np.add.at(table, (experts_T, values_T), 1)
    return information(table)


def examples(
    experts_T: np.ndarray, tokenizer: Any, blocks: Mapping[str, Tensor], count: int = 10, least: int = 5
) -> list[dict[str, Any]]:
    """List, for every expert, its share of tokens and those that it takes most above that share.

    Args:
        experts_T: a layer's choices.
        tokenizer: the parent's.
        blocks: the text.
        count: tokens to list.
        least: how often a token must come.
    """
    ids_T = torch.cat(list(blocks.values())).flatten().numpy()
    everywhere, found = Counter(ids_T.tolist()), []
    for expert in range(int(experts_T.max()) + 1):
        mine = Counter(ids_T[experts_T == expert].tolist())
        rate = {i: n / everywhere[i] for i, n in mine.items() if everywhere[i] >= least}
        best = sorted(rate, key=lambda i: (-rate[i], -everywhere[i], i))[:count]
        found.append({"share": float((experts_T == expert).mean()), "tokens": [_shown(tokenizer, i) for i in best]})
    return found


def _shown(tokenizer: Any, index: int) -> str:
    text: Sequence[str] = pieces(tokenizer, [index])
    return repr(text[0])[1:-1].strip() or "␣"
