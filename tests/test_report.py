"""The report: its figures, and the page of a made-up run."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy

from moesmith.errors import MoesmithError
from moesmith.evaluation.routing import Routing, Sample
from moesmith.files.write import write_json, write_text
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Layer
from moesmith.report import figures, routes
from moesmith.report.numbers import number, percent
from moesmith.report.page import write_report
from moesmith.report.style import to_svg

SECTIONS = ("perplexity", "affinity", "overlap", "training", "routing", "text", "provenance")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
NAMES = ["math", "algebra", "code", "web"]
CLUSTERS = [["math", "algebra"], ["code"], ["web"]]


# figures --------------------------------------------------------------------------------------------------------


def similarity() -> tuple[np.ndarray, np.ndarray]:
    """Correlations whose tree, cut in three, gives CLUSTERS; and the tree."""
    matrix = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.2, 0.1], [0.1, 0.2, 1, 0.3], [0.2, 0.1, 0.3, 1]])
    return matrix, hierarchy.linkage(1 - matrix[np.triu_indices(4, 1)], "average")


def test_affinity_order_makes_blocks() -> None:
    matrix, tree = similarity()
    shuffled = [2, 0, 3, 1]  # code, math, web, algebra
    names = [NAMES[i] for i in shuffled]
    mixed = matrix[np.ix_(shuffled, shuffled)]
    links = hierarchy.linkage(1 - mixed[np.triu_indices(4, 1)], "average")
    order, dendrogram = figures.affinity_order(mixed, names, links, CLUSTERS)
    assert dendrogram is not None
    assert abs(order.index(names.index("math")) - order.index(names.index("algebra"))) == 1
    # clusters that are no branches of the tree: in the clusters' order, without a tree
    order, dendrogram = figures.affinity_order(matrix, NAMES, tree, [["math", "web"], ["algebra", "code"]])
    assert dendrogram is None
    assert [NAMES[i] for i in order] == ["math", "web", "algebra", "code"]
    order, dendrogram = figures.affinity_order(matrix, NAMES, None, CLUSTERS)
    assert dendrogram is None
    assert order == [0, 1, 2, 3]


def text_of(figure: Any) -> str:
    svg = to_svg(figure, "one", "a <picture>")
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_figures_name_what_they_show() -> None:
    matrix, tree = similarity()
    words = text_of(figures.affinity_figure(matrix, NAMES, tree, CLUSTERS))
    assert all(word in words for word in (*NAMES, "E0", "E2", "distance 1 − r", "Pearson"))
    words = text_of(
        figures.stages_figure({"parent": {"math": 4.0}, "carved": {"math": 9.0}}, {"parent": 4.0, "carved": 9.0})
    )
    assert all(word in words for word in ("perplexity (log scale)", "math", "parent", "carved", "geometric mean"))
    words = text_of(routes.load_figure([[0.5, 0.499, 0.001], [0.3, 0.3, 0.4]]))
    assert all(word in words for word in ("share of choices (%)", "layer", "E2", "×", "50", "40"))
    words = text_of(figures.training_figure({"Stage 1": ([10, 20], [3.0, 2.0])}))
    assert all(word in words for word in ("training tokens", "loss (nats per token)", "Stage 1"))


def test_svg_is_part_of_the_page() -> None:
    svg = to_svg(routes.entropy_figure([0.1, 0.2], [0.9, 1.0]), "one", 'a "picture"')
    assert svg.startswith('<svg viewBox="0 0 ')
    assert "http" not in svg
    assert "var(--ink" in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_extreme_values_still_draw() -> None:
    flat = np.ones((3, 1, 1))
    figures.overlap_figure(flat, [1.0] * 3)
    for value in (to_svg(figures.affinity_figure(np.ones((2, 2)), ["a", "b"]), "a", ""),):
        assert "<text" in value
    gap = {"parent": {"a": 2.0, "b": 3.0}, "carved": {"a": float("inf")}}
    assert "nan" not in to_svg(figures.stages_figure(gap, {"parent": 2.4, "carved": float("nan")}), "b", "").lower()
    wide = np.full((50, 64), 1 / 64)
    to_svg(routes.load_figure(wide), "c", "")
    to_svg(routes.domain_figure(wide[:3], ["a", "b", "a_very_long_domain_name"]), "d", "")
    to_svg(routes.parting_figure(np.zeros((90, 1)), [f"domain {i}" for i in range(90)]), "e", "")


def test_a_name_is_never_a_formula() -> None:
    name = r"$\nonsense{$"
    for figure in (
        figures.affinity_figure(np.eye(2), [name, "b"]),
        routes.domain_figure([[0.5, 0.5]], [name]),
        routes.parting_figure([[0.5, 0.5]], [name]),
        figures.stages_figure({name: {name: 3.0}}, {name: 3.0}),
    ):
        assert name in text_of(figure)


# the page -------------------------------------------------------------------------------------------------------


def fake_run(folder: Path) -> Path:
    """A small finished run: 4 domains, 3 experts, 2 layers."""
    carve = {"method": "dive", "experts": 3, "top_k": 1, "ratio": 0.5, "compensation": "bias", "score": "wifv"}
    recipe = {"name": "dive-test", "description": "a test", "seed": 7, "carve": carve | {"selection": "uniform"}}
    recipe |= {"affinity": {"method": "perplexity"}, "router": {"start": "lda"}, "stage1": {"loss": "distill"}}
    inputs = {"model": "some/tiny-parent", "model_digest": "feed", "data": "builtin", "data_digest": "beef"}
    write_json(
        folder / "run.json", {"recipe": recipe, "inputs": inputs, "versions": {"moesmith": "0.1.0", "torch": "2.x"}}
    )
    stages = folder / "stages"
    sizes = {"parent_parameters": 1000, "parameters_total": 2000, "parameters_active": 700}
    for name in ("domains", "moments", "affinity", "carve", "router", "experts", "export", "evaluate"):
        manifest = {"stage": name, "key": f"key-{name}", "seconds": 1.5, "files": {f"{name}.bin": "ab" * 32}}
        write_json(
            stages / name / "manifest.json", manifest | {"metrics": sizes if name in ("carve", "export") else {}}
        )
    matrix, tree = similarity()
    write_csv(
        stages / "affinity" / "affinity.csv", [["", *NAMES], *([n, *r] for n, r in zip(NAMES, matrix, strict=True))]
    )
    write_csv(
        stages / "affinity" / "matrix.csv", [["", *NAMES], *([n, *r] for n, r in zip(NAMES, matrix * 9, strict=True))]
    )
    write_csv(stages / "affinity" / "linkage.csv", tree.tolist())
    write_json(stages / "affinity" / "clusters.json", {"clusters": CLUSTERS})
    channels = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5]), torch.tensor([4, 5, 6, 7])]
    layers = [Layer.of(channels, torch.zeros(3, 4)) for _ in range(2)]
    Carving(layers, 8).save(stages / "carve")
    for name in ("router", "experts"):
        steps = [{"step": i, "tokens": 64 * i, "loss": 5 - 0.1 * i, "tokens_per_second": 100.0} for i in range(1, 21)]
        write_text(stages / name / "log.jsonl", "".join(json.dumps(s) + "\n" for s in steps) + '{"step": 21, "tok')
    results = {
        name: {"domains": {domain: 10.0 * factor + i for i, domain in enumerate(NAMES)}, "geomean": 11.0 * factor}
        for name, factor in {"parent": 1, "carve": 3, "router": 2.5, "experts": 1.5}.items()
    }
    write_json(stages / "evaluate" / "evaluation.json", {"stages": results, "window": 512, "tokens": 4096})
    fake_routing().save(stages / "evaluate" / "routing.npz")
    return folder


def fake_routing() -> Routing:
    counts = np.array(
        [
            [[90, 5, 5], [100, 0, 0]],
            [[80, 10, 10], [90, 10, 0]],
            [[10, 80, 10], [20, 80, 0]],
            [[0, 0, 100], [60, 40, 0]],
        ]
    )
    tokens = ["Hello", " world", "\n", EVIL, ""]
    samples = [Sample(name, tokens, np.zeros((2, 5, 1), int)) for name in NAMES]
    return Routing(tuple(NAMES), counts, np.full((4, 2), 0.3), np.full(4, 100), samples)


def write_csv(path: Path, rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Sections with their text and figures, and everything that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.figures: dict[str, int] = {}
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.here = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "section":
            self.here = values["id"] or ""
            self.sections[self.here] = ""
        if tag == "svg":
            self.figures[self.here] = self.figures.get(self.here, 0) + 1
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        if self.here:
            self.sections[self.here] += data


def test_page_has_every_section_with_its_figures(page: str) -> None:
    found = Reader(page)
    assert tuple(found.sections) == SECTIONS
    assert found.figures == {"perplexity": 1, "affinity": 1, "overlap": 2, "training": 1, "routing": 4}
    assert "absent" not in re.sub(r"<style>.*?</style>|<noscript>.*?</noscript>", "", page, flags=re.DOTALL)
    assert "11.00</strong> for the dense parent" in page
    assert "16.50</strong> for the converted model (× 1.50)" in page
    assert "2.0 k" in page  # parameters in total
    for section, words in {
        "perplexity": ("experts trained", "31", "33"),
        "affinity": ("math, algebra", "Perplexity matrix"),
        "overlap": ("keeps 4 of 8", "22.2"),  # IoUs of the three pairs: 1/3, 1/3, 0
        "training": ("routers trained", "experts trained", "1,280"),
        "routing": ("Dead experts", "1 of 6"),
        "provenance": ("feed", "beef", "key-carve", "seed", "torch 2.x", "ab" * 32, "compensation: bias"),
    }.items():
        assert all(word in found.sections[section] for word in words), (section, found.sections[section])


def test_page_refers_to_nothing_outside(page: str) -> None:
    assert not re.search(r"https?:|//\w+\.\w|@import", page)
    assert all(link.startswith(("#", "data:")) for link in Reader(page).loads)


def test_token_text_cannot_become_markup(page: str) -> None:
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "img" not in Reader(page).tags
    data = json.loads(re.findall(r'<script type="application/json" id="routes">(.*?)</script>', page, re.DOTALL)[0])
    assert data["samples"][0]["tokens"][3] == EVIL
    assert data["clusters"] == CLUSTERS


def test_names_are_escaped_too(tmp_path: Path) -> None:
    header = {"recipe": {"name": EVIL, "carve": {"experts": 2}}, "inputs": {"model": EVIL}}
    write_json(tmp_path / "run.json", header)
    write_json(
        tmp_path / "stages" / "evaluate" / "evaluation.json",
        {"stages": {"parent": {"domains": {EVIL: 3.0}, "geomean": 3.0}}},
    )
    text = write_report(tmp_path).read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert Reader(text).figures == {"perplexity": 1}


def test_missing_parts_are_one_sentence(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "elsewhere" / "page.html"
    write_json(run / "run.json", {"recipe": {"name": "static", "carve": {"experts": 1, "top_k": 1, "ratio": 0.5}}})
    assert write_report(run, target) == target
    text = target.read_text()
    assert len(re.findall(r'<p class="absent">(?!The colours)', text)) == 6
    assert tuple(Reader(text).sections) == SECTIONS
    assert "svg" not in Reader(text).tags


def test_experts_of_no_domain_are_not_added_up_over_layers(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    (folder / "stages" / "affinity" / "clusters.json").unlink()  # every layer has groups of its own
    found = Reader(write_report(folder).read_text())
    assert "Where each domain goes" not in found.sections["routing"]
    assert "How domains differ" in found.sections["routing"]
    assert found.figures["routing"] == 3


def test_damaged_part_is_named_and_the_rest_stays(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    (folder / "stages" / "affinity" / "affinity.csv").write_text(",a,b\na,1\nb,x\n")
    (folder / "stages" / "evaluate" / "routing.npz").write_bytes(b"nothing")
    text = write_report(folder).read_text()
    assert text.count("This part could not be read") == 3
    assert "routing.npz is not a routing record" in text
    assert Reader(text).figures == {"perplexity": 1, "overlap": 2, "training": 1}


@pytest.mark.parametrize("name", ["carving.json", "carving.safetensors"])
def test_a_damaged_carving_leaves_the_rest(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path)
    for path in folder.glob(f"stages/*/{name}"):
        path.write_bytes(b"nothing")
    text = write_report(folder).read_text()
    assert "This part could not be read" in text
    assert f"{name} cannot be read" in text
    assert Reader(text).figures["perplexity"] == 1


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match=r"run\.json is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (3, "3"),
        (3.0, "3.00"),
        (12345, "12,345"),
        (9.876, "9.88"),
        (123.45, "123.5"),
        (0.0021, "0.0021"),
        (0.9998, "1.00"),
        (0.0, "0.00"),
        (1998.4, "1,998"),
    ],
)
def test_numbers(value: Any, shown: str) -> None:
    assert number(value) == shown


def test_percent() -> None:
    assert [percent(x).replace("\N{NO-BREAK SPACE}", " ") for x in (0, 0.5, 0.125, 0.996, 0.00057)] == [
        "0 %",
        "50 %",
        "12.5 %",
        "99.6 %",
        "0.057 %",
    ]
