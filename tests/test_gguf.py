"""GGUF files: llama.cpp gives the carving's probabilities and tokens, and a file that answers differently goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import moesmith
from refusals import refused
from sources import IDS, export, permuted, tiny_source
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moesmith.conversion.convert import convert
from moesmith.conversion.plan import make_plan
from moesmith.errors import MoesmithError
from moesmith.export.gguf import llamacpp
from moesmith.export.gguf import quantise as quantise_module
from moesmith.export.gguf import target as target_module
from moesmith.export.gguf.converter import NAME, structural
from moesmith.export.gguf.llamacpp import TOP, Answers, Questions, ask
from moesmith.export.gguf.quantise import tensor_type
from moesmith.export.gguf.target import Gguf, _judge, mark_losses, wide_rows
from moesmith.export.stock.write import stock_reference
from moesmith.export.target import Options, Source
from moesmith.export.targets import source_of
from moesmith.files.artefact import own_list, sums_of
from moesmith.mixture.layer import Layer, Linear
from moesmith.parent.load import load_parent
from moesmith.run.recipe import load_recipe
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import LLAMA3_ROPE, STOCK, tiny_parent

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytest.importorskip("conversion")


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}


@pytest.mark.parametrize("family", STOCK)
def test_llamacpp_computes_each_family(family: str, tmp_path: Path) -> None:
    source, out = tiny_source(family), tmp_path / "moe.gguf"
    facts = Gguf().write(source, out, Options(quant="f32"))
    assert facts["architecture"] == ("qwen3moe" if family == "qwen3" else "llama")
    found = Gguf().verify(source, out, IDS)
    assert found["logprob_difference_max"] < 1e-3
    assert found["within_tolerance"] == found["argmax_agreement"] == 1.0
    assert found["greedy_match"] == found["greedy_tokens"] > 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_tensor_that_comes_out_otherwise_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = quantise_module.quantiser()
    monkeypatch.setattr(quantise_module, "quantiser", lambda: lambda x, *rest: make(x[..., ::-1], *rest))
    with pytest.raises(MoesmithError, match="off what it was"):
        Gguf().write(tiny_source("llama"), tmp_path / "moe.gguf", Options(quant="q4_k_m"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quant", ["bf16", "q8_0", "q4_k_m"])
def test_quantised_files(quant: str, tmp_path: Path) -> None:
    source = tiny_source("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    out = tmp_path / "moe.gguf"
    facts = Gguf().write(source, out, Options(quant=quant, untie=True))  # type: ignore[arg-type]
    Gguf().verify(source, out, IDS)
    types = types_of(out)
    kind = {"bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}[quant]
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.0.attn_q.weight"] == types["token_embd.weight"] == kind
    assert types["output.weight"] == ("Q6_K" if quant == "q4_k_m" else kind)
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert facts["bytes"] == out.stat().st_size
    assert list(tmp_path.iterdir()) == [out]


def test_a_mixture_larger_than_memory_is_proved_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where f32 does not fit: layer by layer, against a file in bf16, and a fault is still found."""
    monkeypatch.setattr(target_module, "fp32_fits", lambda *_: False)
    source, out = tiny_source("llama", dtype=torch.bfloat16), tmp_path / "moe.gguf"
    kinds: list[str] = []
    convert = target_module.convert
    monkeypatch.setattr(target_module, "convert", lambda f, o, kind: (kinds.append(kind), convert(f, o, kind)))
    Gguf().write(source, out, Options(quant="q8_0"))
    assert kinds == ["bf16", "q8_0"]
    assert Gguf().verify(source, out, IDS)["within_tolerance"] > 0.9
    with pytest.raises(MoesmithError, match=r"does not answer in llama\.cpp"):
        Gguf().verify(permuted(source), out, IDS)


def test_one_expert_and_scaled_positions(tmp_path: Path) -> None:
    source, out = tiny_source("llama", rope_parameters=LLAMA3_ROPE), tmp_path / "moe.gguf"
    carving = source.carving
    layers = [Layer(x.routed[:1], Linear(x.router.weight_ED[:1])) for x in carving.layers]
    one = replace(source, carving=replace(carving, layers=layers))
    Gguf().write(one, out, Options(quant="f32"))
    assert Gguf().verify(one, out, IDS)["logprob_difference_max"] < 1e-3
    assert "rope_freqs.weight" in types_of(out)


def test_tokens_and_template_survive(tmp_path: Path) -> None:
    source, out = tiny_source("qwen2"), tmp_path / "moe.gguf"
    Gguf().write(source, out, Options(quant="f32"))
    tokenizer = source.parent.tokenizer
    texts = ["def add(a, b):\n    return a + b\n", "naïve  12345 — 🦙\t\n\n x", "I've we'll IT'S"]
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    chat.append({"role": "user", "content": "And?"})
    answers = ask(out, Questions(texts=texts, chat=chat))
    assert answers.texts == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert answers.chat == tokenizer.apply_chat_template(chat, tokenize=False)


def test_of_several_templates_the_file_has_that_of_an_ordinary_chat(tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "moe.gguf"
    tokenizer, plain = source.parent.tokenizer, str(source.parent.tokenizer.chat_template)
    tokenizer.chat_template = {"default": plain, "tool_use": "tools: {{ tools }}"}  # type: ignore[assignment]
    Gguf().write(source, out, Options(quant="f32"))
    assert Gguf().verify(source, out, IDS)["within_tolerance"] == 1.0
    assert gguf.GGUFReader(str(out)).fields["tokenizer.chat_template"].contents() == plain


def test_marks_between_documents_are_no_text(tmp_path: Path) -> None:
    source, out = tiny_source("qwen2"), tmp_path / "moe.gguf"
    ids = source.ids.clone()
    ids[:, 9] = source.parent.tokenizer.eos_token_id
    assert "<" in source.parent.tokenizer.decode(ids[0, 9:10])
    source = replace(source, ids=ids)
    Gguf().write(source, out, Options(quant="f32"))
    assert Gguf().verify(source, out, ids)["within_tolerance"] == 1.0


def test_wrong_files_are_caught_and_gone(tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "moe.gguf"
    other = tiny_parent("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    for wrong in (permuted(source), replace(source, parent=other)):
        says = r"moe\.gguf does not answer in llama\.cpp as the carving does: its log-prob"
        with pytest.raises(MoesmithError, match=says):
            export(Gguf(), wrong, source, out)
        assert list(tmp_path.iterdir()) == []


def test_a_fault_is_found_before_quantising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write = tiny_source("llama"), target_module.write_stock
    monkeypatch.setattr(
        target_module, "write_stock", lambda parent, _, *rest: write(parent, permuted(source).carving, *rest)
    )
    with pytest.raises(MoesmithError, match=r"does not answer in llama\.cpp"):
        Gguf().write(source, tmp_path / "moe.gguf", Options(quant="q4_k_m"))
    assert list(tmp_path.iterdir()) == []


def test_another_template_and_another_tokenizer_are_caught(tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "moe.gguf"
    Gguf().write(source, out, Options(quant="f32"))
    tokenizer = source.parent.tokenizer
    tokenizer.chat_template = str(tokenizer.chat_template) + " "
    with pytest.raises(MoesmithError, match="its chat template is not the parent's"):
        Gguf().verify(source, out, IDS)
    tokenizer.chat_template = str(tokenizer.chat_template)[:-1]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # splits where llama.cpp was told not to
        [pre_tokenizers.Split("o", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(MoesmithError, match="makes other tokens"):
        Gguf().verify(source, out, torch.tensor([tokenizer.encode("The brown fox")]))


def marked_source(run: Path, tokens: dict[str, bool]) -> Source:
    """A source whose tokenizer has further special tokens; the true ones swallow the white space after them."""
    source = tiny_source("llama", run, vocab_size=320)
    added = [AddedToken(text, special=True, normalized=False, rstrip=swallows) for text, swallows in tokens.items()]
    source.parent.tokenizer.add_tokens(added, special_tokens=True)
    return source


PHI3 = {"<unk>": False, "<|endoftext|>": False, "</s>": True, "<|user|>": True, "<|end|>": True}


@pytest.mark.parametrize("run", ["my-phi3-notes", "notes"])
def test_special_tokens_are_the_same_whatever_the_folder_is_called(run: str, tmp_path: Path) -> None:
    """llama.cpp takes a model called phi3 for a Phi-3, whose special tokens others lack: it did not load."""
    source, out = marked_source(tmp_path / run, {"<|user|>": False, "<|end|>": False}), tmp_path / "moe.gguf"
    assert mark_losses(source.parent.tokenizer) == []
    Gguf().write(source, out, Options(quant="f32"))
    assert Gguf().verify(source, out, IDS)["within_tolerance"] == 1.0
    assert gguf.GGUFReader(str(out)).fields["general.name"].contents() == NAME


def test_special_tokens_that_swallow_white_space_as_phi3s_do(tmp_path: Path) -> None:
    source, out = marked_source(tmp_path / "run", PHI3), tmp_path / "moe.gguf"
    source.parent.tokenizer.chat_template = "{% for m in messages %}<|user|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    assert mark_losses(source.parent.tokenizer) == []
    Gguf().write(source, out, Options(quant="f32"))
    Gguf().verify(source, out, IDS)
    text = "<|user|>\n two <|end|>  three</s>\n"
    assert ask(out, Questions(marked=[text])).marked == [source.parent.tokenizer.encode(text)]


def test_special_tokens_that_no_file_can_describe_are_named(tmp_path: Path) -> None:
    source, out = marked_source(tmp_path / "run", {"<|user|>": True, "<|end|>": False}), tmp_path / "moe.gguf"
    said = "<|user|> swallow the white space next to them, which llama.cpp keeps"
    assert said in Gguf().lost(source, Options(quant="f32"))
    Gguf().write(source, out, Options(quant="f32"))
    Gguf().verify(source, out, IDS)


@pytest.mark.parametrize("adds", [True, False])
def test_what_is_put_before_a_text_is_put_before_it_in_llamacpp(adds: bool, tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "moe.gguf"
    tokenizer = source.parent.tokenizer
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    Gguf().write(source, out, Options(quant="f32"))
    Gguf().verify(source, out, IDS)
    kept = out.read_bytes()
    expected = tokenizer.encode("x y")
    assert (expected[0] == 0) is adds
    assert ask(out, Questions(begun=["x y"])).begun == [expected]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A" if adds else "<s> $A", None, [("<s>", 0)]
    )
    out.write_bytes(kept)
    with pytest.raises(MoesmithError, match="makes other tokens"):
        Gguf().verify(source, out, IDS)


def test_a_special_token_that_became_text_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = marked_source(tmp_path / "run", {"<|user|>": False}), tmp_path / "moe.gguf"
    plain = marked_source(tmp_path / "run", {"<|other|>": False})
    Gguf().write(replace(source, parent=plain.parent), out, Options(quant="f32"))
    with pytest.raises(MoesmithError, match=r"makes other tokens than the parent's tokenizer.*<\|user\|>"):
        Gguf().verify(source, out, IDS)


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    source, out = tiny_source("llama"), tmp_path / "moe.gguf"
    Gguf().write(source, out, Options(quant="f32"))
    out.write_bytes(out.read_bytes()[:-5000])
    with pytest.raises(MoesmithError, match=r"llama\.cpp does not run moe\.gguf: "):
        ask(out, Questions(texts=["x"]))


def judged(source: Source, second: bool, token: int | None = None) -> dict[str, float]:
    """Judge made-up answers: the reference's own, greedy with the second best or a given token at one place."""
    with torch.no_grad():
        logprobs_NSV = stock_reference(source.parent, source.carving)(IDS).logits.log_softmax(-1)
    top = logprobs_NSV.topk(TOP, -1)
    rows = [
        [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(*pair, strict=True)]
        for pair in zip(top.indices, top.values, strict=True)
    ]
    greedy = [int(top.indices[0, 9, int(second)]) if token is None else token]
    return _judge(
        source, Path("x"), IDS, 10, Answers([], [], [], rows, greedy, None), 0.01 if token is not None else 0.5
    )


def test_near_ties_pass_and_bad_tokens_do_not() -> None:
    source = tiny_source("llama")
    assert judged(source, second=False)["greedy_match"] == 1
    near = judged(source, second=True)  # the second best is close to the best in a random model
    assert (near["greedy_match"], near["within_tolerance"]) == (0, 1.0)
    with torch.no_grad():
        worst = int(stock_reference(source.parent, source.carving)(IDS).logits[0, 9].argmin())
    with pytest.raises(MoesmithError, match="0% of its greedy tokens"):
        judged(source, second=False, token=worst)


def test_types_of_q4_k_m() -> None:
    def kinds(name: str, row: int = 512, experts: int = 4, tied: bool = False) -> list[str | None]:
        return [tensor_type(name.format(i), row, 16, experts, tied) for i in (0, 2, 3, 4, 13, 14)]

    assert kinds("blk.{}.ffn_down_exps.weight") == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K"]
    assert kinds("blk.{}.attn_v.weight") == kinds("blk.{}.ffn_down_exps.weight")
    assert set(kinds("blk.{}.ffn_up_exps.weight")) == set(kinds("blk.{}.attn_output.weight")) == {"Q4_K"}
    assert set(kinds("blk.{}.attn_v.weight", experts=8)) == set(kinds("blk.{}.attn_k.weight", experts=8)) == {"Q8_0"}
    assert set(kinds("blk.{}.attn_output.weight", experts=8)) == {"Q5_K"}
    assert set(kinds("blk.{}.ffn_up_exps.weight", row=96)) == {"Q5_0"}
    assert set(kinds("blk.{}.ffn_up_exps.weight", row=80)) == {"F16"}
    assert kinds("blk.{}.ffn_down_exps.weight", row=96)[:2] == ["Q8_0", "Q5_0"]
    assert kinds("token_embd.weight")[0] == "Q4_K"
    assert kinds("token_embd.weight", tied=True)[0] == kinds("output.weight")[0] == "Q6_K"
    assert kinds("blk.{}.ffn_gate_inp.weight") == kinds("blk.{}.attn_norm.weight") == [None] * 6


def test_plan_warns_of_widths_and_names_the_ratio() -> None:
    parent = tiny_parent("llama", hidden_size=256, intermediate_size=1536)
    [line] = make_plan(load_recipe("dive-1of8"), parent, 4).warnings  # a bias is one more channel: 769, padded to 800
    assert line.startswith("q4_k_m keeps experts' down_proj in q5_0 or larger: rows of 800, next good 1024")
    ratio = line.split("carve.ratio=")[1].rstrip(")")
    assert make_plan(load_recipe("dive-1of8", None, [f"carve.ratio={ratio}"]), parent, 4).warnings == []
    assert make_plan(load_recipe("dive-plus"), parent, 4).warnings == []  # 768


def test_rows_that_q4_k_m_cannot_quantise_are_named() -> None:
    assert wide_rows(512, 512, 768) == []
    assert wide_rows(512, 768, 1408) == [
        "q4_k_m keeps experts' down_proj in q5_0 or larger: rows of 1408, next good 1536"
    ]
    assert [line.split(" in ")[0].removeprefix("q4_k_m keeps ") for line in wide_rows(576, 640, 80)] == [
        "experts' down_proj",
        "what reads the residual stream",
        "attention's o_proj",
    ]
    assert len(wide_rows(576, 576, 576)) == 1


def test_an_unknown_way_of_splitting_is_refused() -> None:
    def tokenizer(pre: object) -> PreTrainedTokenizerFast:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre
        return PreTrainedTokenizerFast(tokenizer_object=made)

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert structural(tokenizer(level)) == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert structural(tokenizer(pre_tokenizers.Sequence([digits, level]))) == "smollm"
    for other in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), level]),
        pre_tokenizers.Whitespace(),
    ):
        with pytest.raises(MoesmithError, match="does not know the parent's tokenizer"):
            structural(tokenizer(other))


def test_missing_llamacpp_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MoesmithError, match=r"xllamacpp.*pip install 'moesmith"):
        ask(tmp_path / "x.gguf", Questions())


def test_command(finished: Path, tmp_path: Path) -> None:
    words = ["export", finished, "--to", "gguf", "--quant", "f32", "--out", tmp_path / "moe.gguf"]
    answer = moesmith(*words)
    assert answer.status == 0, answer.err
    assert "greedy match" in answer.out
    assert f"llama-server -m {tmp_path / 'moe.gguf'} -c 512" in answer.out
    assert f"ollama create moe -f {tmp_path / 'moe.Modelfile'}" in answer.out
    first = sums_of(tmp_path)
    assert first.keys() == {"moe.gguf", "moe.gguf.sha256", "moe.Modelfile"}
    assert set(own_list(tmp_path / "moe.gguf.sha256") or ()) == {"moe.gguf", "moe.Modelfile"}
    assert (tmp_path / "moe.gguf.sha256").read_text().endswith(f"\n{first['moe.gguf']}  moe.gguf\n")
    refused(moesmith(*words), r"moe\.gguf exists\. Give --overwrite")
    assert moesmith(*words, "--overwrite").status == 0
    assert sums_of(tmp_path) == first


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """DIVE on SmolLM2, untrained, its router in closed form: random routers turn any rounding into another model."""
    run = tmp_path_factory.mktemp("real") / "run"
    names = "anecdotes,arithmetic,biography,clinic,contracts,cplusplus,documentation,fiction"
    settings = ["affinity.method=scores", "router.start=lda", "carve.compensation=none", f"domains.names=[{names}]"]
    settings += ["stage1.tokens=0", "stage2.tokens=0", "domains.tokens=1024", "evaluate.tokens=256"]
    settings += ["evaluate.window=128"]
    convert("dive-1of8", "smollm2-135m", "builtin", run, budget="demo", settings=settings)
    return source_of(run)


@pytest.mark.slow
def test_a_random_carving_of_the_real_parent(tmp_path: Path) -> None:
    parent, out = load_parent("smollm2-135m"), tmp_path / "moe.gguf"
    texts = ["It's 1234.5 °C; naïve — 🦙🦙\n\n\tx += 1", "def f(x):\n    return x[0:10]  # 你好\n"]
    ids = torch.tensor(parent.tokenizer(" ".join(texts * 4))["input_ids"][:96]).view(2, 48)
    source = Source(parent, random_carving(parent, experts=8, top_k=1, kept=256), Path("run"), ids)
    Gguf().write(source, out, Options(quant="f32"))  # in less, rounding alone makes another model of it
    assert Gguf().verify(source, out, ids)["within_tolerance"] >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["bf16", "q8_0", "q4_k_m"])
def test_real_parent(real: Source, quant: str, tmp_path: Path) -> None:
    tokenizer = real.parent.tokenizer
    texts = ["It's 1234.5 °C; naïve — 🦙🦙\n\n\tx += 1", "def f(x):\n    return x[0:10]  # 你好\n"]
    out = tmp_path / "moe.gguf"
    Gguf().write(real, out, Options(quant=quant))  # type: ignore[arg-type]
    found = Gguf().verify(real, out, real.ids)
    assert found["within_tolerance"] >= 0.8
    chat = [{"role": "user", "content": "Who are you?"}]
    answers = ask(out, Questions(texts=texts, chat=chat))
    assert answers.texts == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert answers.chat == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
