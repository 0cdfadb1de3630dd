"""Byte-level BPE: load, check and use a `tokenizer.json`.

`python -m data.tokenizer train` makes one, `python -m data.tokenizer inspect` describes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from data.documents import require_file
from data.errors import DataError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# Composed and decomposed accents, full width, emoji with joiners, both scripts of Chinese, digits, all sorts of blanks.
PROBE = (
    "Café cafe\u0301 naïve\t0123 ＡＢＣ，１２\u3000学而时习之，不亦說乎？\r\n"
    "  \U0001f469\u200d\U0001f52c\U0001f1e8\U0001f1f3 ½ €\n\n한국어 ру́сский \u200b\x00 end  "
)


class Tokenizer:
    """A checked byte-level BPE vocabulary. Text never produces BOS or EOS, even where it spells them out.

    Attributes:
        vocab_size: number of ids; ids are dense, `0 .. vocab_size - 1`.
        bos_id, eos_id: ids that open and close a document.
        digest: xxh3-128 of the file, hex.
    """

    def __init__(self, backend: tokenizers.Tokenizer, digest: str, name: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._name = name
        self.digest = digest
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special_id(BOS)
        self.eos_id = self._special_id(EOS)
        self._check()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read and check a `tokenizer.json`.

        Raises:
            DataError: no such file, not a tokenizer, ids not dense, BOS or EOS missing, or text does not survive.
        """
        path = Path(path)
        require_file(path)
        content = path.read_bytes()
        with _errors_name(str(path), "not a tokenizer.json"):
            backend = tokenizers.Tokenizer.from_str(content.decode())
        return cls(backend, xxhash.xxh3_128_hexdigest(content), str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without BOS and EOS, computed on all cores.

        Raises:
            DataError: a text cannot be encoded (a lone surrogate).
        """
        with _errors_name(self._name, "text cannot be encoded"):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; BOS and EOS vanish, an incomplete character becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, (vocab_size,) int64; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # the byte-level alphabet spells every byte as one character
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def _special_id(self, token: str) -> int:
        added = self._backend.get_added_tokens_decoder()
        ids = [index for index, entry in added.items() if entry.special and entry.content == token]
        if len(ids) != 1:
            raise DataError(f"{self._name}: special token {token} is missing")
        return ids[0]

    def _check(self) -> None:
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        if sorted(ids) != list(range(self.vocab_size)):
            raise DataError(f"{self._name}: ids must be 0 .. {self.vocab_size - 1}, each once")
        if self.bos_id == self.eos_id:
            raise DataError(f"{self._name}: BOS and EOS share id {self.bos_id}")
        encoded = self.encode(PROBE)
        if self.decode(encoded) != PROBE or self.byte_lengths()[encoded].sum() != len(PROBE.encode()):
            raise DataError(f"{self._name}: text changes when encoded and decoded, a byte-level tokenizer is needed")


@contextmanager
def _errors_name(name: str, problem: str) -> Iterator[None]:
    """Turn whatever the library raises into a DataError; its panics do not even derive from Exception."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{name}: {problem}: {_first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: {problem}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
