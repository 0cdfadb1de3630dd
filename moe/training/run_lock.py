"""One writer a run folder: two training into the same one would tear each other's metrics and checkpoints."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunFolderBusy(RuntimeError):
    """Another live process trains into the run folder."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock while training; the lock dies with the process. Raises RunFolderBusy."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderBusy(f"{folder}: another process is training into this run folder") from None
        yield
