"""A layer's algebra: shared experts, sums, experts of their own matrices, analytic routers, layers that differ.

The same logits in every form and every format, or a refusal with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import IDS
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesmith.errors import MoesmithError
from moesmith.export.gguf.target import Gguf
from moesmith.export.native import write_native
from moesmith.export.stock.write import stock_reference, stock_refusal, write_stock
from moesmith.export.target import Options, Source, stock_losses
from moesmith.export.verify import verify_folder
from moesmith.mixture.carving import Carving
from moesmith.mixture.count import parameters
from moesmith.mixture.folder import load_folder
from moesmith.mixture.layer import Analytic, Expert, Layer, Linear
from moesmith.mixture.moe import MaskedExperts, build, decoder, moe_blocks
from moesmith.parent.load import Parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import FAMILIES, STOCK, tiny_parent

Make = Callable[[Parent], Carving]
LAYERS: dict[str, Make] = {
    "shared and top-1": lambda parent: random_carving(parent, kept=16, shared=16),
    "shared and top-2": lambda parent: random_carving(parent, kept=16, shared=24, top_k=2),
    "shared and sum of 2": lambda parent: random_carving(parent, kept=16, shared=16, top_k=2, mix="sum"),
    "sum of 4 of 16": lambda parent: random_carving(parent, experts=16, top_k=4, kept=12, mix="sum", ragged=True),
    "sum, refitted": lambda parent: random_carving(parent, top_k=2, mix="sum", compensation="refit"),
    "own matrices": lambda parent: random_carving(parent, top_k=2, trained=True),
    "own matrices and shared": lambda parent: random_carving(parent, kept=16, shared=8, trained=True),
    "biases, shared": lambda parent: directed(random_carving(parent, kept=16, shared=16, compensation="bias")),
    "analytic": lambda parent: routed_by(random_carving(parent, top_k=2), "hidden"),
    "analytic, linear": lambda parent: routed_by(random_carving(parent, top_k=2), "gate"),
    "layers that differ": lambda parent: differing(random_carving(parent, top_k=2)),
}
NATIVE_ONLY = ("analytic", "layers that differ")


def directed(carving: Carving) -> Carving:
    for layer in carving.layers:
        layer.constant_D = torch.randn(32) / 32
    return carving


def routed_by(carving: Carving, reads: str) -> Carving:
    router = Analytic(torch.tensor([3, 9, 27, 41]), reads)  # type: ignore[arg-type]
    return replace(carving, layers=[replace(layer, router=router) for layer in carving.layers])


def differing(carving: Carving) -> Carving:
    """The second layer has fewer experts, of other widths, added up."""
    first, second = carving.layers
    fewer = [Expert(torch.arange(5)), Expert(torch.arange(4, 20)), Expert(torch.arange(30, 31))]
    assert isinstance(second.router, Linear)
    other = Layer(fewer, Linear(second.router.weight_ED[:3]), top_k=2, mix="sum", shared=Expert(torch.arange(50, 64)))
    return replace(carving, layers=[first, other])


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain(parent: Parent, layer: Layer, index: int, x_D: Tensor) -> Tensor:
    """The formula, one token at a time, from the parent's own matrices."""
    ffn = parent.ffns[index]

    def channels(kept: Tensor, gate_FD: Tensor | None = None, up_FD: Tensor | None = None) -> Tensor:
        pre_F = (ffn.gate_FD[kept] if gate_FD is None else gate_FD) @ x_D
        if ffn.gate_bias_F is not None:
            pre_F = pre_F + ffn.gate_bias_F[kept]
        a_F = ffn.activation(pre_F)
        if ffn.up_FD is None:
            return a_F
        up_F = (ffn.up_FD[kept] if up_FD is None else up_FD) @ x_D
        return a_F * (up_F if ffn.up_bias_F is None else up_F + ffn.up_bias_F[kept])

    def output(expert: Expert) -> Tensor:
        down_DF = ffn.down_DF[:, expert.channels] if expert.down_DF is None else expert.down_DF
        y_D = down_DF @ channels(expert.channels, expert.gate_FD, expert.up_FD)
        return y_D if expert.bias_D is None else y_D + expert.bias_D

    if isinstance(layer.router, Linear):
        logits_E = layer.router.weight_ED @ x_D
    elif layer.router.reads == "hidden":
        logits_E = channels(layer.router.channels).abs()
    else:
        kept = layer.router.channels
        logits_E = ffn.gate_FD[kept] @ x_D + (0 if ffn.gate_bias_F is None else ffn.gate_bias_F[kept])
    top_K, ids_K = logits_E.topk(layer.top_k)
    weights_K = torch.ones_like(top_K) if layer.mix == "sum" else top_K.softmax(-1)
    outputs = [w * output(layer.routed[int(e)]) for w, e in zip(weights_K, ids_K, strict=True)]
    y_D = torch.stack(outputs).sum(0) + (0 if layer.shared is None else output(layer.shared))
    return y_D if ffn.down_bias_D is None else y_D + ffn.down_bias_D


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("family", ["llama", "phi", "biased"])
def test_both_forms_are_the_formula(family: str, name: str) -> None:
    parent = tiny_parent(family)
    carving = LAYERS[name](parent)
    x_TD = torch.randn(9, parent.D)
    for form in ("masked", "sliced"):
        if form == "masked" and "own matrices" in name:
            with pytest.raises(MoesmithError, match="layer 0 has experts with their own gate and up rows"):
                build(parent, carving, "masked")
            continue
        blocks = moe_blocks(build(parent, carving, form))  # type: ignore[arg-type]
        assert isinstance(blocks[0].experts, MaskedExperts) == (form == "masked")
        for index, (block, layer) in enumerate(zip(blocks, carving.layers, strict=True)):
            expected = torch.stack([plain(parent, layer, index, x_D) for x_D in x_TD])
            with torch.no_grad():
                torch.testing.assert_close(block(x_TD), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_in_our_own_format(family: str, name: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving = LAYERS[name](parent)
    carving.save(tmp_path / "carving")
    again = Carving.load(tmp_path / "carving")
    sliced = logits_of(build(parent, carving))
    assert torch.equal(logits_of(build(parent, again)), sliced)
    write_native(parent, again, tmp_path / "native")
    assert torch.equal(logits_of(load_folder(tmp_path / "native", torch.float32)), sliced)
    assert verify_folder(parent, tmp_path / "native", decoder(parent, carving), IDS)["compared_tokens"] == IDS.numel()
    assert counted(tmp_path / "native") == parameters(parent, carving, native=True)["parameters_total"]


def counted(folder: Path) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("family", STOCK)
def test_the_stock_home_is_exact(family: str, name: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    carving = LAYERS[name](parent)
    if name in NATIVE_ONLY:
        with pytest.raises(MoesmithError, match=r"routes by what its channels compute|layers have 3 \(top-2\) and 4"):
            write_stock(parent, carving, tmp_path / "stock")
        return
    facts = write_stock(parent, carving, tmp_path / "stock", torch.float32)
    found = verify_folder(parent, tmp_path / "stock", stock_reference(parent, carving), IDS)
    assert found["argmax_agreement"] == 1.0
    assert found["compared_tokens"] == IDS.numel()
    if not carving.biased:  # what it stands for, up to the first near tie
        assert verify_folder(parent, tmp_path / "stock", decoder(parent, carving), IDS)["argmax_agreement"] > 0.9
    beside = "shared" in name and family != "qwen3"
    assert (facts["architecture"] == "Qwen2MoeForCausalLM") == (beside or family == "qwen2")
    assert counted(tmp_path / "stock") == parameters(parent, carving, native=False)["parameters_total"]


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in NATIVE_ONLY])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_in_llama_cpp(family: str, name: str, tmp_path: Path) -> None:
    parent = tiny_parent(family)
    source = Source(parent, LAYERS[name](parent), tmp_path, IDS)
    assert Gguf().explain(source) is None
    out = tmp_path / "moe.gguf"
    facts = Gguf().write(source, out, Options(quant="f32"))
    found = Gguf().verify(source, out, IDS)
    assert found["within_tolerance"] == 1.0
    in_full = name in ("shared and top-1", "shared and sum of 2", "own matrices and shared", "biases, shared")
    assert (facts["architecture"] == "qwen2moe") == (in_full and family != "qwen3")


def test_near_ties_of_added_experts_are_ordered_as_in_the_folder(tmp_path: Path) -> None:
    """Two experts whose logits nearly agree on every token: fp32 softmax of scaled logits cannot tell them apart."""
    parent = tiny_parent("llama")
    carving = random_carving(parent, experts=8, top_k=3, kept=8, mix="sum")
    for layer in carving.layers:
        assert isinstance(layer.router, Linear)
        close_4D = layer.router.weight_ED[:4] + 1e-4 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        layer.router.weight_ED[4:] = close_4D
    write_stock(parent, carving, tmp_path / "stock", torch.float32)
    reference = stock_reference(parent, carving)
    found = verify_folder(parent, tmp_path / "stock", reference, IDS)
    assert found["compared_tokens"] > 0.8 * IDS.numel()
    exact = decoder(parent, carving)
    with pytest.raises(MoesmithError, match="does not compute what the carving computes"):
        verify_folder(parent, tmp_path / "stock", exact, IDS)
    measured = verify_folder(parent, tmp_path / "stock", exact, IDS, judged=False)
    assert measured["compared_tokens"] == IDS.numel()
    assert measured["logits_kl"] > found["logits_kl"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"experts": 7, "top_k": 3, "mix": "sum", "ragged": True}),
        ("qwen2", {"experts": 7, "top_k": 3, "mix": "sum", "shared": 8}),
    ],
)
def test_a_sum_whose_factor_bf16_cannot_hold(
    family: str, options: dict[str, Any], trained: bool, tmp_path: Path
) -> None:
    """Three or seven times a number is rounded in the folder, and so it is in what the folder is compared with."""
    parent = tiny_parent(family, dtype=torch.bfloat16)
    carving = random_carving(parent, kept=8, **options)
    if trained:
        width = max(len(expert.channels) for expert in carving.layers[0].routed)
        for index in range(parent.L):
            A_ErF, B_EDr = torch.randn(7, 2, width) / 8, torch.randn(7, parent.D, 2) / 8
            carving.lora |= {f"{index}.down.A": A_ErF, f"{index}.down.B": B_EDr}
    write_stock(parent, carving, tmp_path / "stock", torch.bfloat16)
    found = verify_folder(parent, tmp_path / "stock", stock_reference(parent, carving), IDS)
    assert found["logits_difference"] < 1e-4
    exact = verify_folder(parent, tmp_path / "stock", decoder(parent, carving), IDS, judged=False)
    assert exact["logits_difference"] > 1e-3


def test_what_has_no_home_says_why() -> None:
    parent = tiny_parent("llama")
    for name, why in (("analytic", "a stock router is linear"), ("layers that differ", "as many in all")):
        refusal = stock_refusal(parent, LAYERS[name](parent))
        assert refusal is not None
        assert why in refusal[0]


def test_room_that_is_wasted_is_told(tmp_path: Path) -> None:
    parent = tiny_parent("llama")
    even = random_carving(parent, kept=32)
    assert stock_losses(Source(parent, even, tmp_path, IDS)) == []
    uneven = replace(even, layers=[Layer.of([torch.arange(16)] * 4, torch.randn(4, 32)), even.layers[1]])
    source = Source(
        parent,
        replace(uneven, layers=[uneven.layers[0], Layer.of([torch.arange(60)] * 4, torch.randn(4, 32))]),
        tmp_path,
        IDS,
    )
    facts = write_stock(parent, source.carving, tmp_path / "stock")
    assert facts["zero_channels"] == pytest.approx(1 - 38 / 64, abs=1e-4)
    assert stock_losses(source) == ["room: 41% of the experts' channels on disk are zeros, for all must be 64 wide"]
    folded = Source(tiny_parent("qwen3"), random_carving(parent, kept=16, shared=16), tmp_path, IDS)
    assert stock_losses(folded) == ["room: the shared expert is written into each of 4 experts"]
