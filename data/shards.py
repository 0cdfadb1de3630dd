"""Read a prepared corpus: checked on opening, memory-mapped, sliced by token position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import file_digest
from data.manifest import SPLITS, TOKENIZER, Manifest, Shard, read_manifest

CHECK_AT_ONCE = 1 << 22


class _ShardFiles:
    """The two files of one shard, mapped. Positions count from the start of the shard."""

    def __init__(self, folder: Path, shard: Shard, dtype: str) -> None:
        token_type = np.dtype(dtype).newbyteorder("<")
        self.tokens = _map(folder / shard.bin_name, token_type, shard.tokens)
        self.ends = _map(folder / shard.idx_name, np.dtype("<u8"), shard.documents)
        if self.ends[-1] != shard.tokens:
            last = self.ends[-1]
            raise DataError(f"{folder / shard.idx_name}: last document ends at {last}, the shard has {shard.tokens}")

    def mark_starts(self, start: int, stop: int, out: np.ndarray) -> None:
        """Set `out`, bool (stop - start,), where positions `start .. stop - 1` open a document."""
        first, last = np.searchsorted(self.ends, np.array([start, stop], dtype=self.ends.dtype))
        opened = self.ends[first:last].astype(np.int64) - start  # a document opens where the one before it ends
        out[opened] = True
        out[: int(start == 0)] = True

    def fill(self, begins: np.ndarray, rows: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> None:
        """`TokenSource.fill_rows` for rows that lie in this shard."""
        length = tokens.shape[1]
        tokens[rows] = self._windows(length)[begins]
        edges = np.concatenate([begins, begins + length]).astype(np.uint64)
        first, last = np.searchsorted(self.ends, edges).reshape(2, -1)
        counts = last - first
        owner = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        opened = self.ends[first[owner] + number].astype(np.int64) - begins[owner]
        starts[rows[owner], opened] = True
        starts[rows[begins == 0], 0] = True

    def _windows(self, length: int) -> np.ndarray:
        """All stretches of `length` tokens as a view, (tokens - length + 1, length), one behind each token."""
        shape, step = (len(self.tokens) - length + 1, length), self.tokens.itemsize
        return np.ndarray(shape, self.tokens.dtype, self.tokens, strides=(step, step))

    def problem(self, vocab_size: int, bos_id: int, eos_id: int) -> str | None:
        ends = self.ends[:].astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        if np.any(ends - starts < 2) or ends[-1] != len(self.tokens):
            return "document ends do not increase"
        for begin in range(0, len(self.tokens), CHECK_AT_ONCE):
            largest = self.tokens[begin : begin + CHECK_AT_ONCE].max()
            if largest >= vocab_size:
                return f"token id {largest} is outside the vocabulary of {vocab_size}"
        if np.any(self.tokens[starts] != bos_id) or np.any(self.tokens[ends - 1] != eos_id):
            return "a document does not run from BOS to EOS"
        return None


class TokenSource:
    """The tokens of one split and source, all shards back to back: BOS, tokens, EOS of every document in turn.

    Attributes:
        num_tokens, num_documents: sizes, BOS and EOS counted as tokens; 0 where nothing was held out.
        text_bytes: bytes of UTF-8 text that the documents hold.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.num_tokens = sum(shard.tokens for shard in shards)
        self.num_documents = sum(shard.documents for shard in shards)
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        self._shards = [_ShardFiles(folder, shard, dtype) for shard in shards]
        self._offsets = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions `start .. stop - 1`, int64, (stop - start,). IndexError outside the source."""
        self._check_range(start, stop)
        ids = np.empty(stop - start, dtype=np.int64)
        self.copy(start, stop, ids)
        return ids

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Which of the positions `start .. stop - 1` open a document, bool, (stop - start,); from the index alone."""
        self._check_range(start, stop)
        starts = np.zeros(stop - start, dtype=np.bool_)
        self._mark(start, stop, starts)
        return starts

    def document_ends(self) -> np.ndarray:
        """Position after the last token of every document, uint64, (num_documents,)."""
        ends = [shard.ends + np.uint64(offset) for shard, offset in zip(self._shards, self._offsets, strict=False)]
        return np.concatenate([np.empty(0, dtype=np.uint64), *ends])

    def fill_rows(self, begins: np.ndarray, rows: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Set `tokens[rows[i]]`, (R, length), to the ids from `begins[i]` on, and `starts` where they open a document;
        `starts` is False before.

        IndexError where a row reaches outside the source.
        """
        length = tokens.shape[1]
        if not len(begins):
            return
        self._check_range(int(begins.min()), int(begins.max()) + length)
        if len(self._shards) == 1:
            self._shards[0].fill(begins, rows, tokens, starts)
            return
        numbers = np.searchsorted(self._offsets, begins, side="right") - 1
        whole = begins + length <= self._offsets[numbers + 1]
        for row, begin in zip(rows[~whole].tolist(), begins[~whole].tolist(), strict=True):
            self.copy(begin, begin + length, tokens[row])
            self._mark(begin, begin + length, starts[row])
        for number in np.unique(numbers[whole]):
            here = whole & (numbers == number)
            self._shards[number].fill(begins[here] - self._offsets[number], rows[here], tokens, starts)

    def problems(self, vocab_size: int, bos_id: int, eos_id: int) -> Iterator[str | None]:
        """For every shard what is wrong with it or None: ids in range, documents in order, each from BOS to EOS."""
        return (shard.problem(vocab_size, bos_id, eos_id) for shard in self._shards)

    def copy(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write the ids at positions `start .. stop - 1` to `out`, (stop - start,), which must lie in the source."""
        for shard, first, last, place in self._pieces(start, stop):
            out[place : place + last - first] = shard.tokens[first:last]

    def _mark(self, start: int, stop: int, out: np.ndarray) -> None:
        for shard, first, last, place in self._pieces(start, stop):
            shard.mark_starts(first, last, out[place : place + last - first])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[_ShardFiles, int, int, int]]:
        """(shard, first, last, place): positions of every shard that `start .. stop` meets, and where they go."""
        number = int(np.searchsorted(self._offsets, start, side="right")) - 1
        place = start
        while place < stop:
            offset, end = int(self._offsets[number]), int(self._offsets[number + 1])
            last = min(stop, end)
            yield self._shards[number], place - offset, last - offset, place - start
            place, number = last, number + 1

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"positions {start}:{stop} are outside 0:{self.num_tokens}")


class CorpusSplit:
    """One split of a corpus: a `TokenSource` for every source."""

    def __init__(self, sources: dict[str, TokenSource]) -> None:
        self._sources = sources

    def source(self, name: str) -> TokenSource:
        """The tokens of source `name`. DataError names the sources there are."""
        if name not in self._sources:
            raise DataError(f"source {name!r} is not in the corpus, it has {', '.join(self._sources)}")
        return self._sources[name]


class TokenCorpus:
    """A prepared corpus folder, open for reading.

    Attributes:
        sources: names, sorted; a source's place here is its id everywhere else.
        language_of: language of every source.
        languages: sorted; a language's place here is its id everywhere else.
        manifest: what the folder says of itself.
        weights: the share of the training tokens that each source was given when it was prepared, on any scale.
        baselines: what `xz` makes of the held-out text, by language; empty for large corpora.
        digest: xxh3-128 (hex) of everything training can see.
        tokenizer_path: the tokenizer.json the corpus was made with, inside the folder.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.sources = tuple(sorted(manifest.sources))
        self.language_of = {name: manifest.sources[name].language for name in self.sources}
        self.languages = tuple(sorted(set(self.language_of.values())))
        self.digest = manifest.digest()
        self.weights = {name: entry.weight for name, entry in manifest.sources.items()}
        self.baselines = manifest.validation
        self.vocab_size = manifest.vocab_size
        self.bos_id = manifest.bos_id
        self.eos_id = manifest.eos_id
        self.tokenizer_path = folder / TOKENIZER
        self._splits = {
            split: {name: TokenSource(folder, self._shards(split, name), manifest.dtype) for name in self.sources}
            for split in SPLITS
        }

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

    def validation_bytes(self, language: str) -> int:
        """Bytes of held-out text of a language."""
        names = [name for name in self.sources if self.language_of[name] == language]
        return sum(self.split("validation").source(name).text_bytes for name in names)

    def sample(self, language: str, count: int) -> np.ndarray:
        """The first ids of the training documents of a language, `count` at most, int64."""
        names = [name for name in self.sources if self.language_of[name] == language]
        sources = [self.split("train").source(name) for name in names]
        ids = [source.tokens(0, min(source.num_tokens, count)) for source in sources]
        return np.concatenate([np.empty(0, dtype=np.int64), *ids])[:count]

    def check_digests(self) -> None:
        """Read every file and raise DataError where its content is not what the manifest says."""
        for shard in self.manifest.shards:
            _check_digest(self.folder / shard.bin_name, shard.tokens_xxh3)
            _check_digest(self.folder / shard.idx_name, shard.index_xxh3)

    def verify(self) -> None:
        """`check_digests`, and raise DataError where ids or document ends make no sense, or a shard is not listed."""
        self.check_digests()
        listed = {name for shard in self.manifest.shards for name in (shard.bin_name, shard.idx_name)}
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".bin", ".idx") and path.name not in listed:
                raise DataError(f"{path}: is not in the manifest")
        for split, name in ((split, name) for split in SPLITS for name in self.sources):
            problems = self._splits[split][name].problems(self.vocab_size, self.bos_id, self.eos_id)
            for shard, problem in zip(self._shards(split, name), problems, strict=True):
                if problem:
                    raise DataError(f"{self.folder / shard.bin_name}: {problem}")

    def stats(self) -> dict[str, Any]:
        """Sizes and bytes per token by split and source, what was left out, and baselines, ready for JSON."""
        splits = {
            split: {name: _sizes(self._splits[split][name]) for name in self.sources if self._shards(split, name)}
            for split in SPLITS
        }
        left_out = {
            name: {
                "language": source.language,
                "duplicates": source.duplicates,
                "filtered": dict(source.filtered),
                "quarantined": source.quarantined,
            }
            for name, source in sorted(self.manifest.sources.items())
        }
        baselines = {language: vars(baseline) for language, baseline in self.manifest.validation.items()}
        facts = {"digest": self.digest, "vocab_size": self.vocab_size}
        return {**facts, "splits": splits, "sources": left_out, "baselines": baselines}

    def _shards(self, split: str, source: str) -> list[Shard]:
        return [shard for shard in self.manifest.shards if (shard.split, shard.source) == (split, source)]


def _sizes(source: TokenSource) -> dict[str, object]:
    encoded = source.num_tokens - 2 * source.num_documents
    return {
        "documents": source.num_documents,
        "tokens": source.num_tokens,
        "text_bytes": source.text_bytes,
        "bytes_per_token": round(source.text_bytes / encoded, 3),
    }


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: is missing, prepare the corpus again")
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise DataError(f"{path}: has {size} bytes, the manifest says {length * dtype.itemsize}")
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # slices of a plain array cost less


def _check_digest(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: is missing, prepare the corpus again")
    if file_digest(path) != expected:
        raise DataError(f"{path}: content does not match the manifest, prepare the corpus again")
