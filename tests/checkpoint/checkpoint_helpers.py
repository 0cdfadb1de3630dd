"""State to save, faults to inject and processes to kill, shared by the checkpoint tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moe.checkpoint import CheckpointManager
from moe.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, _file_digest
from moe.checkpoint.writing import DurableFile

Tensors = dict[str, Any]


def state(value: float, numel: int = 300) -> Tensors:
    """Tensors of several dtypes that can be told from those of any other `value`."""
    weight, bias = torch.full((numel,), float(value)), torch.full((3,), float(value), dtype=torch.bfloat16)
    return {"model": {"weight": weight, "bias": bias}, "rng": torch.full((16,), int(value) % 256, dtype=torch.uint8)}


def load_value(folder: Path, numel: int = 300) -> tuple[int, float]:
    """The step and the `value` of the newest intact checkpoint; fails unless all tensors agree."""
    loaded = state(-1, numel)
    found = CheckpointManager(folder).load(loaded)
    assert found is not None
    value = float(found["value"])
    assert torch.equal(loaded["model"]["weight"], torch.full((numel,), value))
    assert torch.equal(loaded["model"]["bias"], torch.full((3,), value, dtype=torch.bfloat16))
    assert torch.equal(loaded["rng"], torch.full((16,), int(value) % 256, dtype=torch.uint8))
    return int(found["step"]), value


def save_value(manager: CheckpointManager, step: int, value: float, numel: int = 300) -> None:
    manager.save(step, state(value, numel), {"value": value})
    manager.wait()


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def reseal(folder: Path, step: int) -> None:
    """Give an altered checkpoint a manifest that fits, as an attacker would."""
    files = {
        path.name: FileRecord(path.stat().st_size, _file_digest(path))
        for path in folder.iterdir()
        if path.name != MANIFEST_NAME
    }
    (folder / MANIFEST_NAME).write_bytes(Manifest(step, 1, torch.__version__, files).render())


@contextmanager
def at_storage_call(number: int, strike: Callable[[], None]) -> Iterator[list[str]]:
    """Call `strike` in place of the `number`-th mkdir, write, fsync or rename from here on; yields the calls made."""
    calls: list[str] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                strike()
            return original(*args, **kwargs)

        return call

    with (
        mock.patch.object(Path, "mkdir", counting("mkdir", Path.mkdir)),
        mock.patch.object(DurableFile, "write", counting("write", DurableFile.write)),
        mock.patch.object(os, "fsync", counting("fsync", os.fsync)),
        mock.patch.object(Path, "rename", counting("rename", Path.rename)),
    ):
        yield calls


def fail_with(code: int) -> Callable[[], None]:
    def strike() -> None:
        raise OSError(code, os.strerror(code))

    return strike


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """Run `target` in a process forked from a server that has torch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor"])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def die_at_storage_call(folder: Path, step: int, value: float, number: int) -> None:
    """Process body: be killed in place of the `number`-th storage call of one save; exit 0 if there are fewer."""
    manager = CheckpointManager(folder)
    with at_storage_call(number, die):
        save_value(manager, step, value)


def save_for_ever(folder: Path, acknowledgements: Any, first: int, advance: bool, numel: int) -> None:
    """Process body: save values `first`, `first + 1`, ... (each as its own step, or all as step 1) until killed."""
    manager = CheckpointManager(folder)
    value = first
    while True:
        save_value(manager, value if advance else 1, value, numel)
        acknowledgements.send(value)
        value += 1
