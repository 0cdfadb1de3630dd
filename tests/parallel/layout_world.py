"""Every layout against one process from the same weights; each function runs on every rank of one gloo world of four."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from parallel_helpers import (
    assert_all_close,
    build_model,
    build_trainer,
    config_of,
    gradients,
    ragged_batch,
    split,
    state,
    step_terms,
)
from torch import Tensor

from data import Batch
from moe.config import Config
from moe.model import Transformer
from moe.parallel import Layout, World, build_world, mark_last_micro_batch, sum_token_gradients
from moe.training.optimizer import clip_gradients, gradient_norm

CPU = torch.device("cpu")
LAYOUTS = [
    Layout(shard=2),
    Layout(shard=4),
    Layout(replicate=2, shard=2),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(shard=2, expert=2),
    Layout(shard=4, expert=4),
    Layout(shard=4, expert=2),
    Layout(tensor=2, expert=2),
    Layout(shard=2, tensor=2),
    Layout(shard=2, tensor=2, expert=2),
    Layout(shard=2, tensor=2, expert=4),
    Layout(replicate=2, shard=2, expert=2),
    Layout(replicate=2, tensor=2, expert=2),
]


def alone() -> World:
    """A world of its own on every rank."""
    worlds = [build_world(Layout(), CPU, first) for first in range(dist.get_world_size())]
    (own,) = [world for world in worlds if world is not None]
    return own


def share(batch: Batch, world: World) -> Batch:
    """This rank's part of the global batch."""
    return split(batch, world.layout.data)[world.data_rank]


def one_step(world: World, model: Transformer, config: Config, batch: Batch, parts: int) -> tuple[Tensor, Tensor]:
    """Forward and backward passes of a step in `parts` micro-batches: cross-entropy and balance terms of all ranks."""
    totals = torch.zeros(2)
    num_labels, num_tokens = batch.num_labels(), batch.valid.sum()
    for index, part in enumerate(split(share(batch, world), parts)):
        mark_last_micro_batch(model, index == parts - 1, config.parallel.reshard)
        cross_entropy, balance = step_terms(model, part, num_labels, num_tokens)
        (cross_entropy + balance).backward()
        totals += torch.stack([world.once(cross_entropy.detach(), torch.zeros(())), balance.detach()])
    sum_token_gradients(model, world)
    cross_entropy, balance = world.sum(totals)
    return cross_entropy, balance


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each within `tolerance` of its own norm; an expert that got no token may have none at all."""
    for name, tensor in expected.items():
        error = ((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-8)).item()
        assert error < tolerance, f"{name}: off by {error:.1e} of its norm"


def check_first_step(
    layout: Layout, parts: int = 1, runtime: dict[str, Any] | None = None, reshard: bool = False, **model: Any
) -> None:
    config = config_of(runtime=runtime, **model)
    config.parallel.reshard = reshard
    lone, world, batch = alone(), build_world(layout, CPU), ragged_batch()
    if world is None:
        return
    expected_model = build_model(config_of(**model), lone)
    expected = one_step(lone, expected_model, config_of(), batch, 1)
    shared = build_model(config, world)
    found = one_step(world, shared, config, batch, parts)
    for name, value, reference in zip(("cross-entropy", "balance"), found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    all_gradients = gradients(expected_model)
    assert_gradients_close(gradients(shared), all_gradients, 1e-5)
    norm, reference = gradient_norm(shared, world), gradient_norm(expected_model, lone)
    torch.testing.assert_close(norm, reference, rtol=1e-5, atol=0)
    for each, each_norm in ((shared, norm), (expected_model, reference)):
        clip_gradients(each, each_norm, 0.1)
    assert_gradients_close(gradients(shared), gradients(expected_model), 1e-5)
