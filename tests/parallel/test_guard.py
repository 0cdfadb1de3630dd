"""A step that is not finite, or a spike, leaves everything bitwise as it was, and the next one goes on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from parallel_helpers import build_trainer, config_of, differing, ragged_batch, state

from moe.config.schema import GuardConfig
from moe.model import LossSums
from moe.parallel import World, local
from moe.training import trainer as trainer_module
from moe.training.guard import NumericalAbort, StepGuard
from moe.training.trainer import Trainer

CPU = torch.device("cpu")
Injection = Callable[[Trainer, pytest.MonkeyPatch], None]


@contextmanager
def scaled_loss(trainer: Trainer, factor: float) -> Iterator[None]:
    head = trainer.model.lm_head
    assert head is not None
    handle = head.register_forward_hook(lambda m, a, out: LossSums(*(part * factor for part in out)))
    yield
    handle.remove()


def step_with_bad_gradient(trainer: Trainer, step: int, name: str, value: float) -> None:
    """A step in which one entry of one gradient is `value`."""
    original = trainer_module.gradient_norm

    def poisoned(model: torch.nn.Module, world: World) -> torch.Tensor:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        local(gradient).view(-1)[3] = value
        return original(model, world)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "gradient_norm", poisoned)
        trainer.step(step, [ragged_batch(step)])


def bad_step(trainer: Trainer, step: int, kind: str) -> None:
    if kind == "gradient nan":
        step_with_bad_gradient(trainer, step, "layers.1.mlp.experts.down_proj", float("nan"))
    elif kind == "gradient inf":
        step_with_bad_gradient(trainer, step, "layers.2.input_layernorm.weight", float("inf"))
    else:
        with scaled_loss(trainer, float(kind.removeprefix("loss "))):
            trainer.step(step, [ragged_batch(step)])


@pytest.mark.parametrize("kind", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(world: World, kind: str) -> None:
    tried, spared = (build_trainer(config_of(), world) for _ in range(2))
    for trainer in (tried, spared):
        trainer.step(0, [ragged_batch(0)])
    before = state(tried)
    bad_step(tried, 1, kind)
    assert list(differing(state(tried), before)) == []
    assert tried.metrics.scalars[:2].tolist() == [1, 1]
    assert tried.guard.consecutive_skips == 1
    for trainer in (tried, spared):
        trainer.step(2, [ragged_batch(2)])
    after = state(tried)
    assert list(differing(after, state(spared))) == []
    assert torch.equal(tried.metrics.packed, spared.metrics.packed)
    assert tried.guard.consecutive_skips == 0
    moved = set(differing(after, before))
    assert {"lm_head.weight", "lm_head.weight/exp_avg", "lm_head.weight/step", "layers.1.mlp.gate.expert_bias"} <= moved


def test_a_spike_changes_nothing_and_counts_only_from_a_full_window(world: World) -> None:
    config = config_of()
    config.train.guard = GuardConfig(spike_threshold=8.0, window=8)
    trainer = build_trainer(config, world)
    for step in range(8):
        trainer.step(step, [ragged_batch(step)])
        assert trainer.guard.consecutive_skips == 0
    before = state(trainer)
    bad_step(trainer, 8, "loss 100")
    assert trainer.guard.consecutive_skips == 1
    assert list(differing(state(trainer), before)) == []
    trainer.step(9, [ragged_batch(9)])
    assert trainer.guard.consecutive_skips == 0
    assert list(differing(state(trainer), before)) != []


def test_before_the_window_is_full_a_spike_counts(world: World) -> None:
    config = config_of()
    config.train.guard = GuardConfig(spike_threshold=8.0, window=8)
    trainer = build_trainer(config, world)
    bad_step(trainer, 0, "loss 100")
    assert trainer.guard.consecutive_skips == 0


def judge(guard: StepGuard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)) == 1)


def filled_guard(losses: list[float], threshold: float = 8.0) -> StepGuard:
    guard = StepGuard(GuardConfig(spike_threshold=threshold, window=len(losses)), CPU)
    assert all(judge(guard, loss) for loss in losses)
    return guard


LOSSES = [3.0, 2.9, 3.3, 2.5, 3.1, 2.8, 3.4, 2.7, 3.05]


def limit(losses: list[float], threshold: float) -> float:
    """Median plus `threshold` robust deviations, by the standard library."""
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return median + threshold * max(deviation, 0.02 * median)


@pytest.mark.parametrize("threshold", [2.0, 8.0])
def test_the_limit_is_so_many_robust_deviations_above_the_median(threshold: float) -> None:
    edge = limit(LOSSES, threshold)
    assert judge(filled_guard(LOSSES, threshold), edge * 0.999)
    assert not judge(filled_guard(LOSSES, threshold), edge * 1.001)


def test_a_flat_history_allows_two_percent_a_deviation() -> None:
    assert judge(filled_guard([2.0] * 9), 2.0 * 1.159)
    assert not judge(filled_guard([2.0] * 9), 2.0 * 1.161)


def test_falling_is_no_spike_and_either_value_may_spike() -> None:
    assert judge(filled_guard(LOSSES), 0.01)
    assert not judge(filled_guard(LOSSES), 3.0, norm=50.0)


def test_only_accepted_steps_enter_the_window() -> None:
    guard = filled_guard(LOSSES)
    before = guard.history.clone()
    assert not judge(guard, 1000.0)
    assert not judge(guard, float("nan"))
    assert torch.equal(guard.history, before)
    assert judge(guard, 2.0)
    assert guard.history[0].tolist() == pytest.approx([*LOSSES[1:], 2.0])


def test_threshold_zero_refuses_only_what_is_not_finite() -> None:
    guard = filled_guard(LOSSES, threshold=0.0)
    assert judge(guard, 1e6)
    assert not judge(guard, float("inf"))


def test_many_skips_in_a_row_end_the_run() -> None:
    guard = StepGuard(GuardConfig(max_consecutive_skips=3), CPU)
    for skips in range(1, 4):
        judge(guard, float("nan"))
        assert guard.consecutive_skips == skips
        if skips < 3:
            guard.raise_if_stuck(int(guard.consecutive_skips), step=5)
    with pytest.raises(NumericalAbort, match=r"step 5: the last 3 steps .*train.guard.max_consecutive_skips=3"):
        guard.raise_if_stuck(int(guard.consecutive_skips), step=5)


def test_the_guards_memory_travels_with_the_checkpoint() -> None:
    guard, resumed = filled_guard(LOSSES), StepGuard(GuardConfig(window=len(LOSSES)), CPU)
    judge(guard, float("nan"))
    for name, tensor in guard.state_tensors().items():
        resumed.state_tensors()[name].copy_(tensor)
    assert resumed.consecutive_skips == 1
    assert not judge(resumed, limit(LOSSES, 8.0) * 1.001)
