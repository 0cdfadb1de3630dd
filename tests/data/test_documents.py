from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import documents_of

from data import DataError, Document
from data.sources import read_documents
from data.sources.spec import source_of_path

GOOD = b'{"text": "fine", "lang": "en"}\n'

BAD_ROWS = {
    "not JSON": b"{text: 1}",
    "not JSON (blank)": b"",
    "not JSON (nan)": b'{"text": "a", "lang": "en", "score": NaN}',
    "not JSON (cut)": b'{"text": "a", "lang": "e',
    "not JSON (deep)": b"[" * 100_000,
    "not a JSON object": b'["text", "en"]',
    "not a JSON object (null)": b"null",
    "`text` must be a string (missing)": b'{"lang": "en"}',
    "`text` must be a string (null)": b'{"text": null, "lang": "en"}',
    "`text` must be a string (number)": b'{"text": 7, "lang": "en"}',
    "`text` must be a string (list)": b'{"text": ["a"], "lang": "en"}',
    "`text` must be a string (empty)": b'{"text": "", "lang": "en"}',
    "`text` must be a string (blanks)": b'{"text": " \\n ", "lang": "en"}',
    "`lang` must be (missing)": b'{"text": "a"}',
    "`lang` must be (number)": b'{"text": "a", "lang": 1}',
    "`lang` must be (path)": b'{"text": "a", "lang": "../../etc"}',
    "`lang` must be (upper case)": b'{"text": "a", "lang": "EN"}',
    "`lang` must be (newline)": b'{"text": "a", "lang": "en\\n"}',
    "lone surrogate": b'{"text": "a\\ud800b", "lang": "en"}',
    "byte order mark": b'\xef\xbb\xbf{"text": "a", "lang": "en"}',
    "not valid UTF-8": b'{"text": "\xff\xfe", "lang": "en"}',
    "not valid UTF-8 (utf-16)": '{"text": "a", "lang": "en"}'.encode("utf-16"),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_named(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + BAD_ROWS[reason] + b"\n" + GOOD)
    rows = read_documents(source_of_path(path))
    assert next(rows) == Document("fine", "en", "rows")
    with pytest.raises(DataError) as caught:
        next(rows)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert reason.split(" (")[0] in message
    assert "\n" not in message


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.documents.MAX_ROW_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"a" * 1000)
    with pytest.raises(DataError, match=r"rows.jsonl:2: row is longer than 100 bytes"):
        documents_of(path)


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": "Zeile\r\nzwei\u2028drei\x00", "lang": "zh-hant"},
        {"text": " 学而时习之 ", "lang": "zh-hant"},
    ]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert documents_of(path) == [
        Document("Zeile\r\nzwei\u2028drei\x00", "zh-hant", "rows"),
        Document(" 学而时习之 ", "zh-hant", "rows"),
    ]
    assert Document("é学", "zh", "").num_bytes == 5
