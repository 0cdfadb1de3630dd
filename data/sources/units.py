"""Cut the files of a source into units: pieces that are read on their own, in parallel or in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.errors import DataError
from data.sources.open import arrow_batches, megatron_index, parquet_file
from data.sources.resolve import SourceFile
from data.sources.spec import SourceSpec

ROW_FORMATS = ("parquet", "arrow", "megatron")


@dataclass(frozen=True)
class Unit:
    """A piece of a file.

    `first` and `count` are rows of a parquet or arrow file and documents of a Megatron file; bytes of plain JSON Lines
    and text by line, meaning the lines that start in them; bytes of an olmo file, meaning the documents that start in
    them; and the whole file, in bytes, where it is compressed or its documents are paragraphs or files.
    """

    file: SourceFile
    first: int
    count: int


def plan_units(spec: SourceSpec, files: Sequence[SourceFile], *, rows: int, num_bytes: int) -> list[Unit]:
    """Units of `files` in order, of at most about `num_bytes` and, where rows are known beforehand, `rows`.

    A unit never crosses a row group or record batch. The result depends on the contents and the two limits alone.
    Planning reads footers; of a remote arrow file it has to read everything.

    Raises:
        DataError: a limit below 1, or a file that cannot be read.
    """
    if min(rows, num_bytes) < 1:
        raise DataError(f"units: limits of {rows} rows and {num_bytes} bytes are too small, 1 is the least")
    return [
        Unit(file, first, count)
        for file in files
        for begin, length, size in _groups(spec, file)
        for first, count in _cut(begin, length, _step(spec, file, length, size, rows, num_bytes))
    ]


def is_split_by_bytes(spec: SourceSpec, file: SourceFile) -> bool:
    """Whether units of `file` are ranges of bytes whose lines or documents are found by looking for their ends."""
    if file.format == "olmo":
        return True
    return file.compression is None and (file.format == "jsonl" or (file.format == "text" and spec.sample_by == "line"))


def _groups(spec: SourceSpec, file: SourceFile) -> Iterator[tuple[int, int, int]]:
    """(first, count, bytes) of every part of a file that no unit may cross; empty parts are left out."""
    if file.format not in ROW_FORMATS:
        yield from [(0, file.size, file.size)] if file.size else []
        return
    begin = 0
    for length, size in _row_groups(spec, file):
        if length:
            yield begin, length, size
        begin += length


def _row_groups(spec: SourceSpec, file: SourceFile) -> Iterator[tuple[int, int]]:
    if file.format == "megatron":
        yield len(megatron_index(spec, file).documents) - 1, file.size
    elif file.format == "arrow":
        with arrow_batches(spec, file) as batches:
            yield from ((batch.num_rows, batch.nbytes) for batch in batches)
    else:
        with parquet_file(spec, file) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                yield group.num_rows, group.total_byte_size


def _step(spec: SourceSpec, file: SourceFile, length: int, size: int, rows: int, num_bytes: int) -> int:
    if file.format in ROW_FORMATS:
        return min(rows, max(1, length * num_bytes // max(size, 1)))
    return num_bytes if is_split_by_bytes(spec, file) else length


def _cut(begin: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(begin, begin + length, step):
        yield first, min(step, begin + length - first)
