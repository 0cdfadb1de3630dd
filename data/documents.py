"""Documents: one text with its language and where it came from, read lazily from JSON Lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError

MAX_ROW_BYTES = 1 << 26
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


def read_jsonl(path: str | Path) -> Iterator[Document]:
    """Yield the documents of a file whose lines are `{"text": ..., "lang": ..., "source": ...}` (`source` optional).

    Raises:
        DataError: the file cannot be read, or a row is malformed; the line reads `path:row: reason`.
    """
    path = Path(path)
    require_file(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), start=1):
                yield _parse_row(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def require_file(path: Path) -> None:
    """Raise DataError unless `path` is a regular file; says whether it is missing or something else."""
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: not a file name")
    if path.is_dir():
        raise DataError(f"{path}: is a folder, a file is needed")
    if not path.is_file():
        raise DataError(f"{path}: no such file")


def _parse_row(line: bytes, where: str) -> Document:
    row = _parse_object(line, where)
    text, language, source = row.get("text"), row.get("lang"), row.get("source", "")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: `text` must be a string that is not empty")
    if not isinstance(language, str) or not LANGUAGE.fullmatch(language):
        raise DataError(f"{where}: `lang` must be a language tag such as en, zh or zh-hant")
    if not isinstance(source, str):
        raise DataError(f"{where}: `source` must be a string")
    try:
        (text + source).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: lone surrogate in the text, it has no UTF-8 form") from error
    return Document(text, language, source)


def _parse_object(line: bytes, where: str) -> dict[str, object]:
    if len(line) > MAX_ROW_BYTES:
        raise DataError(f"{where}: row is longer than {MAX_ROW_BYTES} bytes")
    if line.startswith(codecs.BOM_UTF8):
        raise DataError(f"{where}: starts with a byte order mark, save the file as plain UTF-8")
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
