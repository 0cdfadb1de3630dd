"""Files that appear whole or not at all, digests, and a lock between processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import xxhash

T = TypeVar("T")
DAMAGES = (OSError, ValueError, KeyError, TypeError)


def file_digest(path: Path) -> str:
    """xxh3-128 of a file, hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` so that it holds all of `content` or is as it was before."""
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the body succeeds and vanishes when it fails."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
    try:
        with _naming(path), os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(out: Path, inside: Path | None = None) -> Iterator[Path]:
    """A scratch folder in `inside`, by default beside `out`, that becomes `out` when the body succeeds, else vanishes.

    Raises:
        OSError: `out` has come into being meanwhile (ENOTEMPTY or EEXIST), or the disk failed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=inside or out.parent, prefix=f".{out.name}.tmp-"))
    folder.chmod(0o755)
    try:
        with _naming(out):
            yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        os.rename(folder, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cached_folder(folder: Path, read: Callable[[Path], T], fill: Callable[[Path], object]) -> T:
    """What `read` finds in `folder`; `fill` makes its content first where it is missing or damaged.

    Any number of processes may call this at once: one fills, the others wait. Where the file system has no locks they
    all fill, and the first rename wins. A folder that is there is only read: its storage may be read-only.

    Raises:
        OSError, DataError: of `fill`, or of `read` behind it.
    """
    with suppress(*DAMAGES):
        return read(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock") as alone:
        try:
            return read(folder)
        except DAMAGES:
            shutil.rmtree(folder, ignore_errors=True)
        for left in folder.parent.glob(f".{folder.name}.tmp-*") if alone else ():  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            with new_folder(folder) as scratch:
                fill(scratch)
        except OSError:
            if not folder.exists():
                raise
    return read(folder)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, such as that of a full disk, the name of what was being written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path`; a process that dies gives it up. Yields whether the file system has locks.

    Some network file systems have none: callers must be safe without, only slower.
    """
    with path.open("w") as file:
        has_locks = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            has_locks = True
        yield has_locks


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
