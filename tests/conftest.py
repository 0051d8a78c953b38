"""No network, few threads, the same start for every test; a tiny parent, tiny data and a finished run for all."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import golden_lines
import pytest
import torch
from commands import moesmith
from conversions import arguments
from refusals import World

from moesmith.conversion import pace
from moesmith.parent import compute
from moesmith.testing.parents import save_tiny
from moesmith.testing.text import save_data

measured_rates = compute.product_rates
# which dtype is the fastest depends on the machine and on what else it does: tests choose fp32 everywhere
FASTEST = {torch.float32: 3e10, torch.bfloat16: 1e10, torch.float16: 1e9}
compute.product_rates = lambda D, F, device, dtypes: {dtype: FASTEST[dtype] for dtype in dtypes}
pace.MEASURE = 0.0  # a round or two tell as much as tests want to know


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _base(tmp_path_factory: pytest.TempPathFactory) -> None:
    golden_lines.base = tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in ``m`` and data in ``d``; tests change copies of them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("home")
    save_tiny("llama", folder / "m")
    save_data(folder / "d")
    return folder


@pytest.fixture(scope="session")
def finished(home: Path) -> Path:
    """A run of dive-plus on them from the command line; ``said`` beside it is what the command printed."""
    run = home / "finished"
    answer = moesmith(*arguments("dive-plus", home / "m", home / "d", run))
    assert answer.status == 0, answer.err
    (home / "said").write_text(answer.out)
    return run


@pytest.fixture
def world(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Where a bad command runs."""
    return World(home / "m", home / "d", tmp_path / "run", monkeypatch)
