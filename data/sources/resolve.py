"""From a source to its files: local paths, folders, globs, http, s3, and hub data sets through `datasets`.

Only names, sizes and stamps are looked up here; `read.py` reads. No code of a data set is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from data.errors import DataError, one_line
from data.sources.spec import SourceSpec

PROTOCOLS = ("file", "http", "https", "s3", "hf")
SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".arrow": "arrow",
    ".bin": "megatron",
    ".npy": "olmo",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSIBLE = ("jsonl", "text")
BUILDERS = {"parquet": "parquet", "json": "jsonl", "text": "text", "arrow": "arrow"}
STAMPS = ("ETag", "etag", "blob_id", "Digest", "Content-MD5", "Last-Modified", "LastModified")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        url: absolute path, or address with protocol.
        format: parquet, jsonl, text, arrow, megatron or olmo.
        compression: gzip, zstd or None.
        size: bytes.
        stamp: changes when the file does: time of modification or entity tag; empty where a server says neither.
    """

    url: str
    format: str
    compression: str | None
    size: int
    stamp: str


def resolve(spec: SourceSpec) -> list[SourceFile]:
    """The files of `spec`, sorted by url.

    Raises:
        DataError: nothing there, a format that is not read, a server that does not answer, a hub name without revision.
    """
    spec, urls = _hub_files(spec) if spec.format == "hub" else (spec, _list(spec))
    files = [describe(spec, url) for url in sorted(set(urls))]
    if not files:
        raise DataError(f"source {spec.name}: {spec.path}: no {_wanted(spec)} files there")
    return files


def describe(spec: SourceSpec, url: str) -> SourceFile:
    """Look `url` up as it is now.

    Raises:
        DataError: it is not there, or its name says a format that is not read.
    """
    with errors_name(url):
        filesystem, path = open_filesystem(spec, url)
        info = filesystem.info(path)
        format, compression = _format(spec, url)
        if format == "megatron":
            with errors_name(index_of(url)):
                index = filesystem.info(index_of(path))
            return SourceFile(url, format, None, int(info["size"]), f"{_stamp(path, info)} {_stamp(path, index)}")
        if info.get("size") is None:
            raise DataError(f"{url}: the server does not say how long it is, download it first")
        return SourceFile(url, format, compression, int(info["size"]), _stamp(path, info))


def check_unchanged(spec: SourceSpec, file: SourceFile) -> None:
    """Raise DataError unless `file` is still what it was when it was resolved."""
    open_filesystem(spec, file.url)[0].invalidate_cache()
    now = describe(replace(spec, format=file.format), file.url)
    if (now.size, now.stamp) != (file.size, file.stamp):
        raise DataError(f"{file.url}: has changed since the work began")


def open_filesystem(spec: SourceSpec, url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it. DataError: a protocol that is not read."""
    protocol = url.partition("://")[0] if "://" in url else "file"
    if protocol not in PROTOCOLS or "::" in url:
        raise DataError(f"source {spec.name}: {url}: protocol is not read, allowed: {', '.join(PROTOCOLS)}")
    try:
        return fsspec.core.url_to_fs(url, **(spec.storage_options if protocol != "file" else {}))
    except ImportError as error:
        raise DataError(f"source {spec.name}: {url}: {error}; `pip install -e .[s3]` brings s3") from error


def index_of(path: str) -> str:
    """Name of the `.idx` beside a Megatron `.bin`."""
    return path.removesuffix(".bin") + ".idx"


@contextmanager
def errors_name(url: str) -> Iterator[None]:
    """Turn what file systems and HTTP clients raise into one line that names `url`."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:  # fsspec raises it for whatever an HTTP server or its absence may mean
        cause = error.__cause__
        if cause is None or getattr(cause, "status", None) in (404, 410):
            raise DataError(f"{url}: no such file") from error
        raise DataError(f"{url}: cannot be read: {one_line(cause)}") from error
    except OSError as error:
        raise DataError(f"{url}: cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # aiohttp, botocore and huggingface_hub share no base class
        raise DataError(f"{url}: cannot be read: {one_line(error)}") from error


def _list(spec: SourceSpec) -> list[str]:
    url = _pinned(spec)
    with errors_name(url):
        filesystem, path = open_filesystem(spec, url)
        filesystem.invalidate_cache()
        http = url.startswith(("http://", "https://"))
        if "*" in url or ("[" in url and not filesystem.exists(path)):
            found = (
                [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
                if not http
                else filesystem.glob(path)
            )
            return [_address(filesystem, name) for name in found]
        if url.endswith("/") if http else filesystem.isdir(path):
            if not http and filesystem.exists(f"{path}/dataset_dict.json"):
                path = f"{path}/{spec.split}"
            return [_address(filesystem, name) for name in filesystem.find(path) if _is_data(spec, name, path)]
        if spec.format == "megatron" and not path.endswith(".bin"):
            path += ".bin"
        return [_address(filesystem, path)]


def _pinned(spec: SourceSpec) -> str:
    """The path with its revision: what a hub address holds may change under the same name."""
    if not spec.path.startswith("hf://"):
        return spec.path
    parts = spec.path.removeprefix("hf://").split("/")
    if len(parts) < 3:
        raise DataError(f"source {spec.name}: {spec.path}: write hf://datasets/OWNER/NAME")
    if "@" not in parts[2]:
        if spec.revision is None:
            raise DataError(f"source {spec.name}: {spec.path}: give its revision, a commit of the data set, to pin it")
        parts[2] += "@" + spec.revision.replace("/", "%2F")
    return "hf://" + "/".join(parts)


def _hub_files(spec: SourceSpec) -> tuple[SourceSpec, list[str]]:
    if not Path(spec.path).is_dir() and spec.revision is None:
        raise DataError(f"source {spec.name}: {spec.path}: give its revision, a commit of the data set, to pin it")
    import datasets  # takes seconds, and only this needs it

    name = f"source {spec.name}: {spec.path}"
    with errors_name(name):
        path = spec.path.removeprefix("hf://datasets/")
        builder = datasets.load_dataset_builder(path, name=spec.config, revision=spec.revision)
        if builder.name not in BUILDERS:
            hint = "its revision refs/convert/parquet may hold it as parquet"
            raise DataError(f"{name}: {builder.name} files are not read, only {', '.join(BUILDERS)}; {hint}")
        splits = builder.config.data_files or {}
        if spec.split not in splits:
            raise DataError(f"{name}: split {spec.split!r} is not there, it has {', '.join(map(str, splits))}")
        urls = [os.path.abspath(url) if "://" not in url else url for url in map(str, splits[spec.split])]
    return replace(spec, format=BUILDERS[builder.name]), urls


def _format(spec: SourceSpec, url: str) -> tuple[str, str | None]:
    suffixes = PurePosixPath(_name(url)).suffixes
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    format = SUFFIXES.get(suffix, "") if spec.format in ("auto", "hub") else spec.format
    if format not in SUFFIXES.values() or (spec.format == "auto" and format in ("megatron", "olmo")):
        raise DataError(f"source {spec.name}: {url}: the name says no format that is read, give format=")
    if compression and format not in COMPRESSIBLE:
        raise DataError(f"source {spec.name}: {url}: {format} files are not read compressed")
    return format, compression


def _is_data(spec: SourceSpec, path: str, folder: str) -> bool:
    """Whether a file found in a folder is one of the source's; cards, licences and bookkeeping are not."""
    inside = PurePosixPath(path.removeprefix(folder).lstrip("/"))
    if any(part.startswith((".", "_")) for part in inside.parts):
        return False
    if spec.format == "auto" and inside.suffix == ".json":
        return False
    try:
        format, _ = _format(replace(spec, format="auto"), path)
    except DataError:
        return spec.format in ("megatron", "olmo") and SUFFIXES.get(inside.suffix) == spec.format
    return spec.format in ("auto", format)


def _name(url: str) -> str:
    path = urlsplit(url).path if url.startswith(("http://", "https://")) else url
    return path.rpartition("/")[2].lower()


def _wanted(spec: SourceSpec) -> str:
    return "parquet, jsonl, text or arrow" if spec.format in ("auto", "hub") else spec.format


def _address(filesystem: Any, path: str) -> str:
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    return path if "file" in protocols or "://" in path else filesystem.unstrip_protocol(path)


def _stamp(path: str, info: dict[str, Any]) -> str:
    if "mtime" in info:
        return str(os.stat(info["name"]).st_mtime_ns)
    return next((str(info[key]).strip('"') for key in STAMPS if info.get(key)), "")
