"""Compression of a tokenizer: the bytes of text that a token stands for, by language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from data.documents import Document

DOCUMENTS_AT_ONCE = 256
Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass
class Compression:
    """Bytes of text by language, and the tokens of every encoder for them."""

    text_bytes: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, Counter[str]] = field(default_factory=dict)

    def bytes_per_token(self, encoder: str, language: str) -> float:
        return self.text_bytes[language] / max(self.tokens[encoder][language], 1)


def compression(
    encoders: Mapping[str, Encode],
    documents: Iterable[Document],
    groups: Callable[[Document], Sequence[str]] = lambda document: [document.language],
) -> Compression:
    """Encode every document with each of `encoders` and add up in all of its `groups`, its language by default."""
    result = Compression(tokens={name: Counter() for name in encoders})
    rest = iter(documents)
    while batch := list(islice(rest, DOCUMENTS_AT_ONCE)):
        texts = [document.text for document in batch]
        for document in batch:
            result.text_bytes.update(dict.fromkeys(groups(document), document.num_bytes))
        for name, encode in encoders.items():
            for document, ids in zip(batch, encode(texts), strict=True):
                result.tokens[name].update(dict.fromkeys(groups(document), len(ids)))
    return result


def table(result: Compression) -> Iterator[str]:
    """Lines: a row a group, with its text in MB, and bytes per token and tokens of every encoder."""
    width = max(len("group"), *map(len, result.text_bytes), 0)
    yield f"{'':{width}} {'MB':>9}" + "".join(f"  {name[-24:]:>24}" for name in result.tokens)
    for key in sorted(result.text_bytes):
        cells = (
            f"  {result.bytes_per_token(name, key):>10.3f} {counts[key]:>13,}" for name, counts in result.tokens.items()
        )
        yield f"{key:{width}} {result.text_bytes[key] / 1e6:>9.3f}" + "".join(cells)
