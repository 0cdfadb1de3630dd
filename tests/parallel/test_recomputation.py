"""Activation checkpointing repeats neither the choice of experts nor what was counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from parallel_helpers import (
    accumulate,
    build_model,
    build_trainer,
    config_of,
    differing,
    gradients,
    ragged_batch,
    split,
    state,
)
from torch.utils._python_dispatch import TorchDispatchMode

from moe.parallel import World

ON = {"activation_checkpointing": "full"}


class OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_loss_and_gradients_are_bitwise_those_without(world: World, dtype: str, parts: int) -> None:
    batches = split(ragged_batch(), parts)
    models = [build_model(config_of(dtype, runtime), world) for runtime in ({}, ON)]
    losses = [accumulate(model, batches) for model in models]
    assert torch.equal(losses[0], losses[1])
    assert list(differing(*(gradients(model) for model in models))) == []


def test_choices_are_saved_and_the_rest_is_recomputed(world: World) -> None:
    counts = []
    for runtime in ({}, ON):
        model = build_model(config_of(runtime=runtime), world)
        with OperatorCounter() as counter:
            accumulate(model, [ragged_batch()])
        counts.append(counter.counts)
    plain, checkpointed = counts
    assert plain["topk"] == checkpointed["topk"] == 2
    # three blocks' norms come again, the final one does not; so do the router's probabilities
    assert checkpointed["_log_softmax"] == plain["_log_softmax"] + 2
    assert checkpointed["mm"] > 1.2 * plain["mm"]


def test_nothing_is_counted_twice(world: World) -> None:
    trainers = [build_trainer(config_of(runtime=runtime), world) for runtime in ({}, ON)]
    for trainer in trainers:
        for step in range(3):
            trainer.step(step, split(ragged_batch(step), 2))
    assert torch.equal(trainers[0].metrics.packed, trainers[1].metrics.packed)
    assert list(differing(*(state(trainer) for trainer in trainers))) == []


def test_less_is_kept_for_the_backward_pass(world: World) -> None:
    kept = []
    for runtime in ({}, ON):
        model, total = build_model(config_of(runtime=runtime), world), [0]

        def pack(tensor: torch.Tensor, total: list[int] = total) -> torch.Tensor:
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ragged_batch().input_ids)
        kept.append(total[0])
    assert kept[1] < 0.3 * kept[0]
