"""Which documents a corpus has, on which side of the split, and in what order.

All of it follows from hashes of the texts and the order of the sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import xxhash

from data.errors import DataError
from data.order import scramble
from data.prepare.encode import TABLE
from data.prepare.plan import Plan
from data.split import HELD_OUT, held_out_below

SHARD_TOKENS = 1 << 28
MAX_BAD_ROWS = 0.01


@dataclass(frozen=True)
class Selection:
    """How documents are chosen and ordered.

    Attributes:
        seed: order of the documents.
        dedup: leave out exact repetitions, whichever source they are in; the first by source name, file, row stays.
        held_out: fraction of the texts held out for validation.
        max_bad_rows: share of a source's rows that may be bad.
        shard_tokens: most tokens in a shard, but for a document that is longer alone.

    Raises:
        DataError: a value out of range.
    """

    seed: int = 0
    dedup: bool = True
    held_out: Fraction = HELD_OUT
    max_bad_rows: float = MAX_BAD_ROWS
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise DataError(f"seed: {self.seed} is out of range, allowed: 0 .. 2^63 - 1")
        if not 0 <= self.held_out < 1:
            raise DataError(f"held_out: {self.held_out} is out of range, allowed: 0 up to but not including 1")
        if not 0 <= self.max_bad_rows <= 1:
            raise DataError(f"max_bad_rows: {self.max_bad_rows} is out of range, allowed: 0 .. 1")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens: {self.shard_tokens} is too small, 1 is the least")


@dataclass(frozen=True)
class Table:
    """All documents, an array (D,) of each: hash, number of source and unit, first id in the unit, ids, bytes."""

    high: np.ndarray
    low: np.ndarray
    source: np.ndarray
    unit: np.ndarray
    begin: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


def read_table(plan: Plan, work: Path) -> Table:
    """The documents of all units in `work`, in the order of the plan."""
    parts = [np.fromfile(work / f"{number}.npy", TABLE) for number in range(len(plan.units))]
    rows = np.concatenate([np.empty(0, TABLE), *parts])
    sizes = [len(part) for part in parts]
    ends = [np.cumsum(part["tokens"], dtype=np.int64) for part in parts]
    begins = [end - part["tokens"].astype(np.int64) for end, part in zip(ends, parts, strict=True)]
    return Table(
        high=rows["high"],
        low=rows["low"],
        source=np.repeat(np.array([planned.source for planned in plan.units], np.int32), sizes),
        unit=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        begin=np.concatenate([np.empty(0, np.int64), *begins]),
        tokens=rows["tokens"].astype(np.int64),
        bytes=rows["bytes"].astype(np.int64),
    )


def first_of_each(table: Table) -> np.ndarray:
    """Which documents, bool (D,), are the first with their text."""
    order = np.lexsort((table.low, table.high))  # stable: equal hashes stay in the order of the sources
    high, low = table.high[order], table.low[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    kept = np.zeros(len(order), np.bool_)
    kept[order[first]] = True
    return kept


def choose_held_out(table: Table, kept: np.ndarray, sources: int, fraction: Fraction) -> np.ndarray:
    """Which documents, bool (D,), are held out: those whose hash is low enough.

    A source of two texts or more has at least one on either side. A text is on one side wherever it appears.
    """
    bound = held_out_below(fraction)
    held = _is_below(table.high, table.low, bound)
    if not fraction:
        return held
    for number in range(sources):
        mine = np.flatnonzero(kept & (table.source == number))
        if len(mine) > 1 and not held[mine].any():
            lowest = mine[np.lexsort((table.low[mine], table.high[mine]))[0]]
            held |= (table.high == table.high[lowest]) & (table.low == table.low[lowest])
    for number in range(sources):
        mine = np.flatnonzero(kept & (table.source == number))
        if len(mine) and held[mine].all():
            highest = mine[np.lexsort((table.low[mine], table.high[mine]))[-1]]
            held &= (table.high != table.high[highest]) | (table.low != table.low[highest])
    return held


def _is_below(high: np.ndarray, low: np.ndarray, bound: int) -> np.ndarray:
    bound_high, bound_low = np.uint64(bound >> 64), np.uint64(bound & (1 << 64) - 1)
    return (high < bound_high) | ((high == bound_high) & (low < bound_low))


def ordered(table: Table, documents: np.ndarray, seed: int) -> np.ndarray:
    """`documents` in the order of a hash of their text under `seed`; repetitions in the order of the sources."""
    key = np.uint64(xxhash.xxh3_64_intdigest(seed.to_bytes(8, "little")))
    mixed = scramble(table.high[documents] ^ key)
    return documents[np.lexsort((table.low[documents], mixed))]
