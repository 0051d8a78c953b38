"""Stages *affinity* (which domains share an expert) and *carve* (the carving before any training)."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesmith.console import meter, say
from moesmith.conversion.stages.data import moments_of, moments_tokens, windows_of
from moesmith.data.text import Domain, evaluation_blocks
from moesmith.errors import MoesmithError
from moesmith.evaluation.perplexity import perplexities
from moesmith.files.artefact import read_json, write_json, write_text
from moesmith.methods import METHODS
from moesmith.methods import affinity as mining
from moesmith.methods.moments import Group, Moments, Second, channel_moments, group_moments, merge, pool
from moesmith.methods.refit import compensation_bias, refit_down
from moesmith.methods.router import constant_direction, lda_router, random_router
from moesmith.methods.scores import channel_scores, choose
from moesmith.methods.tomoe.warm import pruned_share
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.mixture.moe import decoder
from moesmith.parent.accelerator import closed_form_device, free_memory
from moesmith.parent.load import Parent
from moesmith.run.pipeline import Run
from moesmith.run.recipe import CarveSection, Recipe


def affinity_stage(run: Run, parent: Parent, domains: Sequence[Domain]) -> Path:
    """Cluster the domains; saves the similarity, the perplexity matrix, the tree and the clusters."""
    recipe, names = run.recipe, [domain.name for domain in domains]
    spec, experts = recipe.affinity, recipe.carve.experts

    def body(work: Path) -> dict[str, Any]:
        if not recipe.clustered:
            # no affinity: a static mask and random experts see every domain; the control draws from the pool
            write_json(work / "clusters.json", {"clusters": [names] * experts})
            return {"clusters": [names] * experts}
        scores = [channel_scores(parent, moments_of(run, name), recipe.carve.score) for name in names]
        matrix = None
        if spec.method == "perplexity":
            matrix = _perplexities(run, parent, domains, scores, work)
            similarity = mining.perplexity_similarity(matrix, spec.profile)
        else:
            similarity = mining.score_similarity(scores)
        if spec.method == "published":
            assert spec.published is not None
            clusters = mining.published(spec.published, names, experts)
            found = mining.Affinity(names, matrix, similarity, None, clusters)
        else:
            found = mining.mine(names, similarity, experts, spec.linkage, matrix)
        _write_matrix(work / "affinity.csv", names, found.similarity)
        if matrix is not None:
            _write_matrix(work / "matrix.csv", names, matrix)
        if found.tree is not None:
            _write_rows(work / "linkage.csv", [[repr(float(x)) for x in row] for row in found.tree])
        write_json(work / "clusters.json", {"clusters": found.clusters})
        for expert, group in enumerate(found.clusters):
            say(f"  expert {expert}: {', '.join(group)}")
        return {"clusters": found.clusters}

    settings: dict[str, Any] = {"needed": recipe.clustered, "experts": experts, "names": names}
    if recipe.clustered:
        carve = recipe.carve
        settings |= {"affinity": spec.model_dump(), "score": carve.score}
        if recipe.mined:
            settings |= {"ratio": pruned_share(recipe, parent), "selection": carve.selection}
    return run.stage("affinity", ["moments"], settings, body)


def _perplexities(
    run: Run, parent: Parent, domains: Sequence[Domain], scores: Sequence[Tensor], work: Path
) -> np.ndarray:
    """The n × n perplexities of pruned models with bias compensation (dive.md §5); finished rows survive a kill."""
    spec, carve = run.recipe.affinity, run.recipe.carve
    blocks = [evaluation_blocks(d, parent.tokenizer, spec.tokens, spec.window).blocks for d in domains]
    rows = []
    with meter("affinity", len(domains) * sum(block.numel() for block in blocks)) as bar:
        for domain, score in zip(domains, scores, strict=True):
            path = work / f"row-{domain.name}.json"
            if not path.is_file():
                channels = [[kept] for kept in choose(score, pruned_share(run.recipe, parent), carve.selection)]
                pruned = _carving(parent, channels, [moments_of(run, domain.name)], biased=True)
                texts = {str(index): block for index, block in enumerate(blocks)}
                write_json(path, list(perplexities(decoder(parent, pruned), texts, bar=bar).values()))
            rows.append(read_json(path))
    return np.array(rows)


def _carving(
    parent: Parent, channels: list[list[Tensor]], groups: Sequence[Moments], top_k: int = 1, *, biased: bool
) -> Carving:
    """Channels and, if asked for, FLAP's bias; routers are zero."""
    layers = []
    for index, kept_E in enumerate(channels):
        routed = [Expert(kept) for kept in kept_E]
        if biased:
            down_DF = parent.ffns[index].down_DF.to(parent.device)
            for expert, group in zip(routed, groups, strict=True):
                expert.bias_D = compensation_bias(down_DF, group.mean_LF[index], expert.channels)
        layers.append(Layer(routed, Linear(torch.zeros(len(routed), parent.D)), top_k))
    return Carving(layers, parent.F)


def carve_stage(run: Run, parent: Parent) -> Path:
    """Channels, compensation and router start: the whole MoE before training."""
    recipe = run.recipe
    spec = recipe.carve.model_copy(update={"ratio": pruned_share(recipe, parent)})
    if recipe.learned:  # masks come first, compensation on top of them
        spec = spec.model_copy(update={"compensation": "none"})
    start = recipe.router

    def body(work: Path) -> dict[str, Any]:
        clusters = read_json(run.path("affinity") / "clusters.json")["clusters"]
        windows, drawn = windows_of(run), spec.method == "dive" and not recipe.clustered
        if drawn:
            texts = [[ids] for ids in _pool_draws(windows, spec.experts, recipe.seed)]
        else:
            texts = [[windows[name] for name in names] for names in clusters]
        second = _SecondPass(parent, recipe, spec, texts)
        if second.whole:
            groups = [pool(group.domains) for group in second.whole]
        elif drawn or moments_tokens(recipe) is not None:
            groups = [pool([channel_moments(parent, ids) for ids in text]) for text in texts]
        else:
            groups = [pool([moments_of(run, name) for name in names]) for names in clusters]
        channels = METHODS[spec.method](parent, groups, spec, recipe.seed)
        carving = _carving(parent, channels, groups, spec.top_k, biased=spec.compensation == "bias")
        metrics = second.fill(carving)
        generator = torch.Generator().manual_seed(recipe.seed)
        for layer in carving.layers:
            layer.noise, router = start.noise, layer.router
            assert isinstance(router, Linear)
            if spec.experts > 1 and start.start == "random":
                router.weight_ED = random_router(spec.experts, parent.D, generator)
            if spec.experts > 1 and start.noise:
                router.noise_ED = random_router(spec.experts, parent.D, generator)
        carving.provenance = {"method": spec.method, "clusters": clusters, "parent": run.inputs}
        carving.save(work)
        iou = carving.overlap()[:, ~torch.eye(spec.experts, dtype=torch.bool)]
        metrics |= {"union": round(float(carving.union().mean()), 4)} | parameters(parent, carving)
        return metrics | {"overlap": round(float(iou.mean()), 4) if iou.numel() else None}

    settings = {
        "carve": spec.model_dump(),
        "router": start.model_dump(),
        "scale": recipe.stage1.gate_temperature,
        "random_groups": recipe.affinity.method == "random",
    }
    return run.stage("carve", ["affinity"], settings, body)


def _pool_draws(windows: dict[str, Tensor], experts: int, seed: int) -> list[Tensor]:
    """The control without affinity mining (dive.md §4.7): each expert gets its own draw from all domains' windows."""
    everything = torch.cat(list(windows.values()))
    size = max(1, len(everything) // experts)
    draws = []
    for expert in range(experts):
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed + expert))
        draws.append(everything[order[:size]])
    return draws


class _SecondPass:
    """What needs second moments: refit, closed-form router, constant direction.

    Attributes:
        whole: the moments of all layers, where a refit needs their Gram matrices and these fit in memory together.
    """

    def __init__(self, parent: Parent, recipe: Recipe, spec: CarveSection, texts: Sequence[Sequence[Tensor]]) -> None:
        self.parent, self.recipe = parent, recipe
        self.refit = spec.compensation == "refit"
        self.lda = recipe.router.start == "lda" and spec.experts > 1
        self.needed = self.refit or self.lda or spec.compensation == "bias"
        self.weights = [float(sum(map(len, text))) for text in texts]
        if not (self.refit or self.lda):  # a direction in D dimensions needs tokens by D, not every window
            texts = [[_thin(torch.cat(list(text)), 32 * parent.D // len(texts))] for text in texts]
        self.texts = texts
        self.chunks = layer_groups(parent, len(texts), gram=self.refit) if self.needed else []
        self.whole: list[Group] = []
        if self.refit and len(self.chunks) == 1:
            self.whole = group_moments(parent, texts, self.chunks[0], gram=True)

    def fill(self, carving: Carving) -> dict[str, Any]:
        """Put into ``carving`` what the moments say; how constant the constant direction is."""
        errors: list[float] = []
        for layers in self.chunks:
            groups = self.whole or group_moments(self.parent, self.texts, layers, gram=self.refit)
            with meter("closed forms", len(layers), "layers") as bar:
                for offset, index in enumerate(layers):
                    layer, inputs = carving.layers[index], [group.inputs[offset] for group in groups]
                    layer.constant_D, error = constant_direction(merge(inputs, self.weights))
                    errors.append(error)
                    if self.lda:
                        scale = self.recipe.stage1.gate_temperature
                        layer.router = Linear(lda_router(inputs, self.recipe.router.ridge, scale))
                    if self.refit:
                        grams = [group.channels[offset] for group in groups]
                        refit_layer(self.parent, index, layer.routed, grams, self.weights, self.recipe)
                    bar.advance(1)
        if not errors:
            return {}
        return {"constant_direction_error_mean": statistics.mean(errors), "constant_direction_error_max": max(errors)}


def _thin(windows: Tensor, tokens: int) -> Tensor:
    """Evenly spaced windows that hold about so many tokens."""
    wanted = max(1, tokens // windows.shape[1])
    return windows[:: max(1, len(windows) // wanted)]


def refit_layer(
    parent: Parent,
    index: int,
    experts: Sequence[Expert],
    grams: Sequence[Second],
    weights: Sequence[float],
    recipe: Any,
) -> None:
    """Give every expert a ``down_proj`` (D, F_e) refitted on its Gram matrix, with a share of everybody's mixed in.

    In the parent's stored dtype on the CPU, whatever it was computed in and where: carvings are the same everywhere.
    """
    spec, down_DF = recipe.carve, parent.ffns[index].down_DF
    place = closed_form_device(parent.device)
    grams = [Second(gram.count, gram.mean_N.to(place), gram.gram_NN.to(place)) for gram in grams]
    pooled_FF = merge(grams, weights).gram_NN
    for expert, gram in zip(experts, grams, strict=True):
        mixed_FF = torch.lerp(gram.gram_NN, pooled_FF, spec.pool)
        expert.down_DF = refit_down(down_DF, mixed_FF, expert.channels, spec.ridge).to("cpu", parent.stored)


def gram_bytes(D: int, F: int, groups: int, *, gram: bool) -> int:
    """Bytes of one layer's second moments: of router inputs, with ``gram`` also of channels, per group of domains."""
    return 4 * groups * (D**2 + (F**2 if gram else 0))


def layer_groups(parent: Parent, groups: int, *, gram: bool) -> list[list[int]]:
    """Layers whose second moments fit in half of the device's free memory together, or a quarter of what may be used.

    Raises:
        MoesmithError: not even one layer fits.
    """
    per_layer = gram_bytes(parent.D, parent.F, groups, gram=gram)
    shared = parent.memory is not None and parent.device.type == "cpu"  # --memory is the host's
    room = parent.memory // 4 if shared else free_memory(parent.device) // 2  # type: ignore[operator]
    at_once = room // per_layer
    if at_once < 1:
        raise MoesmithError(
            f"the Gram matrices of one layer need {per_layer / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are for them",
            "Free memory, use fewer experts, or set carve.compensation to bias.",
        )
    order = list(range(parent.L))
    return [order[i : i + at_once] for i in range(0, parent.L, at_once)]


def _write_matrix(path: Path, names: Sequence[str], matrix: np.ndarray) -> None:
    _write_rows(path, [["", *names], *([n, *(repr(float(x)) for x in r)] for n, r in zip(names, matrix, strict=True))])


def _write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())
