"""Where a stream stands in a source, and the positions of all streams in a few bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.order import MAX_ROWS

FIELDS = 4


class Cursor(NamedTuple):
    """The first token not read yet: in pass `epoch` over a source's units, the `unit`-th of the stream's, the `row`-th
    of the unit in the order of this pass, and `offset` tokens into its document, BOS counted."""

    epoch: int = 0
    unit: int = 0
    row: int = 0
    offset: int = 0


def pack_cursors(cursors: np.ndarray) -> str:
    """Cursors (streams, sources, 4) as base64 of varints."""
    return base64.b64encode(b"".join(map(_varint, cursors.ravel().tolist()))).decode()


def unpack_cursors(text: object, streams: int, sources: int) -> np.ndarray:
    """The cursors (streams, sources, 4) int64 of `pack_cursors`. DataError: it is no such text."""
    try:
        values = list(_varints(base64.b64decode(str(text), validate=True)))
        return np.array(values, dtype=np.int64).reshape(streams, sources, FIELDS)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise DataError(
            f"data state: `cursors` are damaged, or not of {streams} streams and {sources} sources"
        ) from error


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of all streams from the states of all ranks, in any order.

    Raises:
        DataError: a state is missing or malformed, or they are not of one moment of one run.
    """
    try:
        return _merged(states)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("data state: a rank's state is damaged") from error


def _merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parts = sorted(states, key=lambda state: state["first_stream"])
    first = parts[0]
    raw = b""
    expected = 0
    for part in parts:
        if part["first_stream"] != expected or any(
            part[key] != first[key] for key in ("consumed", "fingerprint", "sources")
        ):
            raise DataError("data state: the ranks' states are not of one moment of one run")
        expected += part["streams"]
        raw += base64.b64decode(part["cursors"])
    return {**first, "streams": expected, "cursors": base64.b64encode(raw).decode()}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(content: Iterable[int]) -> Iterator[int]:
    value = shift = 0
    for byte in content:
        value |= (byte & 0x7F) << shift
        shift += 7
        if value > MAX_ROWS:
            raise ValueError("too large")
        if byte < 0x80:
            yield value
            value = shift = 0
    if shift:
        raise ValueError("cut")
