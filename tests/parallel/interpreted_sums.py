"""Fused experts that add their gradients to a step's sums, in Triton's interpreter, on the CPU; run by
tests/kernels/test_interpreted.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_helpers import LANGUAGES, config_of, full, ragged_batch, split, step_loss
from torch import Tensor
from worlds import play

from moe.config import Config
from moe.model import Transformer, initialise
from moe.parallel import Layout, World, build_world, mark_last_micro_batch, parallelize, sum_token_gradients

# the package's attribute of this name is the function
PARALLELIZE = importlib.import_module("moe.parallel.parallelize")
LAYOUTS = [Layout(shard=2), Layout(shard=2, expert=2), Layout(tensor=2)]


def small_config(recompute: str = "none", **parallel: Any) -> Config:
    options = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_device_groups": 4}
    return config_of("float16", {"activation_checkpointing": recompute}, parallel, **options)


def fused_model(config: Config, world: World, inside: bool, compiled: bool = False) -> Transformer:
    """With experts that add to sums, or that leave it to FSDP."""
    model = Transformer(config.model.build(), num_languages=LANGUAGES, expert_backend="triton", loss_chunk_size=64)
    initialise(model, config.model.initializer_range, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        if not inside:
            patch.setattr(PARALLELIZE, "_sum_gradients_in_products", lambda model: None)
        parallelize(model, world, torch.float16, config.runtime, config.parallel)
    for mixture in model.moe_blocks() if compiled else ():
        mixture.mix = torch.compile(mixture.mix, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    return model


def step(model: Transformer, config: Config, world: World, parts: int) -> tuple[dict[str, Tensor], list[bool]]:
    """Gradients of a step, and for each micro-batch whether its successor is lent sums."""
    batch, lent = ragged_batch(sequences=4), []
    model.zero_grad()
    for index, part in enumerate(split(split(batch, world.layout.data)[world.data_rank], parts)):
        mark_last_micro_batch(model, index == parts - 1, config.parallel.reshard)
        step_loss(model, part, batch.num_labels(), batch.num_tokens()).backward()
        lent += [mixture.experts.gradient_sums is not None for mixture in model.moe_blocks()]
    sum_token_gradients(model, world)
    return {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}, lent


def assert_same_sums(config: Config, world: World, *steps: int, compiled: bool = False) -> None:
    """In steps of as many micro-batches, sums taken inside the experts and outside are equal to the bit."""
    inside, outside = (fused_model(config, world, inside, compiled) for inside in (True, False))
    for parts in steps:
        (found, lent), (expected, never) = (step(model, config, world, parts) for model in (inside, outside))
        assert lent == [not config.parallel.reshard] * (parts - 1) + [False]
        assert not any(never)
        assert found.keys() == expected.keys() == dict(inside.named_parameters()).keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        assert all(found[name].any() for name in found if "experts" in name)


def test_gradients_are_the_same(world: World) -> None:
    assert_same_sums(small_config(), world, 4, 1)


def test_gradients_are_the_same_compiled(world: World) -> None:
    assert_same_sums(small_config(), world, 1, 2, compiled=True)


def test_gradients_are_the_same_recomputed(world: World) -> None:
    assert_same_sums(small_config("full"), world, 2)


def test_sums_are_given_back_before_they_are_reduced() -> None:
    """Else their memory is held while the largest buffers of a step are."""
    experts, seen = SimpleNamespace(gradient_sums=("lent", "lent")), []
    names = ("gate_up_proj", "down_proj")
    infos = [SimpleNamespace(module=experts, param_name=name) for name in names]
    reduced = [SimpleNamespace(_module_info=info, unsharded_accumulated_grad=None) for info in infos]
    PARALLELIZE._lend_sums(SimpleNamespace(fsdp_params=reduced), experts, lambda: seen.append(experts.gradient_sums))
    assert seen == [None]
    assert experts.gradient_sums is None


def test_resharded_weights_have_no_sums(world: World) -> None:
    assert_same_sums(small_config(reshard=True), world, 2)


def play_layouts(rank: int, root: Path) -> None:
    for layout in LAYOUTS:
        world = build_world(layout, torch.device("cpu"))
        assert world is not None
        assert_same_sums(small_config(), world, 2)


def test_layouts_of_two_ranks(tmp_path: Path) -> None:
    assert play({"layouts": play_layouts}, tmp_path, world_size=2, patience=300) == {"layouts": ["", ""]}
