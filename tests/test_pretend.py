"""Every stage of every method on a pretended device: nothing meets what it should not, and the files are the CPU's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretend
import pytest
import torch
from conversions import fitting, tiny_settings, weights
from pretend import watching, without_double
from safetensors.torch import load_file
from torch import Tensor

import moesmith
from moesmith.calibration import moments
from moesmith.evaluation import perplexity as evaluate
from moesmith.methods import refit
from moesmith.methods.tomoe import estimators, hypernetwork
from moesmith.native import experts
from moesmith.parent import accelerator
from moesmith.parent.load import Parent, load_parent
from moesmith.run.folder import Run
from moesmith.testing.parents import save_tiny, tiny_model
from moesmith.testing.text import save_data
from moesmith.testing.tokenizer import tiny_tokenizer
from moesmith.training import losses

PRESETS = [
    *(
        "cmoe",
        "dive-1of8",
        "dive-plus",
        "dot-moe",
        "drop-upcycling",
        "expert-weaver",
        "flap-static",
        "flap-static-refit",
    ),
    *("llama-moe-1of8", "llm-pruner", "moefication", "token", "tomoe-50", "tomoe-plus"),
]
# two domains, two experts, a step or two of each training: AdamW makes a whole step of a gradient that is all rounding,
# so the rate is low
SMALL = [
    *("domains.tokens=64", "affinity.tokens=64", "evaluate.tokens=128"),
    *("stage1.tokens=256", "stage2.tokens=512", "stage2.lora_dropout=0", "stage2.lr=0.001", "masks.lr=0.001"),
    "carve.sample=16",
]
ON_PURPOSE = {
    "mixture/carving.py:Carving.expert_weights": "LoRA is merged in fp64 on the CPU: the same model everywhere",
    "methods/balanced.py:balanced_kmeans": "groups are made in fp64 on the CPU: the same channels everywhere",
    "methods/tomoe/warm.py:start_from": "a start of masks: a few rows in fp64, once per layer",
}
# who may copy more than results to the host, and why: bytes of the tiny models
COPIES = {
    "calibration/stream.py:Stream.views": "tokens wait with the host in front of the first layer",
    "calibration/stream.py:Stream._pass": "and between two layers: all calibration text would not fit there",
    "calibration/stream.py:Stream.hold": "a layer's tokens wait there too for a method that trains",
    "calibration/stream.py:Stream._on": "and go on from there",
    "conversion/steps/training.py:_whole.<locals>.trained": "experts that were trained whole belong to the carving",
    "conversion/steps/training.py:_whole.<locals>.trained.<locals>.<listcomp>": "the same",
    "methods/cmoe.py:marks": "which channels each token of a sample marks, a few per token",
    "methods/expert_weaver.py:profiles": "a number per channel and sample",
    "methods/balanced.py:balanced_kmeans": "rows that are grouped there",
    "methods/parts.py:EqualParts.layer": "a rescaled matrix belongs to the carving",
    "methods/parts.py:split_channels": "a graph that is cut there",
    "methods/groups.py:sent.<locals>.<listcomp>": "which expert each token goes to, a number per token",
    "methods/token.py:as_expert": "trained matrices belong to the carving",
    "methods/upcycling.py:redraw": "an expert's own matrices belong to the carving",
    "parent/digests.py:_bytes": "the parent's digest is taken over every weight, once",
    "files/write.py:write_tensors.<locals>.<dictcomp>": "checkpoints and carvings are files",
    "export/stock/write.py:stock_tensors.<locals>.out": "the export writes every weight",
    "export/verify.py:run": "logits of two models, compared once",
    "methods/channels.py:refit_experts": "a refitted matrix belongs to the carving",
    "mixture/lora.py:lora_tensors": "trained pairs belong to the carving",
    "methods/tomoe/harvest.py:_attention": "the gate of attention belongs to the carving",
    "methods/tomoe/harvest.py:_carving": "mask logits, sorted into a carving",
    "conversion/steps/training.py:harvest": "trained routers belong to the carving",
    "conversion/steps/training.py:harvest.<locals>.<dictcomp>": "trained norms belong to the carving",
}

NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("pretend") / "d", domains=2)


@pytest.fixture
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the way of other devices: blocks of the same size, torch's own random numbers."""
    monkeypatch.setattr(experts, "ALIGN", 1)
    monkeypatch.setattr(experts, "ALIGN_TRAINING", 1)
    monkeypatch.setattr(moments, "ALIGN", 1)
    for module in (losses, evaluate, estimators):
        monkeypatch.setattr(module, "CHUNK", module.DEVICE_CHUNK)
    monkeypatch.setattr(losses, "PIECE", losses.DEVICE_CHUNK)

    def exponential(*shape: int, like: Tensor) -> Tensor:
        return torch.empty(shape, device=like.device).exponential_().clamp_min_(torch.finfo(torch.float32).tiny)

    monkeypatch.setattr(estimators, "exponential", exponential)
    monkeypatch.setattr(hypernetwork, "exponential", exponential)


def parent_on(device: str, family: str, dtype: torch.dtype = torch.float32) -> Parent:
    return Parent.from_model(tiny_model(family, dtype=dtype).to(device), tiny_tokenizer(), f"tiny-{family}")


def settings_of(preset: str) -> list[str]:
    short = ["masks.tokens=64", "stage1.tokens=0", "stage2.tokens=0"] if "tomoe" in preset else ["carve.passes=0"]
    few = {"cmoe": ["carve.experts=3", "carve.sample=64"], "expert-weaver": ["carve.experts=4"]}.get(
        preset, ["carve.experts=2"]
    )
    few += ["assign.tokens=64", "assign.window=32", "assign.batch=2"] if preset == "dot-moe" else []
    few += ["carve.ratio=0.25"] if preset in ("cmoe", "expert-weaver") else []
    return [*tiny_settings(preset), *fitting([*SMALL, *few, *short], preset)]


def convert(preset: str, parent: Parent, data: Path, out: Path, settings: list[str] | None = None) -> Run:
    return moesmith.convert(preset, parent, str(data), out, settings=[*settings_of(preset), *(settings or [])])


# a Phi's router inputs hold no constant direction: the system behind token's routers is nearly singular there
PAIRS = [(preset, "llama") for preset in ("dive-plus", "tomoe-plus", "token")]
RARE = [(preset, family) for preset in PRESETS for family in ("llama", "phi") if (preset, family) != ("token", "phi")]
PAIRS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in RARE if pair not in PAIRS]


@pytest.mark.parametrize(("preset", "family"), PAIRS)
@pytest.mark.usefixtures("same_path")
def test_every_stage_runs_there_as_on_the_cpu(preset: str, family: str, data: Path, tmp_path: Path) -> None:
    with watching(ON_PURPOSE) as watch:
        convert(preset, parent_on("pretend", family), data, tmp_path / "device")
    assert watch.operations > 1000
    assert watch.fallbacks == []
    assert set(watch.copies) <= set(COPIES), watch.copies
    convert(preset, parent_on("cpu", family), data, tmp_path / "cpu")
    compare(tmp_path / "device", tmp_path / "cpu", family)


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.usefixtures("same_path")
def test_experts_are_reconstructed_there(family: str, data: Path, tmp_path: Path) -> None:
    # few experts, so that there are unread tokens that speak for what training made
    settings = ["carve.passes=4", "carve.batch=16", "carve.experts=2", "domains.tokens=1024"]
    with watching(ON_PURPOSE) as watch:
        run = convert("token", parent_on("pretend", family), data, tmp_path / "device", settings)
    assert watch.fallbacks == []
    assert set(watch.copies) <= set(COPIES), watch.copies
    other = convert("token", parent_on("cpu", family), data, tmp_path / "cpu", settings)
    there, here = (r.carving("carve") for r in (run, other))
    assert any(expert.trained for layer in there.layers for expert in layer.routed)
    for mine, same in zip(there.layers[0].routed, here.layers[0].routed, strict=True):
        assert torch.equal(mine.channels, same.channels)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_parent_is_loaded_straight_to_it(dtype: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    there, here = (load_parent(tmp_path, dtype, device=device) for device in ("pretend", "cpu"))
    assert {p.device.type for p in there.model.parameters()} == {"pretend"}
    assert (there.digest, there.stored, there.dtype) == (here.digest, here.stored, here.dtype)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(there.model(ids.to("pretend")).logits.cpu(), here.model(ids).logits)
    stored = there.as_stored()
    assert {(p.device.type, p.dtype) for p in stored.model.parameters()} == {("pretend", torch.bfloat16)}


@pytest.mark.parametrize(
    "preset", ["dive-plus", *(pytest.param(preset, marks=pytest.mark.slow) for preset in ("dive-1of8", "token"))]
)
@pytest.mark.usefixtures("same_path")
def test_a_parent_larger_than_it_streams_through_it(preset: str, data: Path, tmp_path: Path) -> None:
    """Layer by layer: weights stay with the host, every layer computes on the device, the files are the same."""
    save_tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    untrained = [*(["stage1.tokens=0"] if preset != "token" else []), "stage2.tokens=0"]
    parent = load_parent(tmp_path / "m", "fp32", 2**30, device="pretend")
    assert ({p.device.type for p in parent.model.parameters()}, parent.device.type) == ({"cpu"}, "pretend")
    with watching(ON_PURPOSE) as watch:
        convert(preset, parent, data, tmp_path / "device", untrained)
    assert watch.operations > 1000
    assert watch.fallbacks == []
    convert(preset, load_parent(tmp_path / "m", "fp32", device="cpu"), data, tmp_path / "cpu", untrained)
    compare(tmp_path / "device", tmp_path / "cpu", "llama")


# what a Llama has before anything is trained; where a linear layer has a bias, and in backward passes, the CPU has
# other kernels for a product than the operators that the device makes it of, and results agree to rounding
BEFORE = ("held-out", "corpus", "baseline", "domains", "moments", "affinity", "carve")
SAME_BITS = tuple(f"stages/{stage}/" for stage in BEFORE)


def has_slopes(path: Path) -> bool:
    """Whether a file holds gradients."""
    return path.suffix == ".safetensors" and "slopes" in load_file(path)


def compare(device: Path, cpu: Path, family: str) -> None:
    """The same files, with the same whole numbers, and the same bits or the same numbers to rounding."""
    there, here = weights(device), weights(cpu)
    assert there.keys() == here.keys()
    differ = [name for name in here if here[name] != there[name]]
    # but for gradients that a score takes: a backward pass uses other operators there
    exact = [name for name in differ if name.startswith(SAME_BITS) and not has_slopes(cpu / name)]
    assert family != "llama" or exact == []
    for name in differ:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(cpu / name), load_file(device / name)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                if not tensor.is_floating_point():
                    assert torch.equal(tensor, theirs[key]), key
                elif "constant_D" in key:  # the solution of a system that is nearly singular
                    torch.testing.assert_close(theirs[key], tensor, rtol=1e-2, atol=1e-2)
                else:
                    # AdamW makes up to a step (0.001) of a gradient that is all rounding: of routers whose softmax is
                    # saturated, and of single numbers elsewhere
                    difference = (theirs[key].double() - tensor.double()).abs()
                    assert "router" in key or float(difference.mean()) < 1e-4, key
                    torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=2e-3)
        else:
            ours, theirs = ((folder / name).read_text() for folder in (cpu, device))
            assert NUMBER.sub("", ours) == NUMBER.sub("", theirs)
            numbers = [[float(x) for x in NUMBER.findall(text)] for text in (ours, theirs)]
            assert numbers[1] == pytest.approx(numbers[0], rel=1e-3)


def test_planted_work_on_the_cpu_is_caught(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A statistics sink that moves its input to the host: the values are right, and it would be slow."""
    add = moments.Sums.add
    monkeypatch.setattr(moments.Sums, "add", lambda self, x, count=None: add(self, x.cpu(), count))
    with watching(ON_PURPOSE) as watch:
        convert("flap-static-refit", parent_on("pretend", "llama"), data, tmp_path / "run")
    assert {fault.place for fault in watch.fallbacks} == {
        "calibration/moments.py:Sums.add",
        "methods/router.py:constant_direction",
    }
    for sink in ("Inputs", "Hidden"):
        assert watch.copies[f"calibration/stream.py:Stream.statistics.<locals>.{sink}.add"] > 4 * pretend.BYTES


def test_a_planted_loss_on_the_cpu_is_caught(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesmith.training import student

    def slow(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *rest: Any) -> Tensor:
        moved = [x.cpu() if isinstance(x, Tensor) else x for x in rest]
        return losses.head_loss(hidden_ND.cpu(), head_VD.cpu(), labels_N.cpu(), *moved).to(hidden_ND.device)

    monkeypatch.setattr(student, "head_loss", slow)
    with watching(ON_PURPOSE) as watch:
        convert("flap-static-refit", parent_on("pretend", "llama"), data, tmp_path / "run")
    assert {fault.place for fault in watch.fallbacks} == {"training/losses.py:_HeadLoss.forward"}
    assert "training/student.py:token_loss" in watch.copies


def test_a_planted_tensor_of_the_cpu_is_caught(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesmith.methods import channels

    monkeypatch.setattr(
        channels,
        "refit_down",
        lambda down, gram, kept, ridge: refit.refit_down(down, gram, kept, ridge) + down.cpu()[:, kept],
    )
    with pytest.raises(RuntimeError, match="same device"):
        convert("flap-static-refit", parent_on("pretend", "llama"), data, tmp_path / "run")


@pytest.fixture
def single() -> Iterator[None]:
    """A device without fp64."""
    accelerator.has_double.cache_clear()
    with without_double():
        yield
    accelerator.has_double.cache_clear()


@pytest.mark.parametrize("preset", ["dive-plus", "tomoe-plus"])
@pytest.mark.usefixtures("same_path", "single")
def test_a_device_without_fp64(preset: str, data: Path, tmp_path: Path) -> None:
    """Sums in pairs, small systems on the CPU: the same channels, and weights to rounding."""
    run = convert(preset, parent_on("pretend", "llama"), data, tmp_path / "device")
    other = convert(preset, parent_on("cpu", "llama"), data, tmp_path / "cpu")
    for stage in ("carve", *(("masks",) if "tomoe" in preset else ("router", "experts"))):
        there, here = (moesmith.Carving.load(r.path(stage)) for r in (run, other))
        for mine, theirs in zip(there.layers, here.layers, strict=True):
            for expert, same in zip(mine.routed, theirs.routed, strict=True):
                assert torch.equal(expert.channels, same.channels)
            torch.testing.assert_close(mine.router.weight_ED, theirs.router.weight_ED, rtol=1e-4, atol=1e-5)


def test_training_continues_there(tmp_path: Path) -> None:
    """A checkpoint is the CPU's; the step count of a fused optimiser lies where the parameters are."""
    from moesmith.conversion.steps.training import prepare
    from moesmith.mixture.moe import build
    from moesmith.run.settings import TrainSection
    from moesmith.training.loop import train
    from moesmith.training.student import Student

    blocks = torch.randint(2, 250, (16, 32), generator=torch.Generator().manual_seed(1))
    spec = TrainSection(tokens=1024, window=32, batch=8, micro_batch=4, lr=0.01, lora_rank=2, norms=True, gate="sparse",
                        checkpointing=False, router_gradient="straight-through")  # fmt: skip

    def student() -> tuple[Student, dict[str, Any]]:
        from moesmith.testing.carvings import random_carving

        parent = parent_on("pretend", "llama")
        model = build(parent, random_carving(parent))
        return Student(model, None, spec), prepare(model, spec, 0)

    whole, parameters = student()
    train(whole, parameters, blocks, spec, tmp_path / "whole")
    first, some = student()

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    from moesmith.training import loop as module

    before, module.SAVE_SECONDS = module.SAVE_SECONDS, -1.0
    try:
        with pytest.raises(KeyboardInterrupt):
            train(first, some, blocks, spec, tmp_path / "killed", on_step=stop)
    finally:
        module.SAVE_SECONDS = before
    second, again = student()
    train(second, again, blocks, spec, tmp_path / "killed")
    assert all(torch.equal(parameters[name].cpu(), again[name].cpu()) for name in parameters)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_measuring_and_writing_there(family: str) -> None:
    """Likelihoods, routing and generation, in bf16 as well."""
    from recording import record_routing

    from moesmith.evaluation.likelihoods import log_likelihoods
    from moesmith.mixture.moe import build
    from moesmith.testing.carvings import random_carving

    found = []
    for device in ("pretend", "cpu"):
        parent = parent_on(device, family, torch.bfloat16)
        model = build(parent, random_carving(parent))
        with watching() as watch:
            scores = log_likelihoods(model, parent.tokenizer, [("the cat", " sat"), ("a dog", " ran home")])
            routing = record_routing(model, parent.tokenizer, {"a": torch.arange(2, 66).view(2, 32)})
            ids = torch.tensor([[5, 6, 7]]).to(device)
            text = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist()
        assert device == "cpu" or watch.fallbacks == []
        found.append((scores, routing.counts_DLE.tolist(), text))
    (scores, counts, text), (ours, own, words) = found
    assert [s.total for s in scores] == pytest.approx([s.total for s in ours], rel=2e-2)
    assert (sum(map(sum, counts[0])), len(text[0])) == (sum(map(sum, own[0])), len(words[0]))


def test_the_device_raises_where_a_real_one_does() -> None:
    a, b = torch.ones(3, 4, device="pretend"), torch.ones(3, 4)
    for mixed in (
        lambda: a + b,
        lambda: a @ b.T,
        lambda: a.index_select(0, torch.tensor([0])),
        lambda: torch.cat([a, b]),
        lambda: torch.where(a > 0, a, b),
        lambda: a.addmm_(b, b.T @ b),
    ):
        with pytest.raises(RuntimeError, match=r"same device|Bad in-place call"):
            mixed()
    assert (a + torch.tensor(1.0)).device.type == "pretend"  # a number is allowed, and indices are
    assert a[torch.tensor([2, 0])].shape == (2, 4)
    assert torch.equal((a.T @ a).cpu(), b.T @ b)


def test_views_share_their_memory_and_their_gradient() -> None:
    x = torch.arange(12.0, device="pretend").view(3, 4).requires_grad_(True)
    y = x * 1
    y[1:, ::2].mul_(3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1, 1], [3, 1, 3, 1], [3, 1, 3, 1]]


def test_the_benchmark_runs_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks/gpu.py``, which 'make gpu' runs on a real device."""
    import json
    import runpy
    import sys

    from moesmith.testing.parents import save_tiny

    program = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    model, out = save_tiny("llama", tmp_path / "m"), tmp_path / "gpu.json"
    words = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--device",
        "pretend",
        "--dtype",
        "float32",
        "--json",
        str(out),
    ]
    sets = [word for setting in settings_of("flap-static-refit") for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--presets", "flap-static-refit", *sets])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == 0
    written = json.loads(out.read_text())
    assert list(written["devices"]) == ["pretend", "cpu"]
    rows = {(row["stage"], row["device"]): row for row in written["rows"]}
    assert {stage for stage, _ in rows} >= {"baseline", "moments", "carve", "experts", "export", "evaluate"}
    assert rows["experts", "pretend"]["tokens"] == rows["experts", "cpu"]["tokens"] == 512
