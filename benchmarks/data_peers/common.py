"""How every system of the comparison is measured, in a process of its own: one job in, one line of JSON out.

A system is a module that says how it writes the corpus in its own format and how it opens a loader. It runs in its own
environment, so this module needs nothing but torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

WARM_BATCHES = 8
PATIENCE = 10
SEED = 0


@dataclass(frozen=True)
class Job:
    """One thing for one system to do.

    Attributes:
        action: write (the corpus in the system's format), speed, save (a state) or resume (from it).
        corpus: folder of the corpus, see corpus.py; for the text systems that of the text.
        folder: the system's own folder.
        case: which of the system's ways to read.
        workers, seq_len, batch_size: of the loader.
        seconds: how long to measure.
        position: batches before the state that `save` saves.
        state: file of the state, for `save` and `resume`.
    """

    action: str
    corpus: str
    folder: str
    case: str = ""
    workers: int = 0
    seq_len: int = 2048
    batch_size: int = 32
    seconds: float = 5.0
    position: int = 0
    state: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Loader(Protocol):
    """Batches as (inputs, labels), int64 (batch_size, seq_len) both; iterating again starts the next epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def state_dict(self) -> object: ...


Open = Callable[[Job, object], Loader]
"""A loader for a job, continuing after a state unless that is None."""


class RowLoader:
    """A `Loader` over batches (batch_size, seq_len + 1) as they are stored.

    They are widened here, in the main process: workers then pass on a quarter of the bytes. Inputs and labels are views
    of one tensor. Both are the cheapest ways there are.
    """

    def __init__(self, rows: object, state_dict: Callable[[], object]) -> None:
        self._rows = rows
        self.state_dict = state_dict

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self._rows:  # type: ignore[attr-defined]
            ids = rows.long()
            yield ids[:, :-1], ids[:, 1:]


def read_tokens(job: Job) -> np.ndarray:
    """Ids of the whole corpus, uint16, mapped."""
    return np.memmap(Path(job.corpus) / "tokens.bin", dtype="<u2", mode="r")


def read_rows(job: Job) -> np.ndarray:
    """The corpus cut into rows of seq_len + 1 ids, one shared by neighbours, uint16 (rows, seq_len + 1), mapped."""
    tokens = read_tokens(job)
    count = (len(tokens) - 1) // job.seq_len
    strides = (job.seq_len * tokens.itemsize, tokens.itemsize)
    return np.lib.stride_tricks.as_strided(tokens, (count, job.seq_len + 1), strides, writeable=False)


def stack(rows: list[Tensor]) -> Tensor:
    """Rows of ids as one batch."""
    return torch.stack(rows)


def stack_arrays(rows: list[np.ndarray]) -> Tensor:
    """Rows of ids as one batch."""
    return torch.from_numpy(np.stack(rows))


def speed(job: Job, open_loader: Open) -> dict[str, object]:
    """Seconds to the first batch, then inputs a second. The first batches of an epoch do not count, nor what lies
    between epochs: a corpus of real size has few of them. All of it ends after PATIENCE times as long."""
    begin = time.perf_counter()
    loader = open_loader(job, None)
    batches = iter(loader)
    first = next(batches)
    startup = time.perf_counter() - begin
    _check(first, job)
    tokens, seconds = 0, 0.0
    last = time.perf_counter() + PATIENCE * job.seconds
    while seconds < job.seconds and time.perf_counter() < last:
        for _ in range(WARM_BATCHES):
            next(batches, None)
        begin, before = time.perf_counter(), tokens
        for inputs, _labels in batches:
            tokens += inputs.numel()
            if seconds + time.perf_counter() - begin >= job.seconds:
                break
        seconds += time.perf_counter() - begin if tokens > before else 0.0
        if seconds < job.seconds:
            batches = iter(loader)
    if not tokens:
        raise SystemExit("an epoch is too short to measure")
    return {"tokens_per_second": tokens / seconds, "startup_s": startup}


def save(job: Job, open_loader: Open) -> dict[str, object]:
    """Save the state after `job.position` batches, and what the next batch is."""
    loader = open_loader(job, None)
    batches = iter(loader)
    for _ in range(job.position):
        next(batches)
    content = _dump(loader.state_dict())
    Path(job.state).write_bytes(content)
    return {"state_bytes": len(content) - 1, "next_batch": _digest(next(batches))}


def resume(job: Job, open_loader: Open) -> dict[str, object]:
    """Seconds from the saved state to the batch that follows, and what that is."""
    content = Path(job.state).read_bytes()
    begin = time.perf_counter()
    loader = open_loader(job, _load(content))
    batch = next(iter(loader))
    seconds = time.perf_counter() - begin
    _check(batch, job)
    return {"resume_s": seconds, "next_batch": _digest(batch)}


def serve(write: Callable[[Job], None], open_loader: Open, *packages: str) -> None:
    """Do the job on the command line and print what came of it, versions of `packages` included."""
    job = Job(**json.loads(sys.argv[1]))
    if job.action == "write":
        begin = time.perf_counter()
        write(job)
        result: dict[str, object] = {"write_s": time.perf_counter() - begin}
    else:
        result = {"speed": speed, "save": save, "resume": resume}[job.action](job, open_loader)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    print(json.dumps({**result, "versions": versions}), flush=True)


def _check(batch: tuple[Tensor, Tensor], job: Job) -> None:
    inputs, labels = batch
    for tensor in batch:
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != (job.batch_size, job.seq_len):
            raise SystemExit(f"a batch is {tensor.dtype} {tuple(tensor.shape)}")
    if not torch.equal(inputs[:, 1:], labels[:, :-1]):
        raise SystemExit("labels are not the inputs one place further")


def _digest(batch: tuple[Tensor, Tensor]) -> str:
    return hashlib.sha256(batch[0].contiguous().numpy().tobytes()).hexdigest()


def _dump(state: object) -> bytes:
    """JSON where the state allows it, else pickle; the first byte says which."""
    try:
        return b"J" + json.dumps(state).encode()
    except TypeError:
        return b"P" + pickle.dumps(state)


def _load(content: bytes) -> object:
    """What `_dump` wrote in this very run."""
    return json.loads(content[1:]) if content[:1] == b"J" else pickle.loads(content[1:])
