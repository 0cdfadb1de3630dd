"""Make the corpus folder out of encoded units: selection.py chooses and orders documents, here they become shards.

What comes out depends on the documents, their order in the sources and the settings, not on how units were cut, who
encoded them, or how often the work was interrupted. About 60 bytes of memory are needed for a document.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from data.errors import DataError
from data.manifest import MANIFEST, QUARANTINE, TOKENIZER, FileRecord, Manifest, Shard, SourceRecord
from data.prepare.baselines import baselines_of
from data.prepare.encode import UnitFacts, read_facts
from data.prepare.plan import Plan
from data.prepare.selection import Selection, Table, choose_held_out, first_of_each, ordered, read_table
from data.tokenizer import Tokenizer

WRITE_AT_ONCE = 1 << 14


def write_corpus(folder: Path, plan: Plan, work: Path, tokenizer: Tokenizer, selection: Selection) -> None:
    """Fill `folder` with the corpus of the units in `work`, the manifest last.

    Raises:
        DataError: too many bad rows, a source without documents or with several languages.
    """
    facts = [_finished(work, number) for number in range(len(plan.units))]
    languages = _languages(plan, facts)
    quarantined = _write_quarantine(folder / QUARANTINE, plan, facts, selection.max_bad_rows)
    table = read_table(plan, work)
    kept = first_of_each(table) if selection.dedup else np.ones(len(table.high), np.bool_)
    held = choose_held_out(table, kept, len(plan.sources), selection.held_out)
    shutil.copyfile(work / TOKENIZER, folder / TOKENIZER)
    shards: list[Shard] = []
    with _Units(plan, work, tokenizer) as units:
        for number, spec in enumerate(plan.sources):
            mine = kept & (table.source == number)
            if not mine.any():
                raise DataError(f"source {spec.name}: {spec.path}: no documents are left of it")
            for split, part in (("train", mine & ~held), ("validation", mine & held)):
                chosen = ordered(table, np.flatnonzero(part), selection.seed)
                shards += _write_shards(folder, split, spec.name, table, chosen, units, selection.shard_tokens)
    records = _records(plan, facts, languages, quarantined, table, kept)
    manifest = Manifest(
        dtype=tokenizer.token_type.name,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer_xxh3=tokenizer.digest,
        seed=selection.seed,
        held_out=str(selection.held_out),
        sources=records,
        shards=tuple(shards),
        validation=baselines_of(folder, shards, records, tokenizer),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _records(
    plan: Plan, facts: list[UnitFacts], languages: list[str], quarantined: list[int], table: Table, kept: np.ndarray
) -> dict[str, SourceRecord]:
    passed = np.bincount(table.source, minlength=len(plan.sources)).tolist()
    left = np.bincount(table.source[kept], minlength=len(plan.sources)).tolist()
    return {
        spec.name: SourceRecord(
            language=languages[number],
            weight=spec.weight,
            files=tuple(FileRecord(PurePosixPath(file.url).name, file.size, file.stamp) for file in plan.files[number]),
            documents=left[number],
            duplicates=passed[number] - left[number],
            filtered=_filtered(_of_source(plan, facts, number)),
            quarantined=quarantined[number],
        )
        for number, spec in enumerate(plan.sources)
    }


def _filtered(facts: Iterator[UnitFacts]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for fact in facts:
        counts.update(fact.filtered)
    return dict(sorted(counts.items()))


def _finished(work: Path, number: int) -> UnitFacts:
    facts = read_facts(work, number)
    if facts is None:
        raise DataError(f"{work}: unit {number} is missing")
    return facts


def _of_source(plan: Plan, facts: list[UnitFacts], source: int) -> Iterator[UnitFacts]:
    return (fact for planned, fact in zip(plan.units, facts, strict=True) if planned.source == source)


def _languages(plan: Plan, facts: list[UnitFacts]) -> list[str]:
    """The language of every source. DataError: a source has rows of several, or has none."""
    found: list[str] = []
    for number, spec in enumerate(plan.sources):
        seen = sorted({language for fact in _of_source(plan, facts, number) for language in fact.languages})
        if len(seen) > 1:
            raise DataError(
                f"source {spec.name}: has rows of {', '.join(seen[:5])}, but a source has one language: cut it up"
            )
        found += seen or [spec.language or ""]
    return found


def _write_quarantine(path: Path, plan: Plan, facts: list[UnitFacts], most: float) -> list[int]:
    """Write the list of bad rows; returns how many every source has. DataError: more than `most` of its rows."""
    first = _first_rows(plan, facts)
    counts = []
    with path.open("w", encoding="utf-8") as file:
        for number, spec in enumerate(plan.sources):
            entries = [
                {"file": planned.unit.file.url, "row": begin + row, "source": spec.name, "reason": reason}
                for planned, fact, begin in zip(plan.units, facts, first, strict=True)
                if planned.source == number
                for row, reason in fact.bad
            ]
            rows = sum(fact.rows for fact in _of_source(plan, facts, number))
            if len(entries) > most * rows or len(entries) == rows > 0:
                bad = entries[0]
                raise DataError(
                    f"{bad['file']}:{bad['row']}: {bad['reason']}; "
                    f"source {spec.name} has {len(entries)} bad rows of {rows}, allowed: {most:.4g} of them"
                )
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            counts.append(len(entries))
    return counts


def _first_rows(plan: Plan, facts: list[UnitFacts]) -> list[int]:
    """Number of every unit's first row in its file, from 1."""
    rows: Counter[tuple[int, str]] = Counter()
    first = []
    for planned, fact in zip(plan.units, facts, strict=True):
        file = (planned.source, planned.unit.file.url)
        first.append(rows[file] + 1)
        rows[file] += fact.rows
    return first


class _Units:
    """The `.bin` files of all units, mapped while they are used."""

    def __init__(self, plan: Plan, work: Path, tokenizer: Tokenizer) -> None:
        self._paths = [work / f"{number}.bin" for number in range(len(plan.units))]
        self._size = tokenizer.token_type.itemsize
        self._views: dict[int, memoryview] = {}

    def __enter__(self) -> _Units:
        return self

    def __exit__(self, *_: object) -> None:
        self._views.clear()

    def bytes_of(self, units: np.ndarray, begins: np.ndarray, tokens: np.ndarray) -> bytes:
        """Ids of documents one after another, as they are in the files."""
        for unit in np.unique(units).tolist():
            if unit not in self._views:
                self._views[unit] = memoryview(np.memmap(self._paths[unit], np.uint8, "r"))
        places = zip(
            units.tolist(), (begins * self._size).tolist(), ((begins + tokens) * self._size).tolist(), strict=True
        )
        return b"".join([self._views[unit][begin:end] for unit, begin, end in places])


def _write_shards(
    folder: Path, split: str, source: str, table: Table, documents: np.ndarray, units: _Units, most: int
) -> list[Shard]:
    ends = np.cumsum(table.tokens[documents])
    shards: list[Shard] = []
    first = 0
    while first < len(documents):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        shard = _write_shard(folder, split, source, len(shards), table, documents[first:last], units)
        shards.append(shard)
        first = last
    return shards


def _write_shard(
    folder: Path, split: str, source: str, number: int, table: Table, documents: np.ndarray, units: _Units
) -> Shard:
    ends = np.cumsum(table.tokens[documents])
    index = ends.astype("<u8").tobytes()
    shard = Shard(
        split=split,
        source=source,
        number=number,
        tokens=int(ends[-1]),
        documents=len(documents),
        text_bytes=int(table.bytes[documents].sum()),
        tokens_xxh3="",
        index_xxh3=xxhash.xxh3_128_hexdigest(index),
    )
    digest = xxhash.xxh3_128()
    with (folder / shard.bin_name).open("wb") as file:
        for start in range(0, len(documents), WRITE_AT_ONCE):
            some = documents[start : start + WRITE_AT_ONCE]
            content = units.bytes_of(table.unit[some], table.begin[some], table.tokens[some])
            digest.update(content)
            file.write(content)
    (folder / shard.idx_name).write_bytes(index)
    return replace(shard, tokens_xxh3=digest.hexdigest())
