"""Which documents are held out for validation: a property of the text alone.

Within every (language, source) group documents are held out in the order of a keyed hash of their text until they make
up `HELD_OUT` of the group's bytes. File order, file names and seeds play no part, so the tokenizer, the corpus and
every later run agree on what was never trained on. A text held out once is held out wherever it is repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

import xxhash

from data.documents import Document

HELD_OUT = Fraction(6, 100)
SPLIT_KEY = 0x6D6F6573616963


def keyed_hash(text: str, key: int) -> int:
    """128 bits that depend on `text` and the 64-bit `key` alone: the source of every order in this package."""
    return xxhash.xxh3_128_intdigest(text.encode(), key)


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return (training documents, validation documents), each in the given order.

    Every group with two or more distinct texts holds out at least `HELD_OUT` of its bytes, or all its texts but one.
    """
    groups: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    digests = [keyed_hash(document.text, SPLIT_KEY) for document in documents]
    for document, digest in zip(documents, digests, strict=True):
        groups[document.language, document.source][digest] += document.num_bytes
    held_out = {digest for sizes in groups.values() for digest in _choose(sizes)}
    train = [document for document, digest in zip(documents, digests, strict=True) if digest not in held_out]
    validation = [document for document, digest in zip(documents, digests, strict=True) if digest in held_out]
    return train, validation


def _choose(sizes: dict[int, int]) -> Iterable[int]:
    """Digests to hold out of one group, given the bytes that stand behind each digest."""
    wanted = HELD_OUT * sum(sizes.values())
    taken = 0
    for digest in sorted(sizes)[:-1]:
        if taken >= wanted:
            return
        taken += sizes[digest]
        yield digest
