"""Hugging Face datasets, streaming=True: parquet files of sequences in an `input_ids` list column.

Cases: `arrow` and `numpy` are formats of the batches, `shuffled` adds a shuffle buffer of 1,000 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import IterableDataset, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.data_peers.common import SEED, Job, Loader, RowLoader, read_rows, serve

FILES = 8
ROW_GROUP = 1000
BUFFER = 1000


def write(job: Job) -> None:
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(read_rows(job), FILES)):
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * (job.seq_len + 1)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(rows).reshape(-1)))
        path = Path(job.folder) / f"{number:05d}.parquet"
        pq.write_table(pa.table({"input_ids": column}), path, row_group_size=ROW_GROUP)


def from_arrow(batch: pa.Table, batch_size: int) -> Tensor:
    ids = batch["input_ids"].combine_chunks().flatten()
    while pa.types.is_list(ids.type):  # a batch made by `batch()` is one row
        ids = ids.flatten()
    return torch.from_numpy(ids.to_numpy().reshape(batch_size, -1))


def from_numpy(batch: dict[str, np.ndarray], batch_size: int) -> Tensor:
    return torch.from_numpy(np.asarray(batch["input_ids"]).reshape(batch_size, -1))


class Batches:
    """Without workers: the data set's own batches."""

    def __init__(self, dataset: IterableDataset, job: Job) -> None:
        self._dataset, self._job = dataset, job

    def __iter__(self) -> Iterator[Tensor]:
        convert = converter(self._job)
        for batch in self._dataset.iter(self._job.batch_size, drop_last_batch=True):
            yield convert(batch)


def converter(job: Job) -> Callable[[Any], Tensor]:
    return partial(from_numpy if "numpy" in job.case else from_arrow, batch_size=job.batch_size)


def open_loader(job: Job, state: Any) -> Loader:
    files = sorted(str(path) for path in Path(job.folder).glob("*.parquet"))
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    if "shuffled" in job.case:
        dataset = dataset.shuffle(seed=SEED, buffer_size=BUFFER)
    dataset = dataset.with_format("numpy" if "numpy" in job.case else "arrow")
    if state is not None:
        dataset.load_state_dict(state)
    if not job.workers:
        return RowLoader(Batches(dataset, job), dataset.state_dict)
    batches = dataset.batch(job.batch_size, drop_last_batch=True)
    loader = DataLoader(batches, batch_size=None, num_workers=job.workers, collate_fn=converter(job))
    return RowLoader(loader, dataset.state_dict)


if __name__ == "__main__":
    serve(write, open_loader, "datasets", "pyarrow")
