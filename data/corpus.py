"""A prepared corpus folder: checked on opening, read by split and source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import file_digest
from data.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, Shard, read_manifest
from data.shards import CorpusSplit, TokenSource, require_there
from data.tokenizer import Tokenizer


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
        """`check_digests`, and raise DataError where ids or document ends make no sense, the manifest is not of its
        tokenizer, or a shard is not listed."""
        self.check_digests()
        self._check_tokenizer()
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

    def _check_tokenizer(self) -> None:
        tokenizer = Tokenizer.load(self.tokenizer_path)
        for key in ("vocab_size", "bos_id", "eos_id"):
            own, there = getattr(self.manifest, key), getattr(tokenizer, key)
            if own != there:
                raise DataError(f"{self.folder / MANIFEST}: {key} is {own}, the tokenizer's is {there}")

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


def _check_digest(path: Path, expected: str) -> None:
    require_there(path)
    if file_digest(path) != expected:
        raise DataError(f"{path}: content does not match the manifest, prepare the corpus again")
