"""Recipes: everything a conversion depends on, typed, with presets, budget overlays and ``--set``.

A recipe's section ``carve`` holds the settings of its method (``carve.method``); the method also decides which further
sections there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import SerializeAsAny, ValidationError, create_model

from moesmith.arguments import path_text, several
from moesmith.errors import MoesmithError, first_fault
from moesmith.files.parse import parse_yaml
from moesmith.run.settings import DomainsSection, EvaluateSection, LoopSection, Section, Tracker, TrainSection

if TYPE_CHECKING:
    from moesmith.methods.base import Method

BUDGETS = ("demo", "small", "evening", "paper")
DEFAULT = "dive"  # the method of a recipe that names none
DECIDING = ("carve.method=", "carve.start=", "carve.start.")  # which sections a recipe has
# settings that had other names or places in version 0.1, and what to write now
RENAMED = {"masks.start": "carve.start.method (with carve.method tomoe)"}


class Recipe(Section):
    """A whole conversion; made by :func:`load_recipe` or :func:`parse`, which know a method's sections."""

    name: str
    description: str = ""
    seed: int = 42
    report_to: Tracker = "none"
    domains: DomainsSection = DomainsSection()
    carve: SerializeAsAny[Section]
    stage2: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @cached_property
    def method(self) -> Method:
        """The method, with this recipe's settings."""
        from moesmith.methods.registry import find

        carve: Any = self.carve
        return find(carve.method)(self)

    def model_copy(self, **options: Any) -> Self:
        """Copy the recipe; the copy's method has the copy's settings."""
        found = super().model_copy(**options)
        found.__dict__.pop("method", None)
        return found

    def same_work(self) -> dict[str, Any]:
        """Return what it does, as values: without its name, its tracker, and the settings of stages that it skips."""
        found = self.model_dump(mode="json", exclude={"name", "description", "report_to"})
        for key in found:
            section = getattr(self, key)
            if isinstance(section, LoopSection) and not section.tokens:
                found[key] = {"tokens": 0}
        return found


def kind_of(values: Mapping[str, Any]) -> type[Recipe]:
    """Return the type of a recipe with these values: its method's settings, and the sections the method reads.

    Raises:
        MoesmithError: there is no such method.
    """
    from moesmith.methods.registry import find

    given = values.get("carve")
    carve = given if isinstance(given, Mapping) else {}
    method = find(carve.get("method", DEFAULT))
    sections = method.sections_of(carve)
    made: Callable[..., type[Recipe]] = _made  # mypy does not know that types can be hashed
    return made(method, tuple(sections.items()))


@cache
def _made(method: type[Method], sections: tuple[tuple[str, type[Section]], ...]) -> type[Recipe]:
    """Make one type for all recipes of a kind, so that two with the same values are equal."""
    more: dict[str, Any] = {name: (kind, kind()) for name, kind in sections}
    return create_model("Recipe", __base__=Recipe, carve=(method.Settings, method.Settings()), **more)


def parse(values: Mapping[str, Any], *, stored: bool = False) -> Recipe:
    """Make a recipe from values.

    Args:
        values: sections by name.
        stored: whether a run stored the values; they are then taken as they are.

    Raises:
        MoesmithError: an unknown method or key (with the nearest right one), or a value that does not fit.
    """
    kind = kind_of(values)
    try:
        return kind.model_validate(values, context={"stored": stored})
    except ValidationError as error:
        where, what = first_fault(error, "recipe")
        if error.errors()[0]["type"] == "extra_forbidden":
            _check_key(where, kind)
        raise MoesmithError(f"{where}: {what}", "See 'moesmith presets' and docs/recipes.md.") from error


def presets() -> dict[str, str]:
    """Map the names of the recipes that come with moesmith to their one-line descriptions."""
    return dict(_presets())


@cache
def _presets() -> dict[str, str]:
    """Read all of them once per process: that is needed to know one name, and a command asks several times."""
    found = {}
    for entry in sorted((files("moesmith.run") / "presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = yaml.safe_load(entry.read_text(encoding="utf-8"))["description"]
    return found


def choose_recipe(
    recipe: str | Path | Recipe,
    budget: str | None,
    settings: str | Sequence[str] | None,
    active: float | None = None,
) -> Recipe:
    """Return a :class:`Recipe` as it is, or load one with :func:`load_recipe`.

    Raises:
        MoesmithError: budget, settings or active are given with a :class:`Recipe`, or as :func:`load_recipe`.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, budget, settings, active)
    if budget is not None or several("settings", settings) or active is not None:
        raise MoesmithError(
            "budget, settings and active change no Recipe", "Give them to load_recipe, or the recipe's name."
        )
    return recipe


def load_recipe(
    name: str | Path,
    budget: str | None = None,
    settings: str | Sequence[str] | None = (),
    active: float | None = None,
) -> Recipe:
    """Load a preset, a method's name or a YAML file, with a budget overlay and ``section.key=value`` settings on top.

    Args:
        name: of the preset, method or file.
        budget: the overlay.
        settings: on top of both.
        active: share of the feed-forward channels that a token uses, in place of ``carve.ratio``.

    Raises:
        MoesmithError: unknown preset, budget or key (with the nearest right one), or a value that does not fit.
    """
    name, settings = path_text("recipe", name), several("settings", settings)
    own, inherited = _read(name)
    budgets = _overlay(*({"budgets": values.pop("budgets", {})} for values in (inherited, own)))["budgets"]
    overlays = budgets.values() if isinstance(budgets, dict) else ["no mapping"]
    if not all(isinstance(each or {}, dict) for each in overlays) or budgets.keys() - set(BUDGETS):
        raise MoesmithError(f"{name}: budgets is no mapping of {', '.join(BUDGETS)}", "See docs/recipes.md.")
    if budget is not None:
        if budget not in BUDGETS:
            raise MoesmithError(f"there is no budget '{budget}'", f"Choose one of {', '.join(BUDGETS)}.")
        overlay = yaml.safe_load((files("moesmith.run") / "budgets" / f"{budget}.yaml").read_text(encoding="utf-8"))
        overlay = _overlay(overlay, budgets.get(budget) or {})
        values = _overlay(inherited, own)
        own = _known(_overlay(own, {name: part for name, part in overlay.items() if _used(values, name)}), values, own)
    given: dict[str, Any] = {}
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found:
            raise MoesmithError(f"--set {setting} has no '='", "Write --set section.key=value.")
        parsed = parse_yaml(value, f"--set {setting}", "Quote text, as in 'x: y'.")
        nested: Any = parsed
        for part in reversed(key.split(".")):
            nested = {part: nested}
        given = _overlay(given, nested)
    carve = given.get("carve")
    if isinstance(carve, Mapping) and carve.keys() & {"method", "start"}:  # keep what that method knows
        parse(_overlay(_known(inherited, _overlay(inherited, own), {}), own))
        inherited, own = _overlay(inherited, own), {}
    own = _overlay(own, given)
    if active is not None:
        own = _overlay(own, {"carve": {"ratio": _ratio(active, _overlay(inherited, own), given)}})
    values = _overlay(inherited, own)
    kind = kind_of(values)
    for setting in settings:
        _check_key(setting.partition("=")[0], kind)
    return parse(_overlay(_known(inherited, values, {}), own))


def _ratio(active: float, values: Mapping[str, Any], given: Mapping[str, Any]) -> float:
    """Return what an expert loses if all that a token visits have a share ``active`` of the channels together."""
    from moesmith.methods.registry import find

    kind, own = kind_of(values), values.get("carve", {})
    carve: Any = kind.model_fields["carve"].get_default(call_default_factory=True)
    top_k: Any = own.get("top_k", getattr(carve, "top_k", 1)) if isinstance(own, Mapping) else None
    if not isinstance(top_k, int):
        parse(values)  # says what is wrong
    if "ratio" not in type(carve).model_fields:
        cure = "Set masks.budget." if "masks" in kind.model_fields else "Set the method's own width."
        raise MoesmithError(f"--active: method {carve.method} has no carve.ratio that follows from it", cure)
    if "ratio" in given.get("carve", {}):
        raise MoesmithError("--active and carve.ratio say the same", "Give one of them.")
    if not 0 < active <= min(1.0, top_k):
        raise MoesmithError(f"--active {active:g} is no share of the channels", "Give more than 0 and at most 1.")
    return round(find(carve.method).ratio_of(active, top_k), 6)


def _read(name: str, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a recipe's own values, and those of its ``base``; ``above`` are the recipes that led here."""
    if name in above:
        raise MoesmithError(f"{name} is its own base", "Name a preset as the base.")
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise MoesmithError(f"there is no recipe file {path}", "Give a preset's name or an existing YAML file.")
        text = path.read_bytes
    else:
        if name not in (known := presets()):
            return _of_method(name, known), {}
        text = (files("moesmith.run") / "presets" / f"{name}.yaml").read_bytes
    try:
        values = parse_yaml(text(), name)
    except OSError as error:
        raise MoesmithError(f"{name} cannot be read: {error.strerror or error}", "Give a YAML file.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise MoesmithError(f"{name} is not a recipe", "A recipe is a YAML mapping with a name and sections.")
    values = {"name": Path(name).stem, **values}
    if base := values.pop("base", None):
        beneath, inherited = _read(str(base), (*above, name))
        return values, _overlay(inherited, beneath)
    return values, {}


def _of_method(name: str, known: Mapping[str, str]) -> dict[str, Any]:
    """Return the recipe that is a method with its defaults."""
    from moesmith.methods.registry import methods

    if name not in methods():
        near = difflib.get_close_matches(name, [*known, *methods()], 1, 0.3)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise MoesmithError(f"there is no preset '{name}'", f"{hint}'moesmith presets' lists them.")
    return {"name": name, "description": methods()[name].title, "carve": {"method": name}}


def _known(inherited: Mapping[str, Any], values: Mapping[str, Any], always: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the inherited values that the recipe's method knows; another method's settings are dropped."""
    kind = kind_of(values)
    found: dict[str, Any] = {}
    for name, value in inherited.items():
        field = kind.model_fields.get(name)
        if field is None and name not in always:
            continue
        section = None if field is None else field.annotation
        if isinstance(value, Mapping) and isinstance(section, type) and issubclass(section, Section):
            kept = always.get(name, {})
            value = {key: part for key, part in value.items() if key in section.model_fields or key in kept}
        found[name] = value
    return found


def _used(values: Mapping[str, Any], name: str) -> bool:
    """Whether a budget may change a section: it scales the stages that a recipe trains and adds none."""
    section = values.get(name)
    return name not in ("masks", "stage1", "stage2") or (isinstance(section, Mapping) and bool(section.get("tokens")))


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``top`` over ``base``, section by section."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = _overlay(merged.get(key, {}), value)
        else:
            merged[key] = value
    return merged


def keys(kind: type[Recipe]) -> list[str]:
    """List every setting of a type of recipe as ``section.key``."""
    found = []
    for name, field in kind.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found += [f"{name}.{key}" for key in section.model_fields]
        else:
            found.append(name)
    return found


def applicable(name: str | Path, given: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return those of ``settings`` that a recipe has, in their order: what recipes of several methods have in common.

    Args:
        name: of the preset, method or file.
        given: all settings that it gets; one that chooses the method decides what it has.
        settings: ``section.key=value``.
    """
    deciding = [setting for setting in given if setting.startswith(DECIDING)]
    mine = keys(kind_of(load_recipe(name, None, deciding).model_dump()))
    return [setting for setting in settings if _has(mine, setting.partition("=")[0])]


def check_known(settings: Sequence[str]) -> None:
    """Refuse a setting that no method's recipe has: it is misspelt.

    Raises:
        MoesmithError: there is one; the message names the nearest.
    """
    from moesmith.methods.registry import methods

    known = sorted({key for name in methods() for key in keys(kind_of({"carve": {"method": name}}))})
    for key in (setting.partition("=")[0] for setting in settings):
        if not _has(known, key):
            near = difflib.get_close_matches(key, known, 1, 0.0)
            raise MoesmithError(f"no recipe has a setting '{key}'", f"Did you mean '{near[0]}'?")


def _has(known: Sequence[str], key: str) -> bool:
    """Whether a key is among a recipe's, or one of a start's own settings."""
    return key in known or ("carve.start" in known and key.startswith("carve.start."))


def _check_key(key: str, kind: type[Recipe]) -> None:
    known = keys(kind)
    if _has(known, key):
        return
    method = kind.model_fields["carve"].get_default(call_default_factory=True).method
    near = difflib.get_close_matches(key, known, 1, 0.0)
    cure = f"Write {RENAMED[key]}." if key in RENAMED else f"Did you mean '{near[0]}'?"
    raise MoesmithError(f"there is no setting '{key}' with method {method}", cure)
