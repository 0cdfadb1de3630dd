"""Sources on the local disk: every format, how units cut it, and what is said about what is bad."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.sources import (
    SourceSpec,
    check_unchanged,
    parse_source,
    plan_units,
    read_documents,
    read_sources_file,
    read_unit,
    resolve,
    spec_from_mapping,
)

TEXTS = [f"Text {number} 学而时习之" * (1 + number % 7) for number in range(60)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "lang": "en"}, ensure_ascii=False) + "\n" for text in texts).encode()


def table(texts: list[str]) -> pa.Table:
    return pa.table({"text": texts, "lang": ["en"] * len(texts), "other": list(range(len(texts)))})


def write_arrow(path: Path, new_writer: Callable[..., pa.RecordBatchWriter]) -> None:
    rows = table(TEXTS)
    with new_writer(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=25)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines(TEXTS)),
    "b.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(json_lines(TEXTS[:20])) + gzip.compress(json_lines(TEXTS[20:])) + b"\0" * 16
    ),
    "c.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(json_lines(TEXTS[:20])) + zstandard.compress(json_lines(TEXTS[20:]))
    ),
    "d.parquet": lambda path: pq.write_table(
        table(TEXTS), path, row_group_size=25, write_page_checksum=True, use_dictionary=["lang"]
    ),
    "e.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "f.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "g.txt": lambda path: path.write_bytes("\r\n".join(TEXTS).encode()),
    "h.txt.gz": lambda path: path.write_bytes(gzip.compress("\n\n".join(TEXTS).encode())),
}


def source(path: Path, **fields: str) -> SourceSpec:
    return SourceSpec("books", str(path), language="en", **fields)  # type: ignore[arg-type]


def rows_of(spec: SourceSpec, rows: int = 1 << 20, num_bytes: int = 1 << 30) -> list[tuple[str | None, str | None]]:
    units = plan_units(spec, resolve(spec), rows=rows, num_bytes=num_bytes)
    found = []
    for unit in units:
        part = list(read_unit(spec, unit))
        assert [row.position for row in part] == list(range(len(part)))
        found += [(row.text, row.problem) for row in part]
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_in_any_units(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    spec = source(tmp_path / name, sample_by="paragraph" if name == "h.txt.gz" else "line")
    expected = [(text, None) for text in TEXTS]
    assert rows_of(spec) == expected
    assert rows_of(spec, rows=7, num_bytes=300) == expected
    assert rows_of(spec, rows=1, num_bytes=1) == expected
    assert [document.text for document in read_documents(spec)] == TEXTS


def test_units_stay_inside_row_groups(tmp_path: Path) -> None:
    for name in ("d.parquet", "e.arrow", "f.arrow"):
        WRITERS[name](tmp_path / name)
        spec = source(tmp_path / name)
        units = plan_units(spec, resolve(spec), rows=20, num_bytes=1 << 30)
        assert [(unit.first, unit.count) for unit in units] == [(0, 20), (20, 5), (25, 20), (45, 5), (50, 10)]


@given(
    lines=st.lists(st.binary(max_size=5).map(lambda line: line.replace(b"\n", b"")), max_size=8), step=st.integers(1, 9)
)
def test_lines_belong_to_the_unit_they_start_in(
    lines: list[bytes], step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole, cut = rows_of(source(path)), rows_of(source(path), num_bytes=step)
    assert cut == whole


def test_folders_and_globs_are_sorted_and_leave_out_what_is_no_data(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a/1.jsonl", ".hidden/x.jsonl", "_tmp.jsonl", "README.md", "info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([name]))
    assert [text for text, _ in rows_of(source(tmp_path))] == ["a/1.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert [text for text, _ in rows_of(source(tmp_path / "b" / "*.jsonl"))] == ["b/10.jsonl", "b/2.jsonl"]
    assert [text for text, _ in rows_of(source(tmp_path, format="jsonl"))][-1] == "info.json"


def test_a_local_hub_data_set_is_resolved_by_its_card(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(json_lines(TEXTS[:5]))
    (tmp_path / "two.jsonl").write_bytes(json_lines(TEXTS[5:8]))
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: test\n    path: two.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    hub = {"format": "hub", "config": "small"}
    assert [text for text, _ in rows_of(source(tmp_path, **hub, split="test"))] == TEXTS[5:8]
    with pytest.raises(DataError, match="split 'train' is not there, it has test"):
        resolve(source(tmp_path, **hub))
    with pytest.raises(DataError, match="'big' not found"):
        resolve(source(tmp_path, format="hub", config="big"))
    for spec in (source(Path("owner/name"), format="hub"), SourceSpec("a", "hf://datasets/owner/name")):
        with pytest.raises(DataError, match="give its revision"):
            resolve(spec)


def test_a_hub_address_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(spec: SourceSpec, url: str) -> object:
        raise FileNotFoundError(url)

    monkeypatch.setattr(import_module("data.sources.resolve"), "open_filesystem", absent)
    for path, revision, address in (
        ("hf://datasets/owner/name/data/*.parquet", "abc", "hf://datasets/owner/name@abc/data/*.parquet"),
        ("hf://datasets/owner/name", "refs/convert/parquet", "hf://datasets/owner/name@refs%2Fconvert%2Fparquet"),
        ("hf://datasets/owner/name@abc/x", None, "hf://datasets/owner/name@abc/x"),
    ):
        with pytest.raises(DataError, match="no such file") as caught:
            resolve(SourceSpec("a", path, revision=revision))
        assert str(caught.value).startswith(address + ":")
    with pytest.raises(DataError, match="write hf://datasets/OWNER/NAME"):
        resolve(SourceSpec("a", "hf://datasets/name", revision="abc"))


def test_hub_formats_that_are_not_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\none\n")
    with pytest.raises(DataError, match="csv files are not read.*refs/convert/parquet"):
        resolve(source(tmp_path, format="hub"))


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    assert [text for text, _ in rows_of(source(tmp_path / "one"))] == TEXTS
    assert [text for text, _ in rows_of(source(tmp_path / "both", split="test"))] == TEXTS[1:2]


BAD_LINES = {
    b'{"text": "a", "text": "b"}': "key is given twice",
    b'{"text": NaN}': "not JSON",
    b"[" * 100_000: "not JSON",
    b'["text"]': "not a JSON object",
    b'\xef\xbb\xbf{"text": "a"}': "byte order mark",
    b'{"text": "\xff"}': "not valid UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": " \\n"}': "`text` must be a string",
    b'{"text": null}': "`text` must be a string",
    b'{"lang": "en"}': "`text` must be a string",
    b'{"text": "' + b"a" * 200_000 + b'"}': "longer than 150000 bytes",
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_bad_line_is_a_row_with_a_problem(
    pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.documents.MAX_ROW_BYTES", 150_000)
    path = tmp_path / {"bytes": "a.jsonl", "compress": "a.jsonl.gz"}[pack.__name__]
    path = path.with_suffix(".zst") if pack is zstandard.compress else path
    path.write_bytes(pack(b"".join(line + b"\n" + b'{"text": "good"}\n' for line in BAD_LINES)))
    rows = rows_of(source(path))
    assert [text for text, _ in rows] == [None, "good"] * len(BAD_LINES)
    for (_, problem), reason in zip(rows[::2], BAD_LINES.values(), strict=True):
        assert reason in str(problem)
    with pytest.raises(DataError, match=rf"{path.name}:1: a key is given twice"):
        list(read_documents(source(path)))


def test_bad_columns_and_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], "i4").tobytes()), pa.py_buffer(b"a\xffc")]
    )
    pq.write_table(pa.table({"text": invalid}), path)
    assert rows_of(source(path)) == [("a", None), (None, "not valid UTF-8"), ("c", None)]
    pq.write_table(pa.table({"text": ["a", None, "", " \n"]}), path)
    assert [problem is None for _, problem in rows_of(source(path))] == [True, False, False, False]
    cases = {
        "has no column 'text', it has body": {"body": ["a"]},
        "column 'text' must hold strings, it holds int64": {"text": [1]},
        "column 'text' must hold strings, it holds list": {"text": [["a"]]},
        "column 'text' must hold strings, it holds struct": {"text": [{"a": "b"}]},
        "column 'text' must hold strings, it holds null": {"text": [None]},
    }
    for reason, columns in cases.items():
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=f"a.parquet: {reason}"):
            rows_of(source(path))
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="has no column 'lang'"):
        rows_of(SourceSpec("books", str(path)))


def damage(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 0xFF
    return bytes(damaged)


def test_damaged_and_cut_files_are_named(tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrow", "f.arrow"):
        path = tmp_path / name
        WRITERS[name](path)
        content = path.read_bytes()
        cases = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "magic": damage(content, -1 if name == "d.parquet" else 0),
        }
        if name in ("b.jsonl.gz", "d.parquet"):
            cases["flipped"] = damage(content, 150)
        for case, damaged in cases.items():
            path.write_bytes(damaged)
            if case == "empty" and ".jsonl" in name:
                assert rows_of(source(path)) == []
                continue
            with pytest.raises(DataError, match=name) as caught:
                rows_of(source(path))
            assert "\n" not in str(caught.value)


def test_where_a_cut_archive_ends_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(TEXTS[:20])) + gzip.compress(json_lines(TEXTS))[:-9])
    with pytest.raises(DataError, match=r"a.jsonl.gz:\d+: damaged: the compressed data is cut"):
        rows_of(source(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_bomb_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources.open.EXPANSION_SLACK", 1 << 16)
    monkeypatch.setattr("data.sources.open.MAX_EXPANSION", 100)
    lines = b" " * (1 << 22) + b"\n"
    packed = gzip.compress(lines) if name.endswith("gz") else zstandard.compress(lines)
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=f"{name}: unpacks to more than 100 times its size"):
        rows_of(source(tmp_path / name))


def test_text_by_paragraph_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\ntwo\n \nthree\n\n\n\xff\n")
    assert rows_of(source(path, sample_by="paragraph")) == [
        ("one\r\ntwo", None),
        ("three", None),
        (None, "not valid UTF-8"),
    ]
    path.write_bytes(b" one\n\ntwo\n")
    assert rows_of(source(path, sample_by="document")) == [(" one\n\ntwo\n", None)]
    with pytest.raises(DataError, match="text files do not say their language"):
        rows_of(SourceSpec("books", str(path)))


def test_rows_say_the_language_where_the_source_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["one", "two"]) + b'{"text": "drei", "lang": "de"}\n{"text": "x", "lang": "../x"}\n')
    spec = SourceSpec("books", str(path))
    units = plan_units(spec, resolve(spec), rows=9, num_bytes=9999)
    rows = [row for unit in units for row in read_unit(spec, unit)]
    assert [row.language for row in rows] == ["en", "en", "de", None]
    assert "`lang` must be" in str(rows[3].problem)
    with pytest.raises(DataError, match=r"a.jsonl:3: source books has rows of en and de"):
        list(read_documents(spec))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    spec = source(path)
    (file,) = resolve(spec)
    check_unchanged(spec, file)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="a.jsonl: has changed since the work began"):
        check_unchanged(spec, file)


def test_what_cannot_be_resolved(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    cases = {
        str(tmp_path / "none.jsonl"): "none.jsonl: no such file",
        str(tmp_path / "*.jsonl"): "no parquet, jsonl, text or arrow files there",
        str(tmp_path / "a.csv"): "says no format that is read",
        str(tmp_path / "a.parquet.gz"): "parquet files are not read compressed",
        "ftp://host/a.jsonl": "protocol is not read, allowed: file, http",
        "simplecache::http://host/a.jsonl": "protocol is not read",
    }
    for path, reason in cases.items():
        with pytest.raises(DataError, match=reason):
            resolve(SourceSpec("books", path))
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.parquet.gz").unlink()
    with pytest.raises(DataError, match="no parquet, jsonl, text or arrow files there"):
        resolve(SourceSpec("books", str(tmp_path)))


def test_the_command_line_form() -> None:
    assert parse_source("en=a/b.jsonl") == SourceSpec("en", "a/b.jsonl")
    assert parse_source("en=a/b.jsonl,weight=0.3") == SourceSpec("en", "a/b.jsonl", weight=0.3)
    assert parse_source("zh=a,b.txt,language=zh,sample_by=document") == SourceSpec(
        "zh", "a,b.txt", language="zh", sample_by="document"
    )
    assert parse_source("some/EN-a.v1.jsonl") == SourceSpec("en-a", "some/EN-a.v1.jsonl")
    assert parse_source("https://host/x.jsonl?a=b,language=en") == SourceSpec(
        "x", "https://host/x.jsonl?a=b", language="en"
    )
    with pytest.raises(DataError, match="format: 'csv' is unknown, allowed: auto"):
        parse_source("en=a,format=csv")


def test_the_yaml_form(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text("en: {path: a.jsonl, weight: 2}\nzh: {path: b, language: zh, storage_options: {anon: true}}\n")
    assert read_sources_file(path) == [
        SourceSpec("en", "a.jsonl", weight=2.0),
        SourceSpec("zh", "b", language="zh", storage_options={"anon": True}),
    ]
    for content, reason in {
        "[a, b]": "must map names",
        "a: [": "not YAML",
        "en: 3": "must be a path or a mapping",
        "en: {path: 3}": "path: must be a string",
        "en: {language: en}": "path is missing",
        "en: {path: a, wait: 1}": "'wait' is unknown, allowed: path",
        "en: {path: a, weight: much}": "weight: 'much' is not a number",
        "en: {path: a, weight: -1}": "weight: -1.0 is not a number of 0 or more",
        "EN: a": "a name has a-z",
        "en: {path: a, language: EN}": "language: 'EN' is no tag",
        "en: {path: a, storage_options: {client_kwargs: {aws_secret_access_key: x}}}": "looks like a secret",
    }.items():
        path.write_text(content)
        with pytest.raises(DataError, match=reason):
            read_sources_file(path)
    with pytest.raises(DataError, match="path: '' is no path"):
        spec_from_mapping("en", "")
