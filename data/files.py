"""Files that appear whole or not at all, digests, and a lock between processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash


def file_digest(path: Path) -> str:
    """xxh3-128 of a file, hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that becomes `out` when the body succeeds and vanishes when it fails.

    Raises:
        OSError: `out` has come into being meanwhile (ENOTEMPTY or EEXIST), or the disk failed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.tmp-"))
    folder.chmod(0o755)
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        os.rename(folder, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; a process that dies gives it up."""
    with path.open("w") as file:
        with suppress(OSError):  # some network file systems have no locks: callers must be safe without, only slower
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
