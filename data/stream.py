"""What all streams of training sequences have in common: a text, a spec, and rows of held-out text to validate on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.batch import Batch, Sequences, assemble
from data.errors import DataError
from data.shards import CorpusSplit
from data.spec import StreamSpec


class Text(Protocol):
    """What a corpus of either kind, prepared or tokenised while training, says of itself.

    Attributes:
        sources, languages: names, sorted; a place here is the id of a source or language everywhere else.
        language_of: language of every source.
        digest: of everything training can see.
        vocab_size, eos_id, tokenizer_path: of its tokenizer.
        baselines: what `xz` makes of the held-out text, by language, where that is known.
    """

    sources: tuple[str, ...]
    languages: tuple[str, ...]
    language_of: dict[str, str]
    digest: str
    vocab_size: int
    eos_id: int
    tokenizer_path: Path
    baselines: Mapping[str, Any]

    def split(self, name: str) -> CorpusSplit: ...

    def validation_bytes(self, language: str) -> int: ...

    def sample(self, language: str, count: int) -> np.ndarray: ...


class Stream:
    """Training sequences of a text under a spec; see the two kinds, `TokenStream` and `TextStream`.

    Attributes:
        text, spec: as given.
        fingerprint: differs from that of any stream that deals other sequences.

    Raises:
        DataError: weights that do not name the text's sources.
    """

    def __init__(self, text: Text, spec: StreamSpec) -> None:
        require_sources("weights", spec.names(), text)
        self.text, self.spec = text, spec
        self.seq_len = spec.seq_len
        self.fingerprint = spec.fingerprint(text.digest)
        languages = [text.languages.index(text.language_of[name]) for name in text.sources]
        self.source_languages = np.array(languages)

    def assemble(self, sequences: Sequences, size: int) -> list[Batch]:
        """Batches of `size` of the sequences, as they were read."""
        return assemble(sequences, size, mask_documents=self.spec.mask_documents, padding_id=self.text.eos_id)

    def num_validation_rows(self, source: str) -> int:
        """Rows that cover the source's held-out tokens, the last one padded."""
        return -(-max(self.text.split("validation").source(source).num_tokens - 1, 0) // self.seq_len)

    def validation_batch(self, source: str, first: int, count: int) -> Batch:
        """Held-out rows `first .. first + count - 1` of a source, cut end to end; rows behind the last are all padding.

        Every held-out token but the first is a label once, unless documents are masked from each other.
        """
        held_out = self.text.split("validation").source(source)
        last = max(held_out.num_tokens - 1, 0)
        begins = np.minimum(np.arange(first, first + count) * self.seq_len, last)
        lengths = np.minimum(begins + self.seq_len, last) - begins
        tokens = np.full((count, self.seq_len + 1), self.text.eos_id, dtype=np.int64)
        starts = np.zeros(tokens.shape, dtype=np.bool_)
        for row in np.flatnonzero(lengths).tolist():
            begin, end = int(begins[row]), int(begins[row] + lengths[row] + 1)
            tokens[row, : end - begin] = held_out.tokens(begin, end)
            starts[row, : end - begin] = held_out.document_starts(begin, end)
        place = np.full(count, self.text.sources.index(source))
        (batch,) = self.assemble(Sequences(tokens, starts, lengths, self.source_languages[place], place), count)
        return batch


def require_sources(key: str, names: Iterable[str], text: Text) -> None:
    """Raise DataError, naming `key`, unless `names` are the sources of `text`."""
    if set(names) != set(text.sources):
        named, there = (", ".join(sorted(group)) or "none" for group in (names, text.sources))
        raise DataError(
            f"{key}: name {named}, the text has {there}; name these "
            "(~data.weights.NAME drops one, weight 0 leaves a source out)"
        )


def validation_batches(
    stream: Stream, source: str, batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of a source's held-out rows; all ranks get equally many batches, the last ones padded.

    Raises:
        DataError: a size below 1, or the source is not in the corpus.
    """
    if min(batch_size, dp_size) < 1:
        raise DataError(f"batch_size and dp_size: {batch_size} and {dp_size} must be at least 1")
    for start in range(0, stream.num_validation_rows(source), batch_size * dp_size):
        yield stream.validation_batch(source, start + dp_rank * batch_size, batch_size)
