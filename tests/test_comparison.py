"""Comparisons: many conversions on one footing, their table, its intervals and tests."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from golden import ASSETS
from safetensors.torch import load_file
from scipy import stats
from sources import tiny_source

from moesmith.comparison.compare import Comparison, compare, turns
from moesmith.comparison.controls import Control
from moesmith.comparison.figures import curves, tokens_of
from moesmith.comparison.jobs import at_once
from moesmith.comparison.measure import Ruler
from moesmith.comparison.quantised import Quantised
from moesmith.comparison.rounded import write_rounded
from moesmith.comparison.spec import Spec, load_spec
from moesmith.comparison.statistics import interval, mean, p_value
from moesmith.comparison.table import number, table_of
from moesmith.conversion.series import Series
from moesmith.data.text import evaluation_blocks, load_domains, source_digest
from moesmith.errors import MoesmithError
from moesmith.evaluation.harness import find_tasks, run_items, run_tasks
from moesmith.evaluation.health import health
from moesmith.evaluation.perplexity import geometric_mean, perplexities
from moesmith.export.gguf.target import Gguf
from moesmith.export.stock.write import write_stock
from moesmith.export.target import Options
from moesmith.files.artefact import read_json
from moesmith.files.write import write_json
from moesmith.methods.token import Token
from moesmith.parent.load import load_parent
from moesmith.run.folder import open_run
from moesmith.run.recipe import load_recipe

MODEL, DATA = str(ASSETS / "parents" / "llama"), str(ASSETS / "text")
EXAMPLES = Path(__file__).parents[1] / "examples" / "comparisons"
SETTINGS = [
    *("domains.tokens=512", "domains.window=32", "evaluate.tokens=256", "evaluate.window=64"),
    *("affinity.tokens=256", "affinity.window=32", "stage1.tokens=0", "stage2.tokens=0"),
]
ROWS: list[dict[str, Any]] = [
    {"name": "static", "title": "static | mask", "recipe": "flap-static"},
    {"name": "dive", "recipe": "dive-1of8", "settings": ["carve.experts=2"], "vary": {"seed": [1, 2]}},
    {"name": "token", "recipe": "token", "settings": ["carve.experts=2"], "vary": {"carve.ratio": [0.5, 0.25]}},
]
VALUES: dict[str, Any] = {
    "title": "tiny",
    "settings": SETTINGS,
    "measure": {"domains": {"all": ["beast", "count", "sum"], "one": ["place"]}, "tokens": 512, "window": 64},
    "rows": ROWS,
}


def spec(**changes: Any) -> Spec:
    return Spec.model_validate(VALUES | changes)


def written(folder: Path, values: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("comparison") / "out"
    return out, compare(spec(), out, model=MODEL, data=DATA, dtype="fp32")


def row(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in result["rows"] if each.get("name") == name)


def test_numbers_are_those_of_the_models(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    parent = load_parent(MODEL, "fp32")
    domains = load_domains(DATA, ["beast", "count", "sum"])
    blocks = {d.name: evaluation_blocks(d, parent.tokenizer, 512, 64).blocks for d in domains}
    dense = geometric_mean(perplexities(parent.decoder, blocks).values())
    moe = geometric_mean(perplexities(open_run(out / "runs" / "static").load(parent), blocks).values())
    found = row(result, "static")["groups"]["all"]
    assert found["value"] == pytest.approx(moe / dense, rel=1e-5)
    assert found["perplexity"] == pytest.approx(moe, rel=1e-5)
    assert found["low"] < found["value"] < found["high"]
    assert "p" not in found  # the baseline is not tested against itself
    assert result["rows"][0]["groups"]["all"] == {
        "value": 1.0, "low": 1.0, "high": 1.0, "perplexity": pytest.approx(dense, rel=1e-5),
    }  # fmt: skip


def test_seeds_are_one_row(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    found = row(result, "dive")
    assert found["seeds"] == 2
    each = [read_json(out / "rows" / f"dive-seed-{seed}.json")["measured"]["windows"] for seed in (1, 2)]
    dense = read_json(out / "rows" / "parent.json")["measured"]["windows"]
    names = ("beast", "count", "sum")
    ratios = [math.exp(np.mean([np.mean(one[n]) - np.mean(dense[n]) for n in names])) for one in each]
    assert found["groups"]["all"]["value"] == pytest.approx(math.sqrt(math.prod(ratios)), rel=1e-9)
    assert found["groups"]["all"]["spread"] == pytest.approx(np.std(ratios, ddof=1), rel=1e-6)
    assert 0 < found["groups"]["all"]["p"] <= 1


def test_facts_are_the_runs(made: tuple[Path, dict[str, Any]]) -> None:
    _, result = made
    assert row(result, "token-ratio-0.5")["ffn_active"] == 0.5
    assert row(result, "token-ratio-0.25")["ffn_active"] == 0.75
    found = row(result, "token-ratio-0.25")
    assert found["experts"] == 2
    assert found["calibration_tokens"] == 4 * 512
    assert found["training_tokens"] == 0
    assert found["memory"] > 0
    assert found["parameters_total"] > result["rows"][0]["parameters_total"] > found["parameters_active"] * 0.5


def test_files_say_the_same(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    rows = list(csv.DictReader((out / "comparison.csv").open(encoding="utf-8")))
    assert [r["title"] for r in rows] == [r["title"] for r in result["rows"]]
    assert float(rows[1]["groups.all.value"]) == result["rows"][1]["groups"]["all"]["value"]
    text = (out / "comparison.md").read_text(encoding="utf-8")
    assert "static \\| mask" in text
    assert len({line.replace("\\|", "").count("|") for line in text.split("\n\n")[0].splitlines()}) == 1
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "static | mask" in page
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "")  # one self-contained file
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8"))["rows"] == result["rows"]


def test_what_is_finished_stays(made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, result = made

    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr("moesmith.comparison.compare.convert", fail)
    assert compare(spec(), out, model=MODEL, data=DATA)["rows"] == result["rows"]  # in the dtype that it began in
    few = compare(spec(), out, model=MODEL, data=DATA, only="dive, static")
    assert few["rows"] == result["rows"]
    with pytest.raises(MoesmithError, match="computes in fp32, not bf16"):
        compare(spec(), out, model=MODEL, data=DATA, dtype="bf16")


def test_other_text_is_measured_again(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    data, keys = tmp_path / "data", []
    shutil.copytree(DATA, data)
    parent, one = load_parent(MODEL, "fp32"), spec()
    for split in ("", "test", "train"):  # as it is, then with another record in each split
        if split:
            lines = (data / f"sum.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            (data / f"sum.{split}.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
        series = Series("comparison", tmp_path / "out", MODEL, data, dtype="fp32")
        comparison = Comparison(one, series, Ruler(parent, str(data), one.measure))
        keys.append((comparison.key(0), source_digest(str(data), ["sum"])))
    assert keys[0][0] != keys[1][0] == keys[2][0]
    assert len({of_text for _, of_text in keys}) == 3


def test_a_lost_row_is_measured_again(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    (out / "rows" / "static.json").unlink()
    assert compare(spec(), out, model=MODEL, data=DATA)["rows"] == result["rows"]


def test_a_row_that_cannot_be_made_does_not_stop_the_others(tmp_path: Path) -> None:
    rows = [{"name": "wide", "recipe": "dive-1of8", "settings": ["carve.experts=64"]}, ROWS[0]]
    result = compare(spec(rows=rows, baseline="static"), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")
    assert "64" in result["rows"][1]["refused"]
    assert result["rows"][2]["groups"]["all"]["value"] > 0
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert f"- not made: wide: {result['rows'][1]['refused']}" in text


def test_several_rows_at_once_are_those_of_one_after_the_other(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"name": "wide", "recipe": "dive-1of8", "settings": ["carve.experts=64"]}
    result = compare(spec(rows=[*ROWS, wide], keep=False), tmp_path, model=MODEL, data=DATA, dtype="fp32", jobs=2)
    assert [each["title"] for each in result["rows"]] == [*(each["title"] for each in made[1]["rows"]), "wide"]
    for ours, theirs in zip(result["rows"], made[1]["rows"], strict=False):
        assert ours["groups"] == theirs["groups"]
    assert "64" in result["rows"][-1]["refused"]
    assert not list(tmp_path.glob("runs/*/model"))
    said = capsys.readouterr().err
    again = compare(spec(rows=[*ROWS, wide], keep=False), tmp_path, model=MODEL, data=DATA, only="dive", jobs=2)
    assert again["rows"] == result["rows"][:-1]  # nothing is left to make; what was refused is not asked for
    assert all(f"== {name}: after" in said for name in ("static", "dive-seed-1", "token-ratio-0.25", "wide"))
    assert "[carve]" not in said


def dies(_device: Any) -> Any:
    """What gets a process ready that ends at its first row; at the module's level, since it is pickled."""
    return lambda _name: os._exit(1)


def test_a_process_that_ends_is_one_line() -> None:
    with pytest.raises(MoesmithError, match="A process that made rows has ended"):
        list(at_once(dies, ["row"], 2, "cpu"))
    with pytest.raises(MoesmithError, match="jobs is 0"):
        compare(spec(), "unused", model=MODEL, data=DATA, jobs=0)


def sleeps(_device: Any) -> Any:
    """What makes a row that lasts, and says which process does; see :func:`dies`."""

    def made(name: str) -> None:
        Path(name).write_text(str(os.getpid()))
        time.sleep(120)

    return made


def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    names = [str(tmp_path / f"row-{number}") for number in range(2)]
    code = "import test_comparison as t; from moesmith.comparison.jobs import at_once;"
    code += f"list(at_once(t.sleeps, {names}, 2, 'cpu'))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    first = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    wait_for(lambda: all(Path(name).is_file() and Path(name).read_text() for name in names), 120)
    others = [psutil.Process(int(Path(name).read_text())) for name in names]
    first.kill()
    first.wait()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in others), 20)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_models_can_be_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    result = compare(spec(rows=ROWS[:1], keep=False), out, model=MODEL, data=DATA, dtype="fp32")
    assert not (out / "runs" / "static" / "model").exists()
    assert not (out / "runs" / "static" / "stages" / "carve").exists()
    assert (out / "runs" / "static" / "stages" / "domains").is_dir()
    monkeypatch.setattr("moesmith.comparison.compare.convert", None)  # measured rows are not converted again
    assert compare(spec(rows=ROWS[:1], keep=False), out, model=MODEL, data=DATA)["rows"] == result["rows"]


def test_a_row_that_reads_another_comes_after_it(tmp_path: Path) -> None:
    """Wherever it is in the file; then what it read is dropped as well, with the files of the benchmark."""
    rows = [
        {"name": "few", "control": {"quant": "q8_0", "of": "token-ratio-0.25"}},
        ROWS[2] | {"speed": ["bf16"]},
    ]
    out, measure = tmp_path / "out", VALUES["measure"] | {"speed": {"prompt": 32, "new": 4, "rounds": 1}}
    given: dict[str, Any] = {"model": MODEL, "data": DATA, "dtype": "fp32"}
    result = compare(spec(rows=rows, measure=measure, keep=False), out, **given)
    assert row(result, "few")["groups"]["all"]["value"] > 0
    for name in ("token-ratio-0.5", "token-ratio-0.25"):
        left = {path.name for path in (out / "runs" / name).iterdir()}
        assert not {"model", "bench", "bench.json"} & left
        assert (out / "speed" / f"{name}.json").is_file()


def test_a_row_is_timed_again_as_the_specification_says(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """And a benchmark of the run's own stays."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(made[0] / "runs" / "static", run)
    (run / "bench.json").write_text("hours of work")
    given: dict[str, Any] = {"model": MODEL, "data": DATA, "dtype": "fp32"}
    prompts = []
    for prompt in (16, 32, 32):
        rows = [{"name": "mine", "run": str(run), "speed": ["bf16"]}]
        measure = VALUES["measure"] | {"speed": {"prompt": prompt, "new": 4, "rounds": 1}}
        compare(spec(rows=rows, measure=measure), out, **given)
        prompts.append(read_json(out / "rows" / "mine.json")["measured"]["speed"])
    assert [each["bf16"]["as"]["prompt"] for each in prompts] == [16, 32, 32]
    assert prompts[1] == prompts[2]
    assert (run / "bench.json").read_text() == "hours of work"


def test_accuracies_are_in_the_order_of_the_specification() -> None:
    measured = {f"task {name}": {"acc": value} for name, value in (("a", [1.0, 0.0]), ("b", [1.0, 1.0]))}
    measured |= {"windows": {"sum": [1.0, 1.0]}}
    facts = {"parameters": 1, "active": 1.0, "seconds": None}
    asked = spec(rows=ROWS[:1], measure={"domains": {"all": ["sum"]}, "tasks": ["b", "a"]})
    (conversion,) = asked.conversions()
    one = {"facts": facts, "measured": measured}
    table = table_of(asked, one, [(conversion, one)])
    assert [list(each["by task"].items()) for each in table["rows"]] == [[("b", 1.0), ("a", 0.5)]] * 2


def test_a_finished_run_is_a_row(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, result = made
    rows = [{"name": "mine", "run": str(out / "runs" / "static")}]
    found = compare(spec(rows=rows), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")
    assert row(found, "mine")["groups"] == row(result, "static")["groups"]
    with pytest.raises(MoesmithError, match="another parent"):
        compare(spec(rows=rows), tmp_path / "out", model=str(ASSETS / "parents" / "qwen3"), data=DATA)


def test_rows_take_over_stages_of_other_runs(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = made
    options: dict[str, Any] = {"model": MODEL, "data": DATA, "dtype": "fp32", "reuse": [out / "runs" / "static"]}
    found = compare(spec(rows=ROWS[:1]), tmp_path / "out", **options)
    assert row(found, "static")["groups"] == row(result, "static")["groups"]
    assert f"[carve] taken over from {out / 'runs' / 'static'}" in capsys.readouterr().err.replace("\n", "")
    with pytest.raises(MoesmithError, match="does not exist"):
        compare(spec(rows=ROWS[:1]), tmp_path / "other", model=MODEL, data=DATA, reuse="absent")


@pytest.mark.parametrize("by", ["magnitude", "gate"])
def test_controls_keep_each_tokens_largest_channels(by: Any) -> None:
    parent = load_parent(MODEL, "fp32")
    x = torch.randn(1, 5, parent.D, generator=torch.Generator().manual_seed(0))
    ffn, kept = parent.ffns[0], parent.F // 4
    with Control(by=by, active=0.25).row(parent, open_run), torch.no_grad():
        found = ffn.module(x)[0]
    for token, y_D in zip(x[0], found, strict=True):
        gate_F, up_F = ffn.activation(ffn.gate_FD @ token), ffn.up_FD @ token  # type: ignore[operator]
        a_F = gate_F * up_F
        order = sorted(range(parent.F), key=lambda j: -float((a_F if by == "magnitude" else gate_F)[j].abs()))
        torch.testing.assert_close(ffn.down_DF[:, order[:kept]] @ a_F[order[:kept]], y_D, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ffn.module(x), ffn.output(x))  # the parent is as it was


def test_a_control_is_a_row(tmp_path: Path) -> None:
    rows = [{"name": f"top-{share}", "control": {"by": "gate", "active": share}} for share in (1.0, 0.25)]
    result = compare(spec(rows=rows), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")
    dense, whole, few = result["rows"]
    assert whole["groups"]["all"]["value"] == pytest.approx(1)
    assert few["groups"]["all"]["value"] > 1
    assert few["ffn_active"] == 0.25
    assert few["parameters_total"] == dense["parameters_total"] > few["parameters_active"]


@pytest.mark.parametrize(("quant", "error"), [("q8_0", 0.02), ("q4_k_m", 0.16)])
def test_a_parent_in_fewer_bits_is_a_row(quant: Any, error: float, tmp_path: Path) -> None:
    """Its weights are near the parent's and not the same, and it is a row of the table."""
    parent = load_parent(MODEL, "fp32")
    with Quantised(quant=quant).row(parent, open_run) as (model, found):
        for name, wanted in parent.model.state_dict().items():
            if name.endswith("_proj.weight"):
                off = (model.state_dict()[name] - wanted).float().norm() / wanted.float().norm()
                assert 0 < off < error, name
        assert found["bytes"] > 0
    rows = [{"name": "few", "control": {"quant": quant}}]
    dense, few = compare(spec(rows=rows), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")["rows"]
    assert few["groups"]["all"]["value"] == pytest.approx(1, abs=0.1)
    assert few["groups"]["all"]["value"] != 1
    assert few["parameters_total"] == dense["parameters_total"]


def test_a_mixture_in_fewer_bits_is_a_row_and_rows_are_timed(tmp_path: Path) -> None:
    """Its experts are those of its GGUF file; its speed is that of the row whose mixture it is, in its type."""
    rows = [
        ROWS[2] | {"vary": {}, "speed": ["bf16", "q8_0"]},
        {"name": "few", "control": {"quant": "q8_0", "of": "token"}},
        {"name": "q8", "control": {"quant": "q8_0"}},
    ]
    more = {"speed": {"prompt": 32, "new": 4, "rounds": 1}, "health": True}
    timed = spec(rows=rows, measure=VALUES["measure"] | more)
    out, given = tmp_path / "out", {"model": MODEL, "data": DATA, "dtype": "fp32"}
    (_, early) = compare(timed, out, **given, only="few")["rows"]
    assert "the run of row 'token' is not there. Make it first: --only token" in early["refused"]
    result = compare(timed, out, **given)
    token, few, q8 = (row(result, name) for name in ("token", "few", "q8"))
    assert few["groups"]["all"]["value"] == pytest.approx(token["groups"]["all"]["value"], rel=0.05)
    assert few["groups"]["all"]["value"] != token["groups"]["all"]["value"]
    kept = read_json(out / "rows" / "token.json")["measured"]["speed"]
    for one, (quant, side) in ((token, ("bf16", "moe")), (few, ("q8_0", "moe")), (q8, ("q8_0", "dense"))):
        assert one["speed"]["weights"] == quant
        assert one["speed"]["decode"] == kept[quant]["decode"][side] > 0
        assert one["speed"]["bytes"] == kept[quant]["bytes"][side]
    parent = load_parent(MODEL, "fp32")
    assert few["bytes"] == few["speed"]["bytes"] < token["speed"]["bytes"]
    assert result["rows"][0]["speed"]["decode"] == kept["bf16"]["decode"]["dense"]
    assert "decode_ratio" in few["speed"]
    assert "decode_ratio" not in q8["speed"]
    assert token["health"] == health(open_run(out / "runs" / "token").load(parent), parent.tokenizer)
    assert {"answers that end", "decode, tokens/s"} <= set(re.split(r" \| |\| | \|", table_text(out)))
    assert (out / "figures" / "speed.png").is_file()
    again = (out / "rows" / "token.json").read_bytes()
    assert compare(timed, out, **given) == result
    assert (out / "rows" / "token.json").read_bytes() == again


@pytest.mark.parametrize(("quant", "kinds"), [("q8_0", {"Q8_0"}), ("q4_k_m", {"Q4_K", "Q6_K"})])
def test_a_folder_is_rounded_as_its_gguf_file(quant: Any, kinds: set[str], tmp_path: Path) -> None:
    """Experts and embedding as gguf's own reader finds them in the file; norms and routers stay."""
    import gguf

    source = tiny_source("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    folder, file = tmp_path / "model", tmp_path / "moe.gguf"
    write_stock(source.parent, source.carving, folder, torch.float32)
    Gguf().write(source, file, Options(quant=quant))
    write_rounded(folder, file, tmp_path / "out")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    stored = {t.name: (gguf.quants.dequantize(t.data, t.tensor_type), t.tensor_type.name) for t in reader_of(file)}
    names = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
    for name, weight in after.items():
        if (
            found := re.fullmatch(r"model\.layers\.(\d)\.block_sparse_moe\.experts\.(\d)\.(w\d)\.weight", name)
        ) is None:
            continue
        wanted, kind = stored[f"blk.{found[1]}.{names[found[3]]}.weight"]
        assert kind in kinds
        torch.testing.assert_close(weight, torch.from_numpy(wanted[int(found[2])].copy()), atol=0, rtol=0)
    wanted, _ = stored["token_embd.weight"]
    assert torch.equal(after["model.embed_tokens.weight"], torch.from_numpy(wanted.copy()))
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert same == {name for name in before if "norm" in name or "block_sparse_moe.gate" in name}


def table_text(out: Path) -> str:
    return (out / "comparison.md").read_text(encoding="utf-8")


def reader_of(file: Path) -> Any:
    import gguf

    return gguf.GGUFReader(str(file)).tensors


def test_variants_that_read_more_text_are_a_figure(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"vary": {"domains.tokens": [256, 512]}}]
    result = compare(spec(rows=rows), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")
    (few, more), *_ = curves(result["rows"][1:]).values()
    assert tokens_of(few) < tokens_of(more)
    assert (tmp_path / "out" / "figures" / "tokens.png").is_file()
    assert not curves([few])


def test_a_row_depends_on_what_acts(made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a setting while it changes nothing, as one that is added later; but on the version of what computes."""
    out, _ = made
    series = Series("comparison", out, MODEL, DATA, dtype="fp32")
    one = Comparison(spec(), series, Ruler(series.parent, DATA, spec().measure))
    assert all(one.known(conversion) is not None for conversion in one.conversions.values())
    token = one.recipes["token-ratio-0.5"]
    found, *_ = one._work(token)
    assert "among" in token.carve.model_dump()
    assert "among" not in found["carve"]["settings"]
    monkeypatch.setattr(Token, "version", 99)
    assert [name for name, each in one.conversions.items() if one.known(each) is None] == [
        "token-ratio-0.5", "token-ratio-0.25"
    ]  # fmt: skip


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MoesmithError, match="holds no comparison"):
        compare(spec(), tmp_path, model=MODEL, data=DATA)
    with pytest.raises(MoesmithError, match=r"there is no row 'other'\. Choose from static, dive, token"):
        compare(spec(), tmp_path / "out", model=MODEL, data=DATA, only="other")
    with pytest.raises(MoesmithError, match=r"no recipe has a setting 'stage2\.tokns'\. Did you mean 'stage2\.tokens'"):
        compare(spec(settings=["stage2.tokns=0"]), tmp_path / "out", model=MODEL, data=DATA)
    measure = VALUES["measure"] | {"window": 9999, "tokens": 10**5}
    with pytest.raises(MoesmithError, match=r"measure\.window is 9999, but the model reads"):
        compare(spec(measure=measure), tmp_path / "out", model=MODEL, data=DATA)
    assert not (tmp_path / "out").exists()


def test_items_are_the_tasks_scores(tmp_path: Path) -> None:
    records = [{"question": f"cat {n}", "choices": ["dog", "bird fish", "ant"], "answer": n % 3} for n in range(7)]
    lines = "".join(json.dumps({"id": str(n)} | record) + "\n" for n, record in enumerate(records))
    (tmp_path / "arc_easy.test.jsonl").write_text(lines, encoding="utf-8")
    parent = load_parent(MODEL, "fp32")
    tasks = find_tasks(["arc_easy"], tmp_path)
    items, means = (run(parent.model, parent.tokenizer, tasks, 5) for run in (run_items, run_tasks))
    assert len(items["arc_easy"]["acc"]) == 5
    for metric in ("acc", "acc_norm"):
        assert np.mean(items["arc_easy"][metric]) == pytest.approx(means["arc_easy"][metric])


def test_rows_vary() -> None:
    found = [(c.row, c.name, c.title) for c in spec().conversions()]
    assert found == [
        ("static", "static", "static | mask"),
        ("dive", "dive-seed-1", "dive"),
        ("dive", "dive-seed-2", "dive"),
        ("token-ratio-0.5", "token-ratio-0.5", "token, carve.ratio 0.5"),
        ("token-ratio-0.25", "token-ratio-0.25", "token, carve.ratio 0.25"),
    ]


def test_several_sets_vary() -> None:
    sets = [{"carve.ratio": [0.5], "seed": [1, 2]}, {"carve.ratio": [0.25]}]
    rows = [ROWS[0], ROWS[2] | {"vary": [{"carve.passes": [0, 1]}]}]
    assert [c.name for c in spec(rows=rows, vary=sets).conversions()] == [
        "static-ratio-0.5-seed-1", "static-ratio-0.5-seed-2", "static-ratio-0.25",
        "token-ratio-0.5-passes-0-seed-1", "token-ratio-0.5-passes-1-seed-1", "token-ratio-0.5-passes-0-seed-2",
        "token-ratio-0.5-passes-1-seed-2", "token-ratio-0.25-passes-0", "token-ratio-0.25-passes-1",
    ]  # fmt: skip


def test_every_row_has_its_first_turn_before_a_second_one() -> None:
    rows = [
        ROWS[0] | {"vary": {"seed": [1, 2]}},
        ROWS[2],
        {"name": "b", "recipe": "token", "vary": {"seed": [7, 8, 9]}},
    ]
    made = [(c.source.name, c.seed) for c in turns(list(spec(rows=rows).conversions()))]
    assert made == [("static", 1), ("token", None), ("b", 7), ("static", 2), ("token", None), ("b", 8), ("b", 9)]


def test_all_rows_vary() -> None:
    control = {"name": "top", "control": {"by": "gate", "active": 0.5}}
    found = [
        c.name for c in spec(rows=[*ROWS[:2], control], vary={"carve.ratio": [0.5, 0.75], "seed": [7]}).conversions()
    ]
    assert found == [
        *("static-ratio-0.5-seed-7", "static-ratio-0.75-seed-7"),
        *("dive-ratio-0.5-seed-1", "dive-ratio-0.5-seed-2", "dive-ratio-0.75-seed-1", "dive-ratio-0.75-seed-2"),
        "top",
    ]


def test_a_row_takes_the_settings_that_it_has() -> None:
    one = spec()
    given = {c.name: one.settings_of(c) for c in one.conversions()}
    assert "affinity.tokens=256" in given["dive-seed-1"]
    assert "affinity.tokens=256" not in given["token-ratio-0.5"]
    assert given["token-ratio-0.5"][-1] == "carve.ratio=0.5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "rows: "),
        ({"rows": [{"name": "a"}]}, "a recipe, a run or a control"),
        ({"rows": [{"name": "a", "recipe": "token", "run": "b"}]}, "a recipe, a run or a control"),
        ({"rows": [{"name": "a", "control": {"quant": "q8_0"}, "speed": ["bf16"]}]}, "a control is not timed"),
        ({"rows": [{"name": "a", "control": {"quant": "q8_0", "of": "b"}}]}, "a is of 'b', and no conversion"),
        ({"rows": [{"name": "a", "run": "b", "settings": ["seed=1"]}]}, "belong to a recipe"),
        ({"rows": [{"name": "../a", "recipe": "token"}]}, "is no name"),
        ({"rows": [{"name": "parent", "recipe": "token"}]}, "is no name"),
        ({"rows": [{"name": "a", "recipe": "token", "vary": {"seed": []}}]}, "vary.seed has no values"),
        ({"vary": [{"seed": [1]}, {"carve.ratio": []}]}, "vary.carve.ratio has no values"),
        ({"rows": [ROWS[0], ROWS[0]]}, "two rows are called static"),
        ({"baseline": "other"}, "no row 'other' for a baseline"),
        ({"measure": {}}, "names no group"),
        ({"measure": {"domains": {"a": []}}}, "group 'a' names no domain"),
        ({"measure": {"domains": {"a": ["b", "b"]}}}, "or one twice"),
        ({"measure": {"domains": {"a": ["wikitext2"]}, "wikitext2": 4096}}, "wikitext2 is a domain here"),
        ({"measure": {"domains": {"a": ["b"]}, "tokens": 64}}, "fewer than one window"),
        ({"rows": [{"name": "a", "recipe": "token", "vary": {"carve.select": ["../x"]}}]}, "is no name"),
        ({"colour": "red"}, "colour: "),
    ],
)
def test_a_wrong_specification_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoesmithError, match=message) as error:
        load_spec(written(tmp_path, VALUES | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("3", "holds no comparison")])
def test_a_file_that_is_no_specification(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MoesmithError, match=message):
        load_spec(written(tmp_path, text))
    with pytest.raises(MoesmithError, match="cannot be read"):
        load_spec(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_examples_are_specifications(name: str) -> None:
    one = load_spec(EXAMPLES / f"{name}.yaml")

    for conversion in [c for c in one.conversions() if c.source.recipe]:
        load_recipe(conversion.source.recipe, one.budget, one.settings_of(conversion))


@pytest.mark.parametrize(("strata", "size"), [(3, 25), (16, 4)])
def test_intervals_hold_the_mean_as_often_as_they_say(strata: int, size: int) -> None:
    generator, held = np.random.default_rng(3), 0
    for trial in range(300):
        found = interval([generator.normal(centre, 1 + centre, size) for centre in range(strata)], trial)
        held += found.low <= (strata - 1) / 2 <= found.high
    assert 274 <= held <= 296  # 95 % of 300: 285, three standard deviations either way


def test_the_paired_test_is_the_permutation_test() -> None:
    generator = np.random.default_rng(5)
    strata = [generator.normal(0.4, 1, 6), generator.normal(0.4, 1, 6)]
    # one stratum's weight is the other's, so that the mean of all is the same statistic
    exact = stats.permutation_test(
        (np.concatenate(strata), np.zeros(12)), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert p_value(strata) == pytest.approx(exact.pvalue, abs=0.03)
    assert p_value([[0.0] * 9]) == 1
    assert p_value([[1.0] * 30]) < 0.001


def test_a_row_is_tested_against_its_own_variant_of_the_baseline(tmp_path: Path) -> None:
    control = {"name": "top", "control": {"by": "gate", "active": 0.5}}
    rows = [ROWS[0] | {"vary": {"carve.ratio": [0.25, 0.5]}}, ROWS[2], control]
    result = compare(spec(rows=rows), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")
    tested = {each["name"]: "p" in each["groups"]["all"] for each in result["rows"][1:]}
    bases = {"static-ratio-0.25": False, "static-ratio-0.5": False, "top": False}
    assert tested == bases | {"token-ratio-0.5": True, "token-ratio-0.25": True}


def test_rows_of_another_measurement_are_not_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"model": MODEL, "data": DATA}
    compare(spec(rows=ROWS[:2]), out, dtype="fp32", **options)
    other = spec(rows=ROWS[:2], measure=VALUES["measure"] | {"window": 32})
    result = compare(other, out, only="static", **options)
    assert [each["title"] for each in result["rows"]] == ["dense parent", "static | mask"]


def test_a_measurement_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words and the tasks are measured part by part: a part that is known is not measured again."""
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    questions = [{"question": f"cat {n}", "choices": ["dog", "bird fish", "ant"], "answer": n % 3} for n in range(6)]
    passages = [{"context": f"bird {word} fish", "target": word} for word in ("cat", "dog", "ant")]
    for name, records in (("arc_easy", questions), ("lambada", passages)):
        lines = "".join(json.dumps({"id": str(n)} | record) + "\n" for n, record in enumerate(records))
        (data / f"{name}.test.jsonl").write_text(lines, encoding="utf-8")
    measure = VALUES["measure"] | {"lambada": 3, "tasks": ["arc_easy"], "limit": 5}
    one = spec(rows=ROWS[:1], measure=measure)
    options: dict[str, Any] = {"model": MODEL, "data": str(data), "dtype": "fp32"}

    def killed(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moesmith.comparison.measure.run_items", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(one, tmp_path / "out", **options)
    kept = read_json(tmp_path / "out" / "rows" / "parent.json")
    assert kept["measured"].keys() == {"windows", "lambada"}
    kept["measured"]["lambada"]["right"] = [1, 1, 1]
    write_json(tmp_path / "out" / "rows" / "parent.json", kept)
    stopped = compare(one, tmp_path / "out", **options)
    whole = compare(one, tmp_path / "whole", **options)
    assert stopped["rows"][0]["lambada"]["value"] == 1  # what was known
    assert stopped["rows"][0]["accuracy"] == whole["rows"][0]["accuracy"]
    assert stopped["rows"][0]["by task"].keys() == {"arc_easy"}
    assert 0 <= whole["rows"][1]["lambada"]["value"] <= 1 < whole["rows"][1]["lambada"]["perplexity"]


def test_a_row_with_other_settings_says_what_helps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": MODEL, "data": DATA, "dtype": "fp32"}
    compare(spec(rows=ROWS[:1]), tmp_path / "out", **options)
    other = spec(rows=[ROWS[0] | {"settings": ["carve.ratio=0.25"]}])
    refused = compare(other, tmp_path / "out", **options)["rows"][1]["refused"]
    assert "carve.ratio was 0.5, is 0.25" in refused
    assert refused.endswith(f"Or delete {tmp_path / 'out' / 'runs' / 'static'}, or give the row another name.")


def test_losses_that_are_no_numbers_refuse_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(spec(rows=ROWS[:1]), tmp_path / "out", model=MODEL, data=DATA, dtype="fp32")

    def broken(_model: Any, texts: Any, *_args: Any, **_options: Any) -> Any:
        return [torch.full((len(ids), 3), torch.nan) for ids in texts]

    (tmp_path / "out" / "rows" / "static.json").unlink()
    monkeypatch.setattr("moesmith.comparison.measure.token_nlls", broken)
    result = compare(spec(rows=ROWS[:1]), tmp_path / "out", model=MODEL, data=DATA)
    assert "are not finite" in result["rows"][1]["refused"]
    assert result["rows"][0] == whole["rows"][0]


def test_a_stratum_counts_as_one() -> None:
    assert mean([[1.0] * 100, [3.0]]) == 2


def test_a_newer_comparison_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "comparison.json", {"format": 99, "compute": "float32", "parent": "x"})
    with pytest.raises(MoesmithError, match="newer moesmith"):
        compare(spec(), tmp_path, model=MODEL, data=DATA)


@pytest.mark.parametrize(
    ("value", "text"), [(1.2345, "1.234"), (0.0, "0.000"), (99.5, "99.500"), (2583.05, "2,583"), (1.84e6, "1.8e+06")]
)
def test_numbers_have_as_many_digits_as_matter(value: float, text: str) -> None:
    assert number(value, 3) == text


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
KEPT = sorted(path.parent.name for path in RESULTS.glob("*/comparison.json"))


@pytest.mark.parametrize("name", KEPT)
def test_the_tables_that_came_with_the_repository_are_their_rows(name: str) -> None:
    """Numbers of every window and item are committed; the specification in examples makes the same table of them."""
    known = read_json(RESULTS / name / "comparison.json")
    spec = load_spec(RESULTS.parents[1] / "examples" / "comparisons" / f"{name}.yaml")
    rows = {path.stem: read_json(path) for path in (RESULTS / name / "rows").glob("*.json")}
    assert all(row["done"] for row in rows.values())
    made = [(one, rows[one.name]) for one in spec.conversions() if one.name in rows]
    assert len(made) == len(rows) - 1, "the parent is no row of the specification"
    table = table_of(spec, rows["parent"], made)
    assert {key: known[key] for key in table} == json.loads(json.dumps(table))
