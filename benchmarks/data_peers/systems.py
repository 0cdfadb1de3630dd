"""The systems of the comparison: what to install, how each reads, and how a job is run in its environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data_peers.common import Job

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"  # of the same release as torch
TIMEOUT_S = 600
# Without these datasets looks for its hub before it reads local files.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class Failure(Exception):
    """A system cannot be installed or a job of its fails; one line that says why."""


@dataclass(frozen=True)
class Case:
    """A way to read.

    Attributes:
        name, workers: as in `Job`.
        action: `speed`, or what a text system calls it.
        resumes: whether its state can be saved and loaded.
    """

    name: str
    workers: int
    action: str = "speed"
    resumes: bool = True


@dataclass(frozen=True)
class System:
    """`module` of this package does the jobs; without `requirements` it runs in this very environment."""

    module: str
    cases: Sequence[Case]
    requirements: Sequence[str] = ()
    is_text: bool = False


SYSTEMS = {
    "ours": System("ours", [Case(shuffle, workers) for shuffle in ("windowed", "full") for workers in (0, 1)]),
    "torchdata": System(
        "peer_torchdata",
        [Case(fetch, workers) for fetch in ("rows", "batches") for workers in (0, 2)],
        ["torchdata==0.11.0", "numpy"],
    ),
    "litdata": System(
        "peer_litdata", [Case("tokens", workers) for workers in (0, 2)], ["litdata==0.2.76", TORCHVISION]
    ),
    "streaming": System(
        "peer_streaming", [Case("mds", workers) for workers in (0, 2)], ["mosaicml-streaming==0.13.0", TORCHVISION]
    ),
    # The position of a data set in worker processes is not in the state of the one here.
    "hf": System(
        "peer_datasets",
        [
            Case("arrow", 0),
            Case("arrow", 2, resumes=False),
            Case("numpy", 0),
            Case("arrow shuffled", 0),
            Case("arrow shuffled", 2, resumes=False),
        ],
        ["datasets==5.2.0"],
    ),
    "text": System(
        "text",
        [
            Case("encode_batch", 0, "raw", resumes=False),
            Case("encode_batch_fast", 0, "raw", resumes=False),
            Case("encode_batch_fast", 2, "raw", resumes=False),
            Case("mode B", 0),
            Case("mode B", 2),
            Case("data.prepare", 2, "prepare", resumes=False),
        ],
        is_text=True,
    ),
}


def install(name: str, work: Path) -> None:
    """Make the environment of a system below `work`, unless it is there."""
    system = SYSTEMS[name]
    if not system.requirements:
        return
    folder = work / "environments" / name
    wanted = [TORCH, *system.requirements]
    done = folder / "installed"
    if done.exists() and done.read_text() == "\n".join(wanted):
        return
    _call([sys.executable, "-m", "venv", "--clear", str(folder)], {})
    _call([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted], {}, 3 * TIMEOUT_S)
    done.write_text("\n".join(wanted))


def run(name: str, job: Job, work: Path) -> dict[str, object]:
    """Do a job in a process of its own and return what it printed.

    Raises:
        Failure: it ended otherwise.
    """
    python = str(work / "environments" / name / "bin" / "python") if SYSTEMS[name].requirements else sys.executable
    command = [python, "-m", f"benchmarks.data_peers.{SYSTEMS[name].module}", job.to_json()]
    out = _call(command, {**OFFLINE, "HF_HOME": str(work / "hf")})
    if not out.strip():
        raise Failure("it printed nothing")
    return json.loads(out.splitlines()[-1])


def warm(folder: Path) -> None:
    """Read all files below `folder` once, so that they lie in the page cache."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def _call(command: Sequence[str], environment: dict[str, str], timeout: float = TIMEOUT_S) -> str:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=timeout)
    except BaseException as problem:
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.wait()
        if isinstance(problem, subprocess.TimeoutExpired):
            raise Failure(f"no answer within {timeout:.0f} s") from problem
        raise
    if process.returncode:
        code = process.returncode
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        lines = [line for line in error.splitlines() if line.strip()]
        raise Failure(f"{ended}: {lines[-1][:300]}" if lines else ended)
    return out
