"""The corpora that all systems read: random ids in documents of log-normal length, and text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCAB_SIZE = 32_768
BOS_ID, EOS_ID = 0, 1
MEDIAN_LENGTH, SIGMA = 500, 1.0
ROW_GROUP = 1000


def write_tokens(folder: Path, num_tokens: int) -> None:
    """`tokens.bin`, uint16, and `ends.bin`, uint64: where each document, BOS to EOS, ends."""
    if (folder / "ends.bin").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    draws = random.lognormal(np.log(MEDIAN_LENGTH), SIGMA, 2 * num_tokens // MEDIAN_LENGTH + 1)
    ends = np.cumsum(np.maximum(draws.astype(np.int64), 2))
    ends = np.append(ends[ends < num_tokens - 1], num_tokens)
    tokens = random.integers(2, VOCAB_SIZE, num_tokens, dtype=np.uint16)
    tokens[np.concatenate([[0], ends[:-1]])] = BOS_ID
    tokens[ends - 1] = EOS_ID
    tokens.astype("<u2").tofile(folder / "tokens.bin")
    ends.astype("<u8").tofile(folder / "ends.bin")


def write_text(folder: Path, files: list[Path], num_bytes: int) -> None:
    """`text.parquet`: the texts of JSON Lines `files` in random order, again and again with a counter before each, so
    that no two are alike, until there are `num_bytes` of them."""
    if (folder / "text.parquet").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").splitlines()]
    schema = pa.schema({"text": pa.string()})
    partial = folder / ".text.parquet"
    with pq.ParquetWriter(partial, schema) as writer:
        group: list[str] = []
        for text in _repeated(texts, num_bytes):
            group.append(text)
            if len(group) == ROW_GROUP:
                writer.write_table(pa.table({"text": group}, schema))
                group = []
        writer.write_table(pa.table({"text": group}, schema))
    partial.rename(folder / "text.parquet")


def read_texts(folder: Path) -> list[str]:
    return pq.read_table(folder / "text.parquet")["text"].to_pylist()


def _repeated(texts: list[str], num_bytes: int) -> Iterator[str]:
    random = np.random.default_rng(0)
    written = count = 0
    while written < num_bytes:
        for place in random.permutation(len(texts)).tolist():
            count += 1
            text = f"{count}\n{texts[place]}"
            written += len(text.encode())
            yield text
