"""Methods: what one file declares, everything follows from; and one that a person writes outside of the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from commands import moesmith
from conversions import convert
from golden import ASSETS
from refusals import refused

from moesmith.calibration.view import LayerView
from moesmith.conversion.plan import make_plan
from moesmith.errors import MoesmithError
from moesmith.export.target import Options
from moesmith.export.targets import export_run
from moesmith.methods import registry
from moesmith.methods.base import Carver, Needs, Routed
from moesmith.methods.registry import load_file, methods, register
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.run.folder import open_run
from moesmith.run.recipe import kind_of, load_recipe
from moesmith.testing.parents import FAMILIES, save_tiny

EXAMPLE = Path(__file__).parent.parent / "examples" / "token_clusters.py"
SMALL = ["domains.tokens=512", "domains.window=32", "evaluate.tokens=512", "evaluate.window=64", "stage2.tokens=0"]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    methods()
    monkeypatch.setattr(registry, "_known", dict(registry._known))


def words(command: str, *more: Any) -> list[Any]:
    given = [command, "token-clusters", "--method-file", EXAMPLE, "--model", ASSETS / "parents" / "llama"]
    sets = [*SMALL, "carve.experts=4", "carve.sample=512", "carve.ratio=0.25"]
    given += ["--data", ASSETS / "text", *(word for setting in sets for word in ("--set", setting))]
    return [*given, *more]


@pytest.mark.usefixtures("clean")
def test_a_method_from_outside_goes_all_the_way(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    run = tmp_path / "run"
    plan = json.loads(moesmith(*words("plan", "--json")).out)
    assert plan["recipe"] == "token-clusters"
    answer = moesmith(*words("convert", "--out", run, "--dtype", "fp32"))
    assert answer.status == 0, answer.err
    opened = open_run(run)
    carving = opened.carving()
    assert carving.widths().tolist() == [[48] * 4] * 2
    assert opened.settings["carve"] == {
        "method": "token-clusters", "experts": 4, "top_k": 1, "ratio": 0.25, "sample": 512, "rounds": 10,
    }  # fmt: skip
    found = json.loads(moesmith("inspect", run, "--json").out)
    counted = {name: plan[name] for name in ("parent_parameters", "parameters_total", "parameters_active")}
    assert found["parameters"] == counted
    assert "carve" in found["stages"]
    assert moesmith("report", run).status == 0
    assert "token-clusters" in (run / "report.html").read_text(encoding="utf-8")
    for target, out in (("hf", tmp_path / "hf"), ("gguf", tmp_path / "moe.gguf")):
        answer = moesmith("export", run, "--to", target, "--out", out)
        assert answer.status == 0, answer.err
    assert "experts from clusters of tokens" in (run / "model" / "README.md").read_text(encoding="utf-8")
    again = moesmith(*words("convert", "--out", run, "--dtype", "fp32"))
    assert again.err.count("done before") == 7


@pytest.mark.usefixtures("clean")
def test_its_settings_are_checked(tmp_path: Path) -> None:
    for setting, says in (
        ("carve.sample=1", "carve.sample: Input should be greater than or equal to 64"),
        ("carve.rouns=3", "there is no setting 'carve.rouns' with method token-clusters. Did you mean 'carve.rounds'"),
        ("affinity.method=scores", "there is no setting 'affinity.method' with method token-clusters"),
    ):
        answer = moesmith(*words("convert", "--out", tmp_path / "run", "--set", setting))
        refused(answer, re.escape(says))
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no method file"),
        ("x = 1\n", "registers no method"),
        ("1 / 0\n", "cannot be run: ZeroDivisionError: division by zero"),
        ("from moesmith.methods.dive import Dive\nfrom moesmith.methods.registry import register\n"
         "@register\nclass Other(Dive):\n    name = 'dive'\n", "there is a method dive already"),
        ("from moesmith.methods.registry import register\n@register\nclass Odd:\n    pass\n", "Odd is not a method"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_method(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MoesmithError, match=says):
        load_file(path)
    assert "Other" not in {method.__name__ for method in methods().values()}


def test_there_is_no_such_method() -> None:
    with pytest.raises(MoesmithError, match=r"there is no method 'dve'\. Did you mean 'dive'"):
        load_recipe("dive-1of8", None, ["carve.method=dve"])


@pytest.mark.parametrize(
    "name",
    [
        "cmoe",
        "dive",
        "dot-moe",
        "drop-upcycling",
        "expert-weaver",
        "llama-moe",
        "llama-moe-partition",
        "moefication",
        "static",
        "tomoe",
        "upcycling",
    ],
)
def test_every_method_declares_itself(name: str) -> None:
    method = methods()[name]
    assert method.title
    assert method.paper.startswith("arXiv:")
    recipe = load_recipe(name)
    assert recipe.carve.method == name
    assert kind_of(recipe.model_dump()).model_fields.keys() >= method.sections.keys()
    steps = recipe.method.steps()
    assert [step for step in steps if step.title], "something must end in a carving"
    named = [step.name for step in steps]
    assert all(need in named or need in ("corpus", "held-out") for step in steps for need in step.needs)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("upcycling", "carve.experts=3"),
        ("drop-upcycling", "carve.experts=3"),
        ("static", "carve.score=random"),
        ("llm-pruner", "carve.ratio=0.25"),
        ("wanda-sp", "carve.ratio=0.25"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_all_the_way(family: str, name: str, setting: str, tmp_path: Path) -> None:
    """Converted, written, compared with what the carving computes, and shown."""
    save_tiny(family, tmp_path / "m")
    run = convert(name, tmp_path / "m", ASSETS / "text", tmp_path / "run", [setting, "stage2.tokens=0"])
    assert run.metrics("export")["logits_difference"] < 1e-4
    assert set(run.evaluation["stages"]) == {"parent", "carve"}
    assert all(0 < stage["geomean"] < 1e6 for stage in run.evaluation["stages"].values())
    assert len(run.recipe.method.about(run)) <= 2
    assert moesmith("inspect", run.folder, "--json").status == 0


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_shared_and_added_experts_of_a_method(family: str, tmp_path: Path) -> None:
    """A layer with a shared expert and two more that are added: converted, evaluated, exported or refused."""

    @register
    class Added(Carver):
        name = "added"

        class Settings(Routed):
            method: Literal["added"] = "added"
            top_k: int = 2

        def needs(self) -> Needs:
            return Needs()

        def width(self, parent: Any) -> int:
            return 8

        def carve(self, view: LayerView) -> Layer:
            mean_D = view.statistics()[0].inputs.mean_N
            assert mean_D.shape == (view.parent.D,)
            order = torch.randperm(view.parent.F, generator=view.generator)
            routed = [Expert(order[32 + 8 * e : 40 + 8 * e].sort().values) for e in range(self.experts)]
            router = Linear(torch.randn(self.experts, view.parent.D, generator=view.generator))
            return Layer(routed, router, self.top_k, "sum", shared=Expert(order[:32].sort().values))

    import moesmith as package

    settings = [*SMALL, "carve.experts=4"]
    run = package.convert("added", ASSETS / "parents" / family, ASSETS / "text", tmp_path / "run",
                          settings=settings, dtype="fp32", device="cpu")  # fmt: skip
    stages = run.evaluation["stages"]
    assert stages["carve"]["geomean"] != stages["parent"]["geomean"]
    if family != "phi":
        export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")
        export_run(run.folder, "gguf", tmp_path / "moe.gguf", Options(quant="f32"), "cpu")
    export_run(run.folder, "native", tmp_path / "native", Options(), "cpu")


WAYS = {  # settings of a method whose experts add up, and why no stock architecture holds the result
    "cmoe": ([], "routes by what its channels compute"),
    "cmoe linear": (["carve.router=linear"], None),
    "expert-weaver": (["carve.experts=8", "carve.samples=16", "carve.threshold=0.25"], "Its layers have"),
    "expert-weaver equal": (["carve.experts=8", "carve.samples=16", "carve.shares=equal"], None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_divide_a_network(family: str, way: str, tmp_path: Path) -> None:
    """Converted, evaluated, and exported to a stock architecture or refused with the reason."""
    import moesmith as package

    (settings, refused), method = WAYS[way], way.split()[0]
    model = save_tiny(family, tmp_path / "parent")
    given = [*SMALL, *settings, *(["carve.sample=256"] if method == "cmoe" else [])]
    run = package.convert(method, str(model), ASSETS / "text", tmp_path / "run", settings=given, dtype="fp32",
                          device="cpu")  # fmt: skip
    carving, stages, metrics = run.carving(), run.evaluation["stages"], run.metrics("export")
    assert stages["carve"]["geomean"] != stages["parent"]["geomean"]
    assert metrics["logits_difference"] < 1e-3
    for layer in carving.layers:
        channels = torch.cat([expert.channels for expert in layer.experts])
        assert torch.equal(channels.sort().values, torch.arange(64))
        assert abs(layer.active_width - 32) <= layer.top_k  # a token uses half, but for what sizes differ by
    native = {"phi": "have no gate", "biased": "a gate and biases"}
    reason = native.get(family, None if carving.alike and "Its layers" in str(refused) else refused)
    assert (metrics["architecture"] == "MoesmithForCausalLM") == (reason is not None)
    if reason is None:
        export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")
    else:
        with pytest.raises(MoesmithError, match=reason):
            export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")


DIVIDED = {"llama-moe-partition": [], "llama-moe-shared": ["carve.selector=norm"], "moefication": []}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", DIVIDED)
def test_divided_channels_go_all_the_way(preset: str, family: str, tmp_path: Path) -> None:
    """Four parts that are added, two per token: converted, verified, and exported where a stock architecture fits."""
    import moesmith as package

    settings = [*SMALL, "carve.experts=4", *DIVIDED[preset]]
    run = package.convert(preset, save_tiny(family, tmp_path / "m"), ASSETS / "text", tmp_path / "run",
                          settings=settings, dtype="fp32", device="cpu")  # fmt: skip
    stages, carving = run.evaluation["stages"], run.carving()
    assert stages["carve"]["geomean"] != stages["parent"]["geomean"]
    assert run.manifest("export")["metrics"]["logits_difference"] < 1e-3
    scaled = {"llama-moe-partition": "rescaled", "llama-moe-shared": "rescaled", "moefication": "none"}[preset]
    assert (carving.compensation, carving.layers[0].active_width) == (scaled, 32)
    counted, plan = run.manifest("carve")["metrics"], make_plan(load_recipe(preset, None, settings), run.parent(), 4)
    for name in ("parent_parameters", "parameters_total", "parameters_active"):
        assert counted[name] == getattr(plan, name), name
    if family in ("phi", "biased"):
        with pytest.raises(MoesmithError, match="gate"):  # no stock architecture has experts of two matrices, or biases
            export_run(run.folder, "hf", tmp_path / "hf", Options(), "cpu")
    if (preset, family) == ("moefication", "llama"):
        export_run(run.folder, "gguf", tmp_path / "moe.gguf", Options(quant="f32"), "cpu")
        assert moesmith("report", run.folder).status == 0
        page = (run.folder / "report.html").read_text(encoding="utf-8")
        assert "per token, in equal parts" in page


@pytest.mark.usefixtures("clean")
def test_the_method_of_the_page_works(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    (tmp_path / "by_domain.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    load_file(tmp_path / "by_domain.py")
    import moesmith as package

    settings = [*SMALL, "carve.experts=4", "carve.compensation=none"]
    run = package.convert("by-domain", ASSETS / "parents" / "llama", ASSETS / "text", tmp_path / "run",
                          settings=settings, dtype="fp32", device="cpu")  # fmt: skip
    assert run.carving().widths().tolist() == [[32] * 4] * 2
