"""What a rank does in the tests of the watch: worlds of three over gloo in which something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import moe.parallel.watch as watch_module
from moe.parallel.watch import Watch

SIZE = 3
TIMEOUT = 10
ROUND = 0.5
"""Twice as fast as outside of tests."""
EXIT_OWN_ERROR = 3


def killed_in_collective(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if rank == 0:
        time.sleep(1.5)
    add_up(10**6)


def killed_between_collectives(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(10**6)


def first_rank_killed(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(10**6)


def two_killed(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(10**6)


def killed_while_others_wait_elsewhere(rank: int, watch: Watch) -> None:
    """The wait stands for NCCL's, which no death of another rank interrupts."""
    add_up(3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def raising(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 1:
        raise ValueError("shard-00007.bin: it is\nempty")
    add_up(10**6)


def raising_on_first_rank(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 0:
        raise FileNotFoundError(2, "No such file", "corpus.bin")
    threading.Event().wait()


def all_raising(rank: int, watch: Watch) -> None:
    add_up(3)
    raise ValueError("the same on every rank")


def hanging_after_an_error(rank: int, watch: Watch) -> None:
    if rank == 1:
        watch.report(ValueError("first"))
        threading.Event().wait()
    add_up(10**6)


def stopped(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    add_up(10**6)


def store_stopped(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    add_up(10**6)


def stuck(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 1:
        sleep_for_ever()
    add_up(1)


def stuck_unnoticed(rank: int, watch: Watch) -> None:
    """As with NCCL: nothing tells the others' main threads that the time is up."""
    add_up(3)
    if rank == 2:
        sleep_for_ever()
    dist.all_reduce(torch.ones(8), async_op=True)
    threading.Event().wait()


def first_rank_stuck(rank: int, watch: Watch) -> None:
    if rank == 0:
        sleep_for_ever()
    add_up(1)


def never_joining(rank: int, watch: Watch) -> None:
    add_up(1)


def finishing_early(rank: int, watch: Watch) -> None:
    """The last rank works on for longer than a silence, the first for longer than nothing."""
    add_up(3)
    time.sleep((0.1, 0, 0.8 * TIMEOUT * ROUND)[rank])


def long_without_collectives(rank: int, watch: Watch) -> None:
    """Nobody waits for anybody, so nobody is late."""
    add_up(3)
    time.sleep(1.5 * TIMEOUT * ROUND)


def hanging_at_the_end(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 1:
        sleep_for_ever()


def stopped_for_a_while(rank: int, watch: Watch) -> None:
    add_up(3)
    if rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep {TIMEOUT * ROUND / 3}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    add_up(3)


KEPT_BY_FIRST_RANK = (
    first_rank_stuck,
    first_rank_killed,
    raising_on_first_rank,
    store_stopped,
    finishing_early,
    stopped,
)
"""The scenarios in which rank 0 keeps the store; in the others, and in first_rank_killed again, a launcher does."""


def add_up(times: int) -> None:
    for _ in range(times):
        dist.all_reduce(torch.ones(8))


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def play(scenario: Callable[[int, Watch], None], rank: int, port: int, folder: Path) -> None:
    """Run `scenario` as one rank, its stderr going to a file; `port` is the launcher's store, 0 has rank 0 keep one."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    watch_module.ROUND = ROUND
    store = meet(rank, port, folder / "port")
    if scenario is never_joining and rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with Watch(store, rank, SIZE, TIMEOUT, "torchrun" if port else "rank 0") as watch:
            group = dist.PrefixStore("group", store)
            patience = timedelta(seconds=TIMEOUT * ROUND + 2)
            dist.init_process_group("gloo", store=group, rank=rank, world_size=SIZE, timeout=patience)
            scenario(rank, watch)
    except (ValueError, OSError):
        os._exit(EXIT_OWN_ERROR)


def meet(rank: int, port: int, port_file: Path) -> dist.Store:
    """The store, once all ranks have reached it: a loaded machine starts them seconds apart."""
    store = reach_store(rank, port, port_file)
    store.add("arrived", 1)
    while store.add("arrived", 0) < SIZE:
        time.sleep(0.05)
    return store


def reach_store(rank: int, port: int, port_file: Path) -> dist.Store:
    if port == 0 and rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port_file.with_suffix(".new").write_text(str(store.port))
        port_file.with_suffix(".new").rename(port_file)
        return store
    while port == 0:
        time.sleep(0.05)
        port = int(port_file.read_text()) if port_file.exists() else 0
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
