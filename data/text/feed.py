"""The endless tokens of one source in one stream, from any cursor on.

epoch e --permute--> units of the source      dealt out: stream v takes places v, v + V, ...
unit ----permute--> rows of the unit          those held out, filtered or bad are passed over
row --------------> BOS ids EOS               end to end, cut into sequences that share one token with the next
"""

from __future__ import annotations

import numpy as np
import xxhash

from data.errors import DataError
from data.order import permute
from data.text.corpus import TextCorpus
from data.text.cursor import Cursor
from data.text.reader import Reader, Texts

MAX_CHARACTERS = 1 << 15
MOST_BARREN = 100_000


class Feed:
    """Tokens of source number `source` of a corpus for stream `stream`.

    Attributes:
        cursor: the first token of the next sequence.
    """

    def __init__(self, corpus: TextCorpus, reader: Reader, stream: int, source: int, seed: int, cursor: Cursor) -> None:
        self._corpus, self._reader = corpus, reader
        self._stream, self._source = stream, source
        self._key = f"text/{seed}/{corpus.sources[source]}"
        self._num_units = len(corpus.plan.units[source])
        self._next = Cursor(cursor.epoch, cursor.unit, cursor.row)
        self._loaded: tuple[int, int] | None = None
        self._texts: Texts = []
        self._order: list[int] = []
        self._characters = 0
        # Tokens not consumed yet, and the documents they belong to: where each begins, and its place. The first one may
        # begin before the buffer does.
        self._tokens = np.empty(0, corpus.token_type)
        self._begins = np.empty(0, np.int64)
        self._places: list[Cursor] = []
        self._at = 0
        self._offset = cursor.offset

    @property
    def cursor(self) -> Cursor:
        if not len(self._tokens):
            return self._next._replace(offset=self._offset)
        document = int(np.searchsorted(self._begins, self._at, side="right")) - 1
        return self._places[document]._replace(offset=self._at - int(self._begins[document]))

    def take(self, length: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Write the next `length` inputs and the token behind them, and where documents begin, into two (length + 1,).

        Raises:
            DataError: a file cannot be read, or nothing is left to train on.
        """
        self.advance(length)
        begin, end = self._at - length, self._at + 1
        tokens[:] = self._tokens[begin:end]
        starts[:] = False
        first, last = np.searchsorted(self._begins, (begin, end))
        starts[self._begins[first:last] - begin] = True

    def advance(self, length: int) -> None:
        """Go `length` inputs on; the token behind them is there."""
        if self._offset:
            self._enter_document()
        while len(self._tokens) <= self._at + length:
            self._characters = max(min(2 * self._characters, MAX_CHARACTERS), 2 * length)
            self._fill()
        self._at += length

    def _enter_document(self) -> None:
        """Read the one document that the cursor points into, up to there."""
        self._fill()
        self._at, self._offset = min(self._offset, len(self._tokens)), 0

    def _fill(self) -> None:
        texts, places = self._collect()
        tokenizer = self._corpus.tokenizer
        ids, sizes = tokenizer.frame(tokenizer.encode_batch(texts))
        first = max(int(np.searchsorted(self._begins, self._at, side="right")) - 1, 0)
        left = self._tokens[self._at :]
        begins = len(left) + np.cumsum(sizes) - sizes
        self._begins = np.concatenate([self._begins[first:] - self._at, begins])
        self._places = self._places[first:] + places
        self._tokens = np.concatenate([left, ids])
        self._at = 0

    def _collect(self) -> tuple[list[str], list[Cursor]]:
        """Texts from `_next` on, one at least, and their places."""
        texts: list[str] = []
        places: list[Cursor] = []
        characters = barren = 0
        while not texts or characters < self._characters:
            self._load()
            epoch, unit, row, _ = self._next
            if row >= len(self._order):
                self._next = Cursor(epoch, unit + 1)
                barren += 1
            else:
                self._next = Cursor(epoch, unit, row + 1)
                text = self._texts[self._order[row]]
                if text is not None:
                    texts.append(text)
                    places.append(Cursor(epoch, unit, row))
                    characters += len(text)
                    barren = 0
                    continue
                barren += 1
            if barren >= MOST_BARREN:
                name = self._corpus.sources[self._source]
                raise DataError(f"source {name}: {MOST_BARREN} rows on end leave nothing to train on")
        return texts, places

    def _load(self) -> None:
        epoch, unit, _, _ = self._next
        streams = self._corpus.streams
        if unit >= -((self._stream - self._num_units) // streams):
            epoch, unit = epoch + 1, 0
            self._next = Cursor(epoch)
        if self._loaded == (epoch, unit):
            return
        place = self._stream + unit * streams
        number = int(permute(np.array([place]), self._num_units, self._hash(epoch))[0])
        self._texts = self._reader.texts(self._source, number)
        rows = np.arange(len(self._texts))
        self._order = permute(rows, len(rows), self._hash(epoch, number)).tolist()
        self._loaded = epoch, unit

    def _hash(self, *numbers: int) -> int:
        return xxhash.xxh3_64_intdigest("/".join([self._key, *map(str, numbers)]).encode())
