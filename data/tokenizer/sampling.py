"""Which text a tokenizer learns from: pieces of training documents, so chosen that the languages get their shares.

The text is read twice and never held. The first reading adds up the bytes of every language by the leading bits of a
hash of each piece; from these sums follows, for every language, the hash below which pieces are taken. The choice is
therefore a property of the set of documents, whatever the order of files and rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.documents import Document
from data.errors import DataError
from data.split import SPLIT_KEY, is_held_out, keyed_hash

PIECE_CHARACTERS = 1 << 13
BALANCE_KEY = 0x62616C616E6365
BUCKET_BITS = 16


@dataclass(frozen=True)
class Sample:
    """The choice. `limits`: pieces of a language in buckets below its limit are taken.

    `available` and `taken` are bytes of training text by language. `exceptions` are hashes of the documents for which
    the rule of `data.split` is turned round.
    """

    limits: Mapping[str, int]
    available: Mapping[str, int]
    taken: Mapping[str, int]
    exceptions: frozenset[int]

    def pieces(self, documents: Iterable[Document]) -> Iterator[str]:
        """The chosen pieces of `documents`, in their order."""
        for document in documents:
            digest = keyed_hash(document.text, SPLIT_KEY)
            if is_held_out(digest) == (digest in self.exceptions):
                limit = self.limits[document.language]
                yield from (piece for bucket, piece in _pieces(document) if bucket < limit)


@dataclass
class _Source:
    """The documents of one source with the lowest and the highest hash, and which kinds it has."""

    lowest: tuple[int, Document]
    highest: tuple[int, Document]
    has_held_out: bool = False
    has_training: bool = False


def choose(documents: Iterable[Document], shares: Mapping[str, Fraction], max_bytes: int) -> Sample:
    """Choose at most `max_bytes` of the training part of `documents`, `shares` of them by language.

    Without `shares` every language gets equally many bytes. Languages are exact to within a bucket: a 65,536th of the
    text, or a piece where that is more.

    Raises:
        DataError: no training documents, or `shares` names other languages than the text has.
    """
    buckets: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1 << BUCKET_BITS, dtype=np.int64))
    sources: dict[str, _Source] = {}
    for document in documents:
        digest = keyed_hash(document.text, SPLIT_KEY)
        held_out = is_held_out(digest)
        _note(sources, document, digest, held_out)
        _add(buckets[document.language], document, 0 if held_out else 1)
    exceptions = _exceptions(sources.values())
    for digest, document in exceptions.items():
        _add(buckets[document.language], document, 1 if is_held_out(digest) else -1)
    available = {language: int(sums.sum()) for language, sums in sorted(buckets.items())}
    wanted = _wanted(available, shares, max_bytes)
    sums = {language: np.cumsum(buckets[language]) for language in available}
    limits = {language: int(np.searchsorted(sums[language], wanted[language], "right")) for language in available}
    taken = {language: int(sums[language][limit - 1]) if limit else 0 for language, limit in limits.items()}
    return Sample(limits, available, taken, frozenset(exceptions))


def _wanted(available: Mapping[str, int], shares: Mapping[str, Fraction], max_bytes: int) -> dict[str, int]:
    """Bytes to take of every language: as many as `shares` allow before one runs out or the total is reached."""
    if not any(available.values()):
        raise DataError("--source: no training documents, at least two are needed")
    shares = shares or dict.fromkeys(available, Fraction(1))
    if set(shares) != set(available):
        raise DataError(f"--share: shares of {', '.join(sorted(shares))} for text in {', '.join(available)}")
    if empty := [language for language, size in available.items() if not size]:
        raise DataError(f"--source: language {empty[0]} has no training documents")
    total = sum(shares.values())
    most = min(Fraction(max_bytes), *(available[language] * total / share for language, share in shares.items()))
    return {language: int(most * share / total) for language, share in shares.items()}


def _exceptions(sources: Iterable[_Source]) -> dict[int, Document]:
    """A source with no held-out document gives its lowest hash; one with nothing else keeps its highest."""
    exceptions: dict[int, Document] = {}
    for source in sources:
        if not source.has_training:
            exceptions.update([source.highest])
        elif not source.has_held_out and source.lowest[0] != source.highest[0]:
            exceptions.update([source.lowest])
    return exceptions


def _note(sources: dict[str, _Source], document: Document, digest: int, held_out: bool) -> None:
    found = (digest, document)
    source = sources.setdefault(document.source, _Source(found, found))
    source.lowest = min(source.lowest, found, key=lambda entry: entry[0])
    source.highest = max(source.highest, found, key=lambda entry: entry[0])
    source.has_held_out |= held_out
    source.has_training |= not held_out


def _add(sums: np.ndarray, document: Document, sign: int) -> None:
    for bucket, piece in _pieces(document):
        sums[bucket] += sign * len(piece.encode())


def _pieces(document: Document) -> Iterator[tuple[int, str]]:
    """(bucket, text) of a document's pieces: long ones would make the patterns of the trainer slow."""
    for start in range(0, len(document.text), PIECE_CHARACTERS):
        piece = document.text[start : start + PIECE_CHARACTERS]
        yield keyed_hash(piece, BALANCE_KEY) >> (128 - BUCKET_BITS), piece
