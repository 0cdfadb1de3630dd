"""Which process this is among how many, on what device, and the meshes they form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from data.errors import one_line
from moe.config.errors import ConfigError
from moe.parallel.layout import Layout
from moe.parallel.watch import PeerFailure, Watch

T = TypeVar("T")

TO_JUDGE = 10
"""Seconds that torch's own timeouts leave the watch to find out which rank is to blame before they end the process."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, this process's place among them, and their two views (see `moe.parallel.layout`)."""

    rank: int
    device: torch.device
    layout: Layout
    dense: DeviceMesh
    """replicate x shard x tensor: what holds all weights but the routed experts'."""
    sparse: DeviceMesh
    """replicate x expert_shard x expert: the same ranks as the routed experts see them."""
    group: dist.ProcessGroup
    """All ranks."""

    @property
    def size(self) -> int:
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of every global batch is this rank's, of `layout.data`; ranks along `tensor` have the same."""
        return self.rank // self.layout.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.layout.tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place over all ranks and return it; costs nothing on one."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def tensor_sum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place over the ranks that share a sequence, and return it."""
        if self.layout.tensor > 1:
            dist.all_reduce(tensor, group=self.dense.get_group("tensor"))
        return tensor

    def once(self, value: T, otherwise: T) -> T:
        """`value` on the first of the ranks that share a sequence, else `otherwise`: what all of them know, for sums
        that must count it once."""
        return value if self.tensor_rank == 0 else otherwise

    def gather(self, value: T) -> list[T]:
        """The small `value` of every rank, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_data(self, value: T) -> list[T]:
        """As `gather`, one value for each share of the data."""
        return self.gather(value)[:: self.layout.tensor]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)


def build_world(layout: Layout, device: torch.device, first: int = 0) -> World | None:
    """The world of the ranks from `first` on, as many as `layout` needs; None on the others, which take part in
    building it."""
    ranks = torch.arange(first, first + layout.world_size)
    views = (
        ((layout.replicate, layout.shard, layout.tensor), ("replicate", "shard", "tensor")),
        ((layout.replicate, layout.expert_shard, layout.expert), ("replicate", "expert_shard", "expert")),
    )
    dense, sparse = (DeviceMesh(device.type, ranks.view(shape), mesh_dim_names=names) for shape, names in views)
    everyone = layout.world_size == dist.get_world_size()
    group = dist.group.WORLD if everyone else dist.new_group(ranks.tolist())
    if dist.get_rank() not in ranks or group is None:
        return None
    return World(dist.get_rank() - first, device, layout, dense, sparse, group)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this process's device. Raises ConfigError when CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("runtime.device=cuda, but torch sees no CUDA device here; use auto or cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _all_sharded(world_size: int) -> Layout:
    return Layout(shard=world_size)


@contextmanager
def join_world(
    device_name: str, choose_layout: Callable[[int], Layout] = _all_sharded, timeout: int = 600
) -> Iterator[World]:
    """Start torch.distributed as torchrun or srun laid it out, or as a world of one; leave it on exit.

    `choose_layout` is given the number of ranks, before any of them is contacted; a rank that waits for others gives up
    after `timeout` seconds, and a rank that dies or hangs ends all (see `moe.parallel.watch`).
    """
    _translate_slurm()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    layout = choose_layout(size)
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # what travels is waited for; where a product has taken all multiprocessors it would come last
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(seconds=timeout + TO_JUDGE)
    store, keeper = _meet(rank, size, patience)
    with Watch(store, rank, size, timeout, keeper) as watch:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        try:
            world = build_world(layout, device)
            assert world is not None
            for group in distributed_c10d._world.pg_map:  # those of the meshes have torch's default
                distributed_c10d._set_pg_timeout(patience, group)
            yield world
        except BaseException as error:
            watch.report(error)
            raise
        finally:
            dist.destroy_process_group()


def _meet(rank: int, size: int, patience: timedelta) -> tuple[dist.Store, str]:
    """A store for this run of the `size` ranks, and who keeps it. Raises PeerFailure where rank 0 does not come."""
    if size == 1:
        return dist.HashStore(), "this process"
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"environment: WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT ({error})") from None
    keeper = f"{'torchrun' if by_torchrun else 'rank 0'} at {host}:{port}"
    keeps = rank == 0 and not by_torchrun
    try:
        store = dist.TCPStore(host, port, None, keeps, patience, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        raise PeerFailure(f"{keeper} does not keep a store for the others: {one_line(error)}") from error
    # a sweep's runs and torchrun's attempts share the store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run = store.add(f"{attempt}/runs of {rank}", 1)
    return dist.PrefixStore(f"{attempt}/{run}", store), keeper


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
