"""litdata: chunks of documents written by `optimize`, read by StreamingDataset with a TokensLoader.

Its TokensLoader cuts blocks of seq_len + 1 ids end to end, as its README says to do for training a language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
from torch import Tensor

from benchmarks.data_peers.common import SEED, Job, Loader, RowLoader, read_tokens, serve, stack

ROWS_OF_CHUNK = 8012  # as in its README
CHUNKS = 8


def documents(part: int, job: Job, parts: int) -> Iterator[Tensor]:
    """Ids of every document of one part of the corpus."""
    tokens = read_tokens(job)
    ends = np.fromfile(Path(job.corpus) / "ends.bin", dtype="<u8").astype(np.int64)
    begins = np.concatenate([[0], ends[:-1]])
    first, last = len(ends) * part // parts, len(ends) * (part + 1) // parts
    for begin, end in zip(begins[first:last].tolist(), ends[first:last].tolist(), strict=True):
        yield torch.from_numpy(np.array(tokens[begin:end]))


def write(job: Job) -> None:
    rows = len(read_tokens(job)) // (job.seq_len + 1)
    optimize(
        fn=partial(documents, job=job, parts=2),
        inputs=[0, 1],
        output_dir=job.folder,
        chunk_size=(job.seq_len + 1) * min(ROWS_OF_CHUNK, max(rows // CHUNKS, 1)),
        item_loader=TokensLoader(),
        num_workers=2,
        mode="overwrite",
    )


def open_loader(job: Job, state: Any) -> Loader:
    dataset = StreamingDataset(
        job.folder,
        item_loader=TokensLoader(block_size=job.seq_len + 1),
        shuffle=True,
        seed=SEED,
        drop_last=True,
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=job.batch_size,
        num_workers=job.workers,
        collate_fn=stack,
        drop_last=True,
        persistent_workers=job.workers > 0,
    )
    if state is not None:
        loader.load_state_dict(state)
    return RowLoader(loader, loader.state_dict)


if __name__ == "__main__":
    serve(write, open_loader, "litdata")
