"""Read a `.tiktoken` file, tokens and ranks as GPT-2 has them, into a `tokenizers` BPE.

A line holds a token's bytes in base64 and its rank. The merges are not in the file, but the ranks determine them: a
token is made from the two parts left when merging its bytes stops short of the token itself.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.errors import DataError
from data.tokenizer import errors_name, read_tokenizer
from data.tokenizer.layout import byte_letters

Ranks = dict[bytes, int]


def load_ranks(path: str | Path) -> Tokenizer:
    """A BPE that cuts words by GPT-2's pattern and merges by the ranks of `path`; it has no special tokens.

    Raises:
        DataError: no such file, a malformed line, a byte without a rank, or a token that no merge makes.
    """
    ranks = _read(path)
    spell = byte_letters()
    merges = [_parts(token, rank, ranks, str(path)) for token, rank in ranks.items() if len(token) > 1]
    words = {token: "".join(spell[byte] for byte in token) for token in ranks}
    with errors_name(str(path), "not a file of ranks"):
        model = models.BPE(
            {words[token]: rank for token, rank in ranks.items()}, [(words[a], words[b]) for a, b in merges]
        )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read(path: str | Path) -> Ranks:
    ranks: Ranks = {}
    for number, line in enumerate(read_tokenizer(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path}:{number}: must be a token in base64 and its rank") from error
    if missing := 256 - sum(bytes([byte]) in ranks for byte in range(256)):
        raise DataError(f"{path}: {missing} of 256 bytes have no rank")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _parts(token: bytes, rank: int, ranks: Ranks, name: str) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
            raise DataError(f"{name}: no merge of tokens with lower ranks makes {token!r:.60} (rank {rank})")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]
