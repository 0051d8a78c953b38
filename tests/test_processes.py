"""Several processes, one run: the same command under torchrun makes what one process makes, and stops as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import environment, torchrun
from conversions import arguments, convert, tiny_settings
from golden import ASSETS

from moesmith.conversion.convert import predict
from moesmith.run.folder import Run, open_run
from moesmith.testing.parents import tiny_model
from moesmith.testing.tokenizer import tiny_tokenizer

MODEL, DATA = ASSETS / "parents" / "llama", ASSETS / "text"


def answer(words: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=timeout, check=False)


def settings_of(preset: str) -> list[str]:
    """What makes micro-batches the same for any number of processes; they draw dropout and noise by their place."""
    if preset == "dot-moe":
        return ["assign.tokens=512", "assign.window=32", "assign.batch=4", "assign.micro_batch=2", "stage2.tokens=0"]
    if preset == "token":
        return ["carve.passes=1", "carve.batch=16"]
    if preset == "tomoe-50":
        return []
    if preset == "expert-weaver":
        return ["carve.experts=8", "stage2.micro_batch=2"]
    return ["stage1.micro_batch=2", "stage2.micro_batch=2"]


def converted(preset: str, out: Path, processes: int) -> Run:
    words = [*arguments(preset, MODEL, DATA, out, settings_of(preset)), "--dtype", "fp32", "--device", "cpu"]
    if processes == 1:
        return convert(preset, MODEL, DATA, out, settings_of(preset), device="cpu")
    done = answer(torchrun(processes, words))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished: ") == 1  # one process speaks
    assert done.stdout.count("parameters active") == 1
    return open_run(out)


def story(run: Run, step: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run.path(step) / "log.jsonl").read_text().splitlines()]


def check_losses(what: str, one: Run, more: Run) -> None:
    """Compare what every step's training lost at each step, and print by how much it differs (``pytest -s``)."""
    for step in ("router", "experts", "masks", "assign"):
        if one.has(step):
            ours, theirs = story(one, step), story(more, step)
            assert len(ours) == len(theirs) > 1
            differs = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            print(f"{what}, {step}: losses of {len(ours)} steps differ by at most {differs:.1e} nats")
            assert differs <= 1e-4


slow = pytest.mark.slow
MORE = [("dive-1of8", 2), ("dive-plus", 4), ("tomoe-50", 2), ("dot-moe", 2), ("expert-weaver", 2)]


@pytest.mark.parametrize(("preset", "processes"), [("token", 2), *(pytest.param(*more, marks=slow) for more in MORE)])
def test_several_processes_make_what_one_makes(preset: str, processes: int, tmp_path: Path) -> None:
    one, more = converted(preset, tmp_path / "one", 1), converted(preset, tmp_path / "more", processes)
    first = {"dot-moe": "assign", "tomoe-50": "masks"}.get(preset, "carve")
    routers_differ = 0.0
    for ours, theirs in zip(one.carving(first).layers, more.carving(first).layers, strict=True):
        for a, b in zip(ours.experts, theirs.experts, strict=True):
            assert a.channels.tolist() == b.channels.tolist()
        routers = [layer.router.weight_ED for layer in (ours, theirs)]  # type: ignore[union-attr]
        routers_differ = max(routers_differ, float((routers[0] - routers[1]).abs().max()))
    assert routers_differ <= 1e-5
    what = f"{preset}, {processes} processes beside one"
    print(f"\n{what}: routers differ by at most {routers_differ:.1e}")
    check_losses(what, one, more)
    for stage, found in more.evaluation["stages"].items():
        assert found["geomean"] == pytest.approx(one.evaluation["stages"][stage]["geomean"], rel=1e-3)
    assert more.metrics("export")["logits_difference"] < 1e-3
    assert not list(more.path(first).glob(".waiting*"))


@slow
def test_accelerate_starts_several_processes_too(tmp_path: Path) -> None:
    one, out = converted("dive-plus", tmp_path / "one", 1), tmp_path / "more"
    words = [*arguments("dive-plus", MODEL, DATA, out, settings_of("dive-plus")), "--dtype", "fp32", "--device", "cpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    done = answer([*launch, "--mixed_precision=no", "--dynamo_backend=no", "-m", "moesmith", *words])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished: ") == 1
    print()
    check_losses("dive-plus, 2 processes of accelerate beside one", one, open_run(out))


@slow
@pytest.mark.parametrize("preset", ["dive-plus", "tomoe-50", "dot-moe"])
def test_a_parent_that_fits_no_process_is_trained_in_parts(preset: str, tmp_path: Path) -> None:
    """By two processes that have room for it, and by two that have not; each draws the same noise in both."""
    tiny_model("llama", num_hidden_layers=16, hidden_size=64, intermediate_size=256).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    settings = settings_of(preset)
    if preset == "dive-plus":
        settings += ["stage2.lr=0.001"]  # rounding grows with the rate
    one, more = tmp_path / "one", tmp_path / "more"
    plan = predict(preset, tmp_path / "m", DATA, settings=[*tiny_settings(preset), *settings], dtype="fp32", ranks=2)
    assert plan["memory_layerwise"] < plan["memory"]
    room = str((plan["memory_layerwise"] + plan["memory"]) // 2)
    for out, memory in ((one, []), (more, ["--memory", room])):
        words = [*arguments(preset, tmp_path / "m", DATA, out, settings), "--dtype", "fp32", "--device", "cpu"]
        done = answer(torchrun(2, [*words, *memory]))
        assert done.returncode == 0, done.stderr
        assert ("layer by layer: whole, it needs about" in done.stderr) is bool(memory)
    print()
    check_losses(f"{preset}, 2 processes with parts beside 2 with the whole parent", open_run(one), open_run(more))
    alone = answer([sys.executable, "-m", "moesmith", *words, "--memory", room])
    assert alone.returncode == 2
    assert "the plan needs about" in alone.stderr


@contextmanager
def two_hosts() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a wire between them: each one's name and address."""
    hosts = [(f"moesmith-{end}-{os.getpid()}", f"10.199.0.{index}") for index, end in enumerate("ab", 1)]
    names = [f"ms{end}{os.getpid()}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    try:
        try:
            for host, _ in hosts:
                ip("netns", "add", host)
                ip("-n", host, "link", "set", "lo", "up")
            ends = [(name, "netns", host) for name, (host, _) in zip(names, hosts, strict=True)]
            ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for name, (host, address) in zip(names, hosts, strict=True):
                ip("-n", host, "addr", "add", f"{address}/24", "dev", name)
                ip("-n", host, "link", "set", name, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield [(host, address) for host, address in hosts]
    finally:
        for host, _ in hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True, timeout=20)


@slow
def test_two_hosts_make_what_one_process_makes(tmp_path: Path) -> None:
    one, out = converted("dive-plus", tmp_path / "one", 1), tmp_path / "more"
    words = [*arguments("dive-plus", MODEL, DATA, out, settings_of("dive-plus")), "--dtype", "fp32", "--device", "cpu"]
    with two_hosts() as hosts:
        first = hosts[0][1]
        port = f"{20000 + os.getpid() % 20000}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:{port}", "--rdzv-id=1"]
        started = []
        for index, (host, address) in enumerate(hosts):
            inside = [
                "ip",
                "netns",
                "exec",
                host,
                *launch,
                f"--local-addr={address}",
                f"--rdzv-conf=is_host={int(not index)}",
                "-m",
                "moesmith",
                *words,
            ]
            wire = {"GLOO_SOCKET_IFNAME": f"ms{'ab'[index]}{os.getpid()}"}
            started.append(
                subprocess.Popen(
                    inside, env=environment() | wire, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum(errors.count("finished: ") for _, errors in said) == 1  # one process speaks
    more = open_run(out)
    print()
    check_losses("dive-plus, two hosts beside one process", one, more)
    assert more.evaluation["stages"]["experts"]["geomean"] == pytest.approx(
        one.evaluation["stages"]["experts"]["geomean"], rel=1e-3
    )


@slow
def test_it_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Finished by one process, then by two, a run keeps what it has."""
    out = tmp_path / "run"
    before = converted("dive-plus", out, 1).manifest("experts")
    shutil.rmtree(out / "stages" / "evaluate")
    after = converted("dive-plus", out, 2)
    assert after.manifest("experts") == before
    assert set(after.evaluation["stages"]) >= {"parent", "carve", "experts"}


@pytest.mark.parametrize(
    ("setting", "processes", "says"),
    [
        pytest.param("carve.experts=64", 2, "64 experts", marks=slow),
        pytest.param("stage2.batch=4", 3, "stage2.batch is 4, which 3 processes cannot share", marks=slow),
    ],
)
def test_a_refusal_is_one_line_of_one_process(setting: str, processes: int, says: str, tmp_path: Path) -> None:
    words = [*arguments("dive-plus", MODEL, DATA, tmp_path / "run"), "--set", "stage1.tokens=0", "--set", setting]
    done = answer(torchrun(processes, words))
    assert done.returncode != 0
    assert done.stderr.count("moesmith: ") == 1
    assert says in done.stderr
    assert not (tmp_path / "run").exists()


def test_other_commands_are_refused() -> None:
    done = answer(torchrun(2, ["presets"]))
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("moesmith: started as one of 2 processes") == 1


@slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(victim: int, tmp_path: Path) -> None:
    import psutil

    out = tmp_path / "run"
    more = ["stage2.tokens=400000"]
    words = [*arguments("dive-plus", MODEL, DATA, out, more), "--dtype", "fp32", "--device", "cpu"]
    with subprocess.Popen(
        torchrun(2, words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as launcher:
        log = out / "stages" / ".experts.partial" / "log.jsonl"
        for _ in range(1200):
            if log.is_file() and log.stat().st_size:
                break
            time.sleep(0.05)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        ranks: dict[str, Any] = {child.environ().get("RANK", ""): child for child in workers}
        ranks[str(victim)].send_signal(signal.SIGKILL)
        started = time.monotonic()
        assert launcher.wait(timeout=60) != 0
        assert time.monotonic() - started < 60
        assert launcher.stderr is not None
    finished = open_run(out)
    assert not finished.has("experts")
    assert finished.has("carve")
