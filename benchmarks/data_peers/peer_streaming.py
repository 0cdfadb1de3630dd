"""mosaicml-streaming: MDS shards of sequences as fixed-size arrays, read by StreamingDataset from local files."""

from __future__ import annotations

import importlib
import shutil
from typing import Any

import torch

from benchmarks.data_peers.common import SEED, Job, Loader, RowLoader, read_rows, serve, stack_arrays


def import_streaming() -> Any:
    """The package. It imports torchvision for image data sets, which play no part here.

    PyPI's torchvision is built for CUDA: beside a torch for the CPU its operators do not load, and to import it fails
    at two of them that do not exist.
    """
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    package = importlib.import_module("streaming")
    package.torchvision_operators = operators  # they vanish with this object
    return package


streaming = import_streaming()
AHEAD = (
    1 << 20
)  # samples to have ready; nothing is downloaded, and with the 8 batches of the default it waits for itself


def write(job: Job) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)
    columns = {"tokens": f"ndarray:uint16:{job.seq_len + 1}"}
    with streaming.MDSWriter(out=job.folder, columns=columns) as writer:
        for row in read_rows(job):
            writer.write({"tokens": row})


def collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    return stack_arrays([sample["tokens"] for sample in samples])


def open_loader(job: Job, state: Any) -> Loader:
    dataset = streaming.StreamingDataset(
        local=job.folder, batch_size=job.batch_size, shuffle=True, shuffle_seed=SEED, predownload=AHEAD
    )
    loader = streaming.StreamingDataLoader(
        dataset,
        batch_size=job.batch_size,
        num_workers=job.workers,
        collate_fn=collate,
        drop_last=True,
        persistent_workers=job.workers > 0,
    )
    if state is not None:
        loader.load_state_dict(state)
    return RowLoader(loader, loader.state_dict)


if __name__ == "__main__":
    streaming.base.util.clean_stale_shared_memory()  # what processes that were killed have left in /dev/shm
    serve(write, open_loader, "mosaicml-streaming")
