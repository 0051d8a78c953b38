"""Pages of mapped weights: what only the file has is dropped, what was written stays."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesmith.parent import mapped

pytestmark = pytest.mark.skipif(not mapped.MAPS.is_file(), reason="needs /proc")
PAGE, PAGES = mmap.PAGESIZE, 16


@pytest.fixture(params=["the page table", "smaps"])
def how(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where it is read what was written."""
    if request.param == "smaps":  # as where a process may not read its page table
        monkeypatch.setattr(mapped, "PAGES", tmp_path / "nowhere")
    return str(request.param)


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[mmap.mmap]:
    """A file mapped as safetensors maps it, all of it in memory."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(1, PAGES + 1)) * PAGE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3) as weights:
        assert sum(weights[at] for at in range(0, len(weights), PAGE)) > 0
        yield weights


def resident(path: Path) -> int:
    """KiB of a mapped file that are in memory."""
    lines = mapped.SMAPS.read_text().partition(f"{path}\n")[2].splitlines()
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1])


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_pages_of_a_file_go_back(
    how: str, chunk: int, weights: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "CHUNK", chunk)
    path, before = tmp_path / "model.safetensors", bytes(weights)
    assert resident(path) == PAGES * PAGE // 1024
    mapped.give_back()
    assert resident(path) == 0
    assert bytes(weights) == before  # read again


@pytest.mark.parametrize("page", [0, 7, PAGES - 1])
@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_what_was_written_stays(
    how: str, chunk: int, page: int, weights: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "CHUNK", chunk)
    weights[page * PAGE] = 99
    before = bytes(weights)
    mapped.give_back()
    assert bytes(weights) == before
    assert (tmp_path / "model.safetensors").read_bytes()[page * PAGE] != 99 or before[page * PAGE] == 99


def test_the_page_table_is_read_here(monkeypatch: pytest.MonkeyPatch, weights: mmap.mmap) -> None:
    """And smaps, which takes much longer, is not."""
    if not mapped.PAGES.is_file():
        pytest.skip("no page table")
    monkeypatch.setattr(mapped, "SMAPS", Path("/nowhere"))
    assert len(mapped._unwritten()) == 1
    weights[0] = 1
    weights[0] = 99
    assert mapped._unwritten() == []
