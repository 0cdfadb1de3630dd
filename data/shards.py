"""Read the shards of a prepared corpus: memory-mapped, sliced by token position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.manifest import Shard

CHECK_AT_ONCE = 1 << 22


class _ShardFiles:
    """The two files of one shard, mapped. Positions count from the start of the shard."""

    def __init__(self, folder: Path, shard: Shard, dtype: str) -> None:
        token_type = np.dtype(dtype).newbyteorder("<")
        self.tokens = _map(folder / shard.bin_name, token_type, shard.tokens)
        self.ends = _map(folder / shard.idx_name, np.dtype("<u8"), shard.documents)
        if self.ends[-1] != shard.tokens:
            last = self.ends[-1]
            raise DataError(f"{folder / shard.idx_name}: last document ends at {last}, the shard has {shard.tokens}")

    def mark_starts(self, start: int, stop: int, out: np.ndarray) -> None:
        """Set `out`, bool (stop - start,), where positions `start .. stop - 1` open a document."""
        first, last = np.searchsorted(self.ends, np.array([start, stop], dtype=self.ends.dtype))
        opened = self.ends[first:last].astype(np.int64) - start  # a document opens where the one before it ends
        out[opened] = True
        out[: int(start == 0)] = True

    def fill(self, begins: np.ndarray, rows: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> None:
        """`TokenSource.fill_rows` for rows that lie in this shard."""
        length = tokens.shape[1]
        order = np.argsort(begins)  # neighbours are found faster one after the other
        begins, rows = begins[order], rows[order]
        tokens[rows] = self._windows(length)[begins]
        first = np.searchsorted(self.ends, begins.astype(np.uint64))
        last = np.searchsorted(self.ends, (begins + length).astype(np.uint64))
        counts = last - first
        owner = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        opened = self.ends[first[owner] + number].astype(np.int64) - begins[owner]
        starts[rows[owner], opened] = True
        starts[rows[begins == 0], 0] = True

    def _windows(self, length: int) -> np.ndarray:
        """All stretches of `length` tokens as a view, (tokens - length + 1, length), one behind each token."""
        shape, step = (len(self.tokens) - length + 1, length), self.tokens.itemsize
        return np.ndarray(shape, self.tokens.dtype, self.tokens, strides=(step, step))

    def problem(self, vocab_size: int, bos_id: int, eos_id: int) -> str | None:
        ends = self.ends[:].astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        if np.any(ends - starts < 2) or ends[-1] != len(self.tokens):
            return "document ends do not increase"
        for begin in range(0, len(self.tokens), CHECK_AT_ONCE):
            largest = self.tokens[begin : begin + CHECK_AT_ONCE].max()
            if largest >= vocab_size:
                return f"token id {largest} is outside the vocabulary of {vocab_size}"
        if np.any(self.tokens[starts] != bos_id) or np.any(self.tokens[ends - 1] != eos_id):
            return "a document does not run from BOS to EOS"
        return None


class TokenSource:
    """The tokens of one split and source, all shards back to back: BOS, tokens, EOS of every document in turn.

    Attributes:
        num_tokens, num_documents: sizes, BOS and EOS counted as tokens; 0 where nothing was held out.
        text_bytes: bytes of UTF-8 text that the documents hold.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.num_tokens = sum(shard.tokens for shard in shards)
        self.num_documents = sum(shard.documents for shard in shards)
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        self._shards = [_ShardFiles(folder, shard, dtype) for shard in shards]
        self._offsets = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions `start .. stop - 1`, int64, (stop - start,). IndexError outside the source."""
        self._check_range(start, stop)
        ids = np.empty(stop - start, dtype=np.int64)
        self.copy(start, stop, ids)
        return ids

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Which of the positions `start .. stop - 1` open a document, bool, (stop - start,); from the index alone."""
        self._check_range(start, stop)
        starts = np.zeros(stop - start, dtype=np.bool_)
        self._mark(start, stop, starts)
        return starts

    def document_ends(self) -> np.ndarray:
        """Position after the last token of every document, uint64, (num_documents,)."""
        ends = [shard.ends + np.uint64(offset) for shard, offset in zip(self._shards, self._offsets, strict=False)]
        return np.concatenate([np.empty(0, dtype=np.uint64), *ends])

    def fill_rows(self, begins: np.ndarray, rows: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Set `tokens[rows[i]]`, (R, length), to the ids from `begins[i]` on, and `starts` where they open a document;
        `starts` is False before.

        IndexError where a row reaches outside the source.
        """
        length = tokens.shape[1]
        if not len(begins):
            return
        self._check_range(int(begins.min()), int(begins.max()) + length)
        if len(self._shards) == 1:
            self._shards[0].fill(begins, rows, tokens, starts)
            return
        numbers = np.searchsorted(self._offsets, begins, side="right") - 1
        whole = begins + length <= self._offsets[numbers + 1]
        for row, begin in zip(rows[~whole].tolist(), begins[~whole].tolist(), strict=True):
            self.copy(begin, begin + length, tokens[row])
            self._mark(begin, begin + length, starts[row])
        for number in np.unique(numbers[whole]):
            here = whole & (numbers == number)
            self._shards[number].fill(begins[here] - self._offsets[number], rows[here], tokens, starts)

    def problems(self, vocab_size: int, bos_id: int, eos_id: int) -> Iterator[str | None]:
        """For every shard what is wrong with it or None: ids in range, documents in order, each from BOS to EOS."""
        return (shard.problem(vocab_size, bos_id, eos_id) for shard in self._shards)

    def copy(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write the ids at positions `start .. stop - 1` to `out`, (stop - start,), which must lie in the source."""
        for shard, first, last, place in self._pieces(start, stop):
            out[place : place + last - first] = shard.tokens[first:last]

    def _mark(self, start: int, stop: int, out: np.ndarray) -> None:
        for shard, first, last, place in self._pieces(start, stop):
            shard.mark_starts(first, last, out[place : place + last - first])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[_ShardFiles, int, int, int]]:
        """(shard, first, last, place): positions of every shard that `start .. stop` meets, and where they go."""
        number = int(np.searchsorted(self._offsets, start, side="right")) - 1
        place = start
        while place < stop:
            offset, end = int(self._offsets[number]), int(self._offsets[number + 1])
            last = min(stop, end)
            yield self._shards[number], place - offset, last - offset, place - start
            place, number = last, number + 1

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"positions {start}:{stop} are outside 0:{self.num_tokens}")


class CorpusSplit:
    """One split of a corpus: a `TokenSource` for every source."""

    def __init__(self, sources: dict[str, TokenSource]) -> None:
        self._sources = sources

    def source(self, name: str) -> TokenSource:
        """The tokens of source `name`. DataError names the sources there are."""
        if name not in self._sources:
            raise DataError(f"source {name!r} is not in the corpus, it has {', '.join(self._sources)}")
        return self._sources[name]


def require_there(path: Path) -> None:
    """Raise DataError unless the file of a corpus is there."""
    if not path.is_file():
        raise DataError(f"{path}: is missing, prepare the corpus again")


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    require_there(path)
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise DataError(f"{path}: has {size} bytes, the manifest says {length * dtype.itemsize}")
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # slices of a plain array cost less
