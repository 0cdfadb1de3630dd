"""Runs of train.py on two ranks of which the second dies, fails or hangs, wherever it is: the first ends, naming it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from layout_world import SMALL, write_corpus

from moe.parallel import EXIT_PEER_FAILED

SCRIPT = Path(__file__).with_name("failing_train.py")
TIMEOUT = 12
LIMIT = 240
"""Seconds given to a loaded machine, of which starting takes the most."""
EVERYWHERE = ["start", "loader", "forward", "backward", "optimizer", "evaluation", "checkpoint", "end"]
CASES = [
    *((place, fault) for place in EVERYWHERE for fault in ("kill", "fail", "hang")),
    ("checkpoint_writer", "kill"),
    ("checkpoint_writer", "hang"),
    ("data_worker", "kill"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def start(rank: int, port: int, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """As srun starts a rank: with nobody who ends the others."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    environment["FAULT_AT"] = str(folder / "fault")
    with (folder / f"{rank}.err").open("wb") as errors:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def first_rank_of(place: str, fault: str, corpus: Path, folder: Path) -> tuple[int, str]:
    """Exit code and last error line of rank 0."""
    sources = [f"data.sources.{language}.path={corpus}/{language}.jsonl" for language in ("en", "zh")]
    settings = ["checkpoint.interval=2", f"parallel.timeout={TIMEOUT}", f"output_dir={folder}", "train.steps=6"]
    settings += ["train.eval_interval=2", f"data.cache_dir={corpus}", "runtime.num_threads=1"]
    if place == "data_worker":
        settings += ["data.mode=text", "data.workers=1", "data.streams=4"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [place, fault, *(line for line in SMALL if "steps=" not in line or "warmup" in line)]
    arguments = [line for line in arguments if not line.startswith("train.eval_interval")]
    processes = [start(rank, port, [*arguments, *sources, *settings], folder) for rank in range(2)]
    try:
        code = processes[0].wait(LIMIT)
        took = time.time() - float((folder / "fault").read_text(encoding="utf-8"))
        print(f"{place}, {fault}: {took:.1f} s")  # pytest -rP shows it
    finally:
        for process in processes:
            process.kill()
    lines = (folder / "0.err").read_text(encoding="utf-8").splitlines()
    return code, next((line for line in reversed(lines) if line.startswith("error:")), "")


def check(place: str, fault: str, corpus: Path, folder: Path) -> None:
    code, line = first_rank_of(place, fault, corpus, folder)
    assert code == EXIT_PEER_FAILED, (code, line)
    assert "rank 1" in line


def test_a_rank_killed_in_the_middle_of_a_backward_pass(corpus: Path, tmp_path: Path) -> None:
    check("backward", "kill", corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "fault"), CASES, ids=["-".join(case) for case in CASES])
def test_a_rank_lost_anywhere(place: str, fault: str, corpus: Path, tmp_path: Path) -> None:
    check(place, fault, corpus, tmp_path)
