"""fp32 masters, bf16 blocks, fp32 routers and gradient sums: one mechanism, a single device included."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallel_helpers import (
    SEQUENCES,
    accumulate,
    build_model,
    build_trainer,
    config_of,
    gradients,
    ragged_batch,
    split,
    step_loss,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe.model import Transformer
from moe.model.experts import GroupedExperts
from moe.model.router import Routing, TopKRouter
from moe.parallel import World, mark_last_micro_batch


class CastCounter(TorchDispatchMode):
    """Counts elements copied from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bfloat16 and func is torch.ops.aten._to_copy.default:
            self.elements += args[0].numel() if args[0].dtype == torch.float32 else 0
        return result


def test_masters_moments_and_gradients_are_float32(world: World) -> None:
    trainer = build_trainer(config_of("bfloat16"), world)
    accumulate(trainer.model, [ragged_batch()])
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert {t.dtype for t in trainer.optimizer.state[parameter].values()} == {torch.float32}
    for name, buffer in trainer.model.named_buffers():
        assert buffer.dtype == torch.float32, name


def test_blocks_compute_in_bfloat16_and_routers_in_float32(world: World) -> None:
    model = build_model(config_of("bfloat16"), world)
    seen: dict[str, torch.dtype] = {}
    routings: list[Routing] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, _, out, name=name: seen.update({name: (m.weight.dtype, out.dtype)}))
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda m, _, out, name=name: seen.update({name: m.weight.dtype}))
            module.register_forward_hook(lambda *hook: routings.append(hook[2]))
    output = model(ragged_batch().input_ids)
    assert output.hidden.dtype == torch.bfloat16
    gates = {name: dtype for name, dtype in seen.items() if name.endswith("mlp.gate")}
    assert gates == {f"layers.{layer}.mlp.gate": torch.float32 for layer in (1, 2)}
    linears = {name: dtypes for name, dtypes in seen.items() if name not in gates}
    assert len(linears) == 3 * 4 + 3 + 2 * 3
    assert set(linears.values()) == {(torch.bfloat16, torch.bfloat16)}
    assert {t.dtype for r in routings for t in (r.logits, r.scores, r.weights) if t is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("parts", "reshard"), [(1, False), (2, False), (2, True)])
def test_one_rank_keeps_the_gradients_that_fsdp_would_copy(
    world: World, dtype: str, parts: int, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(dtype)
    config.parallel.reshard = reshard
    found, copied = [], []
    for is_kept in (True, False):
        if not is_kept:
            monkeypatch.setattr(
                sys.modules["moe.parallel.parallelize"], "_keep_gradients_of_one_rank", lambda model: None
            )
        model = build_model(config, world)
        with WholeCopyCounter() as counter:
            for number, batch in enumerate(split(ragged_batch(), parts)):
                mark_last_micro_batch(model, number == parts - 1, reshard)
                step_loss(model, batch, 64, 64).backward()
        found.append(gradients(model))
        copied.append(counter.calls)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert copied[0] == 0
    assert copied[1] > 0


class WholeCopyCounter(TorchDispatchMode):
    """Counts the calls by which FSDP2 copies the gradients of a group into one buffer."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func is torch.ops.fsdp.chunk_cat.default
        return func(*args, **(kwargs or {}))


def recording(experts: GroupedExperts, seen: list[tuple[torch.dtype, ...]]) -> Callable[..., Tensor]:
    route = experts.route

    def routed(x: Tensor, *args: Any) -> Tensor:
        out = route(x, *args)
        seen.append((experts.gate_up_proj.dtype, x.dtype, out.dtype))
        return out

    return routed


def test_experts_compute_in_bfloat16(world: World) -> None:
    model = build_model(config_of("bfloat16"), world)
    seen: list[tuple[torch.dtype, ...]] = []
    for block in model.moe_blocks():
        block.experts.route = recording(block.experts, seen)  # type: ignore[method-assign]
    model(ragged_batch().input_ids)
    assert seen == [(torch.bfloat16,) * 3] * 2


def casts_of_each_micro_batch(model: Transformer, parts: int) -> list[int]:
    found = []
    for index, batch in enumerate(split(ragged_batch(), parts)):
        mark_last_micro_batch(model, is_last=index == parts - 1)
        with CastCounter() as counter:
            step_loss(model, batch, 50, 60).backward()
        found.append(counter.elements)
    return found


@pytest.mark.usefixtures("products_as_on_gpus")
def test_the_bfloat16_copy_is_made_once_a_step(world: World) -> None:
    """Later micro-batches cast activations only, far fewer elements than the weights."""
    model = build_model(config_of("bfloat16", vocab_size=480), world)
    weights = sum(p.numel() for name, p in model.named_parameters() if "mlp.gate.weight" not in name)
    first, *later = casts_of_each_micro_batch(model, SEQUENCES)
    assert first > weights
    assert max(later) < 0.2 * weights
    again, *_ = casts_of_each_micro_batch(model, SEQUENCES)
    assert again > weights


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return sum(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact) / len(exact)


def test_gradients_accumulate_in_float32(world: World) -> None:
    """The sum over 32 micro-batches is that of the parts in float64; a bfloat16 sum of them is far from it."""
    batches = split(ragged_batch(sequences=32), 32)
    config = config_of("bfloat16")
    model = build_model(config, world)
    accumulate(model, batches)
    found = gradients(model)
    counts = sum(b.num_labels() for b in batches), sum(b.num_tokens() for b in batches)
    exact = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in found.items()}
    rounded = {name: torch.zeros_like(g, dtype=torch.bfloat16) for name, g in found.items()}
    for batch in batches:
        model.zero_grad()
        mark_last_micro_batch(model, is_last=True)
        step_loss(model, batch, *counts).backward()
        for name, gradient in gradients(model).items():
            exact[name] += gradient
            rounded[name] += gradient.bfloat16()
    assert relative_error(found, exact) < 1e-5
    assert relative_error(rounded, exact) > 1e-3


def test_cpu_defaults_to_the_dtype_that_is_asked_for(world: World) -> None:
    assert build_model(config_of("float32"), world)(ragged_batch().input_ids).hidden.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_selection_bias_moves_in_float32(world: World, dtype: str) -> None:
    """A step of 1e-5 on a bias of about 1 is lost in bfloat16."""
    trainer = build_trainer(config_of(dtype, bias_update_speed=1e-5), world)
    biases = [buffer for name, buffer in trainer.model.named_buffers() if name.endswith("expert_bias")]
    assert len(biases) == 2
    for bias in biases:
        bias.add_(1.0)
    trainer.step(0, [ragged_batch()])
    for bias in biases:
        assert ((bias - 1.0).abs() > 1e-6).any()
