"""Training data as a pure function: sequence g of a `TokenStream` is the same, whoever asks for it and whenever.

    g --skip-----> g'                 ranges of sequences left out
    g' --mixture-> (source, k)        k counts the sequences drawn from the source so far
    k --divmod---> (epoch, j)         over the rows of the source
    j --permute--> row                a new permutation for every source and epoch
    row ---------> L inputs and their labels

Rows are cut as `data.packing` says: end to end, or whole documents fitted together. Unless documents are masked from
each other, those in a chunk follow one another: the first token of one is the label of the last of the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from data.batch import Batch, Sequences
from data.corpus import TokenCorpus
from data.errors import DataError
from data.order import Mixture, permute, permute_in_windows, skip
from data.packing import BestFit, Chunks
from data.shards import TokenSource
from data.spec import StreamSpec
from data.stream import Stream

PLANS = "packing"
LOCATED_AT_ONCE = 8192


@dataclass(frozen=True)
class Place:
    """Where a training sequence comes from: `row` counts the rows of the source, `epoch` its passes."""

    source: str
    epoch: int
    row: int


@dataclass(frozen=True)
class Piece:
    """Tokens of one document in a sequence: its number in the source, where in it they begin, their ids (n,)."""

    document: int
    offset: int
    tokens: np.ndarray


class TokenStream(Stream):
    """The endless training sequences of a prepared corpus, in any order they are asked for.

    Raises:
        DataError: weights that do not name the corpus's sources, or a source without a row.
    """

    def __init__(self, corpus: TokenCorpus, spec: StreamSpec) -> None:
        super().__init__(corpus, spec)
        self.corpus = corpus
        self._mixture = Mixture(spec.stages)
        self._sources = [corpus.split("train").source(name) for name in self._mixture.sources]
        self._rows = [
            self._cut(name, source) for name, source in zip(self._mixture.sources, self._sources, strict=True)
        ]
        self._num_rows = np.array([rows.num_rows for rows in self._rows], dtype=np.int64)
        self._permute = permute_in_windows if spec.shuffle == "windowed" else permute
        self._located = lru_cache(maxsize=8)(self._locate_stretch)
        self._places = np.array([corpus.sources.index(name) for name in self._mixture.sources])
        for name, source, rows in zip(self._mixture.sources, self._sources, self._rows, strict=True):
            if rows.num_rows == 0:
                raise DataError(
                    f"source {name}: {source.num_tokens} training tokens, one sequence needs {spec.seq_len + 1}"
                )

    def batch(self, indices: np.ndarray | Sequence[int]) -> Batch:
        """The training sequences with these global indices, 0 or more, in their order."""
        (batch,) = self.batches(indices, len(indices))
        return batch

    def batches(self, indices: np.ndarray | Sequence[int], size: int) -> list[Batch]:
        """As `batch`, in batches of `size` sequences; reading many at once costs less for each."""
        source, _, row = self._locate(np.asarray(indices, dtype=np.int64))
        return self.assemble(self.sequences(source, row), size)

    def place(self, index: int) -> Place:
        """Where training sequence `index` comes from."""
        source, epoch, row = (int(array[0]) for array in self._locate(np.array([index])))
        return Place(self._mixture.sources[source], epoch, row)

    def pieces(self, index: int) -> list[Piece]:
        """What training sequence `index` is made of, in order, padding left out."""
        place = self.place(index)
        number = self._mixture.sources.index(place.source)
        source, rows = self._sources[number], self._rows[number]
        ends = source.document_ends().astype(np.int64)
        found = []
        for begin, length in rows.spans(place.row):
            cuts = ends[np.searchsorted(ends, begin, side="right") : np.searchsorted(ends, begin + length, side="left")]
            bounds = [begin, *cuts.tolist(), begin + length]
            for first, last in zip(bounds, bounds[1:], strict=False):
                document = int(np.searchsorted(ends, first, side="right"))
                opens = int(ends[document - 1]) if document else 0
                found.append(Piece(document, first - opens, source.tokens(first, last)))
        return found

    def num_rows(self, source: str) -> int:
        """Rows of a source in one epoch."""
        return int(self._num_rows[self._mixture.sources.index(source)])

    def padding(self) -> dict[str, float]:
        """Share of every source's inputs that is padding."""
        plans = zip(self._mixture.sources, self._rows, strict=True)
        return {
            name: rows.padding / (rows.num_rows * self.seq_len) if isinstance(rows, BestFit) else 0.0
            for name, rows in plans
        }

    def sequences(self, source: np.ndarray, row: np.ndarray) -> Sequences:
        """Rows as they are stored; `source` (B,) are places in the mixture's sources."""
        shape = (len(row), self.seq_len + 1)
        tokens = np.empty(shape, dtype=self.corpus.manifest.dtype)
        starts = np.zeros(shape, dtype=np.bool_)
        lengths = np.full(len(row), self.seq_len, dtype=np.int64)
        ends = np.zeros((len(row), self.seq_len), dtype=np.bool_) if self.spec.packing == "best_fit" else None
        for place, rows in enumerate(self._rows):
            here = np.flatnonzero(source == place)
            if isinstance(rows, Chunks):
                self._sources[place].fill_rows(rows.begins(row[here]), here, tokens, starts)
                continue
            assert ends is not None
            for at in here.tolist():
                lengths[at] = self._fill(self._sources[place], rows, int(row[at]), tokens[at], starts[at], ends[at])
        places = self._places[source]
        return Sequences(tokens, starts, lengths, self.source_languages[places], places, ends)

    def _fill(
        self, source: TokenSource, plan: BestFit, row: int, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> int:
        """Lay the pieces of one row side by side; returns the inputs filled. Each piece opens a span of its own."""
        tokens[:] = self.text.eos_id
        filled = 0
        for begin, length in plan.spans(row):
            source.copy(begin, begin + length, tokens[filled : filled + length])
            starts[filled] = True
            filled += length
            ends[filled - 1] = True
        return filled

    def _locate(self, indices: np.ndarray) -> np.ndarray:
        """Place in the mixture's sources, epoch and row of every sequence, (3, B)."""
        if np.any(indices < 0):
            raise IndexError("sequence indices start at 0")
        stretch, inside = np.divmod(indices, LOCATED_AT_ONCE)
        if (stretch == stretch[0]).all():
            return self._located(int(stretch[0]))[:, inside]
        parts = [self._located(int(number))[:, place, None] for number, place in zip(stretch, inside, strict=True)]
        return np.concatenate(parts, axis=1)

    def _locate_stretch(self, stretch: int) -> np.ndarray:
        """(3, LOCATED_AT_ONCE): neighbours are asked for next, and many cost hardly more than one."""
        indices = np.arange(stretch * LOCATED_AT_ONCE, (stretch + 1) * LOCATED_AT_ONCE)
        source, drawn = self._mixture.locate(skip(indices, self.spec.skip_ranges))
        epoch, place = np.divmod(drawn, self._num_rows[source])
        row = np.empty_like(place)
        for number in np.unique(source).tolist():
            for own_epoch in np.unique(epoch[source == number]).tolist():
                here = (source == number) & (epoch == own_epoch)
                key = xxhash.xxh3_64_intdigest(f"{self.spec.seed}/{self._mixture.sources[number]}/{own_epoch}".encode())
                row[here] = self._permute(place[here], int(self._num_rows[number]), key)
        return np.stack([source, epoch, row])

    def _cut(self, name: str, source: TokenSource) -> Chunks | BestFit:
        if self.spec.packing == "chunk":
            return Chunks(source.num_tokens, self.seq_len)
        path = self.corpus.folder / PLANS / f"best_fit-{name}-{self.seq_len}"
        return BestFit.cached(path, source.document_ends(), self.seq_len)
