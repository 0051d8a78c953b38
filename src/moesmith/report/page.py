"""The report: one self-contained HTML page about a run, made from what its stages left on disk.

Every section is built on its own. A section that a run has no data for (a static mask has no affinity, an untrained
model no loss) becomes one sentence.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moesmith.arguments import takes_paths
from moesmith.data.overlap import found_in, warnings
from moesmith.errors import MoesmithError
from moesmith.files.artefact import check_file
from moesmith.files.outputs import check_result, new_file, real
from moesmith.files.parse import as_written
from moesmith.files.write import write_text
from moesmith.report import figures, masks, routes, style
from moesmith.report.numbers import big, duration, number, percent
from moesmith.report.source import AbsentError, Source, present
from moesmith.run.folder import STOCK, Run, finished_of
from moesmith.run.versions import versions_of
from moesmith.training.log import read_log

DEAD = 0.05  # an expert is dead below this fraction of the uniform share


@takes_paths("run", "output")
def write_report(run: str | Path, output: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the page of a run, and its figures as PNG files in ``figures`` next to it.

    Args:
        run: a folder made by ``moesmith convert``, finished or not.
        output: where to write; if left out, ``RUN/report.html``, where an older report of moesmith is replaced.
        overwrite: replace what moesmith wrote at ``output``.

    Returns:
        The file written.

    Raises:
        MoesmithError: the folder holds no run, ``output`` may not be written, or matplotlib or jinja2 is not installed.
    """
    own = Path(run) / "report.html"
    output = Path(output) if output is not None else own
    overwrite = overwrite or real(output) == real(own)
    check_result(output, Path(run), overwrite=overwrite)
    template = template_of("moesmith.report", "page.html")
    with new_file(output, overwrite=overwrite) as work, as_written(Path(run)):
        write_text(work, _page(Source(Run(Path(run)), work.parent / "figures"), template))
    return output


def _page(source: Source, template: Any) -> str:
    """Build the page; its figures are written to ``source.pictures``."""
    sections = {
        "perplexity": _section(_perplexity, source, "This run has not been evaluated."),
        "affinity": _section(
            _affinity, source, "This run did not mine affinity: no matrix decided which domains share an expert."
        ),
        "overlap": _section(_overlap, source, "Overlap needs a carving with two experts or more."),
        "masks": _section(_masks, source, "This run learned no masks."),
        "training": _section(_training, source, "Nothing was trained in this run."),
        "routing": _section(_routing, source, "No routing was recorded: the run has one expert, or is not evaluated."),
        "text": _section(_text, source, "No text was recorded with its experts."),
    }
    page: str = template.render(
        summary=_summary(source),
        palette=[{"colour": style.colour(e), "line": _line(e)} for e in range(source.experts)],
        clusters=source.clusters,
        provenance=_provenance(source),
        **sections,
    )
    return page


def _section(build: Callable[[Source], dict[str, Any]], source: Source, sentence: str) -> dict[str, Any]:
    """Build a section, or ``{"absent": sentence}``, which names a damaged file; faults of ours are raised."""
    try:
        return build(source)
    except AbsentError:
        return {"absent": sentence}
    except (MoesmithError, OSError) as error:
        return {"absent": f"This part could not be read ({error})."}


def template_of(package: str, name: str) -> Any:
    """Load a package's template, with the filters and the style of every page.

    Raises:
        MoesmithError: matplotlib or jinja2 is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment
        from markupsafe import Markup
    except ImportError as error:
        raise MoesmithError("the report needs matplotlib and jinja2", "pip install 'moesmith[report]'") from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "big": big}
    own = {part: (files("moesmith.report") / f"page.{part}").read_text(encoding="utf-8") for part in ("css", "js")}
    environment.globals |= {"css": Markup(own["css"]), "script": Markup(own["js"])}
    return environment.from_string((files(package) / name).read_text(encoding="utf-8"))


def _line(expert: int) -> str:
    """Choose the underline that tells experts of one colour apart in the text."""
    return ("solid", "dashed", "dotted", "double")[expert // len(style.EXPERT_COLOURS) % 4]


def _summary(source: Source) -> dict[str, Any]:
    recipe, inputs = source.run.header.get("recipe", {}), source.run.header.get("inputs", {})
    carve = recipe.get("carve", {})
    measured = [manifest.get("metrics", {}) for manifest in source.run.manifests.values()]
    counts: dict[str, Any] = next((found for found in reversed(measured) if "parent_parameters" in found), {})
    sizes = {key: counts.get(key) for key in ("parent_parameters", "parameters_total", "parameters_active")}
    found: dict[str, Any] = {"recipe": recipe.get("name", "?"), "description": recipe.get("description", "")}
    found |= {"parent": inputs.get("model", "?"), "carve": carve, "router": recipe.get("router", {})} | sizes
    found |= {"masks": source.masks or None}
    carved = source.carved
    found |= {"experts": carved.experts if carved else None, "top_k": carved.top_k if carved else None}
    found["parts"] = carved is not None and carved.gates[0].mix == "sum"  # experts that a token uses together
    if carved is not None:  # a method may have no setting for it
        found["carve"] = {"compensation": carved.compensation} | carve
    found["short"] = str(found["parent"]).rstrip("/").rsplit("/", 1)[-1]
    found |= {"before": None, "after": None, "domains": 0}
    try:
        stages = source.evaluation["stages"]
        found["domains"] = len(stages["parent"]["domains"])
        found["before"], found["after"] = stages["parent"]["geomean"], stages[finished_of(stages)]["geomean"]
    except (AbsentError, MoesmithError):
        pass  # not evaluated yet, or damaged: the page says so in its section
    return found


def _perplexity(source: Source) -> dict[str, Any]:
    stages = source.evaluation["stages"]
    titles = {"parent": "parent (dense)", STOCK: "stock format"} | source.titles
    labels = {name: titles.get(name, name) for name in stages}
    names = source.in_order(list(next(iter(stages.values()))["domains"]))
    values = {labels[name]: {d: stage["domains"].get(d) for d in names} for name, stage in stages.items()}
    means = {labels[name]: stage["geomean"] for name, stage in stages.items()}
    finished = labels[finished_of(stages)]
    first, last = next(iter(values.values())), values[finished]

    def ratio(now: float | None, before: float | None) -> float | None:
        return now / before if now and before and len(stages) > 1 else None

    rows = [
        {"domain": name, "values": [v[name] for v in values.values()], "ratio": ratio(last[name], first[name])}
        for name in names
    ]
    everything = list(means.values())
    return {
        "figure": source.picture(
            figures.stages_figure(values, means), "stages", "Perplexity per domain after each stage"
        ),
        "labels": list(values),
        "rows": rows,
        "means": everything,
        "ratio": ratio(means[finished], everything[0]),
        "twin": finished if STOCK in stages else None,
        "worst": max((row["ratio"] for row in rows if row["ratio"]), default=0.0),
        "home": source.home,
        "overlap": warnings(found_in(source.run.manifests.get("held-out", {}).get("metrics", {}))),
        "window": source.evaluation.get("window"),
        "tokens": source.evaluation.get("tokens"),
    }


def _affinity(source: Source) -> dict[str, Any]:
    folder = source.run.path("affinity")
    names, matrix = _read_matrix(present(folder / "affinity.csv"))
    tree = folder / "linkage.csv"
    linkage = np.array(_read_rows(tree), float) if tree.is_file() else None
    figure = figures.affinity_figure(matrix, names, linkage, source.clusters)
    raw = None
    if (folder / "matrix.csv").is_file():
        columns, values = _read_matrix(folder / "matrix.csv")
        best = np.nanargmin(values, axis=0)
        raw = {"names": columns, "rows": list(zip(columns, values.tolist(), strict=True)), "best": best.tolist()}
    settings = source.run.header["recipe"].get("affinity", {})
    return {
        "figure": source.picture(figure, "affinity", "Correlation between domains as a heatmap, clusters boxed"),
        "method": settings.get("method"),
        "settings": settings,
        "tree": figures.affinity_order(matrix, names, linkage, source.clusters)[1] is not None,
        "raw": raw,
    }


def _read_rows(path: Path) -> list[list[str]]:
    check_file(path)
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file) if row]


def _read_matrix(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """Read a square matrix with names in the first row and column.

    Raises:
        MoesmithError: the file holds no such matrix.
    """
    try:
        head, *rows = _read_rows(path)
        matrix = np.array([row[1:] for row in rows], float)
    except ValueError as error:
        raise MoesmithError(f"{path} holds no numbers: {error}", "Delete its folder and convert again.") from error
    if matrix.shape != (len(head) - 1,) * 2:
        raise MoesmithError(f"{path} is not square", "Delete its folder and convert again.")
    return head[1:], matrix


def _overlap(source: Source) -> dict[str, Any]:
    carving = source.carving
    if carving.experts < 2:
        raise AbsentError
    iou, union, widths = (x.numpy().astype(float) for x in (carving.overlap(), carving.union(), carving.widths()))
    pairs = iou[:, *np.triu_indices(carving.experts, 1)]
    random_iou, random_union = masks.chance(widths / carving.d_ff)
    kept = widths[widths > 0]  # a dense layer has one expert, and nothing to compare it with
    return {
        "figure": source.picture(figures.overlap_figure(iou, union), "overlap", "Overlap of the experts' channels"),
        "layers": source.picture(
            figures.overlap_layers_figure(iou), "overlaps", "Overlap of the experts' channels by layer"
        ),
        "mean": float(np.nanmean(pairs)),
        "random": float(np.nanmean(random_iou)),
        "union": float(union.mean()),
        "random_union": float(random_union.mean()),
        "width": round(float(kept.mean())),
        "even": len(set(kept)) == 1,
        "d_ff": carving.d_ff,
    }


def _masks(source: Source) -> dict[str, Any]:
    if not source.masks:
        raise AbsentError
    carving = source.carving
    figure = masks.layers_figure(
        carving.widths().numpy() / carving.d_ff,
        carving.union().numpy(),
        carving.overlap().numpy(),
        [(a.width_qk / len(a.qk_h), a.width_vo / len(a.vo_h)) for a in carving.attention],
    )
    widths_L = carving.widths().amax(1)
    layers = [
        {"widest": int(width), "attention": [(a.width_qk, a.width_vo) for a in carving.attention[i : i + 1]]}
        for i, width in enumerate(widths_L)
    ]
    return {
        "figure": source.picture(figure, "masks", "Kept channels and attention dimensions, and overlap, per layer"),
        "spec": source.masks,
        "d_ff": carving.d_ff,
        "head": len(carving.attention[0].qk_h) if carving.attention else None,
        "layers": layers,
    }


def _training(source: Source) -> dict[str, Any]:
    curves, facts, picture = {}, [], {}
    for name, manifest in source.run.manifests.items():
        path = source.run.path(name) / "log.jsonl"
        steps = read_log(path) if path.is_file() else []
        if not steps:
            continue
        learned, title, settings = name == source.learned, manifest["title"], manifest.get("settings", {})
        shown = "kl" if learned else "loss"  # the loss of masks has penalties in it
        if learned:
            figure = masks.training_figure(steps, settings["budget"], source.experts)
            picture["masks"] = source.picture(figure, "training-masks", "KL, budget, union and load while masks learn")
        else:
            curves[title] = ([s["tokens"] for s in steps], [s["loss"] for s in steps])
        tenth = max(1, len(steps) // 10)
        facts.append(
            {
                "title": title,
                "steps": len(steps),
                "tokens": steps[-1]["tokens"],
                "start": statistics.mean(s[shown] for s in steps[:tenth]),
                "end": statistics.mean(s[shown] for s in steps[-tenth:]),
                "speed": statistics.median(s.get("tokens_per_second", math.nan) for s in steps),
                "trainable": manifest["metrics"].get("trainable"),
                "loss": "KL to the parent" if learned else settings.get("loss", "next-token"),
            }
        )
    if curves:
        picture["figure"] = source.picture(figures.training_figure(curves), "training", "Training loss over tokens")
    layers = [
        source.picture(figures.layers_figure(label, lines), f"layers-{name}-{number}", f"{label}, by layer")
        for name, manifest in source.run.manifests.items()
        for number, (label, lines) in enumerate(manifest.get("metrics", {}).get("layers", {}).items())
    ]
    if not facts and not layers:
        raise AbsentError
    return picture | {"facts": facts, "layers": layers}


def _routing(source: Source) -> dict[str, Any]:
    routing = source.routing
    if routing.experts < 2:
        raise AbsentError
    names = source.in_order(routing.domains)
    rows = [routing.domains.index(name) for name in names]
    several_L = routing.sizes_L > 1  # a dense layer chooses nothing
    parting_DL = np.where(several_L, routing.parting_DL, np.nan)
    share, parting = routing.share()[rows], dict(zip(routing.domains, parting_DL, strict=True))
    apart = sorted(((float(np.nanmean(row_L)), name) for name, row_L in parting.items()), reverse=True)
    home = [source.home.get(name) for name in names]
    own = [float(share[i, expert]) for i, expert in enumerate(home) if expert is not None]
    dead: dict[int, list[tuple[int, float]]] = {}
    for layer, expert, load in routing.dead(DEAD):
        dead.setdefault(layer, []).append((expert, load))
    load_LE = np.where(routing.present_LE & several_L[:, None], routing.load_LE, np.nan)
    entropy, balance = (np.where(several_L, each_L, np.nan) for each_L in (routing.entropy_L, routing.balance_L))
    return {
        "load": source.picture(routes.load_figure(load_LE, DEAD), "load", "Share of choices per expert and layer"),
        # an expert's number means the same in all layers only where it was made for the same domains
        "domains": source.picture(routes.domain_figure(share, names, home), "domains", "Experts chosen per domain")
        if source.home
        else "",
        "parting": source.picture(
            routes.parting_figure([parting[name] for _, name in apart], [name for _, name in apart]),
            "parting",
            "How a domain's choices differ, per layer",
        ),
        "apart": apart,
        "entropy": source.picture(routes.entropy_figure(entropy, balance), "entropy", "Routing entropy per layer"),
        "dead": dead,
        "count": sum(len(row) for row in dead.values()),
        "all": int(routing.sizes_L[several_L].sum()),
        "threshold": DEAD / routing.experts,
        "tokens": int(routing.tokens_D.sum()),
        "uniform": 1 / routing.experts,
        "own": statistics.mean(own) if own else None,
        "mean_entropy": float(np.nanmean(entropy)),
        "mean_balance": float(np.nanmean(balance)),
    }


def _text(source: Source) -> dict[str, Any]:
    routing = source.routing
    samples: list[Mapping[str, Any]] = [
        {
            "domain": sample.domain,
            "home": source.home.get(sample.domain),
            "tokens": sample.tokens,
            "ids": [[[e for e in ids if e >= 0] for ids in layer] for layer in sample.ids_LTK.tolist()],
        }
        for sample in sorted(routing.samples, key=lambda s: source.home.get(s.domain, len(source.clusters)))
    ]
    if not samples or routing.experts < 2:
        raise AbsentError
    layers, _, top_k = routing.samples[0].ids_LTK.shape
    return {"layers": layers, "top_k": top_k, "samples": samples}


def _provenance(source: Source) -> dict[str, Any]:
    stages = []
    for name, manifest in source.run.manifests.items():
        metrics = {
            key.replace("_", " "): value
            for key, value in manifest.get("metrics", {}).items()
            if isinstance(value, int | float | str) and not isinstance(value, bool)
        }
        row = {"name": name, "seconds": manifest.get("seconds"), "key": manifest.get("key", ""), "metrics": metrics}
        stages.append(row | {"files": manifest.get("files", {})})
    recipe = source.run.header.get("recipe", {})
    return {
        "seed": recipe.get("seed"),
        "inputs": source.run.header.get("inputs", {}),
        "versions": versions_of(source.run.manifests) or source.run.header.get("versions", {}),
        "stages": stages,
        "seconds": sum(row["seconds"] or 0 for row in stages),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100),
    }
