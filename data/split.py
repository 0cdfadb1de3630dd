"""Which documents are held out for validation: a property of the text alone.

A document is held out when a keyed hash of its text falls into the lowest `fraction` of all hashes. File order, file
names, seeds and the rest of the corpus play no part, so the tokenizer, the corpus and every later run agree on what was
never trained on, whether they see the text whole or as a stream. A text held out once is held out wherever it appears.
"""

from __future__ import annotations

from fractions import Fraction

import xxhash

HELD_OUT = Fraction(6, 100)
SPLIT_KEY = 0x6D6F6573616963
_HASHES = 1 << 128


def keyed_hash(text: str, key: int) -> int:
    """128 bits that depend on `text` and the 64-bit `key` alone: the source of every order in this package."""
    return xxhash.xxh3_128_intdigest(text.encode(), key)


def is_held_out(digest: int, fraction: Fraction = HELD_OUT) -> bool:
    """Whether the text with `digest`, its keyed hash under `SPLIT_KEY`, belongs to validation."""
    return digest < held_out_below(fraction)


def held_out_below(fraction: Fraction) -> int:
    """The 128-bit bound under which digests are held out."""
    return int(_HASHES * fraction)
