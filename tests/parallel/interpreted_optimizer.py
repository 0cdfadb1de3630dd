"""AdamW by its own kernel, in Triton's interpreter, on the CPU; run by tests/kernels/test_interpreted.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_helpers import build_trainer, config_of, ragged_batch, split, state
from torch import Tensor, nn
from worlds import play

from moe.config.schema import OptimConfig
from moe.kernels import adamw
from moe.parallel import Layout, build_world
from moe.training.optimizer import AdamW, build_optimizer

SHAPES = [(1,), (7,), (64,), (5, 40), (3, 64), (2, 3, 65)]
LAYOUTS = [Layout(shard=2, expert=2), Layout(tensor=2)]
UNMOVED = {(1, 2), (2, 3), (3, 3)}
"""Steps at which a parameter, by its index, has no gradient: from then on its steps count less."""
TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BLOCK", 64)
    monkeypatch.setattr(AdamW, "has_kernel", lambda optimizer: True)


def model_of(shapes: list[tuple[int, ...]] = SHAPES) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)


def gradients(step: int, model: nn.ParameterList) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    found = [torch.randn(p.shape, generator=generator) * 10.0 ** (index - 3) for index, p in enumerate(model)]
    for gradient in found:
        gradient.view(-1)[10:12] = 0  # as of experts and rows of the vocabulary that nothing has reached
    return found


def move(optimizer: AdamW, model: nn.ParameterList, step: int, divisor: float = 1.0, skip: Tensor = TAKEN) -> None:
    for index, (parameter, gradient) in enumerate(zip(model, gradients(step, model), strict=True)):
        parameter.grad = None if (step, index) in UNMOVED else gradient
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(divisor), skip
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (step + 1)
    optimizer.step()


def everything(optimizer: AdamW, model: nn.ParameterList) -> list[Tensor]:
    return [t.detach().clone() for p in model for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)])
def test_steps_are_those_of_float64(betas: tuple[float, float]) -> None:
    model, exact = model_of(), model_of().double()
    config = OptimConfig(beta1=betas[0], beta2=betas[1])
    optimizer = build_optimizer(model, config)
    matrices, vectors = [p for p in exact if p.dim() > 1], [p for p in exact if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    for step in range(6):
        divisor = 1.0 + step % 3
        move(optimizer, model, step, divisor)
        for group in reference.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        for index, (parameter, gradient) in enumerate(zip(exact, gradients(step, exact), strict=True)):
            parameter.grad = None if (step, index) in UNMOVED else gradient.double() / divisor
        reference.step()
    for own, wanted in zip(model, exact, strict=True):
        torch.testing.assert_close(own.double(), wanted, rtol=0, atol=5e-7)
        for name, moment in reference.state[wanted].items():
            size = moment.double().square().mean().sqrt().item()
            torch.testing.assert_close(
                optimizer.state[own][name].double() / size, moment.double() / size, rtol=0, atol=2e-6
            )


def test_gradients_are_left_as_they_are() -> None:
    model = model_of()
    move(build_optimizer(model, OptimConfig()), model, 0, divisor=4.0)
    for parameter, gradient in zip(model, gradients(0, model), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_skipped_step_changes_nothing_to_the_bit() -> None:
    model = model_of()
    optimizer = build_optimizer(model, OptimConfig())
    for step in range(2):
        move(optimizer, model, step)
        before = everything(optimizer, model)
        move(optimizer, model, 9, divisor=torch.nan, skip=SKIPPED)
        assert all(map(torch.equal, everything(optimizer, model), before))


def test_a_skipped_step_does_not_count() -> None:
    models = model_of(), model_of()
    first, second = (build_optimizer(model, OptimConfig()) for model in models)
    move(first, models[0], 9, skip=SKIPPED)
    for optimizer, model in zip((first, second), models, strict=True):
        move(optimizer, model, 0)
    assert all(map(torch.equal, everything(first, models[0]), everything(second, models[1])))


def test_what_has_no_gradient_or_no_elements_stays() -> None:
    model = model_of([(4,), (0, 8), (8,), (2, 2)])
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    model[0].grad, model[1].grad = torch.ones(4), torch.ones(0, 8)
    before = everything(optimizer, model)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), TAKEN
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(everything(optimizer, model), before, strict=True)]
    step_alone = [False, True, False, False]
    assert changed == [True] * 4 + step_alone + [False] * 8


@pytest.mark.parametrize(
    "gradient",
    [torch.ones(8, 16).T, torch.ones(16, 16)[:, :8], torch.ones(16, 8).half(), torch.ones(8, 8), torch.ones(128)],
)
def test_other_tensors_are_refused(gradient: Tensor) -> None:
    parameter, *moments = (torch.ones(16, 8) for _ in range(3))
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    with pytest.raises(ValueError, match="contiguous float32 tensors of one shape"):
        adamw.adamw(parameter, gradient, *moments, torch.ones(2), torch.ones(()), TAKEN, **settings)
    assert all(tensor.eq(1).all() for tensor in (parameter, *moments))


def two_steps(layout: Layout, own_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    world = build_world(layout, torch.device("cpu"))
    assert world is not None
    monkeypatch.setattr(AdamW, "has_kernel", lambda optimizer: own_kernel)
    trainer = build_trainer(config_of(num_hidden_layers=2, n_routed_experts=5, num_experts_per_tok=2), world)
    for step in range(2):
        trainer.step(step, [split(ragged_batch(step), world.layout.data)[world.data_rank]])
    return state(trainer)


def play_layouts(rank: int, root: Path) -> None:
    for layout in LAYOUTS:
        with pytest.MonkeyPatch.context() as patch:
            own, torchs = (two_steps(layout, own_kernel, patch) for own_kernel in (True, False))
        assert own.keys() == torchs.keys()
        for name, tensor in torchs.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_layouts_of_two_ranks(tmp_path: Path) -> None:
    assert play({"layouts": play_layouts}, tmp_path, world_size=2, patience=300) == {"layouts": ["", ""]}
