"""JSON Lines and text."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import zstandard

from bad_inputs import GOOD_LINES, GOOD_ROWS, Attempt, Bench, Case, Quarantined, Refused, flipped, json_line

LIMIT = 60_000
GZIP = gzip.compress(GOOD_LINES * 50)
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD_LINES * 50)
BOMB = b" " * (4 << 20) + b"\n"
GOOD_TEXT = b"".join(f"Good row {number}\n".encode() for number in range(GOOD_ROWS))


def wide_window() -> bytes:
    """A frame of zstandard that asks for 2 GB of memory."""
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(GOOD_LINES) + packer.flush()


REFUSED = {
    "a.jsonl": {
        "empty": (b"", "is empty"),
        "line feed alone": (b"\n", r"1: not JSON; source books has 1 bad rows of 1"),
        "UTF-16": (GOOD_LINES.decode().encode("utf-16"), "not valid UTF-8"),
        "UTF-16 without mark": (GOOD_LINES.decode().encode("utf-16-le"), "not JSON"),
        "UTF-32": (GOOD_LINES.decode().encode("utf-32"), "not valid UTF-8"),
        "zeros": (bytes(1000), "not JSON"),
        "one array": (json.dumps([{"text": "a", "lang": "en"}]).encode(), "not a JSON object"),
        "indented": (json.dumps({"text": "a", "lang": "en"}, indent=1).encode(), "not JSON"),
        "carriage returns alone": (GOOD_LINES.replace(b"\n", b"\r"), "not JSON"),
        "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not valid UTF-8"),
        "gzip under a plain name": (GZIP, "not valid UTF-8"),
    },
    "a.jsonl.gz": {
        "truncated": (GZIP[:-20], r"\d+: damaged: the compressed data is cut"),
        "header alone": (GZIP[:10], "damaged: the compressed data is cut"),
        "wrong checksum": (flipped(GZIP, -8), "damaged: .*incorrect data check"),
        "wrong length": (flipped(GZIP, -1), "damaged: .*incorrect length check"),
        "bad magic": (flipped(GZIP, 0), "damaged: .*incorrect header"),
        "damaged": (flipped(GZIP, 20), "damaged|bad rows"),
        "plain text": (GOOD_LINES, "damaged: .*incorrect header"),
        "more behind its end": (GZIP + b"more", "damaged: .*incorrect header"),
        "nothing in it": (gzip.compress(b""), "no documents are left"),
        "bomb": (gzip.compress(BOMB), "unpacks to more than 100 times"),
        "bomb in pieces": (gzip.compress(b"\n" * 9000) * 3, "unpacks to more than 100 times|bad rows"),
    },
    "a.jsonl.zst": {
        "truncated": (ZSTD[:-5], "damaged: the compressed data is cut"),
        "bad magic": (flipped(ZSTD, 0), "damaged: .*(Unknown frame|error)"),
        "wrong checksum": (flipped(ZSTD, -1), "damaged: .*checksum"),
        "more memory than allowed": (wide_window(), "damaged: .*too much memory"),
        "bomb": (zstandard.compress(BOMB), "unpacks to more than 100 times"),
    },
    "a.txt": {
        "empty": (b"", "is empty"),
        "blanks": (b" \n\n\t\n", "no documents are left"),
        "UTF-16": ("one line".encode("utf-16"), "not valid UTF-8"),
    },
    "a.txt.gz": {"truncated": (gzip.compress(GOOD_TEXT)[:-3], "damaged: the compressed data is cut")},
}
BAD_LINES = {
    "byte order mark": (b"\xef\xbb\xbf" + json_line(text="a", lang="en"), "byte order mark"),
    "invalid UTF-8": (b'{"text": "\xff", "lang": "en"}\n', "not valid UTF-8"),
    "overlong UTF-8": (b'{"text": "\xc0\xaf", "lang": "en"}\n', "not valid UTF-8"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80", "lang": "en"}\n', "not valid UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800", "lang": "en"}\n', "lone surrogate"),
    "surrogates the wrong way round": (b'{"text": "\\udc00\\ud800", "lang": "en"}\n', "lone surrogate"),
    "zero byte": (b'{"text": "\x00", "lang": "en"}\n', "not JSON"),
    "nested arrays": (b"[" * 50_000 + b"\n", "not JSON"),
    "nested objects": (b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"\n", "not JSON"),
    "NaN": (b'{"text": "a", "lang": "en", "score": NaN}\n', "not JSON"),
    "Infinity": (b'{"text": "a", "lang": "en", "score": Infinity}\n', "not JSON"),
    "minus Infinity": (b'{"text": "a", "lang": "en", "score": -Infinity}\n', "not JSON"),
    "number of 5,000 digits": (b'{"text": "a", "lang": "en", "n": ' + b"9" * 5000 + b"}\n", "not JSON"),
    "key given twice": (b'{"text": "a", "text": "b", "lang": "en"}\n', "a key is given twice"),
    "inner key given twice": (b'{"text": "a", "lang": "en", "x": {"y": 1, "y": 2}}\n', "a key is given twice"),
    "two objects": (b'{"text": "a", "lang": "en"}{"text": "b", "lang": "en"}\n', "not JSON"),
    "trailing comma": (b'{"text": "a", "lang": "en",}\n', "not JSON"),
    "single quotes": (b"{'text': 'a', 'lang': 'en'}\n", "not JSON"),
    "comment": (b'{"text": "a", "lang": "en"} // more\n', "not JSON"),
    "expression": (b"__import__('os').system('true')\n", "not JSON"),
    "cut": (b'{"text": "a", "la', "not JSON"),
    "blank": (b"   \n", "not JSON"),
    "array": (b'["text"]\n', "not a JSON object"),
    "string": (b'"text"\n', "not a JSON object"),
    "number": (b"3\n", "not a JSON object"),
    "null": (b"null\n", "not a JSON object"),
    "too long": (json_line(text="a" * LIMIT, lang="en"), f"longer than {LIMIT} bytes"),
    "no text": (json_line(lang="en"), "`text` must be a string"),
    "other case": (json_line(Text="a", lang="en"), "`text` must be a string"),
    **{
        f"text {name}": (json_line(text=value, lang="en"), "`text` must be a string")
        for name, value in {"null": None, "number": 3, "true": True, "list": ["a"], "object": {}, "empty": ""}.items()
    },
    "no language": (json_line(text="a"), "`lang` must be a language tag"),
    **{
        f"language {value!r}": (json_line(text="a", lang=value), "`lang` must be a language tag")
        for value in (None, 3, "", "EN", "english", "e", "../en", "en\n", ["en"])
    },
}
BAD_TEXT = {
    "invalid UTF-8": (b"\xff\xfe\n", "line", "not valid UTF-8"),
    "byte order mark": (b"\xef\xbb\xbfa\n", "line", "byte order mark"),
    "too long": (b"a" * (LIMIT + 1) + b"\n", "line", f"longer than {LIMIT} bytes"),
    "paragraph too long": ((b"a" * 99 + b"\n") * 700, "paragraph", f"longer than {LIMIT} bytes"),
    "invalid UTF-8 in a paragraph": (b"one\n\xff\n", "paragraph", "not valid UTF-8"),
}


def _whole(name: str, content: bytes) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        bench.patch.setattr("data.documents.MAX_ROW_BYTES", LIMIT)
        bench.patch.setattr("data.sources.open.EXPANSION_SLACK", 1 << 16)
        bench.patch.setattr("data.sources.open.MAX_EXPANSION", 100)
        return bench.prepare(bench.write(name, content), language="en" if ".txt" in name else None)

    return make


def _with_line(name: str, line: bytes, pack: Callable[[bytes], bytes] = bytes) -> Callable[[Bench], Attempt]:
    return _whole(name, pack(GOOD_LINES + line))


def _text(line: bytes, sample_by: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        bench.patch.setattr("data.documents.MAX_ROW_BYTES", LIMIT)
        good = GOOD_TEXT if sample_by == "line" else GOOD_TEXT.replace(b"\n", b"\n\n")
        return bench.prepare(bench.write("a.txt", good + line), sample_by=sample_by)

    return make


def _documents(bad: bytes) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        bench.patch.setattr("data.documents.MAX_ROW_BYTES", LIMIT)
        for number in range(GOOD_ROWS):
            bench.write(f"texts/{number}.txt", f"Good row {number}".encode())
        bench.write("texts/z.txt", bad)
        return bench.prepare(bench.folder / "texts", sample_by="document")

    return make


def _not_a_file(make_it: Callable[[Path], object]) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        make_it(bench.folder / "a.jsonl")
        return bench.prepare(bench.folder / "a.jsonl")

    return make


CASES: dict[str, Case] = {
    **{
        f"{name}: {what}": Refused(_whole(name, content), rf"{name}:.*({reason})")
        for name, contents in REFUSED.items()
        for what, (content, reason) in contents.items()
    },
    **{f"line: {what}": Quarantined(_with_line("a.jsonl", line), reason) for what, (line, reason) in BAD_LINES.items()},
    **{
        f"line: {what}, {suffix}": Quarantined(
            _with_line(f"a.jsonl{suffix}", BAD_LINES[what][0], pack), BAD_LINES[what][1]
        )
        for what in ("too long", "invalid UTF-8", "nested arrays")
        for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress))
    },
    **{
        f"text: {what}": Quarantined(_text(line, sample_by), reason)
        for what, (line, sample_by, reason) in BAD_TEXT.items()
    },
    "text: file with invalid UTF-8": Quarantined(_documents(b"\xff"), "not valid UTF-8", row=1),
    "text: file too long": Quarantined(_documents(b"a\n" * LIMIT), "longer than", row=1),
    "text: no language": Refused(
        lambda bench: bench.prepare(bench.write("a.txt", GOOD_TEXT), language=None), "books: text files do not say"
    ),
    "line: languages mixed": Refused(
        _with_line("a.jsonl", json_line(text="你好", lang="zh")), "source books: has rows of en, zh"
    ),
    "file: pipe": Refused(_not_a_file(os.mkfifo), r"a\.jsonl: "),
    "file: device": Refused(lambda bench: bench.prepare("/dev/zero", format="jsonl"), "/dev/zero: "),
    "file: terminal": Refused(lambda bench: bench.prepare("/dev/null", format="jsonl"), "/dev/null: "),
    "file: empty folder": Refused(_not_a_file(Path.mkdir), r"a\.jsonl: no parquet, jsonl, text or arrow files there"),
    "file: link to nothing": Refused(_not_a_file(lambda path: path.symlink_to("no")), r"a\.jsonl: no such file"),
    "file: missing": Refused(lambda bench: bench.prepare(bench.folder / "a.jsonl"), r"a\.jsonl: no such file"),
    "file: name of 300 letters": Refused(
        lambda bench: bench.prepare("/" + "a" * 300 + ".jsonl"), r"a\.jsonl: cannot be"
    ),
    "file: zero byte in its name": Refused(lambda bench: bench.prepare("a\0.jsonl"), "is no path"),
    "file: inside a file": Refused(
        lambda bench: bench.prepare(bench.write("a.txt", b"a") / "b.jsonl"), r"b\.jsonl: (no such file|cannot be read)"
    ),
    "file: unknown ending": Refused(
        lambda bench: bench.prepare(bench.write("a.csv", b"a")), r"a\.csv: the name says no"
    ),
    "file: bzip2": Refused(lambda bench: bench.prepare(bench.write("a.jsonl.bz2", b"a")), r"the name says no"),
}
