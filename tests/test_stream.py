"""Text that waits before a layer, in several processes: each has what one alone would have, also one without text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from several import several

from moesmith import world as worlds
from moesmith.calibration.stream import Stream
from moesmith.files.artefact import read_tensors
from moesmith.files.write import write_tensors
from moesmith.methods.steps import waiting_room
from moesmith.mixture.moe import carved_layer
from moesmith.parent.load import Parent
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.world import World, crew, together

CASES = [(kind, room) for kind in ("added", "behind a factor") for room in (0, 2**30)]
WINDOWS = torch.randint(2, 250, (20, 16), generator=torch.Generator().manual_seed(3))


def parent_of(kind: str) -> Parent:
    """A parent of which each layer's network is added as it is (``added``), or behind a factor."""
    parent = tiny_parent("llama", dtype=torch.bfloat16, num_hidden_layers=3)
    parent.additive = kind == "added"
    return parent


def hold(rank: int, place: Path, kind: str, room: int, windows: int) -> None:
    """Write all tokens of the last layer, behind two carved ones, as this process has them."""
    torch.set_num_threads(1)
    parent = parent_of(kind)
    carving = random_carving(parent, experts=2)
    texts: Sequence[Sequence[torch.Tensor]] = [[WINDOWS[:windows]]] if windows else []
    place.mkdir(parents=True, exist_ok=True)
    options = {"folder": place, "room": room, "batch": 4, "repair": kind == "added"}
    with Stream(parent, texts, "carved", held=True, **options) as stream:  # type: ignore[arg-type]
        for view in stream.views(torch.Generator()):
            tokens = view.tokens()
            files = {path.name: path.stat().st_size for path in place.glob(f".waiting{rank or ''}/*")}
            stream.carved(lambda: carved_layer(parent, carving, view.index))  # noqa: B023
        found = {name: getattr(tokens, f"{name}_T").clone() for name in ("weight", "sequence", "share")}
        found |= {"x": tokens.x_TD.clone(), "y": tokens.y_TD.clone(), "files": torch.tensor(len(files))}
        if files:  # all that another process holds is on disk as well, and nowhere else
            size = tokens.x_TD.nbytes
            waiting = files.get("waiting", 0)  # none of a process without text
            assert (files["inputs"], files["outputs"], waiting < size) == (size, size, crew().size > 1)
            assert tokens.x_TD.data_ptr() == stream.inputs[0].data_ptr()
    write_tensors(place / f"{crew().size}-{rank}.safetensors", found)


def place_of(folder: str | Path, kind: str, room: int) -> Path:
    return Path(folder) / f"{kind} {room}"


def hold_all(rank: int, folder: str, windows: str) -> None:
    """Of every kind, in memory and on disk."""
    with together():
        for kind, room in CASES:
            hold(rank, place_of(folder, kind, room), kind, room, int(windows))


@pytest.mark.parametrize(("processes", "windows"), [(2, 20), (3, 8)])
def test_every_process_holds_all_tokens(processes: int, windows: int, tmp_path: Path) -> None:
    """In the order of the text, to the bit; on disk if they are too large.

    Two processes share five batches, so one has fewer; three share two, so one has none.
    """
    several(processes, hold_all, tmp_path, windows)
    for kind, room in CASES:
        place = place_of(tmp_path, kind, room)
        hold(0, place, kind, room, windows)
        alone = read_tensors(place / "1-0.safetensors")
        assert alone["x"].shape == (16 * windows, 32)
        assert alone["files"] == (0 if room else 4 if kind == "added" else 3)  # the parent's own states wait for repair
        for rank in range(processes):
            found = read_tensors(place / f"{processes}-{rank}.safetensors")
            assert all(torch.equal(found[name], alone[name]) for name in alone if name != "files")
            if room or len(WINDOWS[:windows].split(4)) >= processes:
                assert found["files"] == alone["files"]


def test_no_text_at_all_is_held_too(tmp_path: Path) -> None:
    hold(0, tmp_path, "added", 0, 0)
    found = read_tensors(tmp_path / "1-0.safetensors")
    assert found["x"].shape == found["y"].shape == (0, 32)
    assert len(found["weight"]) == len(found["sequence"]) == len(found["share"]) == 0


def test_processes_of_a_machine_share_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = replace(tiny_parent("llama"), memory=2**30)
    assert waiting_room(parent) == 2**27
    monkeypatch.setattr(worlds, "_joined", lambda count: World(0, int(count)))
    monkeypatch.setenv("WORLD_SIZE", "8")
    for launched, room in (("2", 2**26), ("8", 2**24), ("", 2**24)):  # all, where the launcher does not say
        monkeypatch.setenv("LOCAL_WORLD_SIZE", launched)
        assert waiting_room(parent) == room
