"""Parquet and Arrow files."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import TOKENIZER

from bad_inputs import GOOD_LINES, GOOD_ROWS, Attempt, Bench, Case, Quarantined, Refused, flipped
from data.prepare import prepare
from data.sources import SourceSpec, check_unchanged, plan_units, read_unit, resolve

TEXTS = [f"Good row {number}" for number in range(GOOD_ROWS)]


def parquet(columns: dict[str, Any] | pa.Table, **settings: Any) -> bytes:
    """A parquet file."""
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **settings)
    return file.getvalue()


def arrow(columns: dict[str, Any], new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    """An Arrow file, or a stream."""
    table = pa.table(columns)
    file = io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def raw_strings(content: bytes, offsets: list[int]) -> pa.Array:
    """Strings that are not checked: bytes and where each begins and ends."""
    ends = pa.py_buffer(np.array(offsets, "<i4").tobytes())
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, ends, pa.py_buffer(content)])


def with_offsets(offsets: list[int]) -> bytes:
    """An Arrow file of two strings with other offsets written over theirs; its checks of itself do not see it."""
    true, false = (np.array(values, "<i4").tobytes() for values in ([0, 2, 6], offsets))
    content = arrow({"text": raw_strings(b"abcdef", [0, 2, 6])})
    assert content.count(true) == 1
    return content.replace(true, false)


CHECKED = parquet({"text": [f"{text} {'x' * 500}" for text in TEXTS]}, write_page_checksum=True, compression="none")
PLAIN = parquet({"text": TEXTS})
FILE = arrow({"text": TEXTS})
STREAM = arrow({"text": TEXTS}, pa.ipc.new_stream)
INVALID_UTF8 = raw_strings(b"aaaa\xff", [0, 1, 2, 3, 4, 5])
BAD_COLUMNS: dict[str, Any] = {
    "int": [1],
    "float": [0.5],
    "bool": [True],
    "null": [None],
    "list": [["a"]],
    "struct": [{"a": "b"}],
    "map": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())),
    "binary": [b"a"],
    "invalid binary": [b"\xff\xfe"],
    "large binary": pa.array([b"a"], pa.large_binary()),
    "timestamp": pa.array([0], pa.timestamp("s")),
    "decimal": pa.array([1], pa.decimal128(3)),
}
KINDS = {"float": "double", "invalid binary": "binary", "large binary": "binary"}
BAD_PARQUET = {
    "empty": (b"", "is empty"),
    "only magic": (b"PAR1", "cannot be read"),
    "magic twice": (b"PAR1PAR1", "cannot be read"),
    "bad magic": (flipped(PLAIN, -1), "cannot be read"),
    "truncated footer": (PLAIN[: len(PLAIN) - 40], "cannot be read"),
    "truncated data": (PLAIN[len(PLAIN) // 2 :], "cannot be read"),
    "footer length too large": (PLAIN[:-8] + struct.pack("<I", 1 << 31) + b"PAR1", "cannot be read"),
    "footer length zero": (PLAIN[:-8] + struct.pack("<I", 0) + b"PAR1", "cannot be read"),
    "footer of zeros": (PLAIN[:-208] + bytes(200) + PLAIN[-8:], "cannot be read"),
    "flipped page": (flipped(CHECKED, 300), "cannot be read: .*(crc|CRC|checksum)"),
    "encrypted footer": (PLAIN[:-4] + b"PARE", "cannot be read"),
    "JSON Lines": (GOOD_LINES, "cannot be read"),
    "zeros": (bytes(4096), "cannot be read"),
    "renamed column": (parquet({"Text": TEXTS}), "has no column 'text', it has Text"),
    "no columns": (parquet(pa.table({})), "has no column 'text'|no documents are left"),
    "column given twice": (
        parquet(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"])),
        "has no column 'text'|has 2 columns",
    ),
    "no row groups": (parquet({"text": pa.array([], pa.string())}), "no documents are left"),
    "only nulls": (parquet({"text": pa.array([None, None], pa.string())}), "has 2 bad rows of 2"),
    **{
        f"{kind} column": (
            parquet({"text": values}),
            f"column 'text' must hold strings, it holds {KINDS.get(kind, kind)}",
        )
        for kind, values in BAD_COLUMNS.items()
    },
}
BAD_ARROW = {
    "empty": (b"", "is empty"),
    "only magic": (b"ARROW1\0\0", "cannot be read"),
    "truncated": (FILE[: len(FILE) // 2], "cannot be read"),
    "truncated footer": (FILE[:-8], "cannot be read"),
    "truncated stream": (STREAM[: len(STREAM) - 60], "cannot be read"),
    "wrong magic": (flipped(FILE, 0), "cannot be read"),
    "feather version 1": (b"FEA1" + bytes(64) + b"FEA1", "cannot be read"),
    "zeros": (bytes(256), "cannot be read|no documents are left"),
    "stream of a huge message": (b"\xff\xff\xff\xff" + struct.pack("<i", (1 << 31) - 1) + bytes(64), "cannot be read"),
    "footer length negative": (FILE[:-10] + struct.pack("<i", -5) + b"ARROW1", "cannot be read"),
    "missing column": (arrow({"body": TEXTS}), "has no column 'text', it has body"),
    "int column": (arrow({"text": [1]}), "must hold strings, it holds int64"),
    "binary column": (arrow({"text": [b"a"]}), "must hold strings, it holds binary"),
    "list column": (arrow({"text": [["a"]]}), "must hold strings, it holds list"),
    "no batches": (arrow({"text": pa.array([], pa.string())}), "no documents are left"),
    "last offset outside": (with_offsets([0, 1, 1 << 30]), "cannot be read"),
    "offset outside": (with_offsets([0, 1 << 30, 1 << 30]), "cannot be read"),
    "offset inside out": (with_offsets([0, 1 << 30, 6]), "cannot be read"),
    "offsets that fall": (with_offsets([0, -5, 6]), "cannot be read"),
    "negative offsets": (with_offsets([-4, 0, 6]), "cannot be read"),
    "dictionary index outside": (
        arrow({"text": pa.DictionaryArray.from_arrays(pa.array([0, 9], pa.int32()), pa.array(["a"]), safe=False)}),
        "cannot be read",
    ),
}


def _zipped(bench: Bench) -> Attempt:
    path = bench.folder / "a.parquet"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.parquet", PLAIN)
    return bench.prepare(path)


def _given_twice(bench: Bench) -> Attempt:
    path = bench.write("a.parquet", PLAIN)
    specs = [SourceSpec(name, str(path), language="en") for name in ("one", "two")]
    return lambda: prepare(specs, TOKENIZER, bench.folder / "out")


def _same_file_by_another_path(bench: Bench) -> Attempt:
    bench.write("a.parquet", PLAIN)
    paths = (str(bench.folder / "a.parquet"), f"{bench.folder}/../{bench.folder.name}/a.parquet")
    specs = [SourceSpec(name, path, language="en") for name, path in zip(("one", "two"), paths, strict=True)]
    return lambda: prepare(specs, TOKENIZER, bench.folder / "out")


def _linked_twice(bench: Bench) -> Attempt:
    (bench.folder / "b.parquet").symlink_to(bench.write("a.parquet", PLAIN))
    specs = [SourceSpec(name, f"{bench.folder}/{name}.parquet", language="en") for name in ("a", "b")]
    return lambda: prepare(specs, TOKENIZER, bench.folder / "out")


def _dictionary_bomb(bench: Bench) -> Attempt:
    """A file of some kilobytes whose rows are 200 GB of text, all of them one entry of a dictionary."""
    bench.patch.setattr("data.sources.open.EXPANSION_SLACK", 1 << 20)
    index = pa.array(np.zeros(100_000, np.int32))
    strings = pa.DictionaryArray.from_arrays(index, pa.array(["x" * (2 << 20)]))
    settings = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    return bench.prepare(bench.write("a.parquet", parquet({"text": strings}, **settings)))


def _changed_after_planning(change: Callable[[Path], object]) -> Callable[[Bench], Attempt]:
    """The file changes after it was planned, before it is read."""

    def make(bench: Bench) -> Attempt:
        path = bench.write("a.parquet", PLAIN)
        original = os.stat(path)
        (bench.folder / "link.parquet").symlink_to(path)
        spec = SourceSpec("books", str(bench.folder / "link.parquet"), language="en")

        def attempt() -> None:
            for unit in plan_units(spec, resolve(spec), rows=100, num_bytes=1 << 20):
                change(path)
                if path.exists() and os.stat(path).st_mtime_ns == original.st_mtime_ns:
                    os.utime(path, ns=(1, 1))
                check_unchanged(spec, unit.file)
                list(read_unit(spec, unit))

        return attempt

    return make


def _linked(target: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        (bench.folder / "a.parquet").symlink_to(target)
        return bench.prepare(bench.folder / "a.parquet")

    return make


def _without_language(columns: dict[str, Any]) -> Callable[[Bench], Attempt]:
    return lambda bench: bench.prepare(bench.write("a.parquet", parquet(columns)), language=None)


def _file(name: str, content: bytes) -> Callable[[Bench], Attempt]:
    return lambda bench: bench.prepare(bench.write(name, content))


def _long_values(columns: dict[str, Any]) -> Callable[[Bench], Attempt]:
    """Values above a lowered limit, all of them one entry of the file's dictionary."""

    def make(bench: Bench) -> Attempt:
        bench.patch.setattr("data.documents.MAX_ROW_BYTES", 1000)
        return bench.prepare(bench.write("a.parquet", parquet(columns)))

    return make


CASES: dict[str, Case] = {
    **{
        f"parquet: {name}": Refused(_file("a.parquet", content), rf"a\.parquet: .*({reason})")
        for name, (content, reason) in BAD_PARQUET.items()
        if "rows of" not in reason
    },
    "parquet: only nulls": Refused(
        _file("a.parquet", BAD_PARQUET["only nulls"][0]), r"a\.parquet:1: .*2 bad rows of 2"
    ),
    "parquet: zip archive": Refused(_zipped, r"a\.parquet: cannot be read"),
    "parquet: a file of two sources": Refused(_given_twice, r"a\.parquet: belongs to sources one and two"),
    "parquet: a file of two sources by two paths": Refused(
        _same_file_by_another_path, "belongs to sources one and two"
    ),
    "parquet: a file and a link to it": Refused(_linked_twice, r"b\.parquet: belongs to sources a and b"),
    "parquet: dictionary bomb": Refused(_dictionary_bomb, r"a\.parquet: unpacks to more than"),
    "parquet: larger since it was planned": Refused(
        _changed_after_planning(lambda path: path.write_bytes(PLAIN * 2)), r"link\.parquet: has changed"
    ),
    "parquet: touched since it was planned": Refused(
        _changed_after_planning(lambda path: os.utime(path, ns=(1, 1))), r"link\.parquet: has changed"
    ),
    "parquet: gone since it was planned": Refused(_changed_after_planning(Path.unlink), r"link\.parquet: no such file"),
    "parquet: link to nothing": Refused(_linked("nowhere"), r"a\.parquet: no such file"),
    "parquet: link to itself": Refused(_linked("a.parquet"), r"a\.parquet: (no such file|cannot be read)"),
    "parquet: link to a device": Refused(_linked("/dev/zero"), r"a\.parquet: "),
    "parquet: no language column": Refused(_without_language({"text": TEXTS}), r"a\.parquet: has no column 'lang'"),
    "parquet: two languages": Refused(
        _without_language({"text": TEXTS, "lang": ["en", "zh"] * 2}), "source books: has rows of en, zh"
    ),
    "parquet: null in a row": Quarantined(
        _file("a.parquet", parquet({"text": [*TEXTS, None]})), "`text` must be a string"
    ),
    "parquet: empty text": Quarantined(_file("a.parquet", parquet({"text": [*TEXTS, ""]})), "`text` must be a string"),
    "parquet: blank text": Quarantined(_file("a.parquet", parquet({"text": [*TEXTS, "\u3000\n"]})), "must be a string"),
    "parquet: invalid UTF-8": Quarantined(_file("a.parquet", parquet({"text": INVALID_UTF8})), "not valid UTF-8"),
    "parquet: bad language": Quarantined(
        _without_language({"text": [*TEXTS, "x"], "lang": ["en"] * 4 + ["English"]}), "`lang` must be a language tag"
    ),
    "parquet: too long": Quarantined(_long_values({"text": [*TEXTS, "x" * 2000]}), "row is longer than 1000 bytes"),
    "parquet: too long in bytes": Quarantined(_long_values({"text": [*TEXTS, "学" * 400]}), "row is longer than 1000"),
    **{
        f"arrow: {name}": Refused(_file("a.arrow", content), rf"a\.arrow: .*({reason})")
        for name, (content, reason) in BAD_ARROW.items()
    },
    "arrow: null in a row": Quarantined(_file("a.arrow", arrow({"text": [*TEXTS, None]})), "must be a string"),
    "arrow: invalid UTF-8": Quarantined(_file("a.arrow", arrow({"text": INVALID_UTF8})), "not valid UTF-8"),
}
