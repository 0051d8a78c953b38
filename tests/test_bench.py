"""``moesmith bench``: bounds against hand arithmetic and counted tensors, real workers, the table's words, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moesmith
from conversions import snapshot
from refusals import refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, GPTNeoXConfig

from moesmith.bench import measure, process
from moesmith.bench.bounds import Count, Experts, Weights, bounds, of_folder, of_gguf
from moesmith.bench.figure import bench_figure
from moesmith.bench.files import Files
from moesmith.bench.measure import prompts, summary
from moesmith.bench.process import Worker
from moesmith.bench.table import sentences, show, verdict
from moesmith.errors import MoesmithError
from moesmith.export.gguf.converter import convert
from moesmith.export.native import write_native
from moesmith.export.target import Source
from moesmith.files.artefact import read_json
from moesmith.mixture.carving import Carving
from moesmith.mixture.layer import Expert, Layer, Linear
from moesmith.parent.load import load_parent
from moesmith.run.folder import open_run
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import save_tiny, tiny_model, tiny_parent

L, D, F, E, F_E, KV = 2, 32, 64, 4, 32, 2 * 8  # the tiny Llama and its carving


def test_bounds_are_hand_arithmetic() -> None:
    dense = Weights(Count(100, 20), Count(90, 20), 3.0, 4.0, None)
    experts = (Experts(4, 1, 30, 120),)
    moe = Weights(Count(40, 20, experts), Count(38, 20, experts), 3.0, 4.0, None)
    assert moe.step_bytes(2, 10) == pytest.approx(40 + 20 + 30 * 7 / 4 + 2 * 3 * 10)
    assert dense.prompt_flops(3) == 2 * 90 * 3 + 2 * 20 + 4 * (1 + 2 + 3)
    found = bounds(dense, moe, 1, 8, 4)
    assert found["decode"]["bound"] == pytest.approx((120 + 30) / (90 + 30))
    assert found["prefill"]["bound"] == pytest.approx((2 * 90 * 8 + 40 + 4 * 36) / (2 * (38 + 30) * 8 + 40 + 4 * 36))
    # every expert is read in the end, and what they share only once
    assert moe.step_bytes(1000, 0) == pytest.approx(40 + 20 + 120)
    overlapping = Count(40, 20, (Experts(4, 1, 30, 50),))
    assert overlapping.used(1000) == 40 + 20 + 50
    # layers may differ in their gate
    several = Count(40, 20, (Experts(4, 1, 30, 120), Experts(3, 2, 10, 30)))
    assert several.used(2) == pytest.approx(40 + 20 + 30 * 7 / 4 + 10 * 3 * (1 - 1 / 9))
    two = Weights(several, several, 0.0, 0.0, None)
    assert two.prompt_flops(5) == pytest.approx(2 * (40 + 30 + 2 * 10) * 5 + 2 * 20)
    windowed = Weights(Count(1, 1), Count(1, 1), 3.0, 4.0, 4)
    assert windowed.step_bytes(2, 10) == 2 + 2 * 3 * 4
    assert windowed.prompt_flops(6) == 2 * 6 + 2 + 4 * (1 + 2 + 3 + 4 + 4 + 4)


def test_counts_are_those_of_the_tensors(home: Path, finished: Path) -> None:
    config = tiny_model("llama").config
    V = config.vocab_size
    attention = D * (4 * 8 + 2 * KV) + 4 * 8 * D
    dense = of_folder(home / "m", config, torch.bfloat16)
    assert dense.entries == Count(L * (attention + 3 * D * F), V * D)  # the tied embedding is read as the head
    assert dense.bytes.always == 2 * (L * (attention + 3 * D * F + 2 * D) + D)
    assert (dense.cache, dense.scores) == (L * 2 * KV * 2, L * 4 * 4 * 8)
    moe = of_folder(finished / "model", config, torch.bfloat16)
    expert = 3 * D * F_E
    assert moe.entries == Count(L * (attention + E * D), V * D, (Experts(E, 1, expert, E * expert),) * L)
    stored = load_file(finished / "model" / "model.safetensors")
    head = 0 if "lm_head.weight" in stored else V * D
    total = sum(tensor.numel() for tensor in stored.values())
    assert moe.bytes.always + sum(layer.all for layer in moe.bytes.layers) + moe.bytes.head == 2 * total
    assert moe.step_bytes(10**6, 0) == pytest.approx(2 * total)
    assert head == V * D


@pytest.mark.parametrize("own", [False, True], ids=["subsets", "matrices of their own"])
def test_counts_of_own_format(own: bool, tmp_path: Path) -> None:
    """One expert of the written folder is as wide as the carving's; subsets of one network are stored once."""
    parent = tiny_parent("phi")
    carving = random_carving(parent, experts=4, kept=24, top_k=2, compensation="refit" if own else "none")
    write_native(parent, carving, tmp_path)
    found = of_folder(tmp_path, parent.config, torch.float32)
    assert [(layer.count, layer.active) for layer in found.entries.layers] == [(4, 2)] * parent.L
    assert [layer.one for layer in found.entries.layers] == [24 * 2 * parent.D] * parent.L
    everything = [4.0 * 24] * parent.L if own else (carving.union() * parent.F).tolist()
    assert [layer.all for layer in found.entries.layers] == pytest.approx([2 * parent.D * n for n in everything])


def test_counts_of_own_format_follow_each_layers_own_gate(tmp_path: Path) -> None:
    parent = tiny_parent("phi", num_hidden_layers=3)
    few, many = random_carving(parent, experts=2, kept=24), random_carving(parent, experts=4, kept=16, top_k=2)
    one = Layer([Expert(torch.arange(40))], Linear(torch.zeros(1, parent.D)))
    write_native(parent, Carving([one, few.layers[1], many.layers[2]], parent.F), tmp_path)
    found, size = of_folder(tmp_path, parent.config, torch.float32).entries, 2 * parent.D
    assert [(layer.count, layer.active, layer.one) for layer in found.layers] == [
        (2, 1, 24 * size),
        (4, 2, pytest.approx(16 * size)),
    ]
    attention, routers = 3 * 3 * parent.D**2, (1 + 2 + 4) * parent.D
    assert found.always == attention + routers + 40 * size  # the only expert of a layer is read by every step


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300), True),
        (GPTNeoXConfig(**SMALL, intermediate_size=64), False),
        (FalconConfig(**SMALL, bos_token_id=0, eos_token_id=1), True),
    ],
    ids=["GPT-2", "GPT-NeoX", "Falcon"],
)
def test_ends_of_a_model_are_known_whatever_they_are_called(config: Any, tied: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    found = of_folder(tmp_path, config, torch.float32)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert found.entries.head == 300 * 32
    assert found.bytes.head == 4 * 300 * 32
    assert found.bytes.always == 4 * (total - 300 * 32 * (1 if tied else 2))


def test_a_parent_with_a_list_of_another_tool_is_read(home: Path, tmp_path: Path) -> None:
    """What the user's folder lists is not moesmith's business: whether the weights are the run's, its digest says."""
    folder, config = Path(shutil.copytree(home / "m", tmp_path / "m")), tiny_model("llama").config
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n{'1' * 64}  model.safetensors\n")
    assert of_folder(folder, config, torch.bfloat16) == of_folder(home / "m", config, torch.bfloat16)
    parent = load_parent(str(folder), torch.float32)
    source = Source(parent, random_carving(parent), tmp_path / "run", torch.zeros(1, 8, dtype=torch.long))
    assert Files(source).folders()[0] == folder
    assert not measure._own(folder)
    convert(folder, tmp_path / "m.gguf", "q4_k_m")
    assert of_gguf(tmp_path / "m.gguf", config).entries == of_folder(folder, config, torch.float32).entries


def test_counts_of_own_format_of_version_0_1(home: Path, tmp_path: Path) -> None:
    """Experts that share channels: one expert is its share of the union, all of them are the union."""
    config = tiny_model("llama").config
    folder = tmp_path / "model"
    shutil.copytree(home / "m", folder)
    tensors = {f"model.layers.{i}.mlp.experts.{n}": torch.zeros(48, D) for i in (0, 1) for n in ("gate", "up", "down")}
    tensors |= {f"model.layers.{i}.mlp.experts.index_EF": torch.zeros(E, 16, dtype=torch.int32) for i in (0, 1)}
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    own = {"gate": {"experts": E, "top_k": 2}, "widths": [16, 24], "unions": [48, 48], "attention": None}
    (folder / "config.json").write_text(json.dumps(own))
    found = of_folder(folder, config, torch.float32)
    assert [(layer.count, layer.active, layer.all) for layer in found.bytes.layers] == [(E, 2, 4 * 3 * D * 48)] * 2
    assert [layer.one for layer in found.bytes.layers] == pytest.approx([4 * 3 * D * 16, 4 * 3 * D * 24])


def test_prompts_are_held_out_text(finished: Path) -> None:
    from moesmith.files.artefact import read_tensors

    text = read_tensors(finished / "stages" / "held-out" / "evaluation.safetensors")
    names = sorted(text)
    rows = prompts(open_run(finished), 6, 10)
    assert [len(row) for row in rows] == [10] * 6
    for row, found in enumerate(rows):
        ids = text[names[row % 4]].flatten().tolist()
        start = 10 * (row // 4)
        assert found == ids[start : start + 10]
    count = text[names[0]].numel()
    longer = prompts(open_run(finished), 1, count + 3)[0]
    assert longer[count:] == longer[:3]


def made_up(ratios: dict[tuple[int, str], tuple[float, ...]]) -> dict[str, Any]:
    """A result whose parent takes one second in every round, and whose MoE takes ``1 / ratio``."""
    results = []
    for batch in sorted({batch for batch, _ in ratios}):
        prefill, decode = ratios[batch, "prefill"], ratios[batch, "decode"]
        seconds = {
            "dense": [{"prefill_seconds": 1.0, "decode_seconds": 1.0, "memory": 2**30}] * len(prefill),
            "moe": [
                {"prefill_seconds": 1 / p, "decode_seconds": 1 / d, "memory": 2**31}
                for p, d in zip(prefill, decode, strict=True)
            ],
        }
        limit = {"prefill": {"bound": 1.5}, "decode": {"bound": 1.4}}
        facts = {"dense": {}, "moe": {"experts": {"prefill": "grouped_mm", "decode": "eager"}}}
        measured = {"seconds": seconds, "idle_cores": 0.2, "facts": facts}
        cell = {"runtime": "transformers", "weights": "bfloat16", "batch": batch}
        files = {"file_bytes": {"dense": 2**20, "moe": 3 * 2**20}}
        results.append(cell | summary(measured, batch, 512, 64, limit) | files)
    return {"run": "runs/x", "prompt": 512, "new": 64, "rounds": 3, "threads": 2, "results": results}


def test_where_the_moe_loses_the_table_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = made_up(
        {
            (1, "prefill"): (1.2, 1.4, 1.3),
            (1, "decode"): (1.1, 0.9, 1.0),
            (8, "prefill"): (0.6, 0.8, 0.7),
            (8, "decode"): (1.3, 1.2, 1.25),
        }
    )
    first, second = found["results"]
    assert first["prefill"] == {
        "dense": 512.0,
        "moe": pytest.approx(512 * 1.3),
        "ratio": pytest.approx(1.3),
        "ratio_min": pytest.approx(1.2),
        "ratio_max": pytest.approx(1.4),
        "verdict": "MoE wins",
        "bound": 1.5,
    }
    assert second["decode"]["dense"] == 8 * 64
    assert second["first_token"]["moe"] == pytest.approx(1 / 0.7)
    show(found)
    said = capsys.readouterr().out
    lost = "MoE loses: prefill in transformers bfloat16 at batch 8 runs at 0.70 x the parent's speed (0.60..0.80)"
    assert lost in said
    assert "MoE is not clearly faster: decode in transformers bfloat16 at batch 1 runs at 1.00 x" in said
    assert sum("MoE loses: " in line for line in sentences(found)) == 1
    for part in (
        "1.30 (1.20..1.40)",
        "MoE wins",
        "no clear winner",
        "1,024 MiB",
        "2,048 MiB",
        "3 MiB",
        "20% of a core",
    ):
        assert part in said
    figure = bench_figure(found)
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"1.30×", "1.00×", "0.70×", "1.25×", "transformers bfloat16"} <= texts
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == pytest.approx([512, 512 * 8, 512 * 1.3, 512 * 8 * 0.7])
    marks = [segment[0][1] for segment in figure.axes[1].collections[0].get_segments()]
    assert marks == pytest.approx([64 * 1.4, 64 * 8 * 1.4])


def test_verdict_needs_all_rounds() -> None:
    assert [verdict(*x) for x in ((1.01, 1.2), (0.9, 0.99), (0.9, 1.1))] == ["MoE wins", "MoE loses", "no clear winner"]


@pytest.mark.slow
def test_bench_in_transformers_and_llama_cpp(finished: Path, tmp_path: Path) -> None:
    """Real processes, from the command line: results of both runtimes, a figure, and files made once."""
    pytest.importorskip("xllamacpp")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    words = ["bench", run, "--batch", "1,3", "--prompt", 24, "--new", 4, "--rounds", 2, "--quant", "q8_0", "--json"]
    answer = moesmith(*words, "--runtime", "transformers,llama.cpp")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert found == read_json(run / "bench.json")
    assert (run / "figures" / "bench.png").read_bytes().startswith(b"\x89PNG")
    cells = [(x["runtime"], x["weights"], x["batch"]) for x in found["results"]]
    types = (("transformers", "float32"), ("llama.cpp", "q8_0"))
    assert cells == [(*cell, batch) for cell in types for batch in (1, 3)]
    for result in found["results"]:
        for side in ("dense", "moe"):
            assert len(result["seconds"][side]) == 2
            assert result["memory"][side] > 2**22
            times = sorted(each["decode_seconds"] for each in result["seconds"][side])
            assert result["decode"][side] == pytest.approx(4 * result["batch"] / (sum(times) / 2))
        assert result["prefill"]["bound"] > 1
        assert result["decode"]["bound"] > (1 if result["batch"] == 1 else 0.5)
    tried = found["results"][0]["experts_tried"]
    assert set(tried) == {"prefill", "decode"}
    assert all(set(kinds) == {"eager", "grouped_mm", "batched_mm"} for kinds in tried.values())
    for phase, kind in found["results"][0]["experts"].items():
        assert tried[phase][kind] == min(tried[phase].values())
    assert found["runtimes"]["transformers"]["threads"] == found["threads"] == process.threads()
    assert set(found["runtimes"]["llama.cpp"]["versions"]) == {"xllamacpp"}
    sizes = {(x["weights"], side): x["file_bytes"][side] for x in found["results"] for side in ("dense", "moe")}
    assert sizes["q8_0", "moe"] == (run / "bench" / "moe-q8_0.gguf").stat().st_size
    assert sizes["float32", "moe"] == sum(p.stat().st_size for p in (run / "model").glob("*.safetensors"))
    made = snapshot(run / "bench")
    assert {"made.json", "moe-q8_0.gguf", "dense-q8_0.gguf"} <= set(
        made
    )  # the parent is a folder in this dtype already
    refused(moesmith(*words, "--runtime", "llama.cpp"), r"bench\.json exists\. Give --overwrite")
    again = moesmith(*words, "--runtime", "llama.cpp", "--overwrite", "--no-repack")
    assert again.status == 0, again.err
    assert (found["repack"], json.loads(again.out)["repack"]) == (True, False)
    assert snapshot(run / "bench") == made


def test_a_worker_computes_what_the_model_says(tmp_path: Path) -> None:
    """The greedy loop with a cache chooses the tokens that the model chooses without one, and does no more."""
    from moesmith.bench.transformers_worker import Model

    folder = save_tiny("llama", tmp_path / "m", dtype=torch.float32)
    worker = Model({"path": str(folder), "dtype": "float32", "device": "cpu", "threads": 1, "own_code": False})
    rows = [[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]]
    ids = torch.tensor(rows)
    with torch.inference_mode():
        cache, last_B1 = worker._prefill(ids)
        tokens = [last_B1]
        for _ in range(5):
            cache, last_B1 = worker._decode(cache, last_B1, 1)
            tokens.append(last_B1)
        for token in tokens:  # without a cache
            logits: Any = worker.model(ids, use_cache=False).logits
            assert torch.equal(logits[:, -1:].argmax(-1), token)
            ids = torch.cat([ids, token], 1)
    seen = []
    worker.model.register_forward_pre_hook(lambda _m, args, _k: seen.append(args[0].shape), with_kwargs=True)
    found = worker.measure(rows, 3)
    assert seen == [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert min(found["prefill_seconds"], found["decode_seconds"]) > 0


def test_a_worker_that_fails_is_one_line_and_gone(tmp_path: Path) -> None:
    with Worker("transformers", sys.executable, "the MoE") as worker:
        with pytest.raises(MoesmithError, match=r"transformers fails with the MoE: \w*Error: .*nowhere") as caught:
            worker.ask("load", path=str(tmp_path / "nowhere"), dtype="float32", device="cpu", threads=1, own_code=False)
        assert "\n" not in str(caught.value)
        worker.process.kill()
        with pytest.raises(MoesmithError, match="ended with status -9"):
            worker.ask("facts")
    assert worker.process.returncode is not None


class Silent:
    """A worker that does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def tell(self, *_: Any, **__: Any) -> None: ...

    def hear(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("late", ["made", "measured"])
def test_a_runtime_that_fails_takes_nothing_with_it(
    late: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise MoesmithError("vllm fails with the MoE: KeyError: gate", "Choose others.")

    pair, times = measure._pair, [{"prefill_seconds": 1.0, "decode_seconds": 1.0, "memory": 1}] * 2

    def rounds(*given: Any) -> dict[str, Any]:
        measured = {"seconds": {"dense": times, "moe": times}, "idle_cores": 0.0, "facts": {"dense": {}, "moe": {}}}
        return fails() if late == "measured" and given[-1].startswith("vllm") else measured

    monkeypatch.setattr(measure, "interpreter", lambda *_: sys.executable)
    monkeypatch.setattr(measure, "Worker", Silent)
    monkeypatch.setattr(measure, "_rounds", rounds)
    if late == "made":
        monkeypatch.setattr(
            measure, "_pair", lambda files, runtime, q: (fails if runtime == "vllm" else pair)(files, runtime, q)
        )
    monkeypatch.setattr(measure, "RUNTIMES", ("transformers", "vllm"))
    given: tuple[Any, ...] = ([1, 2], 24, 4, ["q8_0"], 2)
    out = tmp_path / "all.json"
    measure.bench(finished, None, *given, out=out)
    assert "without vllm float32: vllm fails with the MoE: KeyError: gate. Choose others." in capsys.readouterr().err
    cells = [(x["runtime"], x["batch"]) for x in read_json(out)["results"]]
    assert cells == [("transformers", 1), ("transformers", 2)]
    chosen = tmp_path / "chosen.json"
    with pytest.raises(MoesmithError, match="vllm fails with the MoE"):
        measure.bench(finished, ["transformers", "vllm"], *given, out=chosen)
    if late == "measured":  # what is dear is kept
        assert [(x["runtime"], x["batch"]) for x in read_json(chosen)["results"]] == cells
        assert f"what was measured before is in {chosen}" in capsys.readouterr().err
    else:
        assert not chosen.exists()
    monkeypatch.setattr(measure, "RUNTIMES", ("vllm",))
    with pytest.raises(MoesmithError, match=r"no runtime (is left|measured anything)\. Name one"):
        measure.bench(finished, None, *given, out=tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


REFUSALS: list[tuple[list[object], str]] = [
    (["--runtime", "onnx"], "--runtime onnx is not known"),
    (["--runtime", "transformers,vllm", "--vllm-python", "/nowhere/python"], "vLLM is not installed for /nowhere"),
    (["--quant", "q3"], "--quant q3 is not known"),
    (["--batch", "1,two"], "--batch two is not a number"),
    (["--batch", "8,8"], "--batch names nothing, or something twice"),
    (["--batch", "0"], "a number below 1"),
    (["--prompt", "500", "--new", "20", "--runtime", "transformers"], "521 tokens are more than the model's 512"),
]


@pytest.mark.parametrize(("words", "says"), REFUSALS, ids=[says for _, says in REFUSALS])
def test_refusals_leave_nothing(finished: Path, words: list[object], says: str) -> None:
    before = snapshot(finished)
    refused(moesmith("bench", finished, *words), says)
    assert snapshot(finished) == before


def test_runtime_that_is_not_installed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = process.importlib.util.find_spec
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else real(name))
    before = snapshot(finished)
    refused(moesmith("bench", finished, "--runtime", "llama.cpp"), "llama.cpp is not installed")
    assert snapshot(finished) == before


def test_run_that_is_not_finished(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "model")
    refused(moesmith("bench", run), "has no finished model")
    assert not (run / "bench").exists()


def test_model_that_a_runtime_cannot_hold(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "experts of another kind"
    monkeypatch.setattr(measure.Gguf, "explain", lambda *_: reason)
    monkeypatch.setattr(measure, "interpreter", lambda *_: sys.executable)
    words = ["bench", finished, "--prompt", 24, "--new", 4, "--runtime", "llama.cpp"]
    refused(moesmith(*words), f"llama.cpp cannot hold this model: {reason}")
    assert not measure._takes("llama.cpp", None, False)  # type: ignore[arg-type]
    assert f"without llama.cpp: {reason}" in capsys.readouterr().err
