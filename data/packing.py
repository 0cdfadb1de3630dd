"""How a source's tokens are cut into rows of a sequence length: end to end, or whole documents fitted together.

`Chunks` cuts the tokens as they lie: no token is lost, most documents are cut somewhere. `BestFit` cuts only documents
longer than a row and fits the pieces into rows, best fit decreasing (Ding et al., "Fewer truncations improve language
modeling", 2024): few documents are cut, and what stays free is padding, counted in `padding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data.files import writing_whole

HEADER = 4
PACKINGS = ("chunk", "best_fit")


class Chunks:
    """Row r holds the inputs `r * L .. (r + 1) * L - 1` and the token after them.

    Neighbours share one token, so that every token but the first and the tail after the last full row is a label once
    an epoch.
    """

    def __init__(self, num_tokens: int, seq_len: int) -> None:
        self.seq_len = seq_len
        self.num_rows = max(num_tokens - 1, 0) // seq_len

    def begins(self, rows: np.ndarray) -> np.ndarray:
        """Position of the first input of each row, int64."""
        return rows * self.seq_len

    def spans(self, row: int) -> list[tuple[int, int]]:
        """(begin, length) of the inputs of a row."""
        return [(row * self.seq_len, self.seq_len)]


@dataclass(frozen=True)
class BestFit:
    """Pieces of documents, row by row.

    Attributes:
        seq_len: inputs in a row, L.
        begins, lengths: first token and number of tokens of every piece, in the order of the rows, uint64 and uint32.
        first_piece: row r holds the pieces `first_piece[r] .. first_piece[r + 1] - 1`, uint64 (rows + 1,).
    """

    seq_len: int
    begins: np.ndarray
    lengths: np.ndarray
    first_piece: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.first_piece) - 1

    @property
    def padding(self) -> int:
        """Inputs of all rows that hold no token."""
        return self.num_rows * self.seq_len - int(self.lengths.sum(dtype=np.int64))

    def spans(self, row: int) -> list[tuple[int, int]]:
        """(begin, length) of the pieces of a row, in order."""
        pieces = slice(int(self.first_piece[row]), int(self.first_piece[row + 1]))
        return list(zip(self.begins[pieces].tolist(), self.lengths[pieces].tolist(), strict=True))

    @classmethod
    def plan(cls, document_ends: np.ndarray, seq_len: int) -> BestFit:
        """Fit documents, which end before `document_ends` (D,), into rows of `seq_len` inputs."""
        begins, lengths = _pieces(document_ends.astype(np.int64), seq_len)
        order = np.argsort(-lengths, kind="stable")
        row_of = np.empty(len(order), dtype=np.int64)
        row_of[order] = _best_fit_decreasing(lengths[order], seq_len)
        by_row = np.argsort(row_of, kind="stable")  # within a row, pieces keep the order of the documents
        counts = np.bincount(row_of) if len(row_of) else np.zeros(0, dtype=np.int64)
        return cls(
            seq_len,
            begins[by_row].astype("<u8"),
            lengths[by_row].astype("<u4"),
            np.concatenate([[0], np.cumsum(counts)]).astype("<u8"),
        )

    @classmethod
    def cached(cls, path: Path, document_ends: np.ndarray, seq_len: int) -> BestFit:
        """The plan kept in the file `path`, made there when it is missing or damaged; made in memory where that
        cannot be written."""
        name = xxhash.xxh3_64_intdigest(np.ascontiguousarray(document_ends, "<u8"), seq_len)
        if (plan := _read(path, seq_len, name)) is not None:
            return plan
        plan = cls.plan(document_ends, seq_len)
        try:
            _write(path, plan, name)
        except OSError:  # a corpus on read-only storage
            return plan
        return plan


def _pieces(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and length of every document, longer ones cut into rows and a rest."""
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[document] + number * seq_len
    return begins, np.minimum(ends[document] - begins, seq_len)


def _best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each piece, given falling lengths: the fullest row that still has room, else a new one.

    Pieces of one length are placed together: as many as there are rows with the least sufficient room, and so on.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}
    room_exists = np.zeros(seq_len + 1, dtype=np.bool_)
    num_rows = 0

    def leave(room: int, names: np.ndarray) -> None:
        if room and len(names):
            open_rows.setdefault(room, []).append(names)
            room_exists[room] = True

    values, firsts = np.unique(-lengths, return_index=True)
    for length, first, end in zip((-values).tolist(), firsts, [*firsts[1:], len(lengths)], strict=True):
        place = first
        while place < end:
            wide_enough = np.flatnonzero(room_exists[length:])
            room = int(length + wide_enough[0]) if len(wide_enough) else seq_len
            fit = room // length
            if len(wide_enough):
                names = np.concatenate(open_rows.pop(room))
                room_exists[room] = False
            else:
                names = np.arange(num_rows, num_rows + -(-(end - place) // fit))
                num_rows += len(names)
            count = min(end - place, len(names) * fit)
            filled, rest = divmod(count, fit)
            rows[place : place + count] = np.repeat(names, fit)[:count]
            place += count
            leave(room - fit * length, names[:filled])
            leave(room - rest * length, names[filled : filled + 1])
            leave(room, names[filled + 1 :])
    return rows


def _read(path: Path, seq_len: int, name: int) -> BestFit | None:
    """The plan in `path`; None when there is none, or it is damaged or of other documents."""
    if not path.is_file() or path.stat().st_size < HEADER * 8 or path.stat().st_size % 8:
        return None
    content = np.memmap(path, dtype="<u8", mode="r")
    found, digest, pieces, rows = (int(number) for number in content[:HEADER])
    half = (pieces + 1) // 2
    if found != name or len(content) != HEADER + pieces + half + rows + 1:
        return None
    if xxhash.xxh3_64_intdigest(content[HEADER:]) != digest:
        return None
    begins, lengths, first_piece = np.split(content[HEADER:], [pieces, pieces + half])
    return BestFit(seq_len, begins, lengths.view("<u4")[:pieces], first_piece)


def _write(path: Path, plan: BestFit, name: int) -> None:
    path.parent.mkdir(exist_ok=True)
    lengths = np.zeros((len(plan.lengths) + 1) // 2 * 2, dtype="<u4")
    lengths[: len(plan.lengths)] = plan.lengths
    digest = xxhash.xxh3_64()
    for array in (plan.begins, lengths, plan.first_piece):
        digest.update(array)
    header = np.array([name, digest.intdigest(), len(plan.lengths), plan.num_rows], dtype="<u8")
    with writing_whole(path) as file:
        for array in (header, plan.begins, lengths, plan.first_piece):
            file.write(array.tobytes())
