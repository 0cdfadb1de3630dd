"""The manifest of one checkpoint folder: its files, their sizes and digests, sealed by its own digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_SEAL = "manifest_digest"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the one-line message names the step, the file or key, and the reason."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3-128 digest (32 hexadecimal digits) of one file."""

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint of one step consists of."""

    step: int
    world_size: int
    torch_version: str
    files: dict[str, FileRecord]

    def render(self) -> bytes:
        """The bytes of `manifest.json`: canonical JSON, sealed by the digest of everything else in it."""
        return _seal({"format": FORMAT_VERSION, **asdict(self)})

    @property
    def total_bytes(self) -> int:
        return sum(record.size for record in self.files.values())


def read_manifest(folder: Path, step: int) -> Manifest:
    """Read the manifest of `step` and check it against its own digest.

    Raises:
        CheckpointError: it is missing, unreadable, altered, of another format version, or of another step.
    """
    body = _unseal(_read_bytes(folder / MANIFEST_NAME))
    if body.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{MANIFEST_NAME}: format {body.get('format')}, readable is format {FORMAT_VERSION}")
    if body.get("step") != step:
        raise CheckpointError(f"{MANIFEST_NAME}: belongs to step {body.get('step')}, not to step {step}")
    try:
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return Manifest(step, body["world_size"], body["torch_version"], files)
    except (LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST_NAME}: lacks fields of format {FORMAT_VERSION}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from None


def _seal(body: dict[str, Any]) -> bytes:
    return _canonical({**body, _SEAL: xxhash.xxh3_128_hexdigest(_canonical(body))})


def _unseal(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        del body[_SEAL]
    except (ValueError, LookupError, TypeError, RecursionError):
        body = {}
    if _seal(body) != raw:
        raise CheckpointError(f"{MANIFEST_NAME}: does not match its own digest")
    return body


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def verify_listing(folder: Path, manifest: Manifest) -> None:
    """Check the names and sizes of all files.

    Raises:
        CheckpointError: a file is missing, unexpected, not a regular file, or of another size.
    """
    _verify_names(folder, manifest)
    for name, record in manifest.files.items():
        size = os.lstat(folder / name).st_size
        if size != record.size:
            raise CheckpointError(f"{name}: {size} bytes, the manifest says {record.size}")


def verify_content(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read these files and compare their digests.

    Raises:
        CheckpointError: a file cannot be read or has another content.
    """
    for name in names:
        if _file_digest(folder / name) != manifest.files[name].digest:
            raise CheckpointError(f"{name}: content does not match its digest")


def _verify_names(folder: Path, manifest: Manifest) -> None:
    with os.scandir(folder) as entries:
        regular = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    expected = {*manifest.files, MANIFEST_NAME}
    for name in sorted(expected | regular.keys()):
        if name not in regular:
            raise CheckpointError(f"{name}: missing")
        if name not in expected:
            raise CheckpointError(f"{name}: not a file of this checkpoint")
        if not regular[name]:
            raise CheckpointError(f"{name}: not a regular file")


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from None
