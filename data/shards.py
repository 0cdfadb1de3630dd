"""Read a prepared corpus: checked on opening, memory-mapped, sliced by token position."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import file_digest
from data.manifest import TOKENIZER, Manifest, Shard, read_manifest

CHECK_AT_ONCE = 1 << 22


class TokenSource:
    """The tokens of one split and language, back to back: BOS, tokens, EOS of every document in turn.

    Attributes:
        num_tokens, num_documents: sizes, BOS and EOS counted as tokens.
        text_bytes: bytes of UTF-8 text that the documents hold.
    """

    def __init__(self, folder: Path, shard: Shard, dtype: str) -> None:
        self.num_tokens = shard.tokens
        self.num_documents = shard.documents
        self.text_bytes = shard.text_bytes
        stem = folder / shard.stem
        token_type = np.dtype(dtype).newbyteorder("<")
        self._tokens = _map(stem.with_suffix(".bin"), token_type, shard.tokens)
        self._ends = _map(stem.with_suffix(".idx"), np.dtype("<u8"), shard.documents)
        if self._ends[-1] != shard.tokens:
            raise DataError(f"{stem}.idx: last document ends at {self._ends[-1]}, the shard has {shard.tokens} tokens")

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions `start .. stop - 1`, int64, (stop - start,). IndexError outside the source."""
        self._check_range(start, stop)
        return self._tokens[start:stop].astype(np.int64)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Which of the positions `start .. stop - 1` open a document, bool, (stop - start,); from the index alone."""
        self._check_range(start, stop)
        first, last = np.searchsorted(self._ends, np.array([start, stop], dtype=self._ends.dtype))
        starts = np.zeros(stop - start, dtype=np.bool_)
        opened = self._ends[first:last].astype(np.int64) - start  # a document opens where the one before it ends
        starts[opened] = True
        starts[: int(start == 0)] = True
        return starts

    def check(self, vocab_size: int, bos_id: int, eos_id: int) -> str | None:
        """Say what is wrong with the content, or None: ids in range, documents in order, each from BOS to EOS."""
        ends = self._ends[:].astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        if np.any(ends - starts < 2) or ends[-1] != self.num_tokens:
            return "document ends do not increase"
        for begin in range(0, self.num_tokens, CHECK_AT_ONCE):
            largest = self._tokens[begin : begin + CHECK_AT_ONCE].max()
            if largest >= vocab_size:
                return f"token id {largest} is outside the vocabulary of {vocab_size}"
        if np.any(self._tokens[starts] != bos_id) or np.any(self._tokens[ends - 1] != eos_id):
            return "a document does not run from BOS to EOS"
        return None

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"positions {start}:{stop} are outside 0:{self.num_tokens}")


class CorpusSplit:
    """One split of a corpus: a `TokenSource` for every language."""

    def __init__(self, sources: dict[str, TokenSource]) -> None:
        self._sources = sources

    def source(self, language: str) -> TokenSource:
        """The tokens of `language`. DataError names the languages there are."""
        if language not in self._sources:
            raise DataError(f"language {language!r} is not in the corpus, it has {', '.join(self._sources)}")
        return self._sources[language]


class TokenCorpus:
    """A prepared corpus folder, open for reading.

    Attributes:
        languages: sorted; a language's place here is its id everywhere else.
        manifest: what the folder says of itself, compression baselines included.
        digest: xxh3-128 (hex) of everything training can see.
        tokenizer_path: the tokenizer.json the corpus was made with, inside the folder.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.languages = tuple(sorted({shard.language for shard in manifest.shards}))
        self.digest = manifest.digest()
        self.vocab_size = manifest.vocab_size
        self.bos_id = manifest.bos_id
        self.eos_id = manifest.eos_id
        self.tokenizer_path = folder / TOKENIZER
        self._splits: dict[str, dict[str, TokenSource]] = {}
        for shard in manifest.shards:
            source = TokenSource(folder, shard, manifest.dtype)
            self._splits.setdefault(shard.split, {})[shard.language] = source

    @classmethod
    def open(cls, folder: str | Path) -> TokenCorpus:
        """Open a folder that `data.prepare` wrote; sizes and the tokenizer are checked, tokens are not read.

        Raises:
            DataError: no such folder, unknown format version, or a file that is missing, cut or of another tokenizer.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such corpus folder, `python -m data.prepare` makes one")
        corpus = cls(folder, read_manifest(folder))
        _check_digest(corpus.tokenizer_path, corpus.manifest.tokenizer_xxh3)
        return corpus

    def split(self, name: str) -> CorpusSplit:
        """The split `train` or `validation`."""
        if name not in self._splits:
            raise DataError(f"split {name!r} is not in the corpus, it has {', '.join(self._splits)}")
        return CorpusSplit(self._splits[name])

    def check_digests(self) -> None:
        """Read every file and raise DataError where its content is not what the manifest says."""
        for shard in self.manifest.shards:
            stem = self.folder / shard.stem
            _check_digest(stem.with_suffix(".bin"), shard.tokens_xxh3)
            _check_digest(stem.with_suffix(".idx"), shard.index_xxh3)

    def verify(self) -> None:
        """`check_digests`, and raise DataError where ids or document ends make no sense."""
        self.check_digests()
        for shard in self.manifest.shards:
            source = self._splits[shard.split][shard.language]
            if problem := source.check(self.vocab_size, self.bos_id, self.eos_id):
                raise DataError(f"{self.folder / shard.stem}: {problem}")

    def stats(self) -> dict[str, object]:
        """Sizes, bytes per token and compression baselines by split and language, ready for JSON."""
        splits: dict[str, dict[str, object]] = {}
        for shard in self.manifest.shards:
            splits.setdefault(shard.split, {})[shard.language] = {
                "documents": shard.documents,
                "tokens": shard.tokens,
                "text_bytes": shard.text_bytes,
                "bytes_per_token": round(shard.text_bytes / (shard.tokens - 2 * shard.documents), 3),
            }
        baselines = {language: vars(baseline) for language, baseline in self.manifest.validation.items()}
        return {"digest": self.digest, "vocab_size": self.vocab_size, "splits": splits, "baselines": baselines}


def _map(path: Path, dtype: np.dtype, length: int) -> np.memmap:
    if not path.is_file():
        raise DataError(f"{path}: is missing, prepare the corpus again")
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise DataError(f"{path}: has {size} bytes, the manifest says {length * dtype.itemsize}")
    return np.memmap(path, dtype=dtype, mode="r")


def _check_digest(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: is missing, prepare the corpus again")
    if file_digest(path) != expected:
        raise DataError(f"{path}: content does not match the manifest, prepare the corpus again")
