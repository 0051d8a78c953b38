"""Steps *domains* (calibration windows), *moments* (channel statistics by domain) and *carve* (a method's layers)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from moesmith.arguments import ceil_div
from moesmith.calibration.moments import Moments, channel_moments, gram_bytes
from moesmith.calibration.stream import BATCH, WAITING, Stream, buffers
from moesmith.console import say
from moesmith.data.encoding import reading
from moesmith.data.sampling import packed_windows, sample_windows
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json, read_tensors
from moesmith.files.write import write_json, write_tensors
from moesmith.methods import taylor
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.layer import Layer
from moesmith.mixture.moe import carved_layer
from moesmith.parent.accelerator import free_memory, halving
from moesmith.parent.layerwise import Layered, layered
from moesmith.parent.load import Parent
from moesmith.parent.vocabulary import readable
from moesmith.run.folder import Run
from moesmith.run.settings import DomainsSection
from moesmith.run.shapes import LOSS
from moesmith.run.step import Cost, Job, Step
from moesmith.world import alone, beside, crew

if TYPE_CHECKING:
    from moesmith.methods.base import Carver
    from moesmith.run.recipe import Recipe
    from moesmith.run.shapes import Pace, Shapes

T = TypeVar("T")


class Domains(Step):
    """Calibration windows of every domain."""

    name, tokenises = "domains", True
    reads = ("text_digest", "chat_digest")

    def settings(self, job: Job) -> dict[str, Any]:
        """Return names, counts, and how text is read."""
        spec, records = self.recipe.domains, {domain.name: domain.calibration for domain in job.domains}
        found: dict[str, Any] = {"names": job.names, "tokens": spec.tokens, "window": spec.window}
        found |= {} if spec.reading == "random" else {"reading": spec.reading}
        return found | reading(records, job.parent.tokenizer)

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write ``windows.safetensors``: int32 (N, window) by domain."""
        spec, tokenizer = self.recipe.domains, job.parent.tokenizer
        read = sample_windows if spec.reading == "random" else packed_windows
        windows = {
            domain.name: read(domain, tokenizer, spec.tokens, spec.window, self.recipe.seed) for domain in job.domains
        }
        readable(windows, job.parent.model)
        write_tensors(work / "windows.safetensors", {name: ids.to(torch.int32) for name, ids in windows.items()})
        return {"calibration_tokens": {name: ids.numel() for name, ids in windows.items()}}

    def windows(self) -> dict[str, int]:
        """Return the window of the calibration text."""
        return {"domains.window": self.recipe.domains.window}

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the token ids on disk."""
        tokens = shapes.domains * self.recipe.domains.tokens
        return Cost(tokens=tokens, disk=4 * tokens)


def windows_of(run: Run) -> dict[str, Tensor]:
    """Read calibration windows by domain, (N, window) int64."""
    return {name: ids.long() for name, ids in read_tensors(run.path("domains") / "windows.safetensors").items()}


class ChannelMoments(Step):
    """Channel moments of the dense parent, one forward pass per domain; finished domains survive a kill.

    Attributes:
        tokens: how many of each domain; ``None`` for all calibration text.
        gradients: how many of each domain gradients are taken on as well; 0 for none.
    """

    name, parallel = "moments", True

    def __init__(self, recipe: Recipe, tokens: int | None, gradients: int = 0) -> None:
        super().__init__(recipe, "domains")
        self.tokens, self.gradients = tokens, gradients

    def settings(self, job: Job) -> dict[str, Any]:
        """Return how many tokens."""
        found = {} if self.tokens is None else {"tokens": self.tokens}
        return found | ({"gradients": self.gradients} if self.gradients else {})

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write ``<domain>.safetensors``: count, mean and variance per layer and channel, and slopes if asked for."""
        windows = windows_of(job.run)
        read = sum(first(windows[name], self.tokens).numel() for name in job.names)
        for position, name in crew().mine(list(enumerate(job.names))):
            path, used = work / f"{name}.safetensors", first(windows[name], self.tokens)
            if not path.is_file() and len(used):
                label = f"moments {position + 1}/{len(job.names)} {name}"
                with alone():
                    found = text_moments(job.parent, windows[name], self.tokens, self.gradients, label=label)
                write_tensors(path, found.tensors())
        crew().exchange(None)  # all domains are written
        return {"tokens": read}

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count a forward pass, and one forward and backward where gradients are taken."""
        spec, sizes = self.recipe.domains, shapes.sizes
        tokens = shapes.domains * (spec.tokens if self.tokens is None else min(spec.tokens, self.tokens))
        disk = 8 * shapes.domains * sizes.L * sizes.F
        seconds = tokens / pace.blocks if pace else 0.0
        if not self.gradients:
            return Cost(seconds=seconds, disk=disk)
        if pace:  # a forward pass, and about as much again twice
            backward = shapes.domains * min(spec.tokens, self.gradients)
            seconds += backward * (3 / pace.blocks + 2 * LOSS / pace.head)
        memory = shapes.itemsize * taylor.BATCH * spec.window * sizes.L * (10 * sizes.D + 6 * sizes.F)
        return Cost(seconds=seconds, memory=memory, layerwise=None, disk=disk * (2 + shapes.matrices) // 2)


def first(windows: Tensor, tokens: int | None) -> Tensor:
    """Take the first windows (N, window) that hold ``tokens`` tokens; all of them if ``None``."""
    return windows if tokens is None else windows[: ceil_div(tokens, windows.shape[1])]


def as_fits(label: str, parent: Parent, batch: int, run: Callable[[int], T]) -> T:
    """Run with batches of a size, and out of an accelerator's memory again with less.

    In several processes one alone cannot try again: the others wait for its share.
    """
    return run(batch) if crew().size > 1 else halving(label, parent.device, batch, run)


def evenly(run: Run, names: Sequence[str], tokens: int) -> Tensor:
    """Take whole windows (N, window) of calibration text, equally many of each domain, with at least so many tokens."""
    windows = windows_of(run)
    return torch.cat([first(windows[name], ceil_div(tokens, len(names))) for name in names])


def evenly_tokens(spec: DomainsSection, domains: int, tokens: int) -> int:
    """Count the tokens that :func:`evenly` takes."""
    return domains * min(spec.tokens, ceil_div(tokens, domains * spec.window) * spec.window)


def text_moments(
    parent: Parent, windows: Tensor, tokens: int | None, gradients: int, label: str = "moments"
) -> Moments:
    """Take channel moments over the first ``tokens`` of a text (N, window), and slopes over the first ``gradients``.

    Raises:
        MoesmithError: gradients cannot be taken (:func:`moesmith.methods.taylor.slopes`).
    """
    found = channel_moments(parent, first(windows, tokens), label=label)
    if gradients:
        found.slopes_MLF = taylor.slopes(parent, first(windows, gradients), f"{label}, gradients")
    return found


def moments_of(run: Run, name: str) -> Moments:
    """Read a domain's channel moments."""
    return Moments.from_tensors(read_tensors(run.path("moments") / f"{name}.safetensors"))


LAYERS = "layers"  # the folder of layers of a carving that is not finished
SAVE_SECONDS = 20.0


class Begun:
    """Layers of a carving that is being made, kept on disk so that a process that was killed goes on behind them.

    Args:
        folder: where each layer is a carving of one layer.
        method: its ``measured`` numbers are kept as well.
        generator: the one of the carving; its state is kept as well.
        d_ff: channels of the parent.
        name: of the step, for the line that says where it goes on.
    """

    def __init__(self, folder: Path, method: Carver, generator: torch.Generator, d_ff: int, name: str) -> None:
        self.folder, self.method, self.generator, self.d_ff, self.name = folder, method, generator, d_ff, name
        self.kept, self.saved = 0, time.monotonic()

    def restore(self) -> list[Layer]:
        """Read the layers that are there, in order; the method and the generator go on from the last one."""
        state = self.folder / "state.json"
        known: dict[str, Any] = read_json(state) if state.is_file() else {"layers": 0, "measured": {}}
        self.method.measured, self.kept = known["measured"], int(known["layers"])
        if self.kept:
            self.generator.set_state(torch.tensor(list(bytes.fromhex(known["random"])), dtype=torch.uint8))
            say(f"{self.name}: continuing at layer {self.kept}")
        return [self.read(index) for index in range(self.kept)]

    def keep(self, layers: list[Layer]) -> None:
        """Write the layers that are not there yet, unless the last ones were written a moment ago; all must call it.

        What was written is taken from there again: matrices of experts that are mapped files need no memory. The state
        is written behind the layers and says how many count: a kill between two layers leaves the older state.
        """
        if not crew().share(time.monotonic() - self.saved >= SAVE_SECONDS):
            return
        if crew().first:
            for index in range(self.kept, len(layers)):
                folder = self.folder / f"{index}"
                folder.mkdir(parents=True, exist_ok=True)
                Carving([layers[index]], self.d_ff).save(folder)
            random = bytes(self.generator.get_state().tolist()).hex()
            state = {"layers": len(layers), "measured": self.method.measured, "random": random}
            write_json(self.folder / "state.json", state)
        crew().exchange(None)
        layers[self.kept :] = [self.read(index) for index in range(self.kept, len(layers))]
        self.kept, self.saved = len(layers), time.monotonic()

    def read(self, index: int) -> Layer:
        """Read a layer that was written."""
        return Carving.load(self.folder / f"{index}").layers[0]


class Carve(Step):
    """A method's layers, one after the other: the whole mixture before any training."""

    name, title, parallel = "carve", "carved", True

    def __init__(self, recipe: Recipe, method: Carver, *needs: str) -> None:
        super().__init__(recipe, *needs)
        self.method = method

    def settings(self, job: Job) -> dict[str, Any]:
        """Return the method's name, version and settings."""
        return self.method.key(job.parent)

    def make(self, job: Job, work: Path) -> Mapping[str, Any]:
        """Write a carving."""
        parent, method = job.parent, self.method
        room, needs, base = waiting_room(parent), method.needs(), method.base(job)

        def run(batch: int) -> list[Layer]:
            generator = torch.Generator().manual_seed(self.recipe.seed)
            begun = Begun(work / LAYERS, method, generator, parent.F, self.name)
            texts = method.begin(job)  # in every attempt: a method may count or draw as it goes on
            layers = begun.restore()
            crew().exchange(None)  # all have read what the first one will go on writing
            options: dict[str, Any] = {"held": needs.held, "repair": needs.repair, "folder": work, "room": room}
            options["around"] = around(parent, base) if base.attention else None
            with Stream(parent, texts, method.activations, batch=batch, label=self.name, **options) as stream:
                for view in stream.views(generator):
                    if view.index == len(layers):
                        layer = method.carve(view)
                        layer.check(parent.D, parent.F)
                        layers.append(layer)
                        begun.keep(layers)
                    layer = layers[view.index]
                    so_far = replace(base, layers=[*layers, *[layer] * (parent.L - len(layers))])
                    stream.carved(lambda: parent.turned(layered(parent.model, made(so_far))).layer(view.index))  # noqa: B023
            return layers

        def made(carving: Carving) -> Any:
            return lambda index: carved_layer(parent, carving, index)

        layers = as_fits(self.name, parent, BATCH, run)
        crew().exchange(None)
        if not crew().first:
            return {}
        for left in work.glob(f"{WAITING}*"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        carving = replace(base, layers=layers)
        carving.provenance = {"method": method.name, "parent": job.run.inputs} | method.provenance()
        carving.save(work)
        shutil.rmtree(work / LAYERS, ignore_errors=True)
        iou_LP = carving.overlap()[:, ~torch.eye(carving.experts, dtype=torch.bool)]
        iou_N = iou_LP[~iou_LP.isnan()]
        found: dict[str, Any] = dict(method.metrics())
        found |= {"union": round(float(carving.union().mean()), 4)} | parameters(parent, carving)
        return found | {"overlap": round(float(iou_N.mean()), 4) if len(iou_N) else None}

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Say how much experts have in common, and what the method says."""
        overlap, own = metrics.get("overlap"), self.method.headline(metrics)
        shared = f"union {metrics['union']:.3f}" + (f", overlap {overlap:.3f}" if overlap is not None else "")
        return f"{shared}; {own}" if own else shared

    def cost(self, shapes: Shapes, pace: Pace | None) -> Cost:
        """Count the passes and matrices that the method asks for."""
        needs, sizes = self.method.needs(), shapes.sizes
        tokens = self.method.tokens(shapes)
        seconds = 0.0
        if pace and tokens:  # a Gram matrix is symmetric, and takes a little more than half of the products
            grams, solves = self.method.closed_forms(shapes)
            squares = 0.6 * grams * sizes.F**2 + needs.inputs * tokens * sizes.D**2
            through = tokens * needs.passes + sizes.L * squares / sizes.total
            seconds = through / pace.blocks + sizes.L * solves / pace.solves
        groups = shapes.E if needs.groups is None else needs.groups
        gram = shapes.gram(groups + 2, channels=needs.gram) if needs.inputs or needs.gram else 0
        places = buffers(self.method.activations, held=needs.held, repair=needs.repair)
        states = places * tokens * sizes.D * shapes.itemsize
        waiting = min(states, waiting_room(shapes.parent))
        disk = 4 * sizes.L * shapes.E * (shapes.kept + 2 * sizes.D) + shapes.own
        passing = shapes.own + states - waiting  # layers are kept one by one before they are one file
        return Cost(seconds=seconds, memory=gram + waiting, layerwise=gram + waiting, disk=disk, passing=passing)


def around(parent: Parent, carving: Carving) -> Layered:
    """The parent with a carving's attention and its own networks, layer by layer."""
    return parent.turned(layered(parent.model, lambda index: carved_layer(parent, carving, index, inside=False)))


def waiting_room(parent: Parent) -> int:
    """Return the bytes of memory for a process's tokens that wait between two layers; the rest wait on disk."""
    return (parent.memory or free_memory(torch.device("cpu"))) // 8 // beside()


def check_gram(parent: Parent, groups: int, *, gram: bool) -> None:
    """Refuse second moments of a layer that need more than half of the device's free memory, or a quarter of --memory.

    Raises:
        MoesmithError: they need more.
    """
    per_layer = gram_bytes(parent.D, parent.F, groups, gram=gram)
    shared = parent.memory is not None and parent.device.type == "cpu"  # --memory is the host's
    room = (parent.memory or 0) // 4 if shared else free_memory(parent.device) // 2
    if per_layer > room:
        raise MoesmithError(
            f"the Gram matrices of one layer need {per_layer / 2**30:.1f} GiB, but have {room / 2**30:.1f} GiB",
            "Free memory, use fewer experts, or set carve.compensation to bias.",
        )
