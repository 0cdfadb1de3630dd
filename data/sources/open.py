"""Open files of a source: local or remote, compressed or not, parquet footers, Arrow batches, Megatron indices."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data.errors import DataError
from data.sources.resolve import SourceFile, errors_name, index_of, open_filesystem
from data.sources.spec import SourceSpec

READ_AT_ONCE = 1 << 20
PACKED_AT_ONCE = 1 << 12
MAX_EXPANSION = 1000
EXPANSION_SLACK = 64 << 20
MAX_ZSTD_WINDOW = 1 << 27
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}


def open_binary(spec: SourceSpec, url: str) -> BinaryIO:
    """A buffered, seekable file of raw bytes. The caller closes it. OSError and client errors pass through."""
    filesystem, path = open_filesystem(spec, url)
    if "://" not in url:
        return open(path, "rb", buffering=READ_AT_ONCE)  # noqa: SIM115
    return io.BufferedReader(filesystem.open(path, "rb"), READ_AT_ONCE)


def open_unpacked(spec: SourceSpec, file: SourceFile) -> BinaryIO:
    """The content of `file`, decompressed while it is read; only uncompressed files can seek.

    Reading raises EOFError for a cut file, zlib.error or ZstdError for a damaged one, and DataError for one that
    unpacks to more than 1000 times its size.
    """
    raw = open_binary(spec, file.url)
    if file.compression is None:
        return raw
    return io.BufferedReader(_Chunks(_unpack(raw, file), raw), READ_AT_ONCE)


def require_expansion(file: SourceFile, unpacked: int) -> None:
    """Raise DataError when `unpacked` bytes, or characters, are far too many for a file of this size."""
    if unpacked > EXPANSION_SLACK + MAX_EXPANSION * file.size:
        raise DataError(f"{file.url}: unpacks to more than {MAX_EXPANSION} times its size")


@contextmanager
def parquet_file(spec: SourceSpec, file: SourceFile, columns: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """An open parquet file whose pages are checked against their checksums where it has them.

    Strings of `columns` come as indices into dictionaries: a small file may repeat a long one a million times.
    """
    with errors_name(file.url), closing(open_binary(spec, file.url)) as raw:
        metadata = pq.read_metadata(raw)
        there = {metadata.schema.column(number).path for number in range(metadata.num_columns)}
        dictionaries = sorted(there.intersection(columns))
        with pq.ParquetFile(
            raw, metadata=metadata, page_checksum_verification=True, read_dictionary=dictionaries
        ) as parquet:
            yield parquet


@contextmanager
def arrow_batches(spec: SourceSpec, file: SourceFile) -> Iterator[Iterator[pa.RecordBatch]]:
    """The record batches of an Arrow IPC file, in the file or the stream format."""
    with errors_name(file.url), _arrow_input(spec, file) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        if is_file:
            reader = pa.ipc.open_file(raw)
            yield (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield iter(pa.ipc.open_stream(raw))


@dataclass(frozen=True)
class MegatronIndex:
    """What an `.idx` says: `sizes` and byte `offsets` of the sequences, and at which sequence each document begins."""

    dtype: np.dtype
    sizes: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def megatron_index(spec: SourceSpec, file: SourceFile) -> MegatronIndex:
    """Read and check the index beside a Megatron `.bin`.

    Raises:
        DataError: the index is missing, cut, of another kind, or points outside the `.bin`.
    """
    url = index_of(file.url)
    with errors_name(url), closing(open_binary(spec, url)) as raw:
        content = raw.read()
    if not content.startswith(MEGATRON_MAGIC) or len(content) < 34:
        raise DataError(f"{url}: not the index of a Megatron data set")
    version, code = np.frombuffer(content, "<u8", 1, 9)[0], content[17]
    num_sequences, num_documents = (int(count) for count in np.frombuffer(content, "<u8", 2, 18))
    if version != 1 or code not in MEGATRON_TYPES:
        raise DataError(f"{url}: version {version}, type code {code}: only version 1 with integer ids is read")
    if num_documents < 1 or len(content) < 34 + 12 * num_sequences + 8 * num_documents:
        raise DataError(f"{url}: is cut: {num_sequences} sequences and {num_documents} documents do not fit into it")
    index = MegatronIndex(
        dtype=np.dtype(MEGATRON_TYPES[code]),
        sizes=np.frombuffer(content, "<i4", num_sequences, 34),
        offsets=np.frombuffer(content, "<i8", num_sequences, 34 + 4 * num_sequences),
        documents=np.frombuffer(content, "<i8", num_documents, 34 + 12 * num_sequences),
    )
    if not _is_consistent(index, file.size):
        raise DataError(f"{url}: points outside {file.url}, or its documents are out of order")
    return index


def _is_consistent(index: MegatronIndex, size: int) -> bool:
    last = size - index.sizes.astype(np.int64) * index.dtype.itemsize  # offset + size could overflow
    inside = bool(np.all(index.sizes >= 0) and np.all(index.offsets >= 0) and np.all(index.offsets <= last))
    ordered = index.documents[0] == 0 and index.documents[-1] == len(index.sizes)
    return bool(inside and ordered and np.all(np.diff(index.documents) >= 0))


@contextmanager
def _arrow_input(spec: SourceSpec, file: SourceFile) -> Iterator[Any]:
    if "://" not in file.url:
        with pa.memory_map(file.url) as mapped:
            yield mapped
        return
    with closing(open_binary(spec, file.url)) as raw:
        yield raw


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a raw file, so that a BufferedReader finds the lines in them."""

    def __init__(self, chunks: Iterator[bytes], raw: BinaryIO) -> None:
        self._chunks = chunks
        self._raw = raw
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def _unpack(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    unpacked = 0
    for chunk in _members(iter(lambda: raw.read(PACKED_AT_ONCE), b""), str(file.compression)):
        unpacked += len(chunk)
        require_expansion(file, unpacked)
        yield chunk


def _members(packed: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Unpack gzip members or zstd frames, one after another."""
    decoder: Any = None
    for chunk in packed:
        while chunk:
            decoder = decoder or _decoder(compression)
            yield decoder.decompress(chunk)
            if not decoder.eof:
                break
            chunk, decoder = decoder.unused_data.lstrip(b"\0"), None  # gzip files may be padded with zeros
    if decoder is not None:
        raise EOFError("the compressed data is cut")


def _decoder(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()
