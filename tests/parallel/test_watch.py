"""One rank dies, fails or hangs: all others end, naming it. Every case is a world of three processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist
import watch_world as cases
from watch_world import EXIT_OWN_ERROR, KEPT_BY_FIRST_RANK, SIZE, play

from moe.parallel.watch import EXIT_PEER_FAILED, Watch

LIMIT = 120
"""Seconds given to a loaded machine; the worlds themselves take less than fifteen."""
KILLED = -signal.SIGKILL
WORLDS_AT_A_TIME = 5


@dataclass
class Case:
    scenario: Callable[[int, Watch], None]
    exits: list[int | None]
    """By rank; None: does not end by itself."""
    says: str
    """What every rank that ends with EXIT_PEER_FAILED must have in its one line."""
    by_launcher: bool = False

    @property
    def name(self) -> str:
        return self.scenario.__name__ + ("_launcher" if self.by_launcher else "")


LOST = EXIT_PEER_FAILED
CASES = [
    Case(cases.killed_in_collective, [LOST, KILLED, LOST], "rank 1 (host {}) died without a word"),
    Case(cases.killed_between_collectives, [LOST, LOST, KILLED], "rank 2 (host {}) died without a word"),
    Case(cases.first_rank_killed, [KILLED, LOST, LOST], "rank 0, which keeps the store"),
    Case(cases.first_rank_killed, [KILLED, LOST, LOST], "rank 0 (host {}) died without a word", by_launcher=True),
    Case(cases.two_killed, [LOST, KILLED, KILLED], "died without a word"),  # of both, or of the first to fall silent
    Case(cases.killed_while_others_wait_elsewhere, [LOST, KILLED, LOST], "rank 1 (host {}) died without a word"),
    Case(
        cases.raising, [LOST, EXIT_OWN_ERROR, LOST], "rank 1 (host {}) failed: ValueError: shard-00007.bin: it is empty"
    ),
    Case(
        cases.raising_on_first_rank,
        [EXIT_OWN_ERROR, LOST, LOST],
        "rank 0 (host {}) failed: FileNotFoundError: corpus.bin",
    ),
    Case(cases.all_raising, [EXIT_OWN_ERROR] * SIZE, ""),
    Case(cases.hanging_after_an_error, [LOST] * SIZE, "ValueError: first"),
    Case(cases.stopped, [LOST, LOST, None], "rank 2 (host {}) died without a word"),
    Case(cases.store_stopped, [None, LOST, LOST], "rank 0"),
    Case(cases.stuck, [LOST] * SIZE, "rank 1 (host {}) kept the others waiting for parallel.timeout=10 seconds"),
    Case(cases.stuck_unnoticed, [LOST] * SIZE, "rank 2 (host {}) kept the others waiting"),
    Case(cases.first_rank_stuck, [LOST] * SIZE, "rank 0 (host {}) kept the others waiting"),
    Case(cases.never_joining, [LOST, LOST, KILLED], "rank 2 (host unknown) never joined"),
    Case(cases.hanging_at_the_end, [LOST, LOST, 0], "rank 1 (host {}) kept the others waiting"),
    Case(cases.finishing_early, [0] * SIZE, ""),
    Case(cases.long_without_collectives, [0] * SIZE, ""),
    Case(cases.stopped_for_a_while, [0] * SIZE, ""),
]


@dataclass
class World:
    """The processes of one case."""

    processes: list[BaseProcess]
    folder: Path
    store: dist.Store | None

    def exits(self, expected: list[int | None]) -> list[int | None]:
        """Exit codes; a rank that is not expected to end is left out of the wait."""
        deadline = time.monotonic() + LIMIT
        for process, code in zip(self.processes, expected, strict=True):
            if code is not None:
                process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def complaints(self, rank: int) -> list[str]:
        return [line for line in (self.folder / f"{rank}.err").read_text().splitlines() if line.startswith("error: ")]


def start(case: Case, folder: Path) -> World:
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "watch_world"])
    kept_by_first = case.scenario in KEPT_BY_FIRST_RANK and not case.by_launcher
    store = None if kept_by_first else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port if store else 0
    processes = [
        context.Process(target=play, args=(case.scenario, rank, port, folder), daemon=True) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    return World(processes, folder, store)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    """All cases played, several at a time, for most of it is waiting."""
    root, played = tmp_path_factory.mktemp("worlds"), {}
    for first in range(0, len(CASES), WORLDS_AT_A_TIME):
        batch = CASES[first : first + WORLDS_AT_A_TIME]
        played |= {case.name: start(case, root / case.name) for case in batch}
        for case in batch:
            played[case.name].exits(case.exits)
    yield played
    for process in (process for world in played.values() for process in world.processes):
        process.kill()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_others_end_and_name_the_rank(worlds: dict[str, World], case: Case) -> None:
    world = worlds[case.name]
    assert world.exits(case.exits) == case.exits
    for rank, code in enumerate(case.exits):
        complaints = world.complaints(rank)
        assert len(complaints) == (code == LOST)
        assert all(case.says.format(os.uname().nodename) in line for line in complaints)


def test_stuck_rank_shows_where_it_sleeps(worlds: dict[str, World]) -> None:
    assert "in sleep_for_ever" in (worlds["stuck"].folder / "1.err").read_text()
    assert "in sleep_for_ever" not in (worlds["stuck"].folder / "0.err").read_text()


def test_suspended_process_ends_when_it_wakes(worlds: dict[str, World]) -> None:
    process = worlds["stopped"].processes[2]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)
    process.join(LIMIT)
    assert process.exitcode not in (None, 0)


def test_world_of_one_is_not_watched() -> None:
    threads = threading.active_count()
    with Watch(dist.HashStore(), 0, 1, timeout=1):
        assert threading.active_count() == threads
    with pytest.raises(ValueError, match="its own"), Watch(dist.HashStore(), 0, 1, timeout=1):
        raise ValueError("its own")
