"""This project's mode A: a prepared corpus read by TrainLoader. Cases: the two ways to shuffle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.data_peers.common import SEED, Job, Loader, read_tokens, serve
from benchmarks.data_peers.corpus import BOS_ID, EOS_ID, VOCAB_SIZE
from data.corpus import TokenCorpus
from data.files import file_digest
from data.loader import TrainLoader
from data.manifest import MANIFEST, TOKENIZER, Manifest, Shard, SourceRecord
from data.prepare.selection import SHARD_TOKENS
from data.spec import StreamSpec
from data.token_stream import TokenStream

SAMPLE = Path(__file__).parents[2] / "data" / "sample" / TOKENIZER


class StepLoader:
    """A loader of steps of one batch each, seen as inputs and labels."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.state_dict = loader.state_dict

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in self._loader:
            yield batch.input_ids, batch.labels


def write(job: Job) -> None:
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = read_tokens(job)
    ends = np.fromfile(Path(job.corpus) / "ends.bin", dtype="<u8")
    count = -(-len(tokens) // SHARD_TOKENS)
    cuts = [len(ends) * number // count for number in range(count + 1)]
    shards = [_write_shard(folder, number, tokens, ends, *cuts[number : number + 2]) for number in range(count)]
    shutil.copy(SAMPLE, folder / TOKENIZER)
    source = SourceRecord(
        language="en", weight=1.0, files=(), documents=len(ends), duplicates=0, filtered={}, quarantined=0
    )
    manifest = Manifest(
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        tokenizer_xxh3=file_digest(SAMPLE),
        seed=SEED,
        held_out="0",
        sources={"ids": source},
        shards=tuple(shards),
        validation={},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")


def open_loader(job: Job, state: Any) -> Loader:
    spec = StreamSpec.single_stage(job.seq_len, {"ids": 1}, SEED, shuffle=job.case)
    stream = TokenStream(TokenCorpus.open(job.folder), spec)
    loader = TrainLoader(stream, job.batch_size, job.batch_size, workers=job.workers)
    if state is not None:
        loader.load_state_dict(state)
    return StepLoader(loader)


def _write_shard(folder: Path, number: int, tokens: np.ndarray, ends: np.ndarray, first: int, last: int) -> Shard:
    begin, end = int(ends[first - 1]) if first else 0, int(ends[last - 1])
    shard = Shard("train", "ids", number, end - begin, last - first, end - begin, "", "")
    tokens[begin:end].tofile(folder / shard.bin_name)
    (ends[first:last] - np.uint64(begin)).tofile(folder / shard.idx_name)
    digests = (file_digest(folder / name) for name in (shard.bin_name, shard.idx_name))
    return Shard("train", "ids", number, end - begin, last - first, end - begin, *digests)


if __name__ == "__main__":
    serve(write, open_loader, "numpy")
