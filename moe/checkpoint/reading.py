"""The reading half of torch.distributed.checkpoint, made safe: no pickle is executed, no key is silently left out."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from moe.checkpoint.coordinator import describe
from moe.checkpoint.manifest import CheckpointError, Manifest, read_manifest, verify_content, verify_listing

METADATA_NAME = ".metadata"
TRAIN_STATE_NAME = "train_state.json"

# All that a description of tensors is made of: plain records without side effects.
_ALLOWED = frozenset(
    {(dcp_metadata.__name__, name) for name in [*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING"] if name != "StorageMeta"}
    | {(_StorageInfo.__module__, _StorageInfo.__name__), ("torch", "Size"), ("torch.serialization", "_get_layout")}
)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the names of the metadata records and of dtypes; any other name in the stream ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise CheckpointError(f"{METADATA_NAME}: names {module}.{name}, which a checkpoint never needs")


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """Decode `.metadata` by allow-list and check that it describes tensors in files of this checkpoint only.

    Raises:
        CheckpointError: anything else is in it; nothing it names has been called.
    """
    metadata = _unpickle((folder / METADATA_NAME).read_bytes())
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{METADATA_NAME}: {key} is a pickled object, only tensors are loaded")
    for index, place in metadata.storage_data.items():
        if not isinstance(place, _StorageInfo) or place.relative_path not in manifest.files:
            raise CheckpointError(f"{METADATA_NAME}: {index.fqn} points outside this checkpoint")
    metadata.storage_meta = StorageMeta()
    return metadata


def _unpickle(raw: bytes) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{METADATA_NAME}: cannot be decoded ({type(error).__name__})") from None
    tables = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(metadata, Metadata) or not all(isinstance(table, dict) for table in tables):
        raise CheckpointError(f"{METADATA_NAME}: does not describe a checkpoint")
    return metadata


def read_train_state(folder: Path) -> dict[str, Any]:
    """The JSON object saved beside the tensors.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    try:
        state = json.loads((folder / TRAIN_STATE_NAME).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{TRAIN_STATE_NAME}: not JSON ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{TRAIN_STATE_NAME}: a JSON {type(state).__name__}, not an object")
    return state


def verify_folder(folder: Path, step: int, rank: int = 0, world_size: int = 1) -> Manifest:
    """Check the checkpoint of `step` in `folder`: all names and sizes, and the content of every `world_size`-th file.

    Raises:
        CheckpointError: it is not intact; the message names the file and the reason.
    """
    manifest = read_manifest(folder, step)
    verify_listing(folder, manifest)
    share = sorted(manifest.files)[rank::world_size]
    verify_content(folder, manifest, share)
    if METADATA_NAME in share:
        read_metadata(folder, manifest)
    if TRAIN_STATE_NAME in share:
        read_train_state(folder)
    return manifest


def load_tensors(
    folder: Path, step: int, tensors: dict[str, Any], group: dist.ProcessGroup | None, *, partial: bool = False
) -> None:
    """Fill `tensors` in place from a verified checkpoint, resharding as needed; collective over `group`.

    `partial` leaves alone those top-level parts of the checkpoint that `tensors` does not have.

    Raises:
        CheckpointError: on all ranks, if keys, shapes or dtypes differ from the saved ones, or reading fails.
    """
    alone = group is None or dist.get_world_size(group) == 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                tensors,
                storage_reader=SafeReader(folder, step),
                planner=StrictLoadPlanner(partial),
                process_group=group,
                no_dist=alone,
            )
    except CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise CheckpointError(describe(error)) from None


class SafeReader(FileSystemReader):
    """Reads the shards of one verified folder (torch itself decodes each with `weights_only=True`)."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder)
        self._folder = folder
        self._step = step

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return read_metadata(self._folder, read_manifest(self._folder, self._step))


class StrictLoadPlanner(DefaultLoadPlanner):
    """Loads exactly what is saved: every key, with its shape and dtype, and no pickled object.

    `partial` asks this of the wanted top-level parts alone ("model" of "model.norm.weight").
    """

    def __init__(self, partial: bool) -> None:
        super().__init__()
        self._partial = partial

    def create_local_plan(self) -> LoadPlan:
        """This rank's reads, with its keys attached.

        Raises:
            CheckpointError: a wanted key is not saved, not a tensor, or of another shape or dtype; it names the key.
        """
        for key in sorted(self.state_dict):
            self._check(key, self.state_dict[key], self._saved.get(key))
        return dataclasses.replace(super().create_local_plan(), planner_data=sorted(self.state_dict))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """All ranks' reads.

        Raises:
            CheckpointError: a saved key is wanted by no rank; it names the first.
        """
        wanted = {key for plan in global_plan for key in plan.planner_data}
        unexpected = sorted(self._saved.keys() - wanted)
        if self._partial:
            parts = {_part(key) for key in wanted}
            unexpected = [key for key in unexpected if _part(key) in parts]
        if unexpected:
            raise CheckpointError(f"{unexpected[0]}: in the checkpoint, but nothing here takes it")
        return super().create_global_plan(global_plan)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: a pickled object, only tensors are loaded")

    @property
    def _saved(self) -> dict[str, Any]:
        return self.metadata.state_dict_metadata if self.metadata else {}

    @staticmethod
    def _check(key: str, wanted: object, saved: TensorStorageMetadata | None) -> None:
        if not isinstance(wanted, torch.Tensor):
            raise CheckpointError(
                f"{key}: {type(wanted).__name__} instead of a tensor; plain values go into train_state"
            )
        if saved is None:
            raise CheckpointError(f"{key}: not in the checkpoint")
        if saved.size != wanted.size():
            raise CheckpointError(f"{key}: shape {list(saved.size)} in the checkpoint, {list(wanted.size())} here")
        if saved.properties.dtype != wanted.dtype:
            raise CheckpointError(f"{key}: {saved.properties.dtype} in the checkpoint, {wanted.dtype} here")


def _part(key: str) -> str:
    return key.partition(".")[0]
