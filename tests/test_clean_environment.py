"""The finished folder in a virtual environment that has torch and transformers and no moesmith."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import moesmith
from moesmith.testing.parents import save_tiny
from moesmith.testing.text import save_data

READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import moesmith
except ModuleNotFoundError:
    pass
else:
    sys.exit("moesmith is installed here")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(json.dumps(model(torch.arange(2, 42).view(2, 20)).logits.tolist()))
"""
SETTINGS = ["domains.tokens=512", "domains.window=32", "carve.experts=4", "stage1.tokens=0", "stage2.tokens=0",
            "evaluate.tokens=256", "evaluate.window=64"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_folder_loads_with_torch_and_transformers_alone(family: str, tmp_path: Path) -> None:
    run = moesmith.convert(
        "dive-plus",
        str(save_tiny(family, tmp_path / "parent")),
        str(save_data(tmp_path / "data")),
        tmp_path / "run",
        settings=SETTINGS,
        dtype=torch.float32,
    )
    folder = run.folder / "model"
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(2, 42).view(2, 20)).logits
    home = _environment()
    reader = tmp_path / "reader.py"
    reader.write_text(READER)
    done = subprocess.run([home / "bin" / "python", reader, folder], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5)


def _environment() -> Path:
    """A fresh virtual environment with torch and transformers at the tested versions, kept between the tests."""
    home = Path(sys.prefix).parent / ".venv-clean"
    if not (home / ".ready").is_file():
        venv.create(home, with_pip=True, clear=True)
        constraints = Path(__file__).parent.parent / "constraints.txt"
        subprocess.run([home / "bin" / "pip", "install", "-q", "-c", constraints, "torch", "transformers"], check=True)
        (home / ".ready").touch()
    return home
