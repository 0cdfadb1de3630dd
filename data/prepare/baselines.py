"""Compression baselines of a corpus whose text is small enough to compress twice more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.baseline import MOST_TEXT, xz_bits_per_byte, xz_primed_bits_per_byte
from data.manifest import Baseline, Shard, SourceRecord
from data.tokenizer import Tokenizer

DECODE_AT_ONCE = 1 << 10


def baselines_of(
    folder: Path, shards: Sequence[Shard], sources: Mapping[str, SourceRecord], tokenizer: Tokenizer
) -> dict[str, Baseline]:
    """What `xz -9` makes of the held-out text of every language that has some, and less than 64 MiB of text in all."""
    baselines = {}
    for language in sorted({source.language for source in sources.values()}):
        mine = [shard for shard in shards if sources[shard.source].language == language]
        if sum(shard.text_bytes for shard in mine) >= MOST_TEXT:
            continue
        training, held_out = (
            b"".join(_text(folder, shard, tokenizer) for shard in mine if shard.split == split)
            for split in ("train", "validation")
        )
        if held_out:
            baselines[language] = Baseline(xz_bits_per_byte(held_out), xz_primed_bits_per_byte(training, held_out))
    return baselines


def _text(folder: Path, shard: Shard, tokenizer: Tokenizer) -> bytes:
    ids = np.fromfile(folder / shard.bin_name, tokenizer.token_type)
    ends = np.fromfile(folder / shard.idx_name, "<u8").astype(np.int64)
    pieces = np.split(ids, ends[DECODE_AT_ONCE - 1 : -1 : DECODE_AT_ONCE])
    return "".join(tokenizer.decode(piece.tolist()) for piece in pieces).encode()
