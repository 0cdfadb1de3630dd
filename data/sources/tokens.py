"""Read documents of files that hold token ids already: Megatron's `.bin` with `.idx`, OLMo's raw `.npy`.

A Megatron index says where documents are; an OLMo file has nothing but ids, and its documents end at the tokenizer's
end-of-document id.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from data.documents import MAX_ROW_BYTES
from data.errors import DataError
from data.sources.open import megatron_index, open_binary
from data.sources.resolve import SourceFile, errors_name
from data.sources.spec import SourceSpec
from data.sources.units import Unit

NPY_MAGIC = b"\x93NUMPY"
READ_AT_ONCE = 1 << 22


def read_tokens(spec: SourceSpec, unit: Unit, eos_id: int) -> Iterator[np.ndarray]:
    """Ids of every document of `unit` as the file has them, int64, (n,); for olmo without the `eos_id` at their end.

    Raises:
        DataError: the file is missing, cut or of another kind.
    """
    reader = _megatron(spec, unit) if unit.file.format == "megatron" else _olmo(spec, unit, eos_id)
    with errors_name(unit.file.url):
        yield from reader


def _megatron(spec: SourceSpec, unit: Unit) -> Iterator[np.ndarray]:
    index = megatron_index(spec, unit.file)
    with closing(open_binary(spec, unit.file.url)) as file:
        for document in range(unit.first, unit.first + unit.count):
            first, last = int(index.documents[document]), int(index.documents[document + 1])
            pieces = []
            for offset, size in zip(index.offsets[first:last].tolist(), index.sizes[first:last].tolist(), strict=True):
                file.seek(offset)
                pieces.append(np.frombuffer(file.read(size * index.dtype.itemsize), index.dtype))
            yield np.concatenate([np.empty(0, np.int64), *pieces]).astype(np.int64)


def _olmo(spec: SourceSpec, unit: Unit, eos_id: int) -> Iterator[np.ndarray]:
    """Documents that start in the unit's bytes; one starts where the one before it ends."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if unit.file.size % dtype.itemsize:
        raise DataError(f"{unit.file.url}: {unit.file.size} bytes are no whole number of {spec.dtype} ids")
    first = -(-unit.first // dtype.itemsize)
    end = -(-(unit.first + unit.count) // dtype.itemsize)
    begin = max(first - 1, 0)
    for document in _until_eos(spec, unit.file, dtype, begin, eos_id):
        if begin >= first:
            yield document
        begin += len(document) + 1
        if begin >= end:
            return


def _until_eos(spec: SourceSpec, file: SourceFile, dtype: np.dtype, begin: int, eos_id: int) -> Iterator[np.ndarray]:
    """Pieces between end-of-document ids, from id number `begin` on; ids after the last one are a piece as well."""
    left = np.empty(0, np.int64)
    with closing(open_binary(spec, file.url)) as raw:
        if raw.read(len(NPY_MAGIC)) == NPY_MAGIC:
            raise DataError(f"{file.url}: has a numpy header; OLMo files are raw ids")
        raw.seek(begin * dtype.itemsize)
        while content := raw.read(READ_AT_ONCE):
            ids = np.concatenate([left, np.frombuffer(content, dtype).astype(np.int64)])
            *pieces, left = np.split(ids, np.flatnonzero(ids == eos_id) + 1)
            yield from (piece[:-1] for piece in pieces)
            if len(left) * dtype.itemsize > MAX_ROW_BYTES:
                raise DataError(f"{file.url}: no end of document (id {eos_id}) for {MAX_ROW_BYTES} bytes")
    if len(left):
        yield left
