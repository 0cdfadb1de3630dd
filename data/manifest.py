"""The manifest of a prepared corpus: what the folder holds and what it was made from.

A corpus folder holds `manifest.json`, `tokenizer.json` and, for every split and language, a pair of files
`<split>-<language>-00000.bin` (token ids, little-endian) and `.idx` (uint64, the end of every document in tokens). File
names follow from split and language and are not stored, so a manifest cannot point outside its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from data.documents import LANGUAGE, require_file
from data.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")

T = TypeVar("T")


@dataclass(frozen=True)
class SourceFile:
    """A text file the corpus was made from; `name` has no folder."""

    name: str
    size: int
    xxh3: str


@dataclass(frozen=True)
class Shard:
    """One pair of `.bin` and `.idx` files. `text_bytes` counts UTF-8 bytes of the documents."""

    split: str
    language: str
    tokens: int
    documents: int
    text_bytes: int
    tokens_xxh3: str
    index_xxh3: str

    @property
    def stem(self) -> str:
        """File name without `.bin` or `.idx`."""
        return f"{self.split}-{self.language}-00000"


@dataclass(frozen=True)
class Baseline:
    """Compression of one language's held-out text by `xz -9`, alone and after the training text, in bits per byte."""

    xz_bits_per_byte: float
    xz_primed_bits_per_byte: float


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`."""

    dtype: str
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_xxh3: str
    seed: int
    sources: tuple[SourceFile, ...]
    shards: tuple[Shard, ...]
    validation: dict[str, Baseline]

    def digest(self) -> str:
        """xxh3-128 (hex) of what training can see: ids, documents and tokenizer, not file names or baselines."""
        seen = (FORMAT_VERSION, self.dtype, self.tokenizer_xxh3, [asdict(shard) for shard in self.shards])
        return xxhash.xxh3_128_hexdigest(json.dumps(seen, sort_keys=True).encode())

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of a corpus folder.

    Raises:
        DataError: no manifest, another format version, or an entry that is missing or of the wrong kind.
    """
    path = folder / MANIFEST
    require_file(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise DataError(f"{path}: format_version is {found!r}, this program reads {FORMAT_VERSION}: prepare it again")
    return _check(_parse(content, str(path)), str(path))


def _parse(content: Mapping[str, object], where: str) -> Manifest:
    baselines = _field(content, "validation", dict, where)
    return Manifest(
        dtype=_field(content, "dtype", str, where),
        vocab_size=_field(content, "vocab_size", int, where),
        bos_id=_field(content, "bos_id", int, where),
        eos_id=_field(content, "eos_id", int, where),
        tokenizer_xxh3=_field(content, "tokenizer_xxh3", str, where),
        seed=_field(content, "seed", int, where),
        sources=tuple(_parse_source(entry, f"{where}: sources") for entry in _objects(content, "sources", where)),
        shards=tuple(_parse_shard(entry, f"{where}: shards") for entry in _objects(content, "shards", where)),
        validation={name: _parse_baseline(entry, f"{where}: {name}") for name, entry in baselines.items()},
    )


def _parse_source(entry: Mapping[str, object], where: str) -> SourceFile:
    return SourceFile(
        name=_field(entry, "name", str, where),
        size=_field(entry, "size", int, where),
        xxh3=_field(entry, "xxh3", str, where),
    )


def _parse_shard(entry: Mapping[str, object], where: str) -> Shard:
    return Shard(
        split=_field(entry, "split", str, where),
        language=_field(entry, "language", str, where),
        tokens=_field(entry, "tokens", int, where),
        documents=_field(entry, "documents", int, where),
        text_bytes=_field(entry, "text_bytes", int, where),
        tokens_xxh3=_field(entry, "tokens_xxh3", str, where),
        index_xxh3=_field(entry, "index_xxh3", str, where),
    )


def _parse_baseline(entry: object, where: str) -> Baseline:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: not an object")
    return Baseline(
        xz_bits_per_byte=_field(entry, "xz_bits_per_byte", float, where),
        xz_primed_bits_per_byte=_field(entry, "xz_primed_bits_per_byte", float, where),
    )


def _check(manifest: Manifest, where: str) -> Manifest:
    if manifest.dtype not in DTYPES:
        raise DataError(f"{where}: dtype is {manifest.dtype!r}, allowed: {', '.join(DTYPES)}")
    if not 0 < manifest.vocab_size <= 1 << 31:
        raise DataError(f"{where}: vocab_size {manifest.vocab_size} is out of range")
    for shard in manifest.shards:
        if shard.split not in SPLITS or not LANGUAGE.fullmatch(shard.language):
            raise DataError(f"{where}: unknown split or language {shard.split!r} {shard.language!r}")
        if min(shard.tokens, shard.documents, shard.text_bytes) < 1:
            raise DataError(f"{where}: {shard.stem} has a count below 1")
    languages = {shard.language for shard in manifest.shards}
    expected = sorted((split, language) for split in SPLITS for language in languages)
    if not languages or sorted((shard.split, shard.language) for shard in manifest.shards) != expected:
        raise DataError(f"{where}: every language needs one shard in each of {', '.join(SPLITS)}")
    if set(manifest.validation) != languages:
        raise DataError(f"{where}: validation must name the languages {', '.join(sorted(languages))}")
    return manifest


def _field(content: Mapping[str, object], key: str, kind: type[T], where: str) -> T:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: `{key}` must be a {kind.__name__}, found {value!r:.40}")
    return value


def _objects(content: Mapping[str, object], key: str, where: str) -> list[dict[str, object]]:
    entries = _field(content, key, list, where)
    if not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: `{key}` must be a list of objects")
    return entries
