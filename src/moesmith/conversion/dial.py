"""Find the smallest share of active channels whose loss a user accepts: a few small conversions, and a curve.

The recipe is tried at two shares on a little calibration text, before any training; what it loses there is measured on
calibration records that were held back. The evaluation split is never read. log(perplexity / parent's) falls like a
power of the share of channels that is left out; the curve through both points gives the share. More text and training
lower the loss further, so the share that is found is a cautious one.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesmith.arguments import refuse_many_processes
from moesmith.console import say
from moesmith.conversion.convert import choose_domains, convert
from moesmith.conversion.pace import tokens_of, with_tokens
from moesmith.data.records import Domain
from moesmith.errors import MoesmithError
from moesmith.files.artefact import read_json
from moesmith.run.folder import finished_of
from moesmith.run.legacy import upgraded
from moesmith.run.recipe import Recipe, load_recipe, parse

PROBES = (0.5, 0.75)
BACK = 6  # of so many calibration records one is held back
CARVED, MEASURED = 32_768, 16_384  # tokens of all domains together
LEAST, FLATTEST, STEEPEST = 0.05, 0.5, 4.0  # share; exponent of the curve


def parse_loss(text: str | float) -> float:
    """Read a share such as ``10%`` or ``0.1``.

    Raises:
        MoesmithError: it is no share above 0.
    """
    words = str(text).strip()
    try:
        found = float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
    except ValueError:
        found = math.nan
    if not 0 < found < 10:
        raise MoesmithError(f"--max-loss {text} is no loss", "Write it like 10% or 0.1.")
    return found


def share_for(losses: Mapping[float, float], most: float) -> float:
    """Choose the share whose loss is ``most``, rounded up to a hundredth.

    The curve is log(1 + loss) = a (1 − share)^b through two points; b is kept between :data:`FLATTEST` and
    :data:`STEEPEST`, with the curve then through the point that loses more for its share.

    Args:
        losses: (perplexity / parent's) − 1 by share of active channels, two of them.
        most: the loss that is accepted.
    """
    (s1, r1), (s2, r2) = sorted((share, max(1e-4, math.log1p(loss))) for share, loss in losses.items())
    b = min(STEEPEST, max(FLATTEST, math.log(r1 / r2) / math.log((1 - s1) / (1 - s2))))
    a = max(r1 / (1 - s1) ** b, r2 / (1 - s2) ** b)
    share = 1 - (math.log1p(most) / a) ** (1 / b)
    return math.ceil(round(100 * min(1.0, max(LEAST, share)), 6)) / 100


def active_for(
    most: str | float,
    recipe: str | Path,
    model: str,
    data: str,
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    budget: str | None = None,
    **options: Any,
) -> float:
    """Return the share of channels for ``active`` of :func:`moesmith.conversion.convert.convert`.

    A run that has begun in ``out`` keeps the share that was found then.

    Args:
        most: the largest loss of perplexity, such as ``"10%"``.
        recipe, model, data, out, settings, budget: of the conversion.
        options: further ones of it, such as ``dtype``, ``device`` and ``memory``.

    Raises:
        MoesmithError: no loss, a method without ``carve.ratio``, or as ``convert`` raises.
    """
    refuse_many_processes()
    largest, begun = parse_loss(most), Path(out) / "run.json"
    recipes = {share: load_recipe(recipe, budget, settings, share) for share in PROBES}
    if begun.is_file():
        method = parse(upgraded(read_json(begun)), stored=True).method
        return round(method.active, 6)
    domains = choose_domains(data, recipes[PROBES[0]])
    losses: dict[float, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.mkdir()
        before: list[Path] = []
        for domain in domains:
            _split(domain, text)
        for share, full in recipes.items():
            say(f"trying {share:.0%} active on a little calibration text")
            place = Path(folder) / f"{share}"
            run = convert(_small(full, len(domains)), model, str(text), place, reuse=before, **options)
            stages = run.evaluation["stages"]
            losses[share] = stages[finished_of(stages)]["geomean"] / stages["parent"]["geomean"] - 1
            before = [place]
    share = recipes[PROBES[0]].method.at_least(share_for(losses, largest))
    found = ", ".join(f"{loss:+.0%} at {share:.0%}" for share, loss in losses.items())
    say(f"perplexity {found} active: {share:.0%} for at most {largest:+.0%}")
    return share


def _split(domain: Domain, folder: Path) -> None:
    """Write a domain's calibration records in two parts, as a folder of JSONL files."""
    if len(domain.calibration) < 2:
        raise MoesmithError(f"domain '{domain.name}' has one calibration record", "--max-loss needs two: add text.")
    every = min(BACK, len(domain.calibration))
    back = [record for index, record in enumerate(domain.calibration) if index % every == every - 1]
    rest = [record for index, record in enumerate(domain.calibration) if index % every != every - 1]
    for split, records in (("train", rest), ("test", back)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{domain.name}.{split}.jsonl").write_text(lines, encoding="utf-8")


def _small(recipe: Recipe, domains: int) -> Recipe:
    """The recipe on little text, trained nowhere."""
    counts = dict.fromkeys(tokens_of(recipe), 0)
    for name, tokens in (("domains", CARVED), ("evaluate", MEASURED), ("affinity", MEASURED)):
        if f"{name}.tokens" in counts:
            section = getattr(recipe, name)
            least = -(-tokens // domains // section.window) * section.window
            counts[f"{name}.tokens"] = min(section.tokens, max(section.window, least))
    return with_tokens(recipe, counts)
