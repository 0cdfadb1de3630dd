"""What names a run, and the norm that clipping and the guard go by."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from moe.config import load, recipe, run_id
from moe.parallel import join_world
from moe.training.optimizer import gradient_norm


def identity(*overrides: str, world_size: int = 1) -> str:
    return run_id(recipe(load.compose(overrides), {"text": "corpus"}, world_size))


def test_layout_and_telemetry_do_not_name_a_run() -> None:
    layout = ["train.micro_batch_size=2", "runtime.compile=true", "telemetry.wandb=offline", "checkpoint.interval=3"]
    assert identity(*layout, world_size=2) == identity()
    for recipe_key in ("train.seed=1", "model.granularity=4", "optim.lr=0.01", "train.steps=1000"):
        assert identity(recipe_key) != identity()
    config = load.compose([])
    assert run_id(recipe(config, {"text": "corpus", "seq_len": 128})) != identity()


def test_losses_pooled_over_a_micro_batch_make_its_size_part_of_the_recipe() -> None:
    pooled = "model.seq_aux=false"
    assert identity(pooled, "train.micro_batch_size=2") != identity(pooled, "train.micro_batch_size=4")
    assert identity(pooled, "train.micro_batch_size=2", world_size=2) == identity(pooled, "train.micro_batch_size=4")


def test_gradient_norm_is_exact_on_large_tensors() -> None:
    gradient = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(0))
    with join_world("cpu") as world:
        model = nn.Linear(2000, 3000, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight, world.dense["shard"], [Shard(0)]))
        model.weight.grad = distribute_tensor(gradient, world.dense["shard"], [Shard(0)])
        assert gradient_norm(model, world).item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_difference_names_dotted_keys() -> None:
    config = load.compose([])
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    changes = load.difference(recipe(config, {"text": "a"}), recipe(other, {"text": "b"}))
    assert changes == ["data.text: a -> b", f"optim.lr: {config.optim.lr} -> 0.5"]
