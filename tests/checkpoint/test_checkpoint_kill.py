from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from checkpoint_helpers import die_at_storage_call, leftovers, load_value, save_for_ever, save_value, start

from moe.checkpoint import CheckpointManager

NUMEL = 500_000


def test_killed_at_every_storage_call(tmp_path: Path) -> None:
    """SIGKILL in place of each mkdir, write, fsync and rename of a save: of a new step, and of one that exists."""
    kills = 0
    for step in (2, 1):
        for number in range(1, 1000):
            folder = tmp_path / f"{step}-{number}"
            save_value(CheckpointManager(folder), 1, 1.0)
            process = start(die_at_storage_call, folder, step, 2.0, number)
            process.join(60)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            assert load_value(folder) in [(1, 1.0), (step, 2.0)]
            restarted = CheckpointManager(folder, keep_last=9)
            save_value(restarted, 3, 3.0)
            assert restarted.steps() in ([1, 3], [1, 2, 3])
            assert load_value(folder) == (3, 3.0)
            assert leftovers(folder) == []
            kills += 1
    assert kills > 20


def kill_at_random(folder: Path, kills: int, rng: random.Random) -> None:
    """Kill a saving process `kills` times; after each the last acknowledged value, or a later one, must load."""
    value = 0
    for number in range(kills):
        receiver, sender = multiprocessing.get_context("forkserver").Pipe(duplex=False)
        advance = number % 2 == 0
        process = start(save_for_ever, folder / str(advance), sender, value + 1, advance, NUMEL)
        sender.close()
        acknowledged = receiver.recv()
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        while receiver.poll():
            try:
                acknowledged = receiver.recv()
            except EOFError:
                break
        check_survivors(folder / str(advance), acknowledged)
        value = acknowledged + 1


def check_survivors(folder: Path, acknowledged: int) -> None:
    manager = CheckpointManager(folder)
    for step in manager.steps():
        manager.verify(step)
    _, value = load_value(folder, NUMEL)
    assert acknowledged <= value <= acknowledged + 1


def test_killed_at_random(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 12, random.Random(0))


@pytest.mark.slow
def test_killed_at_random_many_times(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 200, random.Random(1))
