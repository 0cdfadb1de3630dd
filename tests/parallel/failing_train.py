"""`failing_train.py PLACE FAULT OVERRIDES...` is train.py with a fault on rank 1, at the second time it comes to the
place (the first for what happens once). When that is, is written to the file $FAULT_AT."""

from __future__ import annotations

import itertools
import os
import pkgutil
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.errors import DataError  # noqa: E402

Function = Callable[..., Any]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise DataError("made to fail")


def hang() -> None:
    threading.Event().wait()


ONCE = ("start", "loader", "end")
"""Places that a short run comes to once."""
FAULTS = {"kill": kill, "fail": fail, "hang": hang}

PLACES = {
    "start": ("moe.training.session:Session", "_resume"),
    "loader": ("data.token_stream:TokenStream", "batches"),
    "data_worker": ("data.text.workers:WorkerTurns", "next_turn"),
    "forward": ("moe.model:Transformer", "forward"),
    "backward": ("torch:Tensor", "backward"),
    "optimizer": ("torch.optim:AdamW", "step"),
    "evaluation": ("moe.training.session", "evaluate"),
    "checkpoint": ("moe.checkpoint.manager:CheckpointManager", "_plan"),
    "checkpoint_writer": ("moe.checkpoint.writing:ShardWriter", "write_shard"),
    "end": ("moe.training.session:Session", "_require_saved"),
}


def spoil(place: str, fault: Callable[[], None]) -> None:
    name, attribute = PLACES[place]
    owner = pkgutil.resolve_name(name)
    times = itertools.count(1 if place in ONCE else 0)
    replaced: Function = getattr(owner, attribute)
    replacement: Function = {"backward": spoiled_backward, "data_worker": bereft}.get(place, spoiled)

    def act() -> None:
        if next(times) == 1:
            note_the_time()
            fault()

    setattr(owner, attribute, replacement(replaced, act))


def note_the_time() -> None:
    Path(os.environ["FAULT_AT"]).write_text(str(time.time()), encoding="utf-8")


def spoiled(function: Function, fault: Callable[[], None]) -> Function:
    def call(*args: Any, **kwargs: Any) -> Any:
        fault()
        return function(*args, **kwargs)

    return call


def spoiled_backward(function: Function, fault: Callable[[], None]) -> Function:
    """In the middle of it, where other ranks' reductions are under way."""

    def call(loss: torch.Tensor) -> None:
        loss.register_hook(lambda gradient: fault())
        function(loss)

    return call


def bereft(function: Function, fault: Callable[[], None]) -> Function:
    """The worker process is what dies or stops."""

    def call(turns: Any) -> Any:
        note_the_time()
        number = signal.SIGSTOP if sys.argv[2] == "hang" else signal.SIGKILL
        os.kill(turns._workers[0]._process.pid, number)
        return function(turns)

    return call


if __name__ == "__main__":
    place, fault = sys.argv[1:3]
    if os.environ["RANK"] == "1":
        spoil(place, FAULTS[fault])
    del sys.argv[1:3]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
