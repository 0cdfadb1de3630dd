"""Experts without tokens get zero gradients, whatever lay in memory before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parallel_helpers import accumulate, build_model, config_of, differing, gradients, ragged_batch, split
from torch import Tensor

from moe.model import Transformer
from moe.model.router import TopKRouter
from moe.parallel import World

UNLIKELY = [0, 7, 8, 61, 62]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates without writing it holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def model_that_avoids(experts: list[int], world: World, dtype: str, backend: str) -> Transformer:
    model = build_model(config_of(dtype, {"expert_backend": backend}), world)
    for block in model.moe_blocks():
        assert isinstance(block.gate, TopKRouter)
        assert block.gate.expert_bias is not None
        block.gate.expert_bias[experts] = -10.0
    return model


def expert_gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients(model).items() if ".experts." in name}


RUNS = [("float32", "loop"), ("float32", "grouped_mm"), ("bfloat16", "loop"), ("bfloat16", "grouped_mm")]


@pytest.mark.parametrize(("dtype", "backend"), RUNS)
@pytest.mark.parametrize("parts", [1, 2])
def test_their_gradients_are_zero(world: World, dtype: str, backend: str, parts: int) -> None:
    model = model_that_avoids(UNLIKELY, world, dtype, backend)
    accumulate(model, split(ragged_batch(), parts))
    found = expert_gradients(model)
    assert len(found) == 4
    for name, gradient in found.items():
        assert gradient[UNLIKELY].abs().max() == 0, name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(("dtype", "backend"), RUNS)
def test_what_memory_held_before_changes_nothing(
    world: World, dtype: str, backend: str, request: pytest.FixtureRequest
) -> None:
    """Ragged sequences too: their padding is rows past the last expert's."""
    results = []
    for poison in (False, True):
        if poison:
            request.getfixturevalue("poisoned_memory")
        model = model_that_avoids(UNLIKELY, world, dtype, backend)
        loss = accumulate(model, split(ragged_batch(), 2))
        results.append({"loss": loss} | gradients(model))
    assert list(differing(*results)) == []
    assert all(tensor.isfinite().all() for tensor in results[1].values())


def test_all_tokens_on_the_same_experts(world: World) -> None:
    crowd = [3, 4, 5, 6, 9, 10, 11]
    others = [expert for expert in range(63) if expert not in crowd]
    models = [model_that_avoids(others, world, "float32", backend) for backend in ("loop", "grouped_mm")]
    for model in models:
        accumulate(model, [ragged_batch()])
        assert all(gradient[others].abs().max() == 0 for gradient in expert_gradients(model).values())
    for name, gradient in gradients(models[0]).items():
        torch.testing.assert_close(gradients(models[1])[name], gradient, rtol=1e-4, atol=1e-6)
