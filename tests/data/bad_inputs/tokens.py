"""Files that hold token ids already: Megatron and OLMo."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable

import numpy as np
from conftest import TOKENIZER

from bad_inputs import Attempt, Bench, Case, Quarantined, Refused
from data.sources.open import MEGATRON_MAGIC
from data.tokenizer import Tokenizer

GOOD = [Tokenizer.load(TOKENIZER).encode(f"Good row {number}") for number in range(4)]
BOS_ID, EOS_ID = 0, 1


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: object) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mknod, (self.path,)


def index(rows: list[list[int]], code: int = 8, width: int = 2, version: int = 1, **parts: list[int]) -> bytes:
    """A Megatron index of documents; `parts` stand in for its sizes, offsets and documents."""
    sizes = parts.get("sizes", [len(row) for row in rows])
    offsets = parts.get("offsets", [sum(sizes[:number]) * width for number in range(len(sizes))])
    begins = parts.get("documents", list(range(len(sizes) + 1)))
    head = MEGATRON_MAGIC + struct.pack("<QBQQ", version, code, len(sizes), len(begins))
    arrays = (np.array(sizes, "<i4"), np.array(offsets, "<i8"), np.array(begins, "<i8"))
    return head + b"".join(array.tobytes() for array in arrays)


def ids(documents: list[list[int]], dtype: str = "<u2") -> bytes:
    """Ids of documents one after another."""
    return b"".join(np.array(document, dtype).tobytes() for document in documents)


def _megatron(idx: bytes, content: bytes | None = None) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        bench.write("a.idx", idx)
        return bench.prepare(bench.write("a.bin", ids(GOOD) if content is None else content), format="megatron")

    return make


def _olmo(content: bytes, dtype: str = "uint16") -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        bench.patch.setattr("data.sources.tokens.MAX_ROW_BYTES", 1000)
        return bench.prepare(bench.write("a.npy", content), format="olmo", dtype=dtype)

    return make


def _olmo_objects(bench: Bench) -> Attempt:
    """A numpy file whose loading would run code."""
    file = io.BytesIO()
    np.save(file, np.array([Touch(bench.canary)], dtype=object), allow_pickle=True)
    return _olmo(file.getvalue())(bench)


def _pickled_index(bench: Bench) -> Attempt:
    return _megatron(pickle.dumps(Touch(bench.canary)))(bench)


def _index_gone(bench: Bench) -> Attempt:
    return bench.prepare(bench.write("a.bin", ids(GOOD)), format="megatron")


def _bin_gone(bench: Bench) -> Attempt:
    bench.write("a.idx", index(GOOD))
    return bench.prepare(bench.folder / "a.bin", format="megatron")


def _no_language(bench: Bench) -> Attempt:
    bench.write("a.idx", index(GOOD))
    return bench.prepare(bench.write("a.bin", ids(GOOD)), language=None, format="megatron")


def _auto(bench: Bench) -> Attempt:
    bench.write("a.idx", index(GOOD))
    return bench.prepare(bench.write("a.bin", ids(GOOD)))


OUTSIDE = r"a\.idx: points outside .*a\.bin, or its documents are out of order"
BAD_INDICES = {
    "empty": (b"", r"a\.idx: not the index"),
    "bad magic": (b"X" + index(GOOD)[1:], r"a\.idx: not the index"),
    "header cut": (index(GOOD)[:30], r"a\.idx: not the index"),
    "arrays cut": (index(GOOD)[:-8], r"a\.idx: is cut"),
    "version 2": (index(GOOD, version=2), r"a\.idx: version 2"),
    **{f"type code {code}": (index(GOOD, code=code), f"type code {code}") for code in (0, 2, 3, 6, 7, 9, 255)},
    "2^63 sequences": (index(GOOD)[:18] + struct.pack("<QQ", 1 << 63, 5) + bytes(100), r"a\.idx: is cut"),
    "2^64 - 1 documents": (index(GOOD)[:18] + struct.pack("<QQ", 1, (1 << 64) - 1) + bytes(100), r"a\.idx: is cut"),
    "no documents": (index(GOOD, documents=[]), r"a\.idx: is cut"),
    "negative size": (index(GOOD, sizes=[3, -1, 3, 3], offsets=[0, 6, 12, 18]), OUTSIDE),
    "size outside": (index(GOOD, sizes=[3, 3, 3, 1 << 30], offsets=[0, 6, 12, 18]), OUTSIDE),
    "negative offset": (index(GOOD, offsets=[0, -8, 12, 18]), OUTSIDE),
    "offset outside": (index(GOOD, offsets=[0, 6, 12, 1 << 40]), OUTSIDE),
    "offset that overflows": (index(GOOD, offsets=[0, 6, 12, (1 << 63) - 2]), OUTSIDE),
    "documents out of order": (index(GOOD, documents=[0, 2, 1, 4]), OUTSIDE),
    "documents from 1 on": (index(GOOD, documents=[1, 2, 3, 4]), OUTSIDE),
    "documents past the end": (index(GOOD, documents=[0, 1, 2, 9]), OUTSIDE),
    "negative document": (index(GOOD, documents=[0, -1, 2, 4]), OUTSIDE),
    "ids of another width": (index(GOOD, code=4, width=4), OUTSIDE),
}
BAD_DOCUMENTS = {
    "id outside the vocabulary": ([3, 8192], "id 8192 is outside the vocabulary"),
    "id 65535": ([65535], "id 65535 is outside"),
    "BOS inside": ([3, BOS_ID, 4], "BOS or EOS inside"),
    "no text": ([BOS_ID, EOS_ID], "holds no text"),
}

CASES: dict[str, Case] = {
    **{f"megatron: {name}": Refused(_megatron(idx), reason) for name, (idx, reason) in BAD_INDICES.items()},
    "megatron: pickled index": Refused(_pickled_index, r"a\.idx: not the index"),
    "megatron: index missing": Refused(_index_gone, r"a\.idx: no such file"),
    "megatron: ids missing": Refused(_bin_gone, r"a\.bin: no such file"),
    "megatron: ids empty": Refused(_megatron(index(GOOD), b""), r"a\.bin: is empty"),
    "megatron: ids cut": Refused(_megatron(index(GOOD), ids(GOOD)[:-1]), OUTSIDE),
    "megatron: no language": Refused(_no_language, "token files do not say their language"),
    "megatron: format not given": Refused(_auto, r"a\.bin: the name says no format"),
    **{
        f"megatron: {name}": Quarantined(_megatron(index([*GOOD, bad]), ids([*GOOD, bad])), reason)
        for name, (bad, reason) in BAD_DOCUMENTS.items()
    },
    "megatron: negative id": Quarantined(
        _megatron(index([*GOOD, [-5]], code=4, width=4), ids([*GOOD, [-5]], "<i4")), "id -5 is outside"
    ),
    "olmo: empty": Refused(_olmo(b""), r"a\.npy: is empty"),
    "olmo: odd size": Refused(_olmo(ids(GOOD) + b"\0"), r"a\.npy: \d+ bytes are no whole number of uint16 ids"),
    "olmo: odd size of wider ids": Refused(_olmo(bytes(12), "uint64"), r"a\.npy: 12 bytes are no whole number"),
    "olmo: numpy header": Refused(_olmo(b"\x93NUMPY\x01\0" + bytes(120)), r"a\.npy: has a numpy header"),
    "olmo: pickled objects": Refused(_olmo_objects, r"a\.npy: (has a numpy header|\d+ bytes are no whole number)"),
    "olmo: no end of document": Refused(
        _olmo(ids([[5] * 2000])), r"a\.npy: no end of document \(id 1\) for 1000 bytes"
    ),
    "olmo: nothing but ends": Refused(_olmo(ids([[EOS_ID] * 20])), r"a\.npy:1: holds no text"),
    "olmo: unknown type": Refused(_olmo(ids(GOOD), "object"), "dtype: 'object' is unknown"),
    **{
        f"olmo: {name}": Quarantined(_olmo(ids([[*row, EOS_ID] for row in [*GOOD, bad]], dtype), kind), reason)
        for name, bad, dtype, kind, reason in (
            ("id outside the vocabulary", [8192], "<u2", "uint16", "id 8192 is outside"),
            ("negative id", [-5], "<i4", "int32", "id -5 is outside"),
            ("id 2^64 - 1", [(1 << 64) - 1], "<u8", "uint64", "is outside"),
            ("BOS inside", [3, BOS_ID, 4], "<u2", "uint16", "BOS or EOS inside"),
        )
    },
}
