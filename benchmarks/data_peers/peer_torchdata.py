"""torchdata's StatefulDataLoader over a memory-mapped file of ids, the way of many small training scripts.

Cases: `rows` fetches one sequence at a time; `batches` fetches a whole batch in one numpy gather (`__getitems__`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.data_peers.common import SEED, Job, Loader, RowLoader, read_rows, serve, stack


class Rows(Dataset):
    def __init__(self, job: Job) -> None:
        self.rows = read_rows(job)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.rows[index]))


class Batches(Rows):
    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self.rows[indices])


def as_it_is(batch: Tensor) -> Tensor:
    return batch


def write(job: Job) -> None:
    """The corpus is in this format already."""


def open_loader(job: Job, state: Any) -> Loader:
    loader = StatefulDataLoader(
        Rows(job) if job.case == "rows" else Batches(job),
        batch_size=job.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=job.workers,
        collate_fn=stack if job.case == "rows" else as_it_is,
        generator=torch.Generator().manual_seed(SEED),
        persistent_workers=job.workers > 0,
    )
    if state is not None:
        loader.load_state_dict(state)
    return RowLoader(loader, loader.state_dict)


if __name__ == "__main__":
    serve(write, open_loader, "torchdata")
