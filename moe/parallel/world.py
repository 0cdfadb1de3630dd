"""Which process this is among how many, on what device, and the mesh they form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.config.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """One axis, "shard": data parallel with sharded parameters."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place over the ranks and return it; costs nothing on one."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def gather(self, value: T) -> list[T]:
        """The small `value` of every rank, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this process's device. Raises ConfigError when CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("runtime.device=cuda, but torch sees no CUDA device here; use auto or cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def join_world(device_name: str) -> Iterator[World]:
    """Start torch.distributed as torchrun or srun laid it out, or as a world of one; leave it on exit."""
    _translate_slurm()
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        dist.destroy_process_group()


def _translate_slurm() -> None:
    """Give a process that srun started the variables torchrun would have set."""
    environment = os.environ
    tasks = environment.get("SLURM_NTASKS", "1")
    if "WORLD_SIZE" in environment or "SLURM_PROCID" not in environment or tasks == "1":
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = tasks
    environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    # one port a job step, so that jobs sharing a node do not meet
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
