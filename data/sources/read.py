"""Read the rows of a source, unit by unit, lazily and in order; what is wrong with a row is said, not raised."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute
import zstandard

from data import documents
from data.documents import (
    Document,
    RowProblem,
    language_of,
    parse_object,
    parse_text,
    read_lines,
    text_of,
)
from data.errors import DataError, one_line
from data.sources.open import arrow_batches, open_unpacked, parquet_file, require_expansion
from data.sources.resolve import SourceFile, errors_name, resolve
from data.sources.spec import TOKEN_FORMATS, SourceSpec
from data.sources.units import Unit, is_split_by_bytes, plan_units

ROWS_AT_ONCE = 256
UNIT_ROWS = 1 << 16
UNIT_BYTES = 64 << 20
DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)


class Row(NamedTuple):
    """One row: `text` and `language`, or `problem`. `position` counts rows from the start of the unit, from 0.

    Lines of a text file that hold blanks alone are no rows.
    """

    position: int
    text: str | None
    language: str | None
    problem: str | None = None


def read_unit(spec: SourceSpec, unit: Unit) -> Iterator[Row]:
    """The rows of `unit`, lazily and in order.

    Reading from the middle of a parquet row group decodes the rows before as well.

    Raises:
        DataError: the file is missing, cut or damaged, or lacks a column; the line names the file and the row.
    """
    position = 0
    with errors_name(unit.file.url):
        try:
            for position, found in enumerate(_rows(spec, unit), start=1):
                yield _row(spec, position - 1, found)
        except DAMAGES as error:
            raise DataError(f"{unit.file.url}:{position + 1}: damaged: {one_line(error)}") from error


def read_documents(spec: SourceSpec) -> Iterator[Document]:
    """All documents of a source in order; nothing is left out.

    Raises:
        DataError: a bad row, as `url:row: reason`; a file that cannot be read; rows of more than one language.
    """
    language = spec.language
    rows = 0
    for file in resolve(spec):
        before = rows
        for unit in plan_units(spec, [file], rows=UNIT_ROWS, num_bytes=UNIT_BYTES):
            for row in read_unit(spec, unit):
                rows += 1
                where = f"{file.url}:{rows - before}"
                if row.text is None or row.language is None:
                    raise DataError(f"{where}: {row.problem}")
                language = language or row.language
                if row.language != language:
                    raise DataError(f"{where}: source {spec.name} has rows of {language} and {row.language}")
                yield Document(row.text, row.language, spec.name)
    if not rows:
        raise DataError(f"source {spec.name}: {spec.path}: has no rows")


Found = tuple[object, object] | RowProblem


def _row(spec: SourceSpec, position: int, found: Found) -> Row:
    """Check what a reader found: a pair of text and language, or its problem."""
    try:
        if isinstance(found, RowProblem):
            raise found
        text = text_of(found[0], spec.text_field)
        language = spec.language or language_of(found[1], spec.language_field)
    except RowProblem as problem:
        return Row(position, None, None, str(problem))
    return Row(position, text, language)


def _rows(spec: SourceSpec, unit: Unit) -> Iterator[Found]:
    if unit.file.format in TOKEN_FORMATS:
        raise DataError(f"{unit.file.url}: holds token ids, only data.prepare reads them")
    if unit.file.format in ("parquet", "arrow"):
        return _column_rows(spec, unit)
    if unit.file.format == "jsonl":
        return (_json_row(spec, line) for line in _lines(spec, unit))
    if spec.language is None:
        raise DataError(f"source {spec.name}: text files do not say their language, give language=")
    return _TEXT_ROWS[spec.sample_by](spec, unit)


def _lines(spec: SourceSpec, unit: Unit) -> Iterator[bytes | None]:
    """Lines that start in the unit; None stands for one that is too long."""
    with closing(open_unpacked(spec, unit.file)) as file:
        left = unit.count - _to_first_line(file, unit.first)
        whole = not is_split_by_bytes(spec, unit.file)
        for line, size in read_lines(file) if whole or left > 0 else ():
            yield line
            left -= size
            if left <= 0 and not whole:
                return


def _to_first_line(file: BinaryIO, first: int) -> int:
    """Go to the first line that starts at byte `first` or later; returns how many bytes after `first` that is."""
    if first == 0:
        return 0
    file.seek(first - 1)
    skipped = -1
    while piece := file.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _json_row(spec: SourceSpec, line: bytes | None) -> Found:
    try:
        row = parse_object(line)
    except RowProblem as problem:
        return problem
    return row.get(spec.text_field), row.get(spec.language_field)


def _text_row(content: bytes | None) -> Found:
    try:
        return parse_text(content), None
    except RowProblem as problem:
        return problem


def _text_lines(spec: SourceSpec, unit: Unit) -> Iterator[Found]:
    return (_text_row(line and line.rstrip(b"\r\n")) for line in _lines(spec, unit) if line is None or line.strip())


def _text_paragraphs(spec: SourceSpec, unit: Unit) -> Iterator[Found]:
    """Paragraphs end at lines that hold blanks alone."""
    paragraph: list[bytes] = []
    size = 0
    for line in _lines(spec, unit):
        if line is None or line.strip():
            size += documents.MAX_ROW_BYTES + 1 if line is None else len(line)
            if line is not None and size <= documents.MAX_ROW_BYTES:
                paragraph.append(line)
        elif size:
            yield _joined(paragraph, size)
            paragraph, size = [], 0
    if size:
        yield _joined(paragraph, size)


def _joined(paragraph: list[bytes], size: int) -> Found:
    return _text_row(b"".join(paragraph).rstrip(b"\r\n") if size <= documents.MAX_ROW_BYTES else None)


def _text_files(spec: SourceSpec, unit: Unit) -> Iterator[Found]:
    with closing(open_unpacked(spec, unit.file)) as file:
        yield _text_row(_whole(file))


def _whole(file: BinaryIO) -> bytes | None:
    content = bytearray()
    for line, _ in read_lines(file):
        if line is None or len(content) + len(line) > documents.MAX_ROW_BYTES:
            return None
        content += line
    return bytes(content)


_TEXT_ROWS = {"line": _text_lines, "paragraph": _text_paragraphs, "document": _text_files}


def _column_rows(spec: SourceSpec, unit: Unit) -> Iterator[Found]:
    columns = [spec.text_field] + ([spec.language_field] if spec.language is None else [])
    batches = _parquet_batches if unit.file.format == "parquet" else _arrow_batches
    unpacked = 0
    for batch in batches(spec, unit, columns):
        texts = _values(batch.column(0))
        languages = _values(batch.column(1)) if len(columns) == 2 else repeat(None, batch.num_rows)
        for text, language in zip(texts, languages, strict=True):
            unpacked += len(text) if isinstance(text, str) else 0
            require_expansion(unit.file, unpacked)
            problem = next((value for value in (text, language) if isinstance(value, RowProblem)), None)
            yield problem or (text, language)


def _parquet_batches(spec: SourceSpec, unit: Unit, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with parquet_file(spec, unit.file, columns) as parquet:
        _require_columns(unit.file, parquet.schema_arrow, columns)
        begin = 0
        for number in range(parquet.metadata.num_row_groups):
            length = parquet.metadata.row_group(number).num_rows
            if begin <= unit.first < begin + length:
                batches = parquet.iter_batches(ROWS_AT_ONCE, [number], columns, use_threads=False)
                yield from _slices((batch.select(columns) for batch in batches), begin, unit)
            begin += length


def _arrow_batches(spec: SourceSpec, unit: Unit, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with arrow_batches(spec, unit.file) as batches:
        for piece in _slices(batches, 0, unit):
            _require_columns(unit.file, piece.schema, columns)
            for start in range(0, piece.num_rows, ROWS_AT_ONCE):
                batch = piece.slice(start, ROWS_AT_ONCE).select(columns)
                for column in batch.columns:
                    _require_inside(column)
                yield batch


def _slices(batches: Iterator[pa.RecordBatch], begin: int, unit: Unit) -> Iterator[pa.RecordBatch]:
    """The parts of `batches`, whose first row is row `begin` of the file, that lie in the unit."""
    end = unit.first + unit.count
    for batch in batches:
        if begin >= end:
            return
        first, last = max(unit.first - begin, 0), min(end - begin, batch.num_rows)
        if first < last:
            yield batch.slice(first, last - first)
        begin += batch.num_rows


def _require_columns(file: SourceFile, schema: pa.Schema, columns: list[str]) -> None:
    for column in columns:
        if schema.get_field_index(column) < 0:
            raise DataError(f"{file.url}: has no column {column!r}, it has {', '.join(schema.names)}")
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
            raise DataError(f"{file.url}: column {column!r} must hold strings, it holds {value}")


# Types whose values are bytes, so that looking at their offsets does not look at their UTF-8.
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _require_inside(column: pa.Array) -> None:
    """Raise ArrowInvalid where offsets or indices of strings point outside: a mapped file may hold any."""
    if pa.types.is_dictionary(column.type):
        pa.compute.take(pa.nulls(len(column.dictionary)), column.indices)
        column = column.dictionary
    column.view(_AS_BYTES[column.type]).validate(full=True)


def _values(column: pa.Array) -> Iterator[object]:
    """Every row's string, None, or what is wrong with it. Converted together, which is several times as fast as one by
    one; but entries of a dictionary that rows share only once each, as few may stand for more than memory holds."""
    if pa.types.is_dictionary(column.type):
        places, dictionary = column.indices.to_pylist(), column.dictionary
        if len(used := set(places)) < len(places):
            entries = {place: None if place is None else _value(dictionary[place]) for place in used}
            return map(entries.__getitem__, places)
        column = column.dictionary_decode()
    try:
        return map(_checked, column.to_pylist())
    except UnicodeDecodeError:
        return map(_value, column)


def _value(item: pa.Scalar) -> object:
    try:
        return _checked(item.as_py())
    except UnicodeDecodeError:
        return RowProblem("not valid UTF-8")


def _checked(value: object) -> object:
    if isinstance(value, str) and 4 * len(value) > documents.MAX_ROW_BYTES < len(value.encode()):
        return RowProblem(f"row is longer than {documents.MAX_ROW_BYTES} bytes")
    return value
