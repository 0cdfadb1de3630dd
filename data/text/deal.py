"""Deal sequences to virtual streams, turn by turn: sequence g is the turn g // V of stream g % V.

Every turn a stream gives one sequence, of the source that the mixture says for g. Sequences to be skipped are read past
in between, so that what follows is what it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.order import Mixture, skip
from data.spec import StreamSpec
from data.text.corpus import TextCorpus
from data.text.cursor import FIELDS, Cursor
from data.text.feed import Feed
from data.text.reader import Reader


@dataclass(frozen=True)
class Turn:
    """One sequence of each of n streams.

    Attributes:
        tokens, starts: (n, L + 1) ids as stored and bool.
        sources: (n,) int64, places in the corpus's sources.
        moves: (m, 6) int64, the cursors that moved: place among the n streams, source, and the cursor's four numbers.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sources: np.ndarray
    moves: np.ndarray


class Dealer:
    """The turns of some streams of a corpus, from turn `turn` on.

    Args:
        streams: numbers of the streams.
        cursors: (len(streams), sources, 4) where they stand.
        turn: sequences that every stream has given, those skipped not counted.
    """

    def __init__(
        self,
        corpus: TextCorpus,
        spec: StreamSpec,
        streams: Sequence[int],
        cursors: np.ndarray,
        turn: int,
        reader: Reader,
    ) -> None:
        self._corpus, self._spec = corpus, spec
        self._streams, self._turn = list(streams), turn
        self._mixture = Mixture(spec.stages)
        self._places = np.array([corpus.sources.index(name) for name in self._mixture.sources], dtype=np.int64)
        self._skipped = [turns_skipped(spec.skip_ranges, stream, corpus.streams) for stream in self._streams]

        def feed(place: int, source: int) -> Feed:
            cursor = Cursor(*cursors[place, source].tolist())
            return Feed(corpus, reader, self._streams[place], source, spec.seed, cursor)

        self._new_feed: Callable[[int, int], Feed] = feed
        self._feeds: dict[tuple[int, int], Feed] = {}

    def next_turn(self) -> Turn:
        """The next sequence of every stream. DataError: a source cannot be read."""
        sources, moved = self._locate()
        shape = (len(self._streams), self._spec.seq_len + 1)
        tokens, starts = np.empty(shape, self._corpus.token_type), np.empty(shape, np.bool_)
        for place, source in enumerate(sources.tolist()):
            self._feed(place, source).take(self._spec.seq_len, tokens[place], starts[place])
            moved.add((place, source))
        moves = [(place, source, *self._feed(place, source).cursor) for place, source in sorted(moved)]
        self._turn += 1
        return Turn(tokens, starts, sources, np.array(moves, dtype=np.int64).reshape(-1, 2 + FIELDS))

    def _locate(self) -> tuple[np.ndarray, set[tuple[int, int]]]:
        """Source of every stream's next sequence; those to be skipped are read past, and the feeds they moved named."""
        moved = set()
        turns = np.empty(len(self._streams), np.int64)
        for place, (stream, ranges) in enumerate(zip(self._streams, self._skipped, strict=True)):
            turns[place] = _unskipped(self._turn, ranges)
            first = _unskipped(self._turn - 1, ranges) + 1 if self._turn else 0
            for source in self._sources_of(np.arange(first, turns[place]), stream).tolist():
                self._feed(place, source).advance(self._spec.seq_len)
                moved.add((place, source))
        return self._sources_of(turns, np.array(self._streams)), moved

    def _sources_of(self, turns: np.ndarray, streams: np.ndarray | int) -> np.ndarray:
        if not len(turns):
            return turns
        return self._places[self._mixture.locate(turns * self._corpus.streams + streams)[0]]

    def _feed(self, place: int, source: int) -> Feed:
        if (place, source) not in self._feeds:
            self._feeds[place, source] = self._new_feed(place, source)
        return self._feeds[place, source]


def turns_skipped(ranges: Sequence[tuple[int, int]], stream: int, streams: int) -> list[tuple[int, int]]:
    """The turns of a stream whose sequences lie in `ranges`."""
    turns = [tuple(max(-((stream - bound) // streams), 0) for bound in pair) for pair in ranges]
    return [(first, end) for first, end in turns if first < end]


def _unskipped(turn: int, ranges: Sequence[tuple[int, int]]) -> int:
    return int(skip(np.array([turn]), ranges)[0]) if ranges else turn
