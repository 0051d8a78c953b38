"""Read what version 0.1 wrote: its recipes in the terms of this version, and the keys of its steps.

Its recipes had every section whatever the method, ``masks.tokens`` said whether masks are learned, and a step's key
depended on whole sections. So a step of such a run is recognised by the key that 0.1 gave it, computed from the recipe
as 0.1 stored it, if that recipe has the wanted step in this version. There are two kinds of keys: with the fingerprints
of text and dtype (format 2), and older ones without (no format), whose manifests must say that the rest agrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith.errors import MoesmithError
from moesmith.files.artefact import finished, read_json
from moesmith.files.seal import digest
from moesmith.parent.sizes import Sizes
from moesmith.run.fingerprints import folder_companions
from moesmith.run.recipe import Recipe, keys, kind_of, parse
from moesmith.run.step import Job, Step, trained

if TYPE_CHECKING:
    from moesmith.run.pipeline import Pipeline

SINCE = 3  # the first format of this version's own


def upgraded(header: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the recipe of a run's header as this version would write it."""
    values: dict[str, Any] = dict(header["recipe"])
    if header.get("format", 1) >= SINCE:
        return values
    carve, masks = dict(values["carve"]), dict(values.get("masks") or {"tokens": 0})
    if masks["tokens"]:
        start = masks.pop("start", "random")
        own = {name: carve[name] for name in ("experts", "compensation", "ridge", "pool") if name in carve}
        begun = {name: carve[name] for name in ("method", "score", "selection") if name in carve}
        if begun.get("method") == "llama-moe":
            begun = {"method": "llama-moe"}
        values["carve"] = {"method": "tomoe"} | own | ({"start": begun} if start == "carving" else {})
        values["masks"] = masks
    try:
        known = keys(kind_of(values))
    except MoesmithError:
        return values
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            found[name] = value
        elif isinstance(value, Mapping):
            inner = {key: part for key, part in value.items() if f"{name}.{key}" in known}
            found |= {name: inner} if inner else {}
    return found


class Legacy:
    """A run of version 0.1, and the keys that its steps have.

    Attributes:
        header: its ``run.json`` as 0.1 wrote it.
        recipe: its recipe in the terms of this version.
    """

    def __init__(self, folder: Path, header: dict[str, Any], recipe: Recipe) -> None:
        self.folder, self.header, self.recipe = folder, header, recipe
        self.keys: dict[str, str] = {}  # of format 2
        self.oldest: dict[str, str] = {}  # without a format

    @classmethod
    def of(cls, folder: Path) -> Legacy | None:
        """Return the run of a folder if version 0.1 began it."""
        path = folder / "run.json"
        header = read_json(path) if path.is_file() else {}
        header = header.get("before", header) if isinstance(header, dict) else {}
        if not {"recipe", "inputs"} <= header.keys() or header.get("format", 1) >= SINCE:
            return None
        try:
            return cls(folder, header, parse(upgraded(header), stored=True))
        except MoesmithError:
            return None

    def learn(self, step: Step, job: Job, settings: Mapping[str, Any], run: Pipeline) -> None:
        """Note the keys that a wanted step had, if this run's recipe has that step as well."""
        theirs = next((one for one in self.steps if one.name == step.name), None)
        if theirs is None or theirs.settings(job) != settings or self.recipe.seed != run.recipe.seed:
            return
        if any(need not in self.keys for need in step.needs):
            return
        inputs = {k: run.inputs[k] for k in ("model_digest", "data_digest")}
        then = old_settings(step.name, self.header["recipe"], settings, job)
        if then is None:
            return
        facts = {"stage": step.name, "settings": then, "seed": run.recipe.seed}
        needs = {need: self.keys[need] for need in step.needs}
        self.keys[step.name] = digest({**facts, "needs": needs, "inputs": inputs | run._reads(step)})
        if step.name == "moments":
            facts["settings"] = {}  # over all text: more than is needed
        needs = {need: self.oldest[need] for need in step.needs}
        self.oldest[step.name] = digest({**facts, "needs": needs, "inputs": inputs})

    @cached_property
    def steps(self) -> list[Step]:
        """List the steps of its recipe in this version."""
        from moesmith.conversion.order import steps_of

        return steps_of(self.recipe)

    def keys_of(self, name: str) -> list[str]:
        """List the keys under which 0.1 may have begun a step."""
        return [known[name] for known in (self.keys, self.oldest) if name in known]

    def holds(self, step: Step, run: Pipeline, *, own: bool) -> bool:
        """Whether this step is finished in its folder.

        The oldest keys cover neither the tokenizer nor the dtype of the computation: the manifest must say that they
        agree. What it does not say counts as the same only in the run's own folder.
        """
        folder = self.folder / "stages" / step.name
        if step.name in self.keys and finished(folder, self.keys[step.name]):
            return True
        if step.name not in self.oldest:
            return False
        manifest = finished(folder, self.oldest[step.name])
        if manifest is None or "format" in manifest or "chat_digest" in run.inputs or "compute" in run._reads(step):
            return False
        then, now = manifest.get("inputs", {}), run.inputs
        if any(then.get(k, now.get(k) if own else None) != now.get(k) for k in ("tokenizer_digest", "dtype")):
            return False
        known = now.get("companions_digest")
        return step.name != "export" or known is None or folder_companions(run.folder / "model") == known


def old_settings(step: str, recipe: Mapping[str, Any], settings: Mapping[str, Any], job: Job) -> Any:
    """Return the settings that a step's key depended on in 0.1, which may differ from this version's."""
    carve, masks = recipe["carve"], recipe.get("masks") or {"tokens": 0}
    if step == "carve":
        decided: dict[str, Any] = {}
        if masks["tokens"]:
            from moesmith.methods.tomoe.warm import expert_ratio

            decided = {"ratio": expert_ratio(Sizes.of(job.parent), masks["budget"]), "compensation": "none"}
        return {
            "carve": carve | decided,
            "router": recipe["router"],
            "scale": recipe["stage1"]["gate_temperature"],
            "random_groups": recipe["affinity"]["method"] == "random",
        }
    if step == "masks":
        return masks | {"experts": carve["experts"]}
    if step == "moments":
        then = _old_moments(recipe)
        return None if then and not settings else then  # it has less than is needed
    return settings


def _old_moments(recipe: Mapping[str, Any]) -> dict[str, int]:
    """Return how many tokens of each domain 0.1 took moments over; empty for all of them."""
    carve, affinity = recipe["carve"], recipe["affinity"]
    learned = (recipe.get("masks") or {"tokens": 0})["tokens"] > 0
    clustered = carve["method"] == "dive" and affinity["method"] != "random"
    if carve["compensation"] != "refit" or learned or (clustered and affinity["method"] == "perplexity"):
        return {}
    return {"tokens": min(affinity["tokens"], recipe["domains"]["tokens"]) if clustered else 0}


TITLES = {
    "carve": "carved",
    "masks": "masks learned",
    "refit": "down_proj refitted",
    "router": "routers trained",
    "experts": "experts trained",
}


def described(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a manifest the title and the headline that version 0.1 did not write."""
    if "headline" in manifest:
        return dict(manifest)
    name, metrics = manifest.get("stage", ""), manifest.get("metrics", {})
    return dict(manifest) | {"title": TITLES.get(name, ""), "headline": _headline(name, metrics)}


def _headline(name: str, metrics: Mapping[str, Any]) -> str:
    if "trainable" in metrics:
        return trained(metrics) + (f", {metrics['active_share']:.1%} active" if "active_share" in metrics else "")
    if name == "evaluate":
        return "perplexity " + ", ".join(f"{stage} {value:.2f}" for stage, value in metrics.items())
    if name == "export":
        return f"{metrics.get('architecture')}, largest logits difference {metrics.get('logits_difference', 0):.2g}"
    return f"union {metrics['union']:.3f}" if name == "carve" and "union" in metrics else ""
