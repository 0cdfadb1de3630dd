"""Documents as one run of ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from data.tokenizer import Tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """BOS, ids, EOS of every text, one after another, (n,) of `dtype`; and how many each has, int64 (texts,)."""
    ids = tokenizer.encode_batch(texts)
    sizes = np.fromiter(map(len, ids), np.int64, len(ids)) + 2
    ends = np.cumsum(sizes)
    out = np.empty(int(sizes.sum()), dtype)
    inside = np.ones(len(out), dtype=np.bool_)
    inside[ends - 1] = inside[ends - sizes] = False
    out[inside] = np.fromiter(chain.from_iterable(ids), dtype, len(out) - 2 * len(ids))
    out[ends - sizes], out[ends - 1] = tokenizer.bos_id, tokenizer.eos_id
    return out, sizes
