"""What several ranks do together; every function runs on every rank of one gloo world of four."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_helpers import (
    SEQUENCES,
    accumulate,
    assert_all_close,
    build_model,
    build_trainer,
    config_of,
    differing,
    gradients,
    ragged_batch,
    split,
    state,
    step_loss,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data import Batch
from moe.kernels.experts import swiglu
from moe.model import LossSums, Transformer
from moe.parallel import Layout, World, build_world, local, mark_last_micro_batch
from moe.training.optimizer import gradient_norm

WORLD_SIZE = 4
CPU = torch.device("cpu")


def world_of(size: int) -> World | None:
    """The first `size` ranks as a world, None on the others; size 1 is a world of its own on every rank."""
    if size > 1:
        return build_world(Layout(shard=size), CPU)
    worlds = [build_world(Layout(), CPU, first) for first in range(WORLD_SIZE)]
    return worlds[dist.get_rank()]


def share(batch: Batch, world: World) -> Batch:
    return split(batch, world.size)[world.rank]


def gradients_on(
    world: World, model: Transformer, batch: Batch, micro_batches: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The global loss and all gradients of one step in which each rank has its share of `batch`."""
    total = torch.zeros(())
    for index, part in enumerate(split(share(batch, world), micro_batches)):
        mark_last_micro_batch(model, is_last=index == micro_batches - 1)
        loss = step_loss(model, part, batch.num_labels(), batch.num_tokens())
        loss.backward()
        total += loss.detach()
    return world.sum(total), gradients(model)


def check_gradients(num_experts: int, size: int, micro_batches: int = 1, dtype: str = "float32") -> None:
    config = config_of(dtype, n_routed_experts=num_experts, num_experts_per_tok=3, n_device_groups=3)
    alone, world, batch = world_of(1), world_of(size), ragged_batch()
    assert alone is not None
    if world is None:
        return
    model = build_model(config, alone)
    loss, expected = accumulate(model, [batch]), gradients(model)
    shared = build_model(config, world)
    shared_loss, found = gradients_on(world, shared, batch, micro_batches)
    torch.testing.assert_close(shared_loss, loss, rtol=2e-6, atol=0)
    assert len(found) == len(list(shared.parameters()))
    assert_all_close(found, expected, 1e-5)
    torch.testing.assert_close(gradient_norm(shared, world), gradient_norm(model, alone), rtol=1e-5, atol=0)


def loss_and_gradients_on_two_ranks_are_those_on_one(rank: int, folder: Path) -> None:
    check_gradients(num_experts=63, size=2)


def loss_and_gradients_on_four_ranks_are_those_on_one(rank: int, folder: Path) -> None:
    check_gradients(num_experts=63, size=4)
    check_gradients(num_experts=5, size=4, micro_batches=2)


def fewer_experts_than_ranks_shard_too(rank: int, folder: Path) -> None:
    check_gradients(num_experts=3, size=4)


def sixty_three_experts_lie_unevenly_on_four_ranks(rank: int, folder: Path) -> None:
    world = world_of(4)
    assert world is not None
    model = build_model(config_of(), world)
    for block in model.moe_blocks():
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            assert isinstance(weight, DTensor)
            assert weight.shape[0] == 63
            assert weight.to_local().shape == ((15 if rank == 3 else 16), *weight.shape[1:])


def steps_on_two_and_four_ranks_are_those_on_one(rank: int, folder: Path) -> None:
    """Three steps with clipping, AdamW and bias updates; every rank ends with the same counts and biases."""
    worlds = [world for world in map(world_of, (1, 2, 4)) if world is not None]
    trainers = [build_trainer(config_of(), world) for world in worlds]
    for step in range(3):
        for trainer in trainers:
            trainer.step(step, split(share(ragged_batch(step), trainer.world), 2 if trainer.world.size == 2 else 1))
    expected = state(trainers[0])
    for trainer in trainers[1:]:
        found = state(trainer)
        assert_all_close(found, expected, 1e-4)
        for name in expected:
            if name.endswith("expert_bias"):
                assert torch.equal(found[name], expected[name]), name
        assert torch.equal(trainer.sums.counts, trainers[0].sums.counts)
        torch.testing.assert_close(trainer.metrics.packed, trainers[0].metrics.packed, rtol=1e-5, atol=1e-5)


def a_bad_gradient_on_one_rank_is_skipped_by_all(rank: int, folder: Path) -> None:
    world = world_of(4)
    assert world is not None
    trainer = build_trainer(config_of(), world)
    trainer.step(0, [share(ragged_batch(0), world)])
    before = state(trainer)
    head = trainer.model.lm_head
    assert head is not None
    factor = float("nan") if rank == 2 else 1.0
    handle = head.register_forward_hook(lambda m, a, out: LossSums(*(part * factor for part in out)))
    trainer.step(1, [share(ragged_batch(1), world)])
    handle.remove()
    assert trainer.guard.consecutive_skips == 1
    assert list(differing(state(trainer), before)) == []
    trainer.step(2, [share(ragged_batch(2), world)])
    assert trainer.guard.consecutive_skips == 0


def a_signal_on_one_rank_stops_all_at_the_same_step(rank: int, folder: Path) -> None:
    world = world_of(4)
    assert world is not None
    trainer = build_trainer(config_of(), world)
    answers = []
    with trainer.stop.listening():
        for step in range(3):
            answers.append(trainer.stop.agreed())
            if step == 1 and rank == 2:
                signal.raise_signal(signal.SIGTERM)
            trainer.step(step, [share(ragged_batch(step), world)])
        answers.append(trainer.stop.agreed())
    assert answers == [False, False, True, True], answers


def labels_are_counted_over_all_ranks(rank: int, folder: Path) -> None:
    """Rank 1 has no label at all; its share of the loss is nothing, not a quarter."""
    batch = ragged_batch()
    batch.labels[SEQUENCES // 4 : SEQUENCES // 2] = -100
    alone, world = world_of(1), world_of(4)
    assert alone is not None
    assert world is not None
    assert (share(batch, world).num_labels() == 0) == (rank == 1)
    config = config_of()
    trainers = [build_trainer(config, w) for w in (alone, world)]
    for trainer in trainers:
        trainer.step(0, [share(batch, trainer.world)])
    assert_all_close(state(trainers[1]), state(trainers[0]), 1e-4)


def a_shard_of_the_width_keeps_gate_and_up_together(rank: int, folder: Path) -> None:
    """Summed over ranks, what each makes of its quarter of the width is the whole expert."""
    world = world_of(4)
    assert world is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 32, generator=generator)
    gate_up, down = torch.randn(3, 2, 16, 32, generator=generator), torch.randn(3, 32, 16, generator=generator)
    part, down_part = (local(distribute_tensor(t, world.dense["shard"], [Shard(2)])) for t in (gate_up, down))
    assert part.shape == (3, 2, 4, 32)
    for expert in range(3):
        whole = swiglu((x @ gate_up[expert].flatten(0, 1).T).unflatten(1, (2, -1))) @ down[expert].T
        own = swiglu((x @ part[expert].flatten(0, 1).T).unflatten(1, (2, -1))) @ down_part[expert].T
        torch.testing.assert_close(world.sum(own), whole, rtol=1e-4, atol=1e-4)


SCENARIOS = [
    loss_and_gradients_on_two_ranks_are_those_on_one,
    loss_and_gradients_on_four_ranks_are_those_on_one,
    fewer_experts_than_ranks_shard_too,
    sixty_three_experts_lie_unevenly_on_four_ranks,
    steps_on_two_and_four_ranks_are_those_on_one,
    a_bad_gradient_on_one_rank_is_skipped_by_all,
    a_signal_on_one_rank_stops_all_at_the_same_step,
    labels_are_counted_over_all_ranks,
    a_shard_of_the_width_keeps_gate_and_up_together,
]
