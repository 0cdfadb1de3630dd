from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moe.kernels import experts as experts_module
from moe.kernels import has_quack, megablocks
from moe.kernels.experts import (
    available_backends,
    expert_mlp,
    permuted_experts,
    resolve_backend,
    routed_experts,
    swiglu,
)
from moe.kernels.permute import leading_rows, sort_by_expert
from moe.kernels.reference import moe_reference

H, I = 24, 16  # noqa: E741
RUNS = [("loop", torch.float64), ("loop", torch.float32), ("loop", torch.bfloat16)]
RUNS += [("grouped_mm", torch.float32), ("grouped_mm", torch.bfloat16)]
# Largest error allowed, in units of the fp64 value plus the root mean square of its tensor. A lost term costs about 1.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.08}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates without writing it holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def unit_variance(experts: Tensor, num_experts: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """x, experts, weights, gate_up_proj and down_proj such that every product has a variance of about one."""
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = experts.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64) + 0.5
    weights = weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    x, gate_up, down = normal(tokens, H), normal(num_experts, 2, I, H) * H**-0.5, normal(num_experts, H, I) * I**-0.5
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in (x, gate_up, down))
    return x, experts, weights, gate_up, down


def skewed(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Distinct experts a token; low ones are likely, the last two are never chosen where there are others."""
    generator = torch.Generator().manual_seed(seed)
    likelihood = torch.linspace(3, 0, num_experts).exp()
    if num_experts - 2 >= top_k:
        likelihood[-2:] = 0
    return torch.multinomial(likelihood.expand(tokens, -1), top_k, generator=generator)


def assert_matches_reference(backend: str, inputs: Inputs, num_choices: int | None = None) -> None:
    x, experts, weights, gate_up, down = inputs
    leaves = (x, weights, gate_up, down)
    if num_choices is None:
        out = routed_experts(*inputs, backend)
    else:
        permutation = leading_rows(sort_by_expert(experts, len(gate_up)), num_choices)
        out = permuted_experts(x, weights, permutation, gate_up, down, backend)
    experts = experts.where(experts < len(gate_up), -1)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad_out)
    x64, weights64, gate_up64, down64 = (leaf.detach().double().requires_grad_() for leaf in leaves)
    expected = moe_reference(x64, experts, weights64, gate_up64, down64)
    expected_grads = torch.autograd.grad(expected, (x64, weights64, gate_up64, down64), grad_out.double())
    assert out.dtype == x.dtype
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert actual.shape == wanted.shape
        # inputs have unit variance: a smaller typical size is a lone element whose terms happen to cancel
        typical = wanted.square().mean().sqrt().clamp(min=0.1)
        assert ((actual.double() - wanted).abs() <= TOLERANCE[x.dtype] * (wanted.abs() + typical)).all()
    unused = [e for e in range(gate_up.shape[0]) if not (experts == e).any()]
    for grad in grads[2:]:
        assert (grad[unused] == 0).all()


def test_reference_against_one_token_by_hand() -> None:
    x, experts, weights, gate_up, down = unit_variance(torch.tensor([[2, 0]]), 3, torch.float64)
    expected = torch.zeros(H, dtype=torch.float64)
    for choice, expert in enumerate([2, 0]):
        gate, up = gate_up[expert, 0] @ x[0], gate_up[expert, 1] @ x[0]
        expected = expected + weights[0, choice] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    torch.testing.assert_close(moe_reference(x, experts, weights, gate_up, down)[0], expected)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(150, 6, 16), (64, 7, 63), (40, 1, 8), (1, 1, 4), (1, 3, 5), (9, 1, 1)]
)
def test_layer_against_reference(backend: str, dtype: torch.dtype, tokens: int, top_k: int, num_experts: int) -> None:
    experts = skewed(tokens, top_k, num_experts)
    assert_matches_reference(backend, unit_variance(experts, num_experts, dtype))


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.usefixtures("poisoned_memory")
def test_all_tokens_on_one_expert(backend: str, dtype: torch.dtype) -> None:
    for expert in (0, 2, 4):
        assert_matches_reference(backend, unit_variance(torch.full((33, 1), expert), 5, dtype))


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("here", [0, 1, 3, 8])
@pytest.mark.usefixtures("poisoned_memory")
def test_choices_of_experts_that_are_elsewhere_add_nothing(backend: str, dtype: torch.dtype, here: int) -> None:
    experts = skewed(40, 4, 8).clamp(max=here)
    inputs = unit_variance(experts, max(here, 1), dtype)
    if not here:
        inputs = inputs[0], experts + 1, *inputs[2:]
    assert_matches_reference(backend, inputs, num_choices=int((experts < here).sum()))


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 24), num_experts=st.integers(1, 10), top_k=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_any_routing_against_reference(seed: int, tokens: int, num_experts: int, top_k: int) -> None:
    experts = torch.randint(num_experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    assert_matches_reference("loop", unit_variance(experts, num_experts, torch.float64, seed))
    assert_matches_reference("grouped_mm", unit_variance(experts, num_experts, torch.float32, seed))


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("valid_tokens", [0, 13])
@pytest.mark.usefixtures("poisoned_memory")
def test_padding_tokens(backend: str, dtype: torch.dtype, valid_tokens: int) -> None:
    x, experts, weights, gate_up, down = unit_variance(skewed(20, 3, 6), 6, dtype)
    valid = torch.randperm(20, generator=torch.Generator().manual_seed(5)) < valid_tokens
    leaves = (x, weights, gate_up, down)
    out = routed_experts(x, experts, weights, gate_up, down, backend, valid)
    grads = torch.autograd.grad(out.sum(), leaves)
    alone = routed_experts(x[valid], experts[valid], weights[valid], gate_up, down, backend)
    grads_alone = torch.autograd.grad(alone.sum(), leaves)
    for actual, expected in zip(grads, grads_alone, strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(out[valid], alone)
    assert (out[~valid] == 0).all()


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [0, 9, 0]])
@pytest.mark.usefixtures("poisoned_memory")
def test_tail_rows_are_zero_whatever_they_hold(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    used, tokens_per_expert = sum(counts), torch.tensor(counts)
    x, _, _, gate_up, down = unit_variance(torch.zeros(16, 1, dtype=torch.int64), 3, dtype)
    poisoned = x.detach().clone()
    poisoned[used:] = torch.nan
    poisoned.requires_grad_()
    out = expert_mlp(poisoned, gate_up, down, tokens_per_expert, backend)
    grad_out = torch.randn(out.shape).to(dtype)
    grad_out[used:] = torch.nan
    grads = torch.autograd.grad(out, (poisoned, gate_up, down), grad_out)
    assert (out[used:] == 0).all()
    assert (grads[0][used:] == 0).all()
    exact = expert_mlp(x[:used], gate_up, down, tokens_per_expert, backend)
    grads_exact = torch.autograd.grad(exact, (x, gate_up, down), grad_out[:used])
    assert torch.equal(out[:used], exact)
    for actual, expected in zip(grads, grads_exact, strict=True):
        assert torch.equal(actual, expected)
    assert all((grad[tokens_per_expert == 0] == 0).all() for grad in grads[1:])


@pytest.mark.usefixtures("poisoned_memory")
def test_grouped_mm_tail_would_be_garbage_without_the_select() -> None:
    """The trap that zero_tail guards against is there, or the test above proves nothing."""
    x, _, _, gate_up, down = unit_variance(torch.zeros(16, 1, dtype=torch.int64), 3, torch.float32)
    out = expert_mlp(x, gate_up, down, torch.tensor([3, 0, 4]), "grouped_mm", zero_tail=False)
    assert out[7:].isnan().all()


def test_swiglu() -> None:
    gate_up = torch.randn(5, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate_up), F.silu(gate_up[:, 0]) * gate_up[:, 1])


def test_resolve_backend() -> None:
    assert resolve_backend("auto", "cpu", torch.float32, (192, 96)) == "grouped_mm"
    assert resolve_backend("auto", "cpu", torch.float32, (192, 94)) == "loop"
    assert resolve_backend("auto", "cpu", torch.bfloat16, (192, 100)) == "loop"
    assert resolve_backend("auto", "cpu", torch.float64) == "loop"
    assert resolve_backend("auto", "meta", torch.bfloat16) == "loop"
    assert resolve_backend("loop", "cpu", torch.float64) == "loop"
    with pytest.raises(ValueError, match="^expert backend 'fast' is not one of auto, loop, grouped_mm"):
        resolve_backend("fast", "cpu", torch.float32)


ALL = ("triton", "quack", "megablocks")


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "expected"),
    [
        ((9, 0), torch.bfloat16, ALL, "quack"),
        ((9, 0), torch.bfloat16, ("triton",), "triton"),
        ((9, 0), torch.bfloat16, (), "grouped_mm"),
        ((10, 0), torch.bfloat16, ALL, "grouped_mm"),
        ((8, 0), torch.bfloat16, ALL, "loop"),
        ((9, 0), torch.float32, ALL, "loop"),
    ],
)
def test_auto_on_cuda(
    capability: tuple[int, int],
    dtype: torch.dtype,
    installed: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(experts_module, "_is_installed", lambda name: name in installed)
    assert resolve_backend("auto", "cuda", dtype, (1280, 848)) == expected
    assert resolve_backend("auto", "cuda", dtype, (1280, 849)) == "loop"


@pytest.mark.parametrize("backend", ["triton", "quack", "megablocks"])
def test_absent_packages_name_the_installer(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "_is_installed", lambda name: name in ("loop", "grouped_mm"))
    assert available_backends() == ("loop", "grouped_mm")
    message = f"^expert backend '{backend}' is not installed: run launch/install_gpu.sh"
    with pytest.raises(ValueError, match=f"{message}; available here: auto, loop, grouped_mm$"):
        resolve_backend(backend, "cuda", torch.bfloat16)
    x, experts, weights, gate_up, down = unit_variance(skewed(8, 2, 4), 4, torch.float32)
    with pytest.raises(ValueError, match=f"{message}$"):
        routed_experts(x, experts, weights, gate_up, down, backend)
    with pytest.raises(ValueError, match=f"{message}$"):
        expert_mlp(x, gate_up, down, torch.tensor([2, 2, 2, 2]), backend)


def test_packages_are_looked_for_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "has_quack", has_quack.__wrapped__)  # which looks again, not once in a process
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available_backends() == ("loop", "grouped_mm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    for version, expected in (("0.4.2", True), ("0.5.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert ("quack" in available_backends()) == expected


@pytest.mark.parametrize("backend", ["triton", "quack"])
@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_fused_backends_want_hopper(backend: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "_is_installed", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"'{backend}' runs on Hopper GPUs only; available here: auto, loop"):
            resolve_backend(backend, device, torch.bfloat16)


def test_megablocks_wants_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks, "is_installed", lambda: True)
    with pytest.raises(ValueError, match="CUDA devices only; available here: auto, loop, grouped_mm$"):
        resolve_backend("megablocks", "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.float64, 16, "not torch.float64: use 'loop'$"),
        (torch.float32, 18, "multiples of 4 in torch.float32, not 18"),
        (torch.bfloat16, 20, "multiples of 8 in torch.bfloat16, not 20"),
    ],
)
def test_grouped_mm_limits_are_one_clear_line(dtype: torch.dtype, width: int, message: str) -> None:
    x, gate_up, down = torch.randn(4, 16), torch.randn(2, 2, width, 16), torch.randn(2, 16, width)
    with pytest.raises(ValueError, match=message):
        expert_mlp(x.to(dtype), gate_up.to(dtype), down.to(dtype), torch.tensor([2, 2]), "grouped_mm")
    with pytest.raises(ValueError, match="'nope' is not one of loop, grouped_mm"):
        expert_mlp(x, gate_up, down, torch.tensor([2, 2]), "nope")


@pytest.mark.usefixtures("products_as_on_gpus")
def test_compiles_without_graph_breaks() -> None:
    inputs = unit_variance(skewed(32, 3, 8), 8, torch.bfloat16)
    leaves = [t for t in inputs if t.requires_grad]
    compiled = torch.compile(routed_experts, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(routed_experts(*inputs, "grouped_mm").sum(), leaves)
    actual = torch.autograd.grad(compiled(*inputs, "grouped_mm").sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
