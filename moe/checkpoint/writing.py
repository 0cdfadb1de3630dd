"""The writing half of torch.distributed.checkpoint, made safe: staged copies, digests of what was written, fsync."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from moe.checkpoint.manifest import CheckpointError, FileRecord
from moe.checkpoint.staging import StagingMemory


class StagingPlanner(DefaultSavePlanner):
    """Plans a save of tensors, then copies this rank's part to the CPU: writing does not need the originals.

    Only what this rank will write is copied: a replicated tensor is staged once in the whole world.
    """

    def __init__(self) -> None:
        super().__init__()
        self._staged: dict[object, torch.Tensor] = {}

    def local_plan(self, tensors: dict[str, Any], is_coordinator: bool) -> SavePlan:
        """This rank's items.

        Raises:
            CheckpointError: a value is not a tensor; it names the key.
        """
        self.set_up_planner(tensors, is_coordinator=is_coordinator)
        for key, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"{key}: {type(value).__name__} instead of a tensor; plain values go into train_state"
                )
        return self.create_local_plan()

    def originals(self, plan: SavePlan) -> list[torch.Tensor]:
        """What `plan` writes, where it is now."""
        return [cast(torch.Tensor, super(StagingPlanner, self).resolve_data(item)).detach() for item in plan.items]

    def stage(self, plan: SavePlan, memory: StagingMemory) -> None:
        """Copy what `plan` writes to `memory` and let go of the originals."""
        copies = memory.copies(self.originals(plan))
        self._staged = {item.index: copy for item, copy in zip(plan.items, copies, strict=True)}
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The staged copy."""
        return self._staged[write_item.index]


class DurableFile(io.FileIO):
    """A new file that records size and digest of the bytes given to it, and is on the disk when closed."""

    def __init__(self, path: Path, records: dict[str, FileRecord]) -> None:
        super().__init__(path, "xb")
        self._key = path.name
        self._records = records
        self._hash = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._hash.update(memoryview(data).cast("B")[:written])
        self._size += written
        return written

    def close(self) -> None:
        if self.closed:
            return
        try:
            os.fsync(self.fileno())
            self._records[self._key] = FileRecord(self._size, self._hash.hexdigest())
        finally:
            super().close()


class DurableFileSystem(FileSystem):
    """Local (or mounted) files; `records` tells what has been written through it."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            raise ValueError(f"{path}: opened with mode {mode}, only new files are written")
        # The buffered layer repeats short writes (the kernel takes at most 2 GiB at once).
        with io.BufferedWriter(DurableFile(Path(path), self.records)) as stream:
            yield stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class ShardWriter(FileSystemWriter):
    """Writes one shard file per rank, and on the first rank the `.metadata` and the text files beside them."""

    def __init__(self, folder: Path) -> None:
        # One thread: a failure in any further one is swallowed by the base class.
        super().__init__(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=0, overwrite=False)
        self.folder = folder
        self.fs: DurableFileSystem = DurableFileSystem()

    @property
    def records(self) -> dict[str, FileRecord]:
        return self.fs.records

    def write_shard(self, plan: SavePlan, planner: StagingPlanner) -> tuple[list[WriteResult], dict[str, FileRecord]]:
        """Write this rank's staged tensors; the only part of a save that runs off the main thread.

        Raises:
            OSError: the storage refused (full, read-only, broken, ...).
            CheckpointError: fewer items were written than planned.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        results = self.write_data(plan, planner).wait()
        if len(results) != len(plan.items):
            raise CheckpointError(f"{len(results)} of {len(plan.items)} tensors were written")
        return results, self.records

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one further file durably."""
        with self.fs.create_stream(self.folder / name, "wb") as stream:
            cast(io.BufferedWriter, stream).write(content)

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: the default would put absolute paths of this machine into the checkpoint."""
        return None
