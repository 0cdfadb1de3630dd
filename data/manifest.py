"""The manifest of a prepared corpus: what the folder holds and what it was made from.

A corpus folder holds `manifest.json`, `tokenizer.json`, `quarantine.jsonl` (rows that were left out, and why) and, for
every split and source, pairs of files `<split>-<source>-<number>.bin` (token ids, little-endian) and `.idx` (uint64,
the end of every document in tokens of its shard). File names follow from the entries and are not stored, so a manifest
cannot point outside its folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import xxhash

from data.documents import LANGUAGE, require_file
from data.errors import DataError
from data.sources.spec import NAME

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
QUARANTINE = "quarantine.jsonl"
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """A file the corpus was made from: its name without folder, its size in bytes, and its stamp at the time."""

    name: str
    size: int
    stamp: str


@dataclass(frozen=True)
class SourceRecord:
    """A source of the corpus.

    `weight` is the share of the training tokens it was given, on any scale.
    `documents` are those in the shards. `duplicates` were left out as exact repetitions, `filtered` counts those left
    out by reason, `quarantined` counts bad rows.
    """

    language: str
    weight: float
    files: tuple[FileRecord, ...]
    documents: int
    duplicates: int
    filtered: Mapping[str, int]
    quarantined: int


@dataclass(frozen=True)
class Shard:
    """One pair of `.bin` and `.idx` files. `text_bytes` counts UTF-8 bytes of the documents."""

    split: str
    source: str
    number: int
    tokens: int
    documents: int
    text_bytes: int
    tokens_xxh3: str
    index_xxh3: str

    @property
    def bin_name(self) -> str:
        """Name of the file of ids."""
        return f"{self.split}-{self.source}-{self.number:05d}.bin"

    @property
    def idx_name(self) -> str:
        """Name of the file of document ends."""
        return f"{self.split}-{self.source}-{self.number:05d}.idx"


@dataclass(frozen=True)
class Baseline:
    """Compression of one language's held-out text by `xz -9`, alone and after the training text, in bits per byte."""

    xz_bits_per_byte: float
    xz_primed_bits_per_byte: float


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`. `held_out` is the fraction of the documents held out, such as 3/50."""

    dtype: str
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_xxh3: str
    seed: int
    held_out: str
    sources: Mapping[str, SourceRecord]
    shards: tuple[Shard, ...]
    validation: Mapping[str, Baseline]

    def digest(self) -> str:
        """xxh3-128 (hex) of what training can see: ids, documents, languages, tokenizer; not file names or counts."""
        languages = {name: source.language for name, source in sorted(self.sources.items())}
        shards = [asdict(shard) for shard in self.shards]
        seen = (FORMAT_VERSION, self.dtype, self.tokenizer_xxh3, languages, shards)
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
        raise DataError(
            f"{path}: format_version is {found!r:.40}, this program reads {FORMAT_VERSION}: prepare it again"
        )
    return _check(_parse(content, str(path)), str(path))


def _parse(content: Mapping[str, object], where: str) -> Manifest:
    sources = _entries(content, "sources", where)
    baselines = _entries(content, "validation", where)
    for name in (*sources, *baselines):
        if not NAME.fullmatch(name):
            raise DataError(f"{where}: {name!r:.80}: bad source name or language")
    return Manifest(
        dtype=_field(content, "dtype", str, where),
        vocab_size=_field(content, "vocab_size", int, where),
        bos_id=_field(content, "bos_id", int, where),
        eos_id=_field(content, "eos_id", int, where),
        tokenizer_xxh3=_field(content, "tokenizer_xxh3", str, where),
        seed=_count(content, "seed", where),
        held_out=_field(content, "held_out", str, where),
        sources={name: _parse_source(entry, f"{where}: sources: {name}") for name, entry in sources.items()},
        shards=tuple(_parse_shard(entry, f"{where}: shards") for entry in _objects(content, "shards", where)),
        validation={name: _parse_baseline(entry, f"{where}: {name}") for name, entry in baselines.items()},
    )


def _parse_source(entry: Mapping[str, object], where: str) -> SourceRecord:
    filtered = _field(entry, "filtered", dict, where)
    return SourceRecord(
        language=_field(entry, "language", str, where),
        weight=_amount(entry, "weight", where),
        files=tuple(_parse_file(file, f"{where}: files") for file in _objects(entry, "files", where)),
        documents=_count(entry, "documents", where),
        duplicates=_count(entry, "duplicates", where),
        filtered={reason: _count(filtered, reason, where) for reason in filtered},
        quarantined=_count(entry, "quarantined", where),
    )


def _parse_file(entry: Mapping[str, object], where: str) -> FileRecord:
    return FileRecord(
        name=_field(entry, "name", str, where),
        size=_count(entry, "size", where),
        stamp=_field(entry, "stamp", str, where),
    )


def _parse_shard(entry: Mapping[str, object], where: str) -> Shard:
    return Shard(
        split=_field(entry, "split", str, where),
        source=_field(entry, "source", str, where),
        number=_field(entry, "number", int, where),
        tokens=_field(entry, "tokens", int, where),
        documents=_count(entry, "documents", where),
        text_bytes=_field(entry, "text_bytes", int, where),
        tokens_xxh3=_field(entry, "tokens_xxh3", str, where),
        index_xxh3=_field(entry, "index_xxh3", str, where),
    )


def _parse_baseline(entry: Mapping[str, object], where: str) -> Baseline:
    return Baseline(
        xz_bits_per_byte=_amount(entry, "xz_bits_per_byte", where),
        xz_primed_bits_per_byte=_amount(entry, "xz_primed_bits_per_byte", where),
    )


def _check(manifest: Manifest, where: str) -> Manifest:
    if manifest.dtype not in DTYPES:
        raise DataError(f"{where}: dtype is {manifest.dtype!r}, allowed: {', '.join(DTYPES)}")
    if not 0 < manifest.vocab_size <= 1 << 31:
        raise DataError(f"{where}: vocab_size {manifest.vocab_size} is out of range")
    specials = {manifest.bos_id, manifest.eos_id}
    if len(specials) < 2 or not 0 <= min(specials) <= max(specials) < manifest.vocab_size:
        raise DataError(
            f"{where}: bos_id and eos_id {manifest.bos_id}, {manifest.eos_id} must be two of the vocabulary"
        )
    _check_held_out(manifest, where)
    for name, source in manifest.sources.items():
        if not LANGUAGE.fullmatch(source.language):
            raise DataError(f"{where}: {name} of {source.language!r:.40}: bad source name or language")
    for shard in manifest.shards:
        if shard.split not in SPLITS or shard.source not in manifest.sources:
            raise DataError(f"{where}: unknown split or source {shard.split!r:.40} {shard.source!r:.80}")
        if min(shard.tokens, shard.documents, shard.text_bytes) < 1:
            raise DataError(f"{where}: {shard.bin_name} has a count below 1")
    _check_numbers(manifest, where)
    languages = {source.language for source in manifest.sources.values()}
    if not set(manifest.validation) <= languages:
        raise DataError(f"{where}: validation may name the languages {', '.join(sorted(languages))} only")
    return manifest


def _check_held_out(manifest: Manifest, where: str) -> None:
    try:
        held_out = Fraction(manifest.held_out)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"{where}: held_out {manifest.held_out!r:.40} is no fraction") from error
    if not 0 <= held_out < 1:
        raise DataError(f"{where}: held_out {manifest.held_out} is out of range")


def _check_numbers(manifest: Manifest, where: str) -> None:
    numbers: dict[tuple[str, str], list[int]] = {("train", name): [] for name in manifest.sources}
    for shard in manifest.shards:
        numbers.setdefault((shard.split, shard.source), []).append(shard.number)
    if not numbers:
        raise DataError(f"{where}: names no sources")
    for (split, source), found in numbers.items():
        if not found or found != list(range(len(found))):
            raise DataError(f"{where}: {split} shards of {source} must be numbered from 0 on, found {found!r:.80}")


def _field(content: Mapping[str, object], key: str, kind: type[T], where: str) -> T:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: `{key}` must be a {kind.__name__}, found {value!r:.40}")
    return value


def _count(content: Mapping[str, object], key: str, where: str) -> int:
    count = _field(content, key, int, where)
    if count < 0:
        raise DataError(f"{where}: `{key}` must be 0 or more, found {count!r:.40}")
    return count


def _amount(content: Mapping[str, object], key: str, where: str) -> float:
    amount = _field(content, key, float, where)
    if not 0 <= amount < math.inf:
        raise DataError(f"{where}: `{key}` must be a number of 0 or more, found {amount}")
    return amount


def _objects(content: Mapping[str, object], key: str, where: str) -> list[dict[str, object]]:
    entries = _field(content, key, list, where)
    if not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: `{key}` must be a list of objects")
    return entries


def _entries(content: Mapping[str, object], key: str, where: str) -> dict[str, dict[str, object]]:
    entries = _field(content, key, dict, where)
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise DataError(f"{where}: `{key}` must map names to objects")
    return entries
