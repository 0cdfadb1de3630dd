"""What a worker process is told and what it answers: one line of JSON, then messages of bytes.

Every message is the length of its content, its kind, and the content.
"""

from __future__ import annotations

import json
import struct
from typing import BinaryIO

import numpy as np

from data.spec import StreamSpec
from data.text.corpus import TextCorpus
from data.text.cursor import FIELDS
from data.text.deal import Turn

HEADER = struct.Struct("<IB")
TURN, FILE, BAD_ROW, ERROR = range(4)
_SIZES = struct.Struct("<II")


def send(out: BinaryIO, kind: int, payload: bytes) -> None:
    """Write one message."""
    out.write(HEADER.pack(len(payload), kind) + payload)
    out.flush()


def receive(file: BinaryIO) -> tuple[int, bytes] | None:
    """Kind and content of the next message, None at the end."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    length, kind = HEADER.unpack(header)
    payload = file.read(length)
    return (kind, payload) if len(payload) == length else None


def pack_turn(turn: Turn) -> bytes:
    """A turn as bytes."""
    sizes = _SIZES.pack(len(turn.tokens), len(turn.moves))
    arrays = (turn.tokens, np.packbits(turn.starts, axis=1), turn.sources, turn.moves)
    return sizes + b"".join(array.tobytes() for array in arrays)


def unpack_turn(content: bytes, seq_len: int, token_type: np.dtype) -> Turn:
    """The turn of `pack_turn`."""
    rows, moves = _SIZES.unpack_from(content)
    width, at = seq_len + 1, _SIZES.size
    packed = -(-width // 8)
    tokens = np.frombuffer(content, token_type, rows * width, at).reshape(rows, width)
    at += tokens.nbytes
    starts = np.frombuffer(content, np.uint8, rows * packed, at).reshape(rows, packed)
    at += starts.nbytes
    numbers = np.frombuffer(content, np.uint8, offset=at).copy().view(np.int64)
    unpacked = np.unpackbits(starts, axis=1, count=width).view(np.bool_)
    return Turn(tokens, unpacked, numbers[:rows], numbers[rows:].reshape(moves, 2 + FIELDS))


def job_of(corpus: TextCorpus, spec: StreamSpec, streams: list[int], cursors: str, turn: int) -> bytes:
    """The line that tells a worker what to do; `cursors` as packed."""
    stages = [[stage.start, {name: str(share) for name, share in stage.weights.items()}] for stage in spec.stages]
    settings = {"seq_len": spec.seq_len, "seed": spec.seed, "skip_ranges": spec.skip_ranges}
    job = {
        "corpus": corpus.to_json(),
        "spec": settings,
        "stages": stages,
        "streams": streams,
        "cursors": cursors,
        "turn": turn,
    }
    return json.dumps(job).encode() + b"\n"
