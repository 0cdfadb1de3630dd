"""The real parallelization without GPUs: one process stands for a rank among fake ones, weights are shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe.config import ModelConfig
from moe.config.schema import RuntimeConfig
from moe.model import Transformer
from moe.parallel import Layout, World, build_world, local, parallelize


@contextmanager
def fake_world(layout: Layout, rank: int = 0) -> Iterator[World]:
    """`rank` of a world whose other ranks do not exist; its collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        world = build_world(layout, torch.device("cpu"))
        assert world is not None
        yield world
    finally:
        dist.destroy_process_group()


def weight_bytes(model: ModelConfig, layout: Layout, runtime: RuntimeConfig | None = None, rank: int = 0) -> int:
    """Float32 weights that `rank` holds once `model` is parallelized; gradients and moments have their shapes."""
    with fake_world(layout, rank) as world:
        with torch.device("meta"):
            network = Transformer(model)
        parallelize(network, world, torch.bfloat16, runtime or RuntimeConfig())
        return sum(local(parameter).nbytes for parameter in network.parameters())
