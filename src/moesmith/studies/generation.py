"""Open-ended text: what perplexity of given text does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from moesmith.console import meter
from moesmith.evaluation.perplexity import token_nll
from moesmith.run.settings import Section
from moesmith.studies.bench import Bench, digest_of, key_of
from moesmith.studies.figures import marks
from moesmith.studies.study import SIXTEEN, Found, Planned, Study, Table, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 16
ROWS: dict[str, tuple[str, str, list[str]]] = {
    "static": ("static mask, refit, trained", "flap-static-refit", ["stage2.loss=distill"]),
    "dive-plus": ("dive-plus", "dive-plus", []),
    "token": ("token carving, distilled", "token", []),
}


@register
class Generation(Study):
    """Continuations of held-out text by the parent and three mixtures, judged by the parent and by counting."""

    name = "generation"
    title = "What do carved models write?"
    paper = "DIVE, arXiv:2506.09351, section 5"
    question = (
        "Do half-active models continue text as the parent does? How likely does the parent find it, how much of it"
        " is repeated, how many different words are there?"
    )
    expected = "Less likely to the parent in the order of the models' perplexities; greedy text repeats itself more."
    settings = (
        f"domains.names=[{SIXTEEN}]",
        "domains.tokens=12288",
        "affinity.method=scores",
        "evaluate.tokens=1024",
        "stage1.tokens=0",
        "stage2.tokens=163840",
    )

    class Options(Section):
        """Prompts and continuations."""

        prompts: int = Field(4, ge=1, description="prompts of every domain")
        prompt: int = Field(48, ge=2, description="tokens of each")
        new: int = Field(64, ge=8, description="tokens of a continuation")
        temperature: float = Field(0.8, gt=0, description="of sampled continuations")
        top_p: float = Field(0.95, gt=0, le=1, description="likewise")

    def conversions(self) -> list[Planned]:
        """The models that write."""
        return [Planned(name, recipe, own, title) for name, (title, recipe, own) in ROWS.items()]

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Three conversions, continuations of each and of the parent, beside the text's own continuation."""
        spec, found = self.options, {}
        runs = {one.name: bench.make(one) for one in self.conversions()}
        names = list(next(iter(runs.values())).held_out)
        blocks = bench.blocks(names, spec.prompts * (spec.prompt + spec.new), spec.prompt + spec.new)
        ids_NS = torch.cat([part[: spec.prompts] for part in blocks.values()])
        prompts_NP, key = ids_NS[:, : spec.prompt], [digest_of(blocks), spec.model_dump()]
        found["text"] = {"title": "the text itself"} | self._judged(bench, "text", key, prompts_NP, lambda: ids_NS)
        models = {"parent": ("dense parent", None), **{n: (ROWS[n][0], run) for n, run in runs.items()}}
        for name, (title, run) in models.items():
            made = [*key, None if run is None else key_of(run)]
            for sampled in (False, True):
                how = "sampled" if sampled else "greedy"

                def write(run: Any = run, sampled: bool = sampled, label: str = f"{name} {how}") -> Tensor:
                    model = bench.parent.model if run is None else run.load(bench.parent)
                    return continued(model, prompts_NP, spec, bench.parent.tokenizer, label, sampled=sampled)

                row = self._judged(bench, f"{name}-{how}", made, prompts_NP, write)
                found[f"{name}-{how}"] = {"title": f"{title}, {how}"} | row
        return found

    def _judged(self, bench: Bench, name: str, key: Any, prompts_NP: Tensor, write: Any) -> dict[str, Any]:
        """Make continuations, and measure them: all kept under a name."""
        width = prompts_NP.shape[1]

        def make() -> dict[str, Any]:
            ids_NS = write()
            nll = token_nll(bench.parent.model, ids_NS, BATCH, label=f"{name}: the parent reads").double()
            new_NW = ids_NS[:, width:]
            texts = [str(bench.parent.tokenizer.decode(row)) for row in new_NW[:: max(1, len(new_NW) // 8)]]
            starts = [str(bench.parent.tokenizer.decode(row)) for row in prompts_NP[:: max(1, len(new_NW) // 8)]]
            return {
                "perplexity": float(nll.reshape(len(ids_NS), -1)[:, width - 1 :].mean().exp()),
                "repeated": repeated(new_NW.tolist(), 4),
                "distinct": distinct(new_NW.tolist(), 2),
                "samples": list(zip(starts, texts, strict=True)),
            }

        return bench.once(name, key, make)

    def tables(self, found: Found) -> list[Table]:
        """Numbers, and the beginnings of some continuations."""
        head = ["", "the parent's perplexity", "repeated 4-grams", "different 2-grams"]
        body = [
            [r["title"], f"{r['perplexity']:.2f}", f"{r['repeated']:.1%}", f"{r['distinct']:.1%}"]
            for r in found.values()
        ]
        tables = [Table("Continuations", head, body)]
        for index, (prompt, text) in enumerate(found["text"]["samples"][:4]):
            texts = [[r["title"], _short(r["samples"][index][1])] for n, r in found.items() if n != "text"]
            tables.append(Table(f"To read, {index + 1}: … {_short(prompt[-160:])}", ["", "continuation"],
                                [["the text itself", _short(text)], *texts]))  # fmt: skip
        return tables

    def figures(self, found: Found) -> dict[str, Figure]:
        """How likely, and how repetitive."""
        titles = [row["title"] for row in found.values()]
        return {
            "likelihood": marks("the parent's perplexity (log scale)", titles, {"": _all(found, "perplexity")}),
            "repetition": marks(
                "share of n-grams, %", titles,
                {"repeated 4-grams": [100 * x for x in _all(found, "repeated")],
                 "different 2-grams": [100 * x for x in _all(found, "distinct")]}, log=False,
            ),
        }  # fmt: skip


def _all(found: Found, name: str) -> list[float]:
    return [row[name] for row in found.values()]


def _short(text: str) -> str:
    return " ".join(text.split())[:220]


def continued(
    model: PreTrainedModel, prompts_NP: Tensor, spec: Any, tokenizer: Any, label: str, *, sampled: bool
) -> Tensor:
    """Continue prompts of one length, (N, P + new): no end of text is written, so that all are as long."""
    how: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        how |= {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
    generate: Any = model.generate
    parts = []
    with meter(label, len(prompts_NP) * spec.new) as bar, torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        for part_NP in prompts_NP.split(BATCH):
            ids = part_NP.to(model.device)
            made = generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=spec.new, min_new_tokens=spec.new,
                pad_token_id=tokenizer.eos_token_id, **how,
            )  # fmt: skip
            parts.append(made.cpu())
            bar.advance(len(part_NP) * spec.new)
    return torch.cat(parts)


def grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """List the n-grams of a text."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repeated(texts: Sequence[Sequence[int]], n: int) -> float:
    """Compute the share of a text's n-grams that stand in it before, mean over texts."""
    shares = [1 - len(set(found)) / len(found) for found in (grams(text, n) for text in texts)]
    return sum(shares) / len(shares)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Compute different n-grams of all texts together over their number (Li et al., arXiv:1510.03055)."""
    found = [gram for text in texts for gram in grams(text, n)]
    return len(set(found)) / len(found)
