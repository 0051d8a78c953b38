"""Train a tiny MoE in two processes. Run as a program: ``python tests/data_parallel.py FOLDER``.

Forks two processes that talk over gloo, as ``accelerate launch`` would start them, and one that works alone. Each
writes the trained weights to ``FOLDER/<world>-<rank>.safetensors``.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from moesmith.conversion.steps.training import prepare
from moesmith.files.artefact import write_tensors
from moesmith.mixture.moe import build
from moesmith.run.settings import TrainSection
from moesmith.testing.carvings import random_carving
from moesmith.testing.parents import tiny_parent
from moesmith.training.loop import train
from moesmith.training.student import Student
from moesmith.world import together

SPEC = TrainSection(
    tokens=6 * 8 * 16, window=16, batch=8, micro_batch=3, lr=3e-3, lora_rank=2, lora_dropout=0, norms=True,
    loss="distill", mix=0.5, router_gradient="straight-through",
)  # fmt: skip


def work(folder: Path, world: int, rank: int) -> None:
    """Train as process ``rank`` of ``world``."""
    torch.set_num_threads(1)
    parent = tiny_parent("llama")
    model = build(parent, random_carving(parent, compensation="bias"), "sliced")
    blocks = torch.randint(0, 300, (40, 16), generator=torch.Generator().manual_seed(0))
    parameters = prepare(model, SPEC, seed=1)
    with together():
        train(Student(model, parent.model, SPEC), parameters, blocks, SPEC, folder / f"world-{world}", seed=1)
    write_tensors(folder / f"{world}-{rank}.safetensors", {name: p.detach() for name, p in parameters.items()})


def main() -> None:
    """Fork the processes and wait for them; the exit status tells if all were well."""
    folder = Path(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for world in (1, 2):
        for rank in range(world):
            child = os.fork()
            if child == 0:
                if world > 1:
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    if Path("/sys/class/net/lo").exists():  # a host name that does not resolve is no obstacle then
                        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                status = 1
                try:
                    work(folder, world, rank)
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)


if __name__ == "__main__":
    main()
