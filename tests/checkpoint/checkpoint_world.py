"""What four ranks do together with checkpoints; every function runs on every rank of one gloo world."""

from __future__ import annotations

import errno
import os
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import at_storage_call, fail_with, leftovers, state
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from moe.checkpoint import CheckpointError, CheckpointManager
from moe.checkpoint.writing import ShardWriter

WORLD_SIZE = 4
ROWS = {"uneven": 63, "fewer_than_ranks": 3, "even": 8}


def sharded(mesh: DeviceMesh, offset: float) -> dict[str, DTensor]:
    return {name: distribute_tensor(full_rows(name) + offset, mesh, [Shard(0)]) for name in ROWS}


def full_rows(name: str) -> torch.Tensor:
    return torch.arange(ROWS[name] * 5.0).reshape(-1, 5)


def load_and_compare(folder: Path, group: dist.ProcessGroup, offset: float) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    target = {"model": {name: zeros(rows, 5, device_mesh=mesh, placements=[Shard(0)]) for name, rows in ROWS.items()}}
    counter = torch.zeros((), dtype=torch.int64)
    found = CheckpointManager(folder, process_group=group).load({**target, "counter": counter})
    assert found == {"consumed": 5, "step": 1}, found
    assert counter.item() == 42
    for name, loaded in target["model"].items():
        assert torch.equal(loaded.full_tensor(), full_rows(name) + offset), name


def reshards_from_4_to_2_to_1_and_back(rank: int, folder: Path) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    for saved_on in (4, 2):
        target = folder / str(saved_on)
        if rank < saved_on:
            mesh = DeviceMesh.from_group(groups[saved_on], "cpu")
            manager = CheckpointManager(target, process_group=groups[saved_on])
            model = sharded(mesh, offset=saved_on)
            manager.save(1, {"model": model, "counter": torch.tensor(42)}, {"consumed": 5})
            for tensor in model.values():
                tensor.to_local().zero_()
            manager.wait()
        dist.barrier()
        for loaded_on, group in groups.items():
            if rank < loaded_on:
                load_and_compare(target, group, offset=saved_on)


def one_process_reads_what_four_saved(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    manager.save(1, {"model": sharded(mesh, 0.0)}, {})
    manager.wait()
    own = dist.new_group([rank], use_local_synchronization=True)
    plain = {"model": {name: torch.zeros(rows, 5) for name, rows in ROWS.items()}}
    CheckpointManager(folder, process_group=own).load(plain)
    for name, loaded in plain["model"].items():
        assert torch.equal(loaded, full_rows(name)), name


def a_replicated_tensor_is_written_once(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    manager.save(1, {"weight": torch.ones(100_000)}, {})
    manager.wait()
    size = sum(path.stat().st_size for path in (folder / "step-00000001").iterdir())
    assert 400_000 < size < 420_000, size


def one_rank_that_cannot_write_fails_the_save_for_all(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    for step, failing in enumerate(range(WORLD_SIZE), start=1):
        manager.save(step, state(1.0), {})
        manager.wait()
        with at_storage_call(2 if rank == failing else 0, fail_with(errno.EIO)):
            manager.save(step + 1, state(2.0), {})
            manager.wait()
        assert manager.failed_saves == step
        assert manager.steps()[-1] == step
        assert leftovers(folder) == []
        dist.barrier()


def a_first_rank_that_cannot_commit_fails_the_save_for_all(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    with mock.patch.object(Path, "rename", side_effect=OSError(errno.EACCES, os.strerror(errno.EACCES))):
        manager.save(1, state(1.0), {})
        manager.wait()
    assert manager.failed_saves == 1
    assert manager.steps() == []


def a_value_that_is_no_tensor_on_one_rank_is_an_error_on_all(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    with pytest.raises(CheckpointError, match="rank 2: bad: int instead of a tensor"):
        manager.save(1, {"bad": 3 if rank == 2 else torch.zeros(1)}, {})


def a_slow_rank_holds_the_commit_on_all(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    write_shard = ShardWriter.write_shard
    dist.barrier()
    release = folder.with_suffix(".release")

    def slow(*args: object) -> object:
        while not release.exists():
            time.sleep(0.01)
        return write_shard(*args)  # type: ignore[arg-type]

    with mock.patch.object(ShardWriter, "write_shard", slow if rank == 3 else write_shard):
        manager.save(1, state(1.0), {})
        for _ in range(5):
            manager.poll()
            assert manager.steps() == []
        dist.barrier()
        if rank == 0:
            release.touch()
        while not manager.steps():
            manager.poll()
    assert manager.steps() == [1]
    assert manager.latest_intact() == 1


def all_ranks_fall_back_together(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder, keep_last=9)
    for step in (1, 2, 3):
        manager.save(step, state(float(step)), {})
    manager.wait()
    if rank == 0:
        shard = folder / "step-00000003" / "__2_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
        (folder / "step-00000002" / "manifest.json").unlink()
    dist.barrier()
    loaded = state(0.0)
    assert manager.load(loaded) == {"step": 1}
    assert torch.equal(loaded["model"]["weight"], state(1.0)["model"]["weight"])
    with pytest.raises(CheckpointError, match="step-00000003: rank.*__2_0.distcp"):
        manager.load(loaded, step=3)


def keys_of_single_ranks_are_saved_and_found_again(rank: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    manager.save(1, {"rng": {str(rank): torch.full((4,), rank)}}, {})
    loaded = torch.zeros(4, dtype=torch.int64)
    manager.load({"rng": {str(rank): loaded}})
    assert loaded.tolist() == [rank] * 4
    with pytest.raises(CheckpointError, match="rng.1: in the checkpoint, but nothing here takes it"):
        manager.load({"rng": {"0": loaded}})


SCENARIOS = [
    reshards_from_4_to_2_to_1_and_back,
    one_process_reads_what_four_saved,
    a_replicated_tensor_is_written_once,
    one_rank_that_cannot_write_fails_the_save_for_all,
    a_first_rank_that_cannot_commit_fails_the_save_for_all,
    a_value_that_is_no_tensor_on_one_rank_is_an_error_on_all,
    a_slow_rank_holds_the_commit_on_all,
    all_ranks_fall_back_together,
    keys_of_single_ranks_are_saved_and_found_again,
]


def play_all(rank: int, root: Path, outcomes: Connection) -> None:
    """Process body: play every scenario and send its name with the traceback, or an empty text."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=40)
    )
    for scenario in SCENARIOS:
        try:
            scenario(rank, root / scenario.__name__)
            outcomes.send((scenario.__name__, ""))
        except BaseException:
            outcomes.send((scenario.__name__, traceback.format_exc()))
        dist.barrier()
    dist.destroy_process_group()
