"""Sources behind HTTP and an S3 API, both served on loopback."""

from __future__ import annotations

import functools
import http.server
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TOKENIZER
from test_sources import TEXTS, WRITERS, rows_of

from data.errors import DataError
from data.prepare.__main__ import main
from data.sources import SourceSpec, check_unchanged, read_unit, resolve
from data.sources.units import Unit

NAMES = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrow", "f.arrow", "g.txt")


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges and entity tags, as object stores and the hub serve them."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        super().end_headers()

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        first, last = int(wanted[1]), int(wanted[2])
        content = path.read_bytes()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder with a file of every format, and its address."""
    for name in NAMES:
        WRITERS[name](tmp_path / name)
    handler = functools.partial(RangeHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_http_gives_the_rows_of_the_local_file(name: str, served: tuple[Path, str]) -> None:
    spec = SourceSpec("books", f"{served[1]}/{name}", language="en")
    expected = [(text, None) for text in TEXTS]
    assert rows_of(spec) == expected
    assert rows_of(spec, rows=20, num_bytes=2000) == expected


def test_http_folders_changes_and_errors(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "part").mkdir()
    for name in ("1.jsonl", "2.jsonl"):
        WRITERS["a.jsonl"](folder / "part" / name)
    spec = SourceSpec("books", f"{address}/part/", language="en")
    files = resolve(spec)
    assert [file.url for file in files] == [f"{address}/part/{name}" for name in ("1.jsonl", "2.jsonl")]
    check_unchanged(spec, files[0])
    os.utime(folder / "part" / "1.jsonl", ns=(1, 1))
    with pytest.raises(DataError, match=r"1.jsonl: has changed"):
        check_unchanged(spec, files[0])
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        resolve(SourceSpec("books", f"{address}/none.jsonl", language="en"))
    (folder / "part" / "2.jsonl").unlink()
    with pytest.raises(DataError, match=r"2.jsonl: ") as caught:
        list(read_unit(spec, Unit(files[1], 0, files[1].size)))
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/a.jsonl: cannot be read"):
        resolve(SourceSpec("books", "http://127.0.0.1:9/a.jsonl"))


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def test_s3_files_folders_and_globs(s3_endpoint: str, tmp_path: Path) -> None:
    import s3fs

    store = s3fs.S3FileSystem(endpoint_url=s3_endpoint)
    store.mkdir("corpus")
    for name in NAMES:
        WRITERS[name](tmp_path / name)
        store.put_file(str(tmp_path / name), f"corpus/{name[0]}/{name}")
    options = {"endpoint_url": s3_endpoint}
    expected = [(text, None) for text in TEXTS]
    for name in NAMES:
        spec = SourceSpec("books", f"s3://corpus/{name[0]}/{name}", language="en", storage_options=options)
        assert rows_of(spec, rows=20, num_bytes=2000) == expected
    everything = SourceSpec("books", "s3://corpus", language="en", storage_options=options)
    assert [file.url for file in resolve(everything)] == [f"s3://corpus/{name[0]}/{name}" for name in NAMES]
    some = SourceSpec("books", "s3://corpus/*/*.arrow", language="en", storage_options=options)
    files = resolve(some)
    assert [file.url for file in files] == ["s3://corpus/e/e.arrow", "s3://corpus/f/f.arrow"]
    check_unchanged(some, files[0])
    store.pipe_file("corpus/e/e.arrow", b"other")
    with pytest.raises(DataError, match=r"s3://corpus/e/e.arrow: has changed"):
        check_unchanged(some, files[0])
    with pytest.raises(DataError, match=r"s3://corpus/none.jsonl: no such file"):
        resolve(SourceSpec("books", "s3://corpus/none.jsonl", storage_options=options))


@pytest.mark.parametrize("path", ["s3://none/a.jsonl", "s3://none", "s3://none/*.jsonl", "s3://there/a.jsonl"])
def test_missing_buckets_and_keys_end_the_command(
    path: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=s3_endpoint).makedirs("there", exist_ok=True)
    listed = tmp_path / "sources.yaml"
    listed.write_text(f"books: {{path: '{path}', language: en, storage_options: {{endpoint_url: '{s3_endpoint}'}}}}\n")
    options = ["--sources", str(listed), "--tokenizer", str(TOKENIZER), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare", *options])
    assert main() == 77
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: .*{re.escape(path)}: (no such file|no parquet, jsonl, .*|cannot be read: .*)", line)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sources.yaml"]
