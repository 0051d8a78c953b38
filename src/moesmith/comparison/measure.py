"""Measure one model for a comparison: every window's loss, every item's answer, so that models can be paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from moesmith.comparison.spec import Measure
from moesmith.console import meter
from moesmith.data.text import evaluation_blocks, load_domains, read_records, records_file
from moesmith.errors import MoesmithError
from moesmith.evaluation.harness import Found, find_tasks, run_items
from moesmith.evaluation.likelihoods import lambada_scores
from moesmith.evaluation.perplexity import token_nlls, wikitext2_blocks
from moesmith.files.artefact import digest
from moesmith.parent.layerwise import Decoder
from moesmith.parent.load import Parent

WIKITEXT = "wikitext2"


class Ruler:
    """Text and tasks, read once.

    Attributes:
        digest: of all that it reads.

    Args:
        parent: whose tokenizer reads them.
        data: data source; WikiText-2, LAMBADA and tasks need a folder.
        spec: what to measure.

    Raises:
        MoesmithError: a domain, a file or a task is missing or malformed.
    """

    def __init__(self, parent: Parent, data: str, spec: Measure) -> None:
        self.parent, self.spec = parent, spec
        self.folder = Path(data)
        if (spec.wikitext2 or spec.lambada) and not self.folder.is_dir():
            raise MoesmithError("WikiText-2 and LAMBADA need files of these names", "Give a folder that holds them.")
        domains = load_domains(data, spec.names)
        self.blocks: dict[str, Tensor] = {
            d.name: evaluation_blocks(d, parent.tokenizer, spec.tokens, spec.window).blocks for d in domains
        }
        if spec.wikitext2:
            self.blocks[WIKITEXT] = wikitext2_blocks(parent.tokenizer, self.folder, spec.window, spec.wikitext2)
        records: dict[str, Any] = {}
        if spec.lambada:
            records["lambada"] = read_records(records_file(self.folder, "lambada.test"))[: spec.lambada]
        local = self.folder if self.folder.is_dir() else None
        self.tasks: Found = find_tasks(spec.tasks, local) if spec.tasks else {}
        for name, task in self.tasks.items():
            records[name] = [(part.test, part.train) for part in task] if isinstance(task, list) else name
        self.digest = digest([{name: ids.tolist() for name, ids in self.blocks.items()}, records])

    def measure(self, model: Decoder, label: str) -> dict[str, Any]:
        """Measure a model.

        Returns:
            ``windows``: mean loss of each window, by domain (and ``wikitext2``), nats per token; ``lambada``: ``loss``
            of each last word and whether it was the most likely one (``right``); ``tasks``: by task and metric, each
            item's score.
        """
        with meter(label, sum(ids.numel() for ids in self.blocks.values())) as bar:
            nlls = token_nlls(model, list(self.blocks.values()), bar=bar)
        windows = {
            name: [round(float(x), 6) for x in nll_NS.double().mean(1)]
            for name, nll_NS in zip(self.blocks, nlls, strict=True)
        }
        found: dict[str, Any] = {"windows": windows}
        whole, tokenizer = cast(PreTrainedModel, model), self.parent.tokenizer
        if self.spec.lambada:
            scores = lambada_scores(whole, tokenizer, self.folder, self.spec.lambada)
            found["lambada"] = {
                "loss": [round(-s.total, 6) for s in scores],
                "right": [int(s.greedy) for s in scores],
            }
        if self.tasks:
            found["tasks"] = run_items(whole, tokenizer, self.tasks, self.spec.limit)
        return found
