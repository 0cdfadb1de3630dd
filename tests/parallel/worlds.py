"""Worlds of processes that stay for a whole file of tests and play one scenario after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

Scenario = Callable[[int, Path], None]
"""Called on every rank with the rank and a folder for all of them."""
Outcomes = dict[str, list[str]]
"""The failures of every scenario by rank, empty texts where there was none."""


def play(scenarios: Mapping[str, Scenario], root: Path, world_size: int, patience: float) -> Outcomes:
    """Play all scenarios, in order, in one gloo world; what a rank does not answer within `patience` seconds is
    missing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor.parallel"])
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    body = partial(_play_all, dict(scenarios), root, world_size)
    processes = [context.Process(target=body, args=(rank, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    found: Outcomes = {name: [] for name in scenarios}
    deadline = time.monotonic() + patience
    for receiver, _ in pipes:
        with contextlib.suppress(EOFError):
            while receiver.poll(max(0.0, deadline - time.monotonic())):
                name, failure = receiver.recv()
                found[name].append(failure)
    for process in processes:
        process.kill()
    return found


def _play_all(scenarios: Mapping[str, Scenario], root: Path, size: int, rank: int, outcomes: Connection) -> None:
    torch.set_num_threads(1)
    store = f"file://{root}/store"
    # ranks outside a layout wait while those inside compile, most of a minute where nothing is cached
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    for name, scenario in scenarios.items():
        try:
            scenario(rank, root)
            outcomes.send((name, ""))
        except BaseException:
            outcomes.send((name, traceback.format_exc()))
        dist.barrier()
    dist.destroy_process_group()
