"""Training data as a pure function: `TokenStream[g]` is the g-th sequence ever trained on, whoever asks and whenever.

    g --mixture--> (language, k)      k counts the sequences drawn from the language so far
    k --divmod---> (epoch, j)         over the rows of the language
    j --permute--> row                a new permutation for every language and epoch
    row ---------> L + 1 tokens at row * L: the first L are inputs, the last L their labels

Neighbouring rows share one token, so every token but a source's first and the tail after its last full row is a label
once an epoch. Documents follow one another without a mask: a document's first token is the label of the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import xxhash

from data.batch import IGNORE_INDEX, Row
from data.errors import DataError
from data.order import Mixture, permute
from data.shards import TokenCorpus, TokenSource

STREAM_VERSION = 1


@dataclass(frozen=True)
class StreamSpec:
    """All that decides which sequence comes when. `weights` are the exact shares, `corpus` is `TokenCorpus.digest`."""

    corpus: str
    seq_len: int
    seed: int
    weights: Mapping[str, Fraction]

    def fingerprint(self) -> str:
        """32 hex digits that differ when the stream does."""
        shares = {language: str(share) for language, share in sorted(self.weights.items())}
        spec = (STREAM_VERSION, self.corpus, self.seq_len, self.seed, shares)
        return xxhash.xxh3_128_hexdigest(json.dumps(spec).encode())


class TokenStream:
    """The endless training sequences of a corpus, and its validation rows.

    Args:
        corpus: an open corpus.
        seq_len: inputs in a sequence, L.
        weights: share of every language of the corpus in the training tokens; 0 leaves a language out.
        seed: order of the rows.

    Raises:
        DataError: a setting out of range, weights that do not name the corpus's languages, or a language without a row.
    """

    def __init__(
        self, corpus: TokenCorpus, seq_len: int, weights: Mapping[str, Fraction | float | str], seed: int
    ) -> None:
        if seq_len < 1:
            raise DataError(f"seq_len: {seq_len} is too small, 1 is the least")
        if set(weights) != set(corpus.languages):
            named, there = (", ".join(sorted(names)) or "none" for names in (weights, corpus.languages))
            raise DataError(
                f"weights: name {named}, the corpus has {there}; name these "
                "(~data.weights.NAME drops one, weight 0 leaves a language out)"
            )
        self.corpus = corpus
        self.seq_len = seq_len
        self.seed = seed
        self._mixture = Mixture(weights)
        self.spec = StreamSpec(corpus.digest, seq_len, seed, self._mixture.weights)
        self._sources = {language: corpus.split("train").source(language) for language in self._mixture.weights}
        for language, source in self._sources.items():
            if source.num_tokens <= seq_len:
                raise DataError(
                    f"language {language}: {source.num_tokens} training tokens, one sequence needs {seq_len + 1}"
                )

    def __getitem__(self, index: int) -> Row:
        """The training sequence with global index `index`, 0 or more."""
        if index < 0:
            raise IndexError(f"sequence {index}: indices start at 0")
        language, drawn = self._mixture.locate(index)
        rows = self.num_rows(language)
        epoch, place = divmod(drawn, rows)
        row = permute(place, rows, xxhash.xxh3_64_intdigest(f"{self.seed}/{language}/{epoch}".encode()))
        return self._cut(self._sources[language], language, row, epoch)

    def num_rows(self, language: str) -> int:
        """Rows of a language in one epoch."""
        return (self._sources[language].num_tokens - 1) // self.seq_len

    def num_validation_rows(self, language: str) -> int:
        """Rows that cover the language's held-out tokens, the last one padded."""
        return -(-(self.corpus.split("validation").source(language).num_tokens - 1) // self.seq_len)

    def validation_row(self, language: str, row: int) -> Row:
        """Row `row` of the held-out tokens, in order; from `num_validation_rows` on, rows are all padding."""
        return self._cut(self.corpus.split("validation").source(language), language, row, epoch=0)

    def validation_rows(self, language: str) -> Iterator[Row]:
        """All held-out rows of a language in order; every held-out token but the first is a label exactly once."""
        return (self.validation_row(language, row) for row in range(self.num_validation_rows(language)))

    def _cut(self, source: TokenSource, language: str, row: int, epoch: int) -> Row:
        begin = min(row * self.seq_len, source.num_tokens - 1)
        end = min(begin + self.seq_len, source.num_tokens - 1)
        count, missing = end - begin, self.seq_len - (end - begin)
        tokens = source.tokens(begin, end + 1)
        return Row(
            input_ids=np.pad(tokens[:-1], (0, missing), constant_values=self.corpus.eos_id),
            labels=np.pad(tokens[1:], (0, missing), constant_values=IGNORE_INDEX),
            valid=np.arange(self.seq_len) < count,
            document_starts=np.pad(source.document_starts(begin, end), (0, missing)),
            language=self.corpus.languages.index(language),
            source_row=row,
            epoch=epoch,
        )
