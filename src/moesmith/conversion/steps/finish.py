"""Steps *baseline*, *export* (a Hugging Face folder, verified) and *evaluate* (held-out perplexity)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from moesmith.console import say
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import geometric_mean, perplexities
from moesmith.evaluation.routing import Recorder, Routing
from moesmith.export.folder import SHARD_BYTES
from moesmith.export.native import write_native
from moesmith.export.stock.experts import router_scales
from moesmith.export.stock.write import stock_reference, write_stock
from moesmith.export.verify import fp32_fits, verify_folder
from moesmith.files.artefact import MANIFEST, SUMS, own_list, read_json, write_list
from moesmith.files.outputs import new_folder
from moesmith.files.seal import file_digest
from moesmith.files.write import write_json, write_record, write_text
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.moe import decoder
from moesmith.parent.layerwise import HELD, Decoder
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.proof.positions import text_to_compare
from moesmith.report.card import model_card
from moesmith.run.folder import STOCK, Run
from moesmith.run.pipeline import Pipeline
from moesmith.run.recipe import Recipe
from moesmith.run.shapes import LOSS, Pace, Shapes
from moesmith.run.step import Cost, Job, Step
from moesmith.training.tracking import Report, Tracking
from moesmith.world import crew

CARD = "README.md"
COPY = 5e8  # bytes per second at which a model is sliced, cast, hashed, written and read


class Baseline(Step):
    """Perplexity per domain of the dense parent."""

    name, parallel = "baseline", True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, "held-out")

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """``parent.json``."""
        result = _perplexities(job.parent.decoder, job.run.held_out, "parent")
        if crew().first:
            write_json(work / "parent.json", result)
        return {"perplexity": result["geomean"]}

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the parent on all evaluation text."""
        tokens = shapes.domains * self.recipe.evaluate.tokens
        return Cost("evaluation", tokens, tokens * (1 / pace.blocks + LOSS / pace.head) if pace else 0.0)


class Export(Step):
    """Write ``RUN/model`` and compare its logits with the carving's own.

    It is in the parent's stock MoE architecture, or in moesmith's own if no stock architecture holds the carving: a
    parent without a gate, a router that is not linear, layers that differ in experts, top-k or width, or attention
    masked by token. If it is attention alone, ``RUN/stock`` is written as well. Both are written and compared under
    hidden names, and get their real names when the step's manifest lists them: nothing unproved ever has that name, and
    only what a manifest lists is replaced.
    """

    name, shared, parallel = "export", False, True  # shared: the model itself is stored elsewhere
    reads = ("companions_digest",)

    def __init__(self, recipe: Recipe, before: str) -> None:
        super().__init__(recipe, before, "held-out")
        self.before = before

    @contextmanager
    def prepared(self, job: Job) -> Iterator[None]:
        """Wrap the step: check what was finished before, and make it again if it is gone."""
        carving, manifest = job.run.carving(self.before), job.run.path("export") / MANIFEST
        names = ("model", "stock") if has_stock(job.parent, carving) else ("model",)
        folders = [job.run.folder / name for name in names]
        if manifest.is_file() and not all((folder / "config.json").is_file() for folder in folders):
            write_record(manifest, read_json(manifest) | {"key": None})  # made again; what it says of the other holds
        elif manifest.is_file():
            for name in names:
                job.run.check_files(name)
        with ExitStack() as places:
            self._ready = carving, folders, places
            yield
        del self._ready

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write the model; the step's folder holds only the manifest. All processes write, the first one compares."""
        target, parent = job.run.model, job.parent.as_stored()
        if not crew().first:
            self._help(parent, job.run.carving(self.before))
            return {}
        carving, folders, places = self._ready
        hidden = {folder: places.enter_context(_place(folder)) for folder in folders}
        ids = text_to_compare(parent.config, next(iter(job.run.held_out.values())))
        counts = parameters(parent, carving)
        whole = fp32_fits(counts["parameters_total"], parent.device)  # else it is compared layer by layer anyway

        def exact(folder: Path, *, judged: bool = True) -> dict[str, Any]:
            return verify_folder(parent, folder, decoder(parent, carving, whole=whole), ids, judged=judged)

        def stock(folder: Path) -> dict[str, Any]:
            written = write_stock(parent, carving, folder, parent.model.dtype)
            return written | verify_folder(parent, folder, stock_reference(parent, carving, whole=whole), ids)

        if not carving.is_native(parent):
            metrics = stock(hidden[target])
            if carving.biased:  # the constant channel replaces it: say how well
                measured = exact(hidden[target])
                metrics |= {f"constant_channel_{name}": measured[name] for name in ("logits_kl", "argmax_agreement")}
                say(f"  constant channel for the bias: mean KL {measured['logits_kl']:.2e} nats to the exact bias")
            elif any(layer.mix == "sum" and layer.top_k > 1 for layer in carving.layers):
                measured = exact(hidden[target], judged=False)
                metrics |= {f"sums_{name}": measured[name] for name in ("logits_kl", "argmax_agreement")}
                say(f"  sums of experts as averages: mean KL {measured['logits_kl']:.2e} nats to the exact sums")
        else:
            metrics = write_native(parent, carving, hidden[target])
            metrics |= exact(hidden[target])
            if has_stock(parent, carving):
                metrics[STOCK] = stock(hidden[job.run.folder / "stock"])
                say("  RUN/stock has no masks over attention by token: all of V and O that any token keeps is used")
        sums = {folder.name: file_digest(place / SUMS) for folder, place in hidden.items()}
        return metrics | {"sums": sums} | counts

    @staticmethod
    def _help(parent: Parent, carving: Carving) -> None:
        """Write this process's shards of the folders that the first one makes, in the same order."""
        if carving.is_native(parent):
            write_native(parent, carving, Path())
        if not carving.is_native(parent) or has_stock(parent, carving):
            write_stock(parent, carving, Path(), parent.model.dtype)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say into what it was exported, and how exactly."""
        text = f"{metrics['architecture']}, largest logits difference {metrics['logits_difference']:.2g}"
        twin = metrics.get(STOCK)
        return text + (f"; also in stock {twin['architecture']}" if twin else "")

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count writing and loading it again, and its fp32 copy next to the sliced model."""
        s, sizes = shapes, shapes.sizes
        again = s.dense * s.stored if s.stored != s.itemsize else 0  # the parent as it is stored, to export from
        shard = min(SHARD_BYTES, s.total * s.stored) + 8 * s.matrices * sizes.D * s.kept
        # a layer sliced and copied, and in fp32 next to the shell
        verify = (4 + 2 * s.itemsize) * s.layer + 4 * s.shell
        twin = s.stock_total if s.native_attention else 0
        models, most = s.total + twin, max(s.total, twin)
        seconds = 6 * models * s.stored / COPY if pace else 0.0
        layered = max(shard, verify)
        device = (s.parent.choice or s.parent).device
        fits = device.type == "meta" or fp32_fits(most, device)  # of another machine nothing is known
        whole = (4 + s.stored) * most if fits else layered  # as it will be compared
        return Cost("export", 0, seconds, whole + again, layered, models * s.stored)


@contextmanager
def _place(folder: Path) -> Iterator[Path]:
    """Give a hidden name for ``RUN/model`` or ``RUN/stock``; what has the real name is replaced if the run lists it.

    The model's card may be edited by its owner, and stays.
    """
    check_known(folder)
    if os.path.lexists(folder / SUMS) and file_digest(folder / SUMS) != Run(folder.parent).sums(folder.name):
        raise MoesmithError(f"{folder} is not a model that this run lists", "Delete it or move it away.")
    with new_folder(folder, overwrite=True, apart=(CARD,)) as work:
        yield work


def check_known(folder: Path) -> None:
    """Refuse to make a model in the place of something that no manifest of the run lists.

    Args:
        folder: ``RUN/model`` or ``RUN/stock``.

    Raises:
        MoesmithError: there is such a thing.
    """
    filled = folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if filled and not Run(folder.parent).has("export"):
        raise MoesmithError(f"{folder} is not a model that this run lists", "Delete it or move it away.")


def has_stock(parent: Parent, carving: Carving) -> bool:
    """Whether a run leaves ``RUN/stock`` next to ``RUN/model``: its attention is native, its experts are not."""
    return bool(carving.attention) and parent.family != NATIVE


class Evaluate(Step):
    """Perplexity per domain of every step's carving and of the parent, and the finished model's routing.

    The last carving is measured on ``RUN/model`` itself, loaded as any user would; so is ``RUN/stock``.
    """

    name, parallel = "evaluate", True

    def __init__(self, recipe: Recipe, made: Sequence[str]) -> None:
        super().__init__(recipe, "held-out", "baseline", *made, "export")
        self.made = list(made)

    def settings(self, job: Job) -> dict[str, Any]:
        """Return which carvings are measured."""
        return {"made": self.made}

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write ``evaluation.json``, ``<step>.json``, ``routing.npz``."""
        run, parent, made, blocks = job.run, job.parent, self.made, job.run.held_out
        results = {"parent": read_json(run.path("baseline") / "parent.json")}
        for name in made[:-1]:
            results[name] = _once(
                work / f"{name}.json",
                lambda name=name: _perplexities(decoder(parent, run.carving(name)), blocks, name),  # type: ignore[misc]
            )
        name, routing, last = made[-1], work / "routing.npz", run.carving(made[-1])

        def finished() -> dict[str, Any]:
            scales = [] if last.is_native(parent) else router_scales(parent, last)
            recorder = Recorder(scales) if last.experts > 1 else None
            found = _perplexities(run.load(parent), blocks, name, recorder)
            if recorder is not None and crew().first:
                recorder.result(parent.tokenizer, list(blocks)).save(routing)
            return found

        results[name] = _once(work / f"{name}.json", finished, *([routing] if last.experts > 1 else []))
        if has_stock(parent, last):
            twin = work / "stock.json"
            results[STOCK] = _once(twin, lambda: _perplexities(run.load(parent, "stock"), blocks, "stock"))
        window = self.recipe.evaluate.window
        summary = {"stages": results, "window": window, "tokens": sum(b.numel() for b in blocks.values())}
        if crew().first:
            write_json(work / "evaluation.json", summary)
            self._report(job, results, Routing.load(routing) if last.experts > 1 else None)
        return {name: result["geomean"] for name, result in results.items()}

    def _report(self, job: Job, results: Mapping[str, Any], routing: Routing | None) -> None:
        """Send what was measured to the recipe's tracker."""
        tracking = Tracking(Report.of(self, job), self.recipe.evaluate.model_dump())
        loads = [] if routing is None else routing.load_LE.max(-1) * routing.sizes_L
        numbers = {f"perplexity/{stage}": result["geomean"] for stage, result in results.items()}
        tracking.log(1, numbers, [float(load) for load in loads])
        tracking.close()

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say all perplexities."""
        return "perplexity " + ", ".join(f"{stage} {value:.2f}" for stage, value in metrics.items())

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count every model on all evaluation text."""
        models = len(self.made) + (shapes.native_attention and shapes.stock_total > 0)  # RUN/stock as well
        tokens = models * shapes.domains * self.recipe.evaluate.tokens
        seconds = tokens * (shapes.active / pace.blocks + LOSS / pace.head) if pace else 0.0
        held = min(HELD, tokens * shapes.sizes.D * shapes.itemsize)
        layerwise = 2 * shapes.layer * shapes.itemsize + shapes.shell * shapes.itemsize + held
        return Cost("evaluation", tokens, seconds, 0, layerwise)


def write_card(run: Pipeline) -> None:
    """Write the model card, and its hash into ``RUN/card.sha256``: a card that was edited since stays as it is."""
    card = run.model / CARD
    text, list_path, name = model_card(run), run.folder / "card.sha256", card.relative_to(run.folder).as_posix()
    known = own_list(list_path) or {}
    if os.path.lexists(card) and card.read_bytes() != text.encode():
        if card.is_symlink() or file_digest(card) != known.get(name):
            say(f"  {card} was edited and stays as it is")
            return
    elif os.path.lexists(card) and known.get(name) == file_digest(card):
        return
    write_text(card, text)
    if known or not os.path.lexists(list_path):
        write_list(list_path, {name: file_digest(card)})


def _once(path: Path, make: Callable[[], dict[str, Any]], *beside: Path) -> dict[str, Any]:
    """Return what a file holds, or make and write it; ``beside``: files that must be there as well."""
    if not crew().share(all(each.is_file() for each in (path, *beside))):
        found = make()
        if crew().first:
            write_json(path, found)
    return crew().share(read_json(path) if crew().first else {})


def _perplexities(
    model: Decoder, blocks: dict[str, Tensor], label: str, listener: Recorder | None = None
) -> dict[str, Any]:
    domains = perplexities(model, blocks, label=f"perplexity of {label}", listener=listener)
    worst = max(domains, key=lambda name: domains[name])
    return {"domains": domains, "geomean": geometric_mean(domains.values()), "worst": worst}
