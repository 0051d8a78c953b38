"""Never lost: killed at any moment or out of disk, the same command continues and ends with the same bits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import LEARNED, SHARED, STAGES, convert, weights
from killable import server
from transformers import AutoModelForCausalLM

from moesmith.errors import MoesmithError
from moesmith.files.artefact import MANIFEST, read_tensors, verify_files

Outcome = dict[str, Any]
Job = Callable[..., Outcome]


@pytest.fixture(scope="module")
def job(home: Path) -> Iterator[Job]:
    """Runs a conversion in a forked process of its own."""
    with server(home) as run:
        yield run


@pytest.fixture(scope="module")
def undisturbed(home: Path, job: Job) -> Outcome:
    """A run that nobody disturbs: what it made, and its events."""
    outcome = job(home / "undisturbed")
    assert (outcome["signal"], outcome["error"]) == (0, None)
    assert set(outcome["counts"]) == {"before", *STAGES}
    return outcome | {"folder": home / "undisturbed", "weights": weights(home / "undisturbed")}


def story(folder: Path, stage: str) -> list[dict[str, Any]]:
    """A training log without what depends on the clock."""
    lines = (folder / "stages" / stage / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def check(folder: Path, undisturbed: Outcome) -> None:
    """The run is finished, equal to the undisturbed one, and holds nothing else."""
    assert weights(folder) == undisturbed["weights"]
    for stage in ("router", "experts"):
        told = story(folder, stage)
        assert [line["step"] for line in told] == list(range(1, 9))
        assert told == story(undisturbed["folder"], stage)
    for stage in STAGES:
        verify_files(folder / "stages" / stage)
    assert files(folder) == files(undisturbed["folder"])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def whole(folder: Path) -> None:
    """What is there is whole, though not everything may be there."""
    for manifest in folder.glob(f"stages/[!.]*/{MANIFEST}"):
        verify_files(manifest.parent)
    if (folder / "model").exists():
        _, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert (folder / "model" / "tokenizer.json").is_file()
        assert (folder / "model" / "generation_config.json").is_file()


def events_of(stage: str, counts: dict[str, int], stages: tuple[str, ...] = STAGES) -> range:
    """The numbers of a stage's events."""
    order = ("before", *stages)
    start = sum(counts[name] for name in order[: order.index(stage)])
    return range(start + 1, start + counts[stage] + 1)


SOME = ("before", "moments", "carve", "experts", "export")  # of each kind one
RARE = [stage for stage in STAGES if stage not in SOME]


@pytest.mark.parametrize("stage", [*SOME, *(pytest.param(stage, marks=pytest.mark.slow) for stage in RARE)])
def test_killed_anywhere_in_a_stage(job: Job, undisturbed: Outcome, tmp_path: Path, stage: str) -> None:
    points = random.Random(stage).sample(events_of(stage, undisturbed["counts"]), 2)
    for point in points:
        out = tmp_path / str(point)
        assert job(out, kill=point)["signal"] == 9
        whole(out)
        again = job(out)
        assert (again["signal"], again["error"]) == (0, None)
        check(out, undisturbed)


def test_killed_again_and_again(job: Job, undisturbed: Outcome, tmp_path: Path) -> None:
    counts = undisturbed["counts"]
    longest = max(counts[name] for name in ("affinity", "carve", "export", "evaluate"))  # made in one go
    rng, kills = random.Random(0), 0
    while job(tmp_path / "run", kill=rng.randint(longest, longest + 40))["signal"] == 9:
        whole(tmp_path / "run")
        kills += 1
        assert kills < 40
    assert kills >= 4
    check(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_while_stages_are_taken_over(job: Job, undisturbed: Outcome, tmp_path: Path) -> None:
    changed = {"settings": ["stage2.lr=0.02"], "reuse": [str(undisturbed["folder"])]}
    alone = job(tmp_path / "alone", settings=changed["settings"])
    assert alone["error"] is None
    taken = sum(job(tmp_path / "count", **changed)["counts"].get(name, 0) for name in ("before", *SHARED))
    for point in random.Random(1).sample(range(2, taken), 3):
        out = tmp_path / str(point)
        assert job(out, kill=point, **changed)["signal"] == 9
        whole(out)
        assert job(out, **changed)["error"] is None
        assert weights(out) == weights(tmp_path / "alone")
        assert files(out) == files(undisturbed["folder"])
    assert weights(undisturbed["folder"]) == undisturbed["weights"]


@pytest.mark.slow
def test_files_that_find_no_room(job: Job, undisturbed: Outcome, tmp_path: Path) -> None:
    sizes = sorted({p.stat().st_size for p in undisturbed["folder"].rglob("*") if p.is_file()} - {0})
    for limit in [sizes[i * (len(sizes) - 1) // 5] - 1 for i in range(6)]:
        out = tmp_path / str(limit)
        outcome = job(out, limit=limit)
        assert outcome["signal"] == 0
        assert outcome["error"].startswith(("cannot write", "stage"))
        assert outcome["error"].endswith("Free disk space and run the same command again.")
        assert not list(out.rglob("*.tmp"))
        whole(out)
        assert job(out)["error"] is None
        check(out, undisturbed)


def test_a_disk_that_fills_up_in_the_middle_of_a_write(job: Job, undisturbed: Outcome, tmp_path: Path) -> None:
    out, rng = tmp_path / "run", random.Random(2)
    fills = [rng.randint(1, 20) for _ in range(8)]
    assert undisturbed["writes"] > 60
    for writes in fills:  # each continues what the one before could not write
        outcome = job(out, full=writes)
        assert outcome["signal"] == 0
        assert "No space left on device" in outcome["error"]
        assert outcome["error"].endswith("Free disk space and run the same command again.")
        assert not list(out.rglob("*.tmp"))
        whole(out)
    assert job(out)["error"] is None
    check(out, undisturbed)


def test_a_loss_that_is_not_finite_stops_for_good(home: Path, tmp_path: Path) -> None:
    says = r"experts: the loss is not finite at step 1; its data is in \S+\. Lower the stage's lr"
    work = tmp_path / "run" / "stages" / ".experts.partial"
    for _ in range(2):  # the same command does not train on either
        with pytest.raises(MoesmithError, match=says):
            convert("dive-1of8", home / "m", home / "d", tmp_path / "run", ["stage2.lr=1e30"])
        assert not (tmp_path / "run" / "stages" / "experts").exists()
        saved = read_tensors(work / "nonfinite-step-1.safetensors")["ids"]
        assert saved.shape == (8, 32)
        blocks = read_tensors(tmp_path / "run" / "stages" / "corpus" / "training.safetensors")["stage2"]
        assert saved.dtype == blocks.dtype == torch.int32  # token ids are never held at 8 bytes each
        assert all((row == blocks).all(1).any() for row in saved)
        assert len((work / "log.jsonl").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def learned(home: Path, job: Job) -> Outcome:
    """An undisturbed run of learned masks."""
    outcome = job(home / "learned", preset="tomoe-50")
    assert (outcome["signal"], outcome["error"]) == (0, None)
    assert set(outcome["counts"]) == {"before", *LEARNED}
    return outcome | {"folder": home / "learned", "weights": weights(home / "learned")}


@pytest.mark.parametrize("part", range(3))
def test_killed_while_masks_are_learned(job: Job, learned: Outcome, tmp_path: Path, part: int) -> None:
    points = events_of("masks", learned["counts"], LEARNED)
    third = len(points) // 3
    point, out = random.Random(part).choice(points[part * third : (part + 1) * third]), tmp_path / "run"
    assert job(out, preset="tomoe-50", kill=point)["signal"] == 9
    assert not (out / "stages" / "masks").exists()
    again = job(out, preset="tomoe-50")
    assert (again["signal"], again["error"]) == (0, None)
    assert weights(out) == learned["weights"]
    assert any(name.startswith("stock/") for name in learned["weights"])
    assert story(out, "masks") == story(learned["folder"], "masks")
    assert [line["step"] for line in story(out, "masks")] == list(range(1, 9))
    for stage in LEARNED:
        verify_files(out / "stages" / stage)
    assert files(out) == files(learned["folder"])


def test_killed_while_learned_experts_are_refitted(job: Job, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preset": "tomoe-plus", "settings": ["masks.budget=0.6"]}
    alone = job(tmp_path / "alone", **options)
    assert (alone["signal"], alone["error"]) == (0, None)
    order = ("held-out", "corpus", "baseline", "domains", "moments", "affinity", "carve", "masks", "refit")
    for point in random.Random(2).sample(events_of("refit", alone["counts"], order), 2):
        out = tmp_path / str(point)
        assert job(out, kill=point, **options)["signal"] == 9
        whole(out)
        assert job(out, **options)["error"] is None
        assert weights(out) == weights(tmp_path / "alone")
        assert files(out) == files(tmp_path / "alone")
