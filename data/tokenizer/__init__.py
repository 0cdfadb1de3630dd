"""Byte-level BPE: load, check and use a `tokenizer.json`.

`python -m data.tokenizer train` makes one, `import` takes over another project's, `inspect` describes and compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from data.documents import require_file
from data.errors import DataError, one_line
from data.tokenizer.layout import (
    BOS,
    EOS,
    MAX_FILE_BYTES,
    check_entries,
    check_lossless,
    check_unspeakable,
    parse,
    special_names,
)

__all__ = ["BOS", "EOS", "PROBE", "Tokenizer", "errors_name", "read_tokenizer"]

# Composed and decomposed accents, full width, emoji with joiners, both scripts of Chinese, digits, all sorts of blanks.
PROBE = (
    "Café cafe\u0301 naïve\t0123 ＡＢＣ，１２\u3000学而时习之，不亦說乎？\r\n"
    "  \U0001f469\u200d\U0001f52c\U0001f1e8\U0001f1f3 ½ €\n\n한국어 ру́сский \u200b\x00 end  "
)
# Runs on which patterns that backtrack too much give up with a panic, here rather than in the middle of a corpus.
STRESS = tuple(
    character * 2048 + stop for character in ("a", "Z", " ", "1", "!", "中", "\n") for stop in ("", "!", "中")
)
LONG_BLANKS = re.compile(r"\s{512,}")
# A run that long takes up eight or more of the places looked at; to look at all of them takes 1 % of the encoding.
BLANKS_STRIDE = 64
MAYBE_LONG_BLANKS = re.compile(r"\s{8}")


class Tokenizer:
    """A checked byte-level BPE vocabulary. Text never produces BOS or EOS, even where it spells them out.

    Attributes:
        vocab_size: the highest id plus one: the rows a model needs.
        num_entries: ids in use, all of `0 .. vocab_size - 1` unless an imported file leaves holes.
        token_type: how ids are stored: uint16 where they fit, else uint32, little-endian.
        bos, eos, bos_id, eos_id: tokens that open and close a document, and their ids.
        digest: xxh3-128 of the file, hex.
    """

    def __init__(self, content: bytes, name: str) -> None:
        with errors_name(name, "not a tokenizer.json"):
            backend = tokenizers.Tokenizer.from_str(content.decode())
            layout = parse(content)
        check_lossless(layout, name)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._name = name
        self.digest = xxhash.xxh3_128_hexdigest(content)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        check_entries(layout, vocabulary, name)
        self.num_entries = len(vocabulary)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.token_type = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        # Added tokens for ordinary text. The library reads their characters as if they spelled bytes when it decodes,
        # which ruins the 13 letters from À to ÿ that the released models have so.
        added = backend.get_added_tokens_decoder().items()
        self._ordinary = {index: entry.content for index, entry in added if not entry.special}
        self.bos, self.eos = special_names(layout)
        check_unspeakable(layout, (self.bos, self.eos), name)
        self.bos_id = self._special_id(self.bos)
        self.eos_id = self._special_id(self.eos)
        self._check()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read and check a `tokenizer.json`.

        Raises:
            DataError: no such file, too large, not a tokenizer, bad ids, BOS or EOS missing, or text does not survive.
        """
        return cls(read_tokenizer(path), str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without BOS and EOS, computed on all cores.

        Raises:
            DataError: a text cannot be encoded (a lone surrogate).
        """
        cut = [_cut_blanks(text) for text in texts]
        with errors_name(self._name, "text cannot be encoded"):
            encodings = iter(
                self._backend.encode_batch_fast([part for parts in cut for part in parts], add_special_tokens=False)
            )
        return [_join([next(encodings).ids for _ in parts]) for parts in cut]

    def frame(self, documents: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """BOS, ids, EOS of every document, one after another, (n,) of `token_type`; the size of each, (D,) int64."""
        sizes = np.fromiter(map(len, documents), np.int64, len(documents)) + 2
        ends = np.cumsum(sizes)
        out = np.empty(int(sizes.sum()), self.token_type)
        inside = np.ones(len(out), dtype=np.bool_)
        inside[ends - 1] = inside[ends - sizes] = False
        out[inside] = np.fromiter(chain.from_iterable(documents), self.token_type, len(out) - 2 * len(documents))
        out[ends - sizes], out[ends - 1] = self.bos_id, self.eos_id
        return out, sizes

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens vanish, an incomplete character becomes U+FFFD."""
        if self._ordinary.keys().isdisjoint(ids):
            return self._backend.decode(list(ids), skip_special_tokens=True)
        runs = groupby(ids, key=self._ordinary.get)
        return "".join(
            self._backend.decode(list(run), skip_special_tokens=True) if added is None else added * len(list(run))
            for added, run in runs
        )

    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, (vocab_size,) int64; 0 for special tokens and ids without a token."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # the byte-level alphabet spells every byte as one character
        for index in self._backend.get_added_tokens_decoder():
            lengths[index] = len(self._ordinary.get(index, "").encode())
        return lengths

    def _special_id(self, token: str) -> int:
        added = self._backend.get_added_tokens_decoder()
        ids = [index for index, entry in added.items() if entry.special and entry.content == token]
        if len(ids) != 1:
            raise DataError(f"{self._name}: special token {token} is missing")
        return ids[0]

    def _check(self) -> None:
        if self.bos_id == self.eos_id:
            raise DataError(f"{self._name}: BOS and EOS are the same token {self.bos}, documents need two")
        texts = [
            PROBE,
            *STRESS,
            *(f"a \t{token}\n {token} b" for token in self._ordinary.values()),
            f"{self.bos} {self.eos}{self.bos}",
        ]
        lengths = self.byte_lengths()
        encoded = self.encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self.decode(ids) != text or lengths[ids].sum() != len(text.encode()):
                problem = "text changes when encoded and decoded, a byte-level tokenizer is needed"
                raise DataError(f"{self._name}: {problem}: {text!r:.60}")


def read_tokenizer(path: str | Path) -> bytes:
    """Content of a tokenizer file.

    Raises:
        DataError: no such file, or one far too large to be a tokenizer.
    """
    path = Path(path)
    require_file(path)
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise DataError(f"{path}: {size:,} bytes are too many for a tokenizer, {MAX_FILE_BYTES:,} are allowed")
    return path.read_bytes()


@contextmanager
def errors_name(name: str, problem: str) -> Iterator[None]:
    """Turn whatever the library raises into a DataError; its panics do not even derive from Exception."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{name}: {problem}: {one_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: {problem}: {one_line(error)}") from error


def _cut_blanks(text: str) -> list[str]:
    """`text`, cut before the last blank of every very long run of them.

    The family's pattern for trailing blanks takes time with the square of such a run; a million would take hours.
    """
    if not MAYBE_LONG_BLANKS.search(text[::BLANKS_STRIDE]):
        return [text]
    cuts = [run.end() - 1 for run in LONG_BLANKS.finditer(text)]
    return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]


def _join(parts: list[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else [index for part in parts for index in part]
