"""Held-out documents of streamed sources: tokenised once, kept as files like those of a prepared corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data.errors import DataError
from data.files import cached_folder
from data.manifest import Shard
from data.shards import TokenSource
from data.sources import Row, SourceSpec, read_unit
from data.split import SPLIT_KEY, held_out_below, keyed_hash
from data.text.reader import row_place

if TYPE_CHECKING:
    from data.text.corpus import TextCorpus

FACTS = "facts.json"
VERSION = 1
ENCODED_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class HeldOut:
    """Documents to validate on by source, and the language of every source."""

    sources: dict[str, TokenSource]
    language_of: dict[str, str]


def open_held_out(corpus: TextCorpus, num_tokens: int, cache_dir: Path) -> HeldOut:
    """The first held-out documents of every source, `num_tokens` of them or a little more; none where there are none.

    Raises:
        DataError: `num_tokens` is negative, a file cannot be read, or a source has no good row.
    """
    if num_tokens < 0:
        raise DataError(f"validation_tokens: {num_tokens} is negative")
    name = xxhash.xxh3_128_hexdigest(f"{VERSION}/{corpus.digest}/{num_tokens}".encode())
    folder = cache_dir / f"held-out-{name}"
    return cached_folder(folder, partial(_read, corpus), partial(_write, corpus, num_tokens))


def _read(corpus: TextCorpus, folder: Path) -> HeldOut:
    facts = json.loads((folder / FACTS).read_bytes())
    sources = {}
    for name in corpus.sources:
        shards = [Shard(**entry) for entry in facts[name]["shards"]]
        sources[name] = TokenSource(folder, shards, str(corpus.token_type))
    return HeldOut(sources, {name: facts[name]["language"] for name in corpus.sources})


def _write(corpus: TextCorpus, num_tokens: int, folder: Path) -> None:
    facts = {name: _write_source(corpus, place, num_tokens, folder) for place, name in enumerate(corpus.sources)}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _write_source(corpus: TextCorpus, source: int, num_tokens: int, folder: Path) -> dict[str, object]:
    spec = corpus.plan.sources[source]
    language = spec.language or _first_language(corpus, source)
    tokens, lengths, text_bytes = [np.empty(0, corpus.token_type)], [np.empty(0, np.int64)], 0
    left = num_tokens
    for texts in _batches(corpus, source, language) if num_tokens and corpus.held_out else ():
        ids, sizes = corpus.tokenizer.frame(corpus.tokenizer.encode_batch(texts))
        kept = int(np.searchsorted(np.cumsum(sizes), left)) + 1
        tokens.append(ids[: sizes[:kept].sum()])
        lengths.append(sizes[:kept])
        text_bytes += sum(len(text.encode()) for text in texts[:kept])
        left -= int(sizes[:kept].sum())
        if left <= 0:
            break
    ends = np.cumsum(np.concatenate(lengths)).astype("<u8")
    if not len(ends):
        return {"language": language, "shards": []}
    shard = Shard("validation", spec.name, 0, int(ends[-1]), len(ends), text_bytes, "", "")
    (folder / shard.bin_name).write_bytes(np.concatenate(tokens).tobytes())
    (folder / shard.idx_name).write_bytes(ends.tobytes())
    return {"language": language, "shards": [asdict(shard)]}


def _batches(corpus: TextCorpus, source: int, language: str) -> Iterator[list[str]]:
    """Held-out texts in order, as many as are worth encoding together."""
    bound, batch, characters = held_out_below(corpus.held_out), [], 0
    for _, row in _rows(corpus, source):
        text = row.text
        if text is None or row.language != language or keyed_hash(text, SPLIT_KEY) >= bound:
            continue
        if corpus.filters.reason(text, language) is None:
            batch.append(text)
            characters += len(text)
        if characters >= ENCODED_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _first_language(corpus: TextCorpus, source: int) -> str:
    problem = ""
    for where, row in _rows(corpus, source):
        if row.language is not None:
            return row.language
        problem = problem or f"{where}: {row.problem}"
    raise DataError(problem or f"source {corpus.sources[source]}: has no rows")


def _rows(corpus: TextCorpus, source: int) -> Iterator[tuple[str, Row]]:
    """All rows of a source, every block opened once."""
    spec: SourceSpec = corpus.plan.sources[source]
    last = None
    for number in range(len(corpus.plan.units[source])):
        block, _ = corpus.plan.block(source, number)
        if block != last:
            yield from ((row_place(spec, block, row.position), row) for row in read_unit(spec, block))
        last = block
