"""Learning rates against closed forms at every boundary, and the optimizer's groups."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from parallel_helpers import build_trainer, config_of, ragged_batch

from moe.config.schema import ScheduleConfig
from moe.kernels import has_triton
from moe.parallel import World
from moe.training.optimizer import build_optimizer, learning_rate

PEAK = 1.08e-3


def rate(step: int, total: int, **schedule: object) -> float:
    """In units of the peak."""
    return learning_rate(step, total, PEAK, ScheduleConfig(**schedule)) / PEAK  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["multistep", "cosine", "constant", "wsd"])
def test_every_shape_warms_up_linearly(shape: str) -> None:
    found = [rate(step, 1000, shape=shape, warmup_steps=100) for step in (0, 1, 49, 98, 99, 100)]
    assert found == pytest.approx([0.01, 0.02, 0.5, 0.99, 1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize(
    ("total", "first_drop", "second_drop"), [(25_000, 20_000, 22_500), (106_449, 85_160, 95_805), (10, 8, 9)]
)
def test_multistep_drops_at_80_and_90_percent(total: int, first_drop: int, second_drop: int) -> None:
    steps = [first_drop - 1, first_drop, second_drop - 1, second_drop, total - 1]
    expected = [1.0, 0.316, 0.316, 0.316**2, 0.316**2]
    assert [rate(step, total, warmup_steps=2) for step in steps] == pytest.approx(expected, rel=1e-12)


def test_constant_stays() -> None:
    assert {rate(step, 13_000, shape="constant", warmup_steps=2000) for step in (2000, 7000, 12_999)} == {1.0}


def test_cosine() -> None:
    found = [
        rate(step, 1101, shape="cosine", warmup_steps=100, final_ratio=0.1) for step in (100, 350, 600, 1099, 1100)
    ]
    expected = [1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.cos(math.pi / 1000), 0.1]
    assert found == pytest.approx(expected, rel=1e-9)


def test_wsd_is_flat_then_linear() -> None:
    options = {"shape": "wsd", "warmup_steps": 10, "final_ratio": 0.2, "decay_fraction": 0.25}
    found = [rate(step, 1000, **options) for step in (10, 749, 750, 751, 875, 999)]
    expected = [1.0, 1.0, 1.0, 1 - 0.8 / 249, 1 - 0.8 * 125 / 249, 0.2]
    assert found == pytest.approx(expected, rel=1e-9)


def test_no_decay_and_no_warmup_are_possible() -> None:
    assert rate(0, 100, warmup_steps=0) == 1.0
    assert rate(99, 100, shape="wsd", warmup_steps=0, decay_fraction=0.0) == 1.0
    assert rate(99, 100, shape="cosine", warmup_steps=100) == 1.0


def test_the_step_uses_the_rate_of_its_index(world: World) -> None:
    config = config_of()
    config.optim.schedule = ScheduleConfig(warmup_steps=10)
    trainer = build_trainer(config, world)
    for step in (0, 4, 85):
        trainer.step(step, [ragged_batch(step)])
        expected = learning_rate(step, config.train.steps, config.optim.lr, config.optim.schedule)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [expected, expected]


def test_the_papers_adamw_decays_matrices_only(world: World) -> None:
    config = config_of()
    trainer = build_trainer(config, world)
    optimizer = build_optimizer(trainer.model, config.optim)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == spared["betas"] == (0.9, 0.95)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in spared["params"]} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(
        set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        for group in (decayed, spared)
        for p in group["params"]
    )


def test_the_kernel_moves_what_is_on_a_gpu(world: World) -> None:
    config = config_of()
    optimizer = build_optimizer(build_trainer(config, world).model, config.optim)
    told = [None, torch.zeros(()), SimpleNamespace(is_cuda=True)]
    with pytest.MonkeyPatch.context() as patch:
        for found_inf, expected in zip(told, (False, False, has_triton()), strict=True):
            patch.setattr(optimizer, "found_inf", found_inf)
            assert optimizer.has_kernel() == expected
