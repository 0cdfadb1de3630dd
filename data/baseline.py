"""What a general compressor makes of the held-out text: the figure a language model has to beat."""

from __future__ import annotations

import lzma

# `xz -9` looks back this far, so more text before the held-out text would not help it.
XZ_WINDOW = 64 << 20
# A language with more text than this has no baseline: xz would take longer than all the rest of the preparation.
MOST_TEXT = 64 << 20


def xz_bits_per_byte(text: bytes) -> float:
    """Size of `xz -9` of `text`, in bits per byte of text."""
    return len(lzma.compress(text, preset=9)) * 8 / len(text)


def xz_primed_bits_per_byte(training_text: bytes, text: bytes) -> float:
    """Bits per byte that `text` adds to `xz -9` of the training text in front of it (its last 64 MiB at most)."""
    prime = training_text[-XZ_WINDOW:]
    added = len(lzma.compress(prime + text, preset=9)) - len(lzma.compress(prime, preset=9))
    return added * 8 / len(text)
