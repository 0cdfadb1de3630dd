"""Documents: one text with its language and source; and what makes a row a bad one."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError

# The tokenizers library takes about 90 bytes of memory for one of text.
MAX_ROW_BYTES = 1 << 24
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})?")


@dataclass(frozen=True)
class Document:
    """One text. `language` is a tag such as `en` or `zh-hant`; `source` names the collection it belongs to."""

    text: str
    language: str
    source: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in bytes of UTF-8."""
        return len(self.text.encode())


class RowProblem(ValueError):
    """What is wrong with one row; the reader of the file knows which row."""


def require_file(path: Path) -> None:
    """Raise DataError unless `path` is a regular file; says whether it is missing or something else."""
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: not a file name")
    if path.is_dir():
        raise DataError(f"{path}: is a folder, a file is needed")
    if not path.is_file():
        raise DataError(f"{path}: no such file")


def read_lines(file: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """Lines of `file` with their sizes in bytes; None in place of one that is longer than MAX_ROW_BYTES."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        size = len(line)
        if size <= MAX_ROW_BYTES:
            yield line, size
            continue
        while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
            size += len(line)
        yield None, size


def parse_text(content: bytes | None) -> str:
    """Decode a row's bytes, None being a row that is too long. RowProblem: too long, a byte order mark, not UTF-8."""
    if content is None:
        raise RowProblem(f"row is longer than {MAX_ROW_BYTES} bytes")
    if content.startswith(codecs.BOM_UTF8):
        raise RowProblem("starts with a byte order mark, save the file as plain UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RowProblem("not valid UTF-8") from error


def parse_object(line: bytes | None) -> dict[str, object]:
    """The object on a line of JSON. RowProblem: as `parse_text`, not JSON, not an object, a key given twice."""
    text = parse_text(line)
    try:
        row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RowProblem:
        raise
    except (ValueError, RecursionError) as error:
        raise RowProblem("not JSON") from error
    if not isinstance(row, dict):
        raise RowProblem("not a JSON object")
    return row


def text_of(value: object, field: str = "text") -> str:
    """`value` when it can be a document. RowProblem: not a string, empty, or a lone surrogate in it."""
    if not isinstance(value, str) or not value or value.isspace():
        raise RowProblem(f"`{field}` must be a string that is not empty")
    return _encodable(value)


def language_of(value: object, field: str = "lang") -> str:
    """`value` when it is a language tag, else RowProblem."""
    if not isinstance(value, str) or not LANGUAGE.fullmatch(value):
        raise RowProblem(f"`{field}` must be a language tag such as en, or the source must name its language")
    return value


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem("lone surrogate in the text, it has no UTF-8 form") from error
    return text


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise RowProblem("a key is given twice")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
