"""Cut sources into units for streaming, once: nothing is read but footers, and the result is kept on disk.

A unit is what a stream reads at a time, a block what is decoded at a time: a row group holds several units, a stretch
of JSON Lines is both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from data.errors import DataError
from data.files import cached_folder
from data.prepare.plan import resolve_all, sorted_sources
from data.sources import SourceFile, SourceSpec, Unit, plan_units
from data.sources.spec import TOKEN_FORMATS
from data.sources.units import is_split_by_bytes

PLAN_VERSION = 1
PLAN = "plan.json"
UNITS_PER_STREAM = 4
MAX_UNIT_ROWS = 1024
MIN_UNIT_BYTES = 256
MAX_UNIT_BYTES = 4 << 20
OPEN_UNIT_BYTES = 512 << 20  # of all streams and sources together
MAX_BLOCK_BYTES = 32 << 20
MAX_PACKED_BYTES = 16 << 20
# To read from the middle of a row group all rows before are decoded: cut a large one into few, larger units.
UNITS_PER_LARGE_BLOCK = 16
LARGEST_GROWTH = 8
FOOTERS_AT_ONCE = 16
WHOLE = 1 << 62
UNIT = np.dtype([("file", "<u4"), ("first", "<i8"), ("count", "<i8"), ("block_first", "<i8"), ("block_count", "<i8")])


@dataclass(frozen=True)
class Plan:
    """Sources by name, the files of each, and their units in order.

    Attributes:
        units: for every source an array of UNIT: `first` and `count` as of `Unit`, those of its block, and the file.
        streams: V.
    """

    folder: Path
    sources: tuple[SourceSpec, ...]
    files: tuple[tuple[SourceFile, ...], ...]
    units: tuple[np.ndarray, ...]
    streams: int

    def block(self, source: int, number: int) -> tuple[Unit, slice]:
        """The block of unit `number` of a source, and which of the block's rows are the unit's."""
        file, first, count, block_first, block_count = self.units[source][number].item()
        block = Unit(self.files[source][file], block_first, block_count)
        if (first, count) == (block_first, block_count):
            return block, slice(None)
        return block, slice(first - block_first, first - block_first + count)

    def digest(self) -> str:
        """xxh3-128 (hex) of the files, how their rows are read, and the units."""
        fields = ("name", "language", "text_field", "language_field", "sample_by")
        sources = [[getattr(spec, field) for field in fields] for spec in self.sources]
        files = [[asdict(file) for file in group] for group in self.files]
        units = [xxhash.xxh3_128_hexdigest(np.ascontiguousarray(table)) for table in self.units]
        return xxhash.xxh3_128_hexdigest(json.dumps([PLAN_VERSION, self.streams, sources, files, units]).encode())


def make_plan(sources: Sequence[SourceSpec], streams: int, cache_dir: Path) -> Plan:
    """The plan of these sources as they are now, read from `cache_dir` where it has been made before.

    Raises:
        DataError: a source cannot be used, or has fewer units than there are streams.
    """
    if streams < 1:
        raise DataError(f"streams: {streams} is too small, 1 is the least")
    specs = sorted_sources(sources)
    files = resolve_all(specs)
    for spec, group in zip(specs, files, strict=True):
        _require_streamable(spec, group)
    inputs = json.dumps(
        [PLAN_VERSION, streams, [asdict(spec) for spec in specs], [[asdict(f) for f in g] for g in files]]
    )
    folder = cache_dir / f"text-{xxhash.xxh3_128_hexdigest(inputs.encode())}"
    return cached_folder(folder, read_plan, lambda scratch: _write_plan(scratch, specs, files, streams))


def read_plan(folder: Path) -> Plan:
    """The plan in `folder`; its units are mapped, not read. OSError, ValueError, KeyError, TypeError: it is none."""
    content = json.loads((folder / PLAN).read_bytes())
    sources = tuple(SourceSpec(**entry) for entry in content["sources"])
    files = tuple(tuple(SourceFile(**entry) for entry in group) for group in content["files"])
    units = tuple(np.load(_units_path(folder, spec), mmap_mode="r", allow_pickle=False) for spec in sources)
    return Plan(folder, sources, files, units, content["streams"])


def _write_plan(folder: Path, specs: Sequence[SourceSpec], files: Sequence[Sequence[SourceFile]], streams: int) -> None:
    tables = [_plan_source(spec, group, streams, len(specs)) for spec, group in zip(specs, files, strict=True)]
    content = {
        "streams": streams,
        "sources": [asdict(spec) for spec in specs],
        "files": [[asdict(file) for file in group] for group in files],
    }
    (folder / PLAN).write_text(json.dumps(content), encoding="utf-8")
    for spec, table in zip(specs, tables, strict=True):
        np.save(_units_path(folder, spec), table)


def _units_path(folder: Path, spec: SourceSpec) -> Path:
    return folder / f"units-{spec.name}.npy"


def _require_streamable(spec: SourceSpec, files: Sequence[SourceFile]) -> None:
    for file in files:
        if file.format in TOKEN_FORMATS:
            raise DataError(f"{file.url}: holds token ids, only data.prepare reads them")
        if file.compression and file.size > MAX_PACKED_BYTES:
            limit = f"streaming takes such files up to {MAX_PACKED_BYTES >> 20} MiB"
            raise DataError(f"{file.url}: can only be unpacked from its start, {limit}: unpack it or use data.prepare")


def _plan_source(spec: SourceSpec, files: Sequence[SourceFile], streams: int, num_sources: int) -> np.ndarray:
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        groups = list(pool.map(partial(_groups, spec), files))
    share = max(sum(file.size for file in files) // (UNITS_PER_STREAM * streams), MIN_UNIT_BYTES)
    limit = min(share, MAX_UNIT_BYTES, max(OPEN_UNIT_BYTES // (streams * num_sources), MIN_UNIT_BYTES))
    rows = [
        _cut(spec, file, number, group, limit, share) for number, file in enumerate(files) for group in groups[number]
    ]
    table = np.concatenate([np.empty(0, UNIT), *rows])
    if len(table) < streams:
        raise DataError(
            f"source {spec.name}: has {len(table)} units to deal to {streams} streams; "
            f"set data.streams to {max(len(table), 1)} or less, or use data.prepare"
        )
    return table


def _groups(spec: SourceSpec, file: SourceFile) -> list[tuple[int, int, int]]:
    """(first, count, rows of the whole file) of every part of `file` that no unit may cross."""
    units = plan_units(spec, [file], rows=WHOLE, num_bytes=WHOLE)
    total = sum(unit.count for unit in units)
    return [(unit.first, unit.count, total) for unit in units]


def _cut(
    spec: SourceSpec, file: SourceFile, number: int, group: tuple[int, int, int], limit: int, share: int
) -> np.ndarray:
    """Units of about `limit` bytes; `share` is the most that leaves every stream its units."""
    first, count, total = group
    whole, split = _is_whole(spec, file), is_split_by_bytes(spec, file)
    step = count if whole else limit if split else _rows_of(limit, file, total)
    small = file.size * count // total <= MAX_BLOCK_BYTES
    if not (whole or split or small):
        larger = min(-(-count // UNITS_PER_LARGE_BLOCK), LARGEST_GROWTH * step)
        step = max(step, min(larger, max(share * total // file.size, 1)))
    begins = np.arange(first, first + count, step)
    units = np.empty(len(begins), UNIT)
    units["file"], units["first"] = number, begins
    units["count"] = np.minimum(begins + step, first + count) - begins
    units["block_first"], units["block_count"] = units["first"], units["count"]
    if small and not split:
        units["block_first"], units["block_count"] = first, count
    return units


def _is_whole(spec: SourceSpec, file: SourceFile) -> bool:
    return file.format in ("jsonl", "text") and not is_split_by_bytes(spec, file)


def _rows_of(num_bytes: int, file: SourceFile, total: int) -> int:
    return min(max(num_bytes * total // max(file.size, 1), 1), MAX_UNIT_ROWS)
