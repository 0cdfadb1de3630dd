"""Parity over ranks: four processes share one gloo world in which every scenario is played."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
from parallel_world import SCENARIOS, WORLD_SIZE, play_all

Outcomes = dict[str, list[str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The failures of every scenario, by rank."""
    root = tmp_path_factory.mktemp("world")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor"])
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD_SIZE)]
    processes = [
        context.Process(target=play_all, args=(rank, root, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    found: Outcomes = {scenario.__name__: [] for scenario in SCENARIOS}
    for receiver, _ in pipes:
        collect(receiver, found)
    for process in processes:
        process.kill()
    return found


def collect(receiver: Connection, found: Outcomes) -> None:
    """Take what one rank sends; a rank that died leaves its remaining scenarios without an answer."""
    for _ in SCENARIOS:
        try:
            name, failure = receiver.recv() if receiver.poll(120) else ("", "")
        except EOFError:
            return
        if name:
            found[name].append(failure)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_ranks_agree_with_one_process(outcomes: Outcomes, scenario: Callable[..., None]) -> None:
    assert outcomes[scenario.__name__] == [""] * WORLD_SIZE
