from __future__ import annotations

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection

import pytest
from checkpoint_helpers import start
from checkpoint_world import SCENARIOS, WORLD_SIZE, play_all

Outcomes = dict[str, list[str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The failures of every scenario, by rank, from one world in which all are played."""
    root = tmp_path_factory.mktemp("world")
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(WORLD_SIZE)]
    processes = [start(play_all, rank, root, sender) for rank, (_, sender) in enumerate(pipes)]
    for _, sender in pipes:
        sender.close()
    found: Outcomes = {scenario.__name__: [] for scenario in SCENARIOS}
    deadline = time.monotonic() + 120
    for receiver, _ in pipes:
        collect(receiver, found, deadline)
    for process in processes:
        process.kill()
    return found


def collect(receiver: Connection, found: Outcomes, deadline: float) -> None:
    """Take what one rank reports, until it ends or the time is up (a rank that hangs has then no outcome)."""
    with contextlib.suppress(EOFError):
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            name, failure = receiver.recv()
            found[name].append(failure)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_four_ranks(outcomes: Outcomes, scenario: object) -> None:
    assert outcomes[scenario.__name__] == [""] * WORLD_SIZE  # type: ignore[attr-defined]
