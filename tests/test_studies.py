"""Studies: every one runs on a tiny parent, continues, and writes its page; what they compute, checked by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import ASSETS
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from moesmith.errors import MoesmithError
from moesmith.parent.load import load_parent
from moesmith.studies.correlation import rand_index
from moesmith.studies.expert_tokens import class_of, shares_of
from moesmith.studies.generation import distinct, repeated
from moesmith.studies.routing_domains import information
from moesmith.studies.run import study
from moesmith.studies.study import find, studies

MODEL, DATA = str(ASSETS / "parents" / "llama"), str(ASSETS / "text")
NAMES = "beast,count,place,sum"
SETTINGS = [
    *(f"domains.names=[{NAMES}]", "domains.tokens=256", "domains.window=32"),
    *("evaluate.tokens=128", "evaluate.window=64", "affinity.tokens=128", "affinity.window=32"),
    *("stage1.tokens=128", "stage1.window=32", "stage1.batch=2", "stage1.micro_batch=2"),
    *("stage2.tokens=128", "stage2.window=32", "stage2.batch=2", "stage2.micro_batch=2"),
    *("masks.tokens=128", "masks.window=32", "masks.batch=2", "masks.micro_batch=2", "carve.passes=0"),
]
MASKS = ("active-50", "domain-transfer", "dynamic-attention", "expert-tokens", "stability", "union")
OWN: dict[str, list[str]] = {
    "clusters": ["study.experts=[4]", "study.lambada=0", "study.tasks=[]"],
    "correlation": ["study.served=sum", "study.by=[count, place]"],
    "domain-transfer": ["study.medicine=[beast, count]", "study.others=[place, sum]", "study.tokens=512"],
    "expert-tokens": ["study.tokens=512"],
    "generation": ["study.prompts=1", "study.prompt=16", "study.new=8"],
    "router-init": ["study.seeds=[1, 2]"],
    "scale": [f"study.models=[{MODEL}]", "study.recipes=[static, token]"],
    "stability": ["study.seeds=[1, 2]"],
}


def settings_of(name: str) -> list[str]:
    given = [s for s in SETTINGS if not (name in MASKS and s.startswith("stage"))]
    if name == "domain-transfer":
        given = [s for s in given if not s.startswith("domains.names")]  # it names its own
    wide = [] if name == "clusters" else ["carve.experts=2"]
    return [*given, *wide, *OWN.get(name, [])]


def test_conversions_at_once_find_what_one_after_the_other_does(tmp_path: Path) -> None:
    given = settings_of("stability")
    one = study("stability", MODEL, DATA, tmp_path / "one", settings=given, dtype="fp32")
    several = study("stability", MODEL, DATA, tmp_path / "several", settings=given, dtype="fp32", jobs=2)
    assert several["found"] == one["found"]
    assert several["conversions"] == one["conversions"]
    with pytest.raises(MoesmithError, match="experts"):  # said once, by the process that met it
        study(
            "stability", MODEL, DATA, tmp_path / "wrong", settings=[*given, "carve.experts=4096"], dtype="fp32", jobs=2
        )
    with pytest.raises(MoesmithError, match="jobs is 0"):
        study("stability", MODEL, DATA, tmp_path / "none", jobs=0)


SOME = ("correlation", "router-stage", "union", "expert-tokens")
RARE = sorted(set(studies()) - {*SOME})


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)])
def test_a_study_runs_and_writes_its_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    result = study(name, MODEL, DATA, out, settings=settings_of(name), dtype="fp32")
    kind = find(name)
    assert result["found"] == json.loads((out / "study.json").read_text(encoding="utf-8"))["found"]
    page = (out / "study.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {kind.title}\n")
    assert kind.question in page
    pictures = sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert pictures
    assert all(f"figures/{picture}.png" in page for picture in pictures)
    assert page.count("|---|") == len(kind(kind.Options()).tables(result["found"]))
    assert not re.search(r"\bnan\b", page)
    assert len(result["conversions"]) == len(list((out / "runs").iterdir()))
    for table in kind(kind.Options()).tables(result["found"]):
        assert {len(row) for row in table.body} == {len(table.head)}

    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("measured already")

    monkeypatch.setattr("moesmith.studies.bench.perplexities", fail)
    again = study(name, MODEL, DATA, out, settings=settings_of(name))  # in the dtype that it began in
    assert again["found"] == result["found"]
    with pytest.raises(MoesmithError, match="holds the study"):
        study("union" if name != "union" else "scale", MODEL, DATA, out)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesmithError, match="Did you mean 'stability'"):
        study("stabiliti", MODEL, DATA, tmp_path / "out")
    with pytest.raises(MoesmithError, match=r"has no setting 'study\.seed'. It has study\.seeds, study\.recipe"):
        study("stability", MODEL, DATA, tmp_path / "out", settings="study.seed=1")
    with pytest.raises(MoesmithError, match=r"study\.seeds: .* at least 2"):
        study("stability", MODEL, DATA, tmp_path / "out", settings="study.seeds=[1]")
    with pytest.raises(MoesmithError, match=r"study\.recipes\.0: Input should be 'static', 'dive-plus'"):
        study("scale", MODEL, DATA, tmp_path / "out", settings="study.recipes=[dive]")
    with pytest.raises(MoesmithError, match=r"study\.experts\.0: Input should be a multiple of 4"):
        study("clusters", MODEL, DATA, tmp_path / "out", settings="study.experts=[6]")
    with pytest.raises(MoesmithError, match=r"no recipe has a setting 'mask\.tokens'"):
        study("stability", MODEL, DATA, tmp_path / "out", settings="mask.tokens=1")
    assert not (tmp_path / "out").exists()


def test_rand_index_is_the_librarys() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 7):
        for _ in range(20):
            one, other = generator.integers(0, count, 12).tolist(), generator.integers(0, count, 12).tolist()
            assert rand_index(one, other) == pytest.approx(adjusted_rand_score(one, other), abs=1e-12)
    assert rand_index([0, 1, 2], [2, 0, 1]) == 1


def test_information_is_the_librarys() -> None:
    counts = np.array([[3, 1, 0], [0, 5, 2]])
    domain, expert = (
        np.repeat(np.arange(2), counts.sum(1)),
        np.concatenate([np.repeat(np.arange(3), r) for r in counts]),
    )
    entropy = mutual_info_score(domain, domain)
    assert information(counts) == pytest.approx(mutual_info_score(domain, expert) / entropy)
    assert information(np.array([[4, 0], [0, 4]])) == pytest.approx(1)
    assert information(np.array([[4, 4]])) == 0


def test_a_property_that_decides_explains_all_and_one_that_does_not_nothing() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 4, 4000)
    other = generator.integers(0, 1000, 4000)  # as many values as a fifth of the tokens: chance alone looks like much
    found = shares_of(np.stack([tokens, 3 - tokens]), {"token": tokens, "other": other})
    assert found["token"] == pytest.approx([1, 1], abs=0.01)
    assert max(found["other"]) < 0.02


def test_repetition_and_variety() -> None:
    assert repeated([[1, 2, 3, 4, 5], [7, 7, 7, 7, 7]], 2) == pytest.approx((0 + 3 / 4) / 2)
    assert distinct([[1, 2, 1, 2], [1, 2, 3, 3]], 2) == pytest.approx(4 / 6)


def test_classes_of_tokens() -> None:
    pieces = {0: "Ġthe", 1: "Ġcat", 2: "ing", 3: "Ġ42", 4: "Ċ", 5: ",", 6: "ĠParis", 7: "Ġé"}

    class Known:
        def convert_ids_to_tokens(self, index: int) -> str:
            return pieces[index]

        def decode(self, ids: list[int]) -> str:
            return pieces[ids[0]].replace("Ġ", " ").replace("Ċ", "\n")

    assert [class_of(Known(), i) for i in range(8)] == [
        "function word", "word", "part of a word", "number", "space", "punctuation", "capitalised word",
        "other letters",
    ]  # fmt: skip


def test_the_plain_union_does_not_count_noise() -> None:
    """Eight equal experts at even odds: sampled masks together keep nearly all, masks without noise all or nothing."""
    from moesmith.methods.tomoe.hypernetwork import Masks
    from moesmith.methods.tomoe.settings import MasksSection
    from moesmith.parent.sizes import Sizes

    spec = MasksSection(union="plain")
    masks = Masks(Sizes.of(load_parent(MODEL, "fp32")), 8, spec, 0)
    masks.draw()
    ffn, _ = masks.layers()[0]
    with torch.no_grad():
        ffn.decoder_FR.zero_()  # every logit is 0
        for bias, kept in ((math.log(math.log(2)) + 0.1, 1.0), (math.log(math.log(2)) - 0.1, 0.0)):
            ffn.spec = spec.model_copy(update={"bias": bias})
            assert float((1 - (1 - ffn.plain()).prod(0)).mean()) == kept
            assert float((1 - (1 - ffn.sample()).prod(0)).mean()) > 0.9
    ffn.decoder_FR.requires_grad_(True)
    ffn.plain().sum().backward()
    assert ffn.decoder_FR.grad is not None
    assert float(ffn.decoder_FR.grad.abs().sum()) > 0
