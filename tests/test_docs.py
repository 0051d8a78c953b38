"""The documentation says what the code does: links, commands, settings, examples."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from commands import moesmith

from moesmith.cli import app
from moesmith.data.builtin import SOURCES
from moesmith.data.hf_datasets import HubSet
from moesmith.evaluation.templates import task_names
from moesmith.methods.channels import Channels
from moesmith.methods.registry import methods
from moesmith.mixture.carving import Carving
from moesmith.run import recipe
from moesmith.testing.parents import save_tiny
from moesmith.testing.text import save_data

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BUILTIN = {name: kind for name, kind in methods().items() if kind.__module__.startswith("moesmith.")}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def without_code(text: str) -> str:
    """A page's prose: fenced blocks and inline code hold brackets of their own."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """What headings of a page can be linked to, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def tables(text: str) -> Iterator[list[str]]:
    """The cells of every table row."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def section(name: str, page: str) -> str:
    """The text of a page between a heading and the next one of its depth."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        other = page if not name else (page.parent / name).resolve()
        assert other.exists(), f"{page.name} links to {name}, which is not there"
        inside = other.is_relative_to(ROOT / "docs") or other.parent == ROOT
        assert inside or page.parent == ROOT, f"{page.name} links to {name}, which the site does not have"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target} names no heading"


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_absolute_paths(page: Path) -> None:
    found = re.findall(r"(?<![\w.:/~])/(?:home|root|tmp|work|Users|usr|opt|mnt|var|etc)\b\S*", page.read_text())
    assert not found


def test_every_command_has_its_page() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "commands").glob("*.md")}
    assert pages.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        assert pages[name].startswith(f"# moesmith {name}\n")
        described = {cell for row in tables(pages[name]) for cell in re.findall(r"`([^`]+)`", row[0])}
        for option in command.params:
            wanted = option.opts[0] if option.opts[0].startswith("-") else option.opts[0].upper()
            assert wanted in described, f"docs/commands/{name}.md does not describe {wanted}"
        known = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]}
        usage = set(re.findall(r"(?<![\w-])--[a-z-]+", re.split(r"^```$", pages[name], flags=re.MULTILINE)[1]))
        assert usage <= known, f"docs/commands/{name}.md knows options that do not exist"


def test_settings_table_is_the_recipes() -> None:
    known = {name: recipe.kind_of({"carve": {"method": name}}) for name in BUILTIN}
    rows: dict[tuple[str, str], str] = {}
    for names, default, whose, _ in (row for row in tables(section("Settings", "recipes.md")) if len(row) == 4):
        settings = re.findall(r"`([\w.]+)`", names)
        groups = whose.split(";")
        assert not settings or len(groups) in (1, len(settings)), f"docs/recipes.md: {names}: {whose}"
        for setting, group in zip(settings, groups * len(settings) if len(groups) == 1 else groups, strict=True):
            for method in known if group.strip() == "all" else re.findall(r"`([\w-]+)`", group):
                assert (setting, method) not in rows, f"{setting} stands twice for {method}"
                rows[setting, method] = default
    assert sorted(rows) == sorted((key, method) for method, kind in known.items() for key in recipe.keys(kind))
    for (key, method), shown in rows.items():
        value: Any = recipe.parse({"name": "any", "carve": {"method": method}}).model_dump(mode="json")
        if key == "name":
            continue
        for part in key.split("."):
            value = value[part]
        if key == "carve.method":
            assert value == method
            continue
        assert yaml.safe_load(shown.strip("`")) == value, f"docs/recipes.md: {key} of {method} is {value}, not {shown}"


def test_methods_table() -> None:
    rows = {row[0].strip("`"): row[2] for row in tables(section("Methods", "recipes.md")) if row[0].startswith("`")}
    assert rows.keys() == BUILTIN.keys()
    for name, shown in rows.items():
        assert set(re.findall(r"`(\w+)`", shown.partition("; with")[0])) == set(BUILTIN[name].sections), name
        if issubclass(BUILTIN[name], Channels):  # and a start brings its own
            started = recipe.kind_of({"carve": {"method": "tomoe", "start": {"method": name}}})
            plain = recipe.kind_of({"carve": {"method": "tomoe"}})
            assert started.model_fields.keys() == plain.model_fields.keys() | BUILTIN[name].sections.keys()


def test_presets_and_budgets_table() -> None:
    rows_of_presets = (re.findall(r"`([\w-]+)`", row[0]) for row in tables(section("Presets", "recipes.md")))
    listed = {name for names in rows_of_presets for name in names}
    assert listed == set(recipe.presets())
    rows = {row[0]: row[1:] for row in tables(section("Budgets", "recipes.md"))}
    for column, budget in enumerate(recipe.BUDGETS):
        chosen, masks = recipe.load_recipe("dive-1of8", budget), recipe.load_recipe("tomoe-50", budget).masks
        expected = {
            "calibration tokens per domain": [chosen.domains.tokens],
            "tokens per domain for the perplexity matrix": [chosen.affinity.tokens],
            "stage 1: tokens, window, batch": [chosen.stage1.tokens, chosen.stage1.window, chosen.stage1.batch],
            "stage 2: tokens, window, batch": [chosen.stage2.tokens, chosen.stage2.window, chosen.stage2.batch],
            "masks: tokens, window, batch": [masks.tokens, masks.window, masks.batch],
            "evaluation tokens per domain, window": [chosen.evaluate.tokens, chosen.evaluate.window],
        }
        for title, values in expected.items():
            shown = [int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*", rows[title][column])]
            assert shown == values, f"docs/recipes.md, {budget}: {title}"


def test_data_page_lists_what_there_is() -> None:
    def first_column(name: str) -> dict[str, list[str]]:
        rows = (row for row in tables(section(name, "data.md")) if row[0].startswith("`"))
        return {row[0].strip("`"): row[1:] for row in rows}

    assert {name: row[0] for name, row in first_column("builtin").items()} == {
        name: source.group for name, source in SOURCES.items()
    }
    assert first_column("Hugging Face data sets").keys() == HubSet.model_fields.keys()
    named = re.findall(r"`([\w]+)`", section("Files for benchmark tasks", "data.md"))
    assert set(task_names()) <= set(named)


def test_module_map_is_complete() -> None:
    package = ROOT / "src" / "moesmith"
    text = section("Modules", "architecture.md")
    named = {name for row in tables(text) for name in re.findall(r"`([\w/.]+)`", row[0])}
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        folders = {f"{parent}/" for parent in path.relative_to(package).parents if str(parent) != "."}
        assert name in named or folders & named or path.name == "__init__.py", f"docs/architecture.md leaves out {name}"
    for name in named:
        assert (package / name).exists(), f"docs/architecture.md names {name}, which is not there"


def run_page(name: str) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other; the names that they leave."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) > 5
    names: dict[str, Any] = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], f"docs/{name}", "exec"), names)  # a traceback names the page's line
    return names


def test_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "my-model")
    save_data(tmp_path / "my-text")
    monkeypatch.chdir(tmp_path)
    run_page("python.md")


def test_tutorial_runs_and_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("tutorial.md")
    printed = capsys.readouterr().out
    assert re.findall(r"^expert (\d) \((\w+)\) keeps 32 of 64", printed, re.MULTILINE) == [
        ("0", "beast"), ("1", "count"), ("2", "place"), ("3", "sum")
    ]  # fmt: skip
    share_DE = names["routing"].share()
    assert (share_DE.argmax(1) == [0, 1, 2, 3]).all(), "a domain's own expert is the one that it goes to most"
    stages = {name: float(value) for name, value in re.findall(r"^(\w+) +(\d+\.\d)$", printed, re.MULTILINE)}
    assert stages["experts"] < stages["carve"]
    for shown in ("MixtralForCausalLM continues: cat dog bird", "answers: "):
        assert shown in printed


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_example_says_how_to_run_it(script: Path) -> None:
    head = script.read_text(encoding="utf-8").split('"""')[1]
    method = f"    moesmith convert .*--method-file examples/{script.name} "  # or a method to convert with
    assert f"    python examples/{script.name}" in head or re.search(method, head)


@pytest.mark.slow
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", ["own_text"])
    runpy.run_path(str(ROOT / "examples" / "own_text.py"), run_name="__main__")
    assert "experts  perplexity" in capsys.readouterr().out
    model, text = tmp_path / "runs" / "example" / "parent", tmp_path / "runs" / "example" / "text"
    words = ["convert", "token-clusters", "--method-file", ROOT / "examples" / "token_clusters.py"]
    words += ["--model", model, "--data", text, "--out", tmp_path / "mine", "--budget", "demo"]
    answer = moesmith(*words, "--set", "carve.experts=4")
    assert answer.status == 0, answer.err
    assert re.search(r"4 experts, top-1", answer.out)
    assert Carving.load(tmp_path / "mine" / "stages" / "carve").experts == 4
